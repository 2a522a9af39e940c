"""The page for labelling by hand: a history, an answer whose words are clicked or walked by keys.

Keys: arrows go to a word, 0 and 1 judge it and go on, Space turns it round, with Shift all of these
mean the whole query; a is the answer as a whole, Enter the next answer, s leaves it out, u takes
the last one back, ? shows this.  Digits are taken by their place on the keyboard, because some
layouts have them behind Shift.
"""

from __future__ import annotations

from tppo.stages.hand.page_script import BEGIN, COMMON, frame
from tppo.stages.hand.page_style import CSS
from tppo.stages.live_page import live_page, policy

SCRIPT = COMMON + r"""
const NAMES = {"-1": "not judged", "0": "not wanted", "1": "wanted"};
let words = [], whole = null, at = 0, buttons = [];

function fromWords() {
  const judged = words.filter(w => w >= 0);
  return judged.length && judged.filter(w => w === 1).length >= item.threshold * judged.length
    ? 1 : 0;
}
function drawWhole() {
  const value = whole === null ? fromWords() : whole;
  for (const [id, one] of [["good", 1], ["bad", 0]])
    $(id).setAttribute("aria-pressed", String(value === one));
  $("from").textContent = whole === null ? "as its words say" : "as you say";
}
function drawWord(i) {
  buttons[i].setAttribute("aria-checked", ["mixed", "false", "true"][words[i] + 1]);
  buttons[i].setAttribute("aria-label", visible(item.texts[i]) + ", " + NAMES[words[i]]);
}
function go(i, focus = true) {
  if (!buttons.length) return;
  buttons[at].tabIndex = -1;
  at = Math.max(0, Math.min(buttons.length - 1, i));
  buttons[at].tabIndex = 0;
  if (focus) buttons[at].focus();
}
function set(indices, value) {
  for (const i of indices) { words[i] = value; drawWord(i); }
  drawWhole();
}
function queryOf(i) { return item.lines.find(line => line.some(part => part.word === i)); }
function indicesOf(line) { return line.filter(part => part.word !== null).map(part => part.word); }
function ofQuery() { return indicesOf(queryOf(at)); }
function step(by) {
  const lines = item.lines.map(indicesOf).filter(line => line.length);
  const here = lines.findIndex(line => line.includes(at));
  go(lines[Math.max(0, Math.min(lines.length - 1, here + by))][0]);
}
function judgeAndGoOn(value, all) {
  const chosen = all ? ofQuery() : [at];
  set(chosen, value);
  go(Math.max(...chosen) + 1);
}
function turn(all) {
  const chosen = all ? ofQuery() : [at];
  set(chosen, words[at] === 1 ? 0 : 1);
}

function draw(found) {
  words = found.words || item.texts.map(() => -1);
  whole = found.words ? found.sentence : null;
  buttons = [];
  $("answer").replaceChildren(...item.lines.map((line, number) => {
    const made = element("li", "query");
    made.dir = item.rtl[number] ? "rtl" : "ltr";
    made.setAttribute("role", "group");
    made.setAttribute("aria-label", "query " + (number + 1));
    for (const part of line) {
      if (part.word === null) { made.append(element("span", "between", visible(part.text)));
        continue; }
      const button = element("button", "word");
      button.type = "button";
      button.tabIndex = -1;
      button.setAttribute("role", "checkbox");
      button.append(element("bdi", "", visible(part.text)));
      button.addEventListener("click", () => { go(part.word); turn(false); });
      buttons[part.word] = button;
      made.append(button);
    }
    return made;
  }));
  words.forEach((_, i) => drawWord(i));
  drawWhole();
  at = 0;
  go(0);
}

function entered() {
  if (!item) { finish(); return; }
  send("/label", {id: item.id, words, sentence: whole === null ? fromWords() : whole});
}
function wholeTurn() {
  if (!item) return;
  whole = (whole === null ? fromWords() : whole) ? 0 : 1;
  drawWhole();
}
const letters = {a: wholeTurn};

function pressed(event) {
  if (event.repeat && !event.code.startsWith("Arrow")) return;  // arrows alone may be held
  const backwards = buttons[at]
    && getComputedStyle(buttons[at].parentElement).direction === "rtl" ? -1 : 1;
  const acts = {
    ArrowRight: () => go(at + backwards), ArrowLeft: () => go(at - backwards),
    ArrowDown: () => step(1), ArrowUp: () => step(-1),
    Digit1: () => judgeAndGoOn(1, event.shiftKey), Numpad1: () => judgeAndGoOn(1, event.shiftKey),
    Digit0: () => judgeAndGoOn(0, event.shiftKey), Numpad0: () => judgeAndGoOn(0, event.shiftKey),
    Space: () => turn(event.shiftKey),
  };
  if (acts[event.code]) { event.preventDefault(); acts[event.code](); }
}
$("next").addEventListener("click", entered);
$("good").addEventListener("click", () => { whole = 1; drawWhole(); });
$("bad").addEventListener("click", () => { whole = 0; drawWhole(); });
""" + BEGIN

POLICY = policy(SCRIPT, CSS)

_KEYS = (
    ("1, 0", "the word is wanted, is not wanted; goes on to the next"),
    ("Space", "turn the word round"),
    ("Shift", "with 1, 0 or Space: the whole query"),
    ("← → ↑ ↓", "another word, another query"),
    ("a", "turn the answer as a whole round; unless you do, its words decide"),
    ("Enter", "keep it, and show the next"),
    ("u", "take the last one back"),
    ("s", "leave this one out"),
)

_WORK = """<section aria-label="answer"><h2>An answer of the model, a query a line</h2>
<ol id="answer"></ol>
<div id="whole"><span class="soft">The answer as a whole:</span>
<button type="button" id="good">wanted</button><button type="button" id="bad">not wanted</button>
<span class="soft" id="from"></span></div>
</section>"""


def label_page(annotator: str, guidance: str) -> str:
    """The page; what it shows of answers it asks its server for."""
    body = frame(
        "Which words does this user want?", _WORK,
        '<button type="button" id="next" class="first">Next <kbd>Enter</kbd></button>', _KEYS,
        "A word that you do not judge is left open, and nothing is learnt from it.",
        annotator=annotator, guidance=guidance,
    )  # fmt: skip
    return live_page("Label by hand", CSS, body, SCRIPT)
