"""The page for labelling by hand: a history, an answer whose words are clicked or walked by keys.

Keys: arrows go to a word, 0 and 1 judge it and go on, Space turns it round, with Shift all of these
mean the whole query; a is the answer as a whole, Enter the next answer, s leaves it out, u takes
the last one back, ? shows this.  Digits are taken by their place on the keyboard, because some
layouts have them behind Shift.
"""

from __future__ import annotations

from html import escape

from tppo.stages.hand.page_style import CSS
from tppo.stages.live_page import SHARED, live_page, policy

SCRIPT = SHARED + r"""
const key = new URLSearchParams(location.search).get("key");
const client = sessionStorage.getItem("client") || Array.from(
  crypto.getRandomValues(new Uint8Array(12)), b => b.toString(16).padStart(2, "0")).join("");
sessionStorage.setItem("client", client);
const NAMES = {"-1": "not judged", "0": "not wanted", "1": "wanted"};
let item = null, words = [], whole = null, at = 0, busy = false, buttons = [];

async function call(path, body) {
  let found;
  try {
    const person = {client, annotator: $("annotator").value};
    const reply = await fetch(path, {method: "POST", body: JSON.stringify({...person, ...body}),
      headers: {"Content-Type": "application/json", "X-Tppo-Key": key}});
    found = await reply.json();
  } catch (error) {
    found = {error: {message: "The labelling cannot be reached. What was judged so far is kept; " +
      "start the command again and open the address that it prints."}};
  }
  $("error").textContent = found.error ? visible(found.error.message) : "";
  return found.error ? null : found;
}

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

function show(found) {
  drawFigures(found.progress);
  item = found.item;
  $("work").hidden = !item;
  $("done").hidden = Boolean(item);
  if (!item) {
    const {labelled, wanted} = found.progress;
    $("why").textContent = (labelled >= wanted ? "That is all that was asked for: "
      : "No answer is left for you: ") + labelled + " answers are labelled.";
    $("finish").focus();
    return;
  }
  words = found.words || item.texts.map(() => -1);
  whole = found.words ? found.sentence : null;
  $("history").replaceChildren(...item.history.map(line => {
    const made = element("li");
    made.append(element("bdi", "", visible(line)));
    return made;
  }));
  $("truth").hidden = !item.targets;
  $("targets").replaceChildren(...(item.targets || []).map(line => {
    const made = element("li");
    made.append(element("bdi", "", visible(line)));
    return made;
  }));
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

function percent(share) { return (100 * share).toFixed(0) + " %"; }
function drawFigures(p) {
  $("fill").style.width = Math.min(100, 100 * p.labelled / p.wanted) + "%";
  const made = [p.labelled + " of " + p.wanted + " answers"];
  const names = Object.keys(p.annotators);
  if (names.length > 1)
    made.push(names.map(name => visible(name) + " " + p.annotators[name]).join(", "));
  if (p.seconds !== null) made.push(p.seconds.toFixed(0) + " s an answer");
  if (p.agreement) {
    const a = p.agreement;
    made.push("a model of your labels agrees with you on " + percent(a.share) + " of " + a.words +
      " words that it did not learn from (" + percent(a.low) + " to " + percent(a.high) + ")" +
      (a.before === null ? "" : ", " + percent(a.before) + " before this round"));
  }
  if (p.foretold) made.push("it foretold " + percent(p.foretold.share) + " of the last " +
    p.foretold.answers + " answers");
  $("figures").replaceChildren(...made.map(text => element("span", "soft", text)));
  $("stop").hidden = !p.enough;
}

async function send(path, body) {
  if (busy) return;
  busy = true;
  const found = await call(path, body);
  busy = false;
  if (found) show(found);
}
function next() {
  if (!item) { finish(); return; }
  send("/label", {id: item.id, words, sentence: whole === null ? fromWords() : whole});
}
async function finish() {
  if (await call("/finish", {})) {
    document.body.replaceChildren(element("p", "", "The labels are kept, and the command goes " +
      "on. This page can be closed."));
  }
}
function undo() { send("/undo", {}); }
function skip() { if (item) send("/skip", {id: item.id}); }
function wholeTurn() { whole = (whole === null ? fromWords() : whole) ? 0 : 1; drawWhole(); }
function help() {
  $("help").hidden = !$("help").hidden;
  $("ask").setAttribute("aria-expanded", String(!$("help").hidden));
}

document.addEventListener("keydown", event => {
  if (event.ctrlKey || event.altKey || event.metaKey) return;
  if (["INPUT", "TEXTAREA"].includes(event.target.tagName)) return;
  const own = event.target.tagName === "BUTTON" && !event.target.classList.contains("word");
  const backwards = item && buttons[at]
    && getComputedStyle(buttons[at].parentElement).direction === "rtl" ? -1 : 1;
  const acts = {
    ArrowRight: () => go(at + backwards), ArrowLeft: () => go(at - backwards),
    ArrowDown: () => step(1), ArrowUp: () => step(-1),
    Digit1: () => judgeAndGoOn(1, event.shiftKey), Numpad1: () => judgeAndGoOn(1, event.shiftKey),
    Digit0: () => judgeAndGoOn(0, event.shiftKey), Numpad0: () => judgeAndGoOn(0, event.shiftKey),
  };
  const letters = {a: wholeTurn, s: skip, u: undo, "?": help};
  if (event.key === "Escape" && !$("help").hidden) { help(); event.preventDefault(); return; }
  if (own && (event.key === "Enter" || event.key === " ")) return;
  if (event.key === "Enter") { event.preventDefault(); if (!event.repeat) next(); return; }
  if (letters[event.key]) { event.preventDefault();
    if (item || event.key === "u" || event.key === "?") letters[event.key](); return; }
  if (!item) return;
  if (event.key === " ") { event.preventDefault(); turn(event.shiftKey); return; }
  if (acts[event.code]) { event.preventDefault(); acts[event.code](); }
});
$("next").addEventListener("click", next);
$("undo").addEventListener("click", undo);
$("back").addEventListener("click", undo);
$("skip").addEventListener("click", skip);
$("ask").addEventListener("click", help);
$("finish").addEventListener("click", finish);
$("end").addEventListener("click", finish);
$("good").addEventListener("click", () => { whole = 1; drawWhole(); });
$("bad").addEventListener("click", () => { whole = 0; drawWhole(); });
$("settings").addEventListener("submit", event => event.preventDefault());
$("guidance").addEventListener("change", () => call("/guidance", {text: $("guidance").value}));
$("annotator").addEventListener("change", () => { item = null; send("/next", {fresh: true}); });
send("/next", {});
"""

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


def label_page(annotator: str, guidance: str) -> str:
    """The page; what it shows of answers it asks its server for."""
    keys = "".join(f"<dt><kbd>{name}</kbd></dt><dd>{does}</dd>" for name, does in _KEYS)
    body = f"""<header>
<h1>Which words does this user want?</h1>
<div class="bar"><div id="fill"></div></div>
<div id="figures" aria-live="polite"></div>
<p id="stop" class="soft" hidden>The last labels have changed next to nothing of what the model
knows: you may stop here. <button type="button" id="end">Stop labelling</button></p>
</header>
<main id="work" hidden>
<section aria-label="history"><h2>What the user did, the newest last</h2><ol id="history"></ol>
<div id="truth" hidden><h2>What he searched for next</h2><ul id="targets"></ul></div></section>
<section aria-label="answer"><h2>An answer of the model, a query a line</h2>
<ol id="answer"></ol>
<div id="whole"><span class="soft">The answer as a whole:</span>
<button type="button" id="good">wanted</button><button type="button" id="bad">not wanted</button>
<span class="soft" id="from"></span></div>
<div class="actions">
<button type="button" id="next">Next <kbd>Enter</kbd></button>
<button type="button" id="undo">Undo <kbd>u</kbd></button>
<button type="button" id="skip">Skip <kbd>s</kbd></button>
<button type="button" id="ask" aria-expanded="false" aria-controls="help">Keys <kbd>?</kbd></button>
</div>
<div id="help" hidden><dl>{keys}</dl>
<p class="soft">A word that you do not judge is left open, and nothing is learnt from it.</p></div>
</section>
</main>
<section id="done" hidden><p id="why"></p><div class="actions">
<button type="button" id="finish">Finish <kbd>Enter</kbd></button>
<button type="button" id="back">Undo the last <kbd>u</kbd></button></div></section>
<p id="error" role="alert"></p>
<form id="settings">
<label>By what you judge <input id="guidance" value="{escape(guidance)}" autocomplete="off"></label>
<label>You are <input id="annotator" value="{escape(annotator)}" size="10" autocomplete="off">
</label>
</form>"""
    return live_page("Label by hand", CSS, body, SCRIPT)
