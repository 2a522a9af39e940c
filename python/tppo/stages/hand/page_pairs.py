"""The page for comparing pairs: a history, and two answers side by side, of which one key tells
the better.

Keys: 1 or the left arrow, 2 or the right arrow, 0 for equally good; s leaves the pair out, u takes
the last one back, ? shows this.
"""

from __future__ import annotations

from tppo.stages.hand.page_script import BEGIN, COMMON, frame
from tppo.stages.hand.page_style import CSS
from tppo.stages.live_page import live_page, policy

SCRIPT = COMMON + r"""
const TOO_SOON_MS = 250;  // nobody reads two answers so fast: a second press of the same key
let since = 0;

function draw(found) {
  item.sides.forEach((lines, side) => {
    const list = $(side ? "second" : "first");
    list.replaceChildren(...lines.map((line, number) => {
      const made = element("li", "query");
      made.dir = item.rtl[side][number] ? "rtl" : "ltr";
      made.append(element("bdi", "line", visible(line)));
      return made;
    }));
  });
  for (const side of ["left", "equal", "right"])
    $(side).setAttribute("aria-pressed", String(found.better === side));
  since = performance.now();
}
function choose(better) {
  if (item && performance.now() - since > TOO_SOON_MS) send("/label", {id: item.id, better});
}
function entered() { if (!item) finish(); }
const letters = {ArrowLeft: () => choose("left"), ArrowRight: () => choose("right")};
const CHOICES = {1: "left", 2: "right", 0: "equal"};

function pressed(event) {
  const digit = /^(?:Digit|Numpad)([012])$/.exec(event.code);
  if (digit && !event.repeat) { event.preventDefault(); choose(CHOICES[digit[1]]); }
}
for (const side of ["left", "equal", "right"])
  $(side).addEventListener("click", () => choose(side));
""" + BEGIN

POLICY = policy(SCRIPT, CSS)

_KEYS = (
    ("1 or ←", "answer 1 is better"),
    ("2 or →", "answer 2 is better"),
    ("0", "they are equally good"),
    ("u", "take the last one back"),
    ("s", "leave this pair out"),
)

_WORK = """<div id="two">
<section aria-label="answer 1"><h2>Answer 1</h2><ol id="first"></ol></section>
<section aria-label="answer 2"><h2>Answer 2</h2><ol id="second"></ol></section>
</div>"""

_ACTIONS = """
<button type="button" id="left" class="first">1 is better <kbd>1</kbd></button>
<button type="button" id="equal">Equal <kbd>0</kbd></button>
<button type="button" id="right" class="first">2 is better <kbd>2</kbd></button>"""


def pair_page(annotator: str, guidance: str) -> str:
    """The page; what it shows of answers it asks its server for."""
    body = frame(
        "Which answer is better for this user?", _WORK, _ACTIONS, _KEYS,
        "Which of the two stands first is drawn at random.",
        annotator=annotator, guidance=guidance,
    )  # fmt: skip
    return live_page("Compare by hand", CSS, body, SCRIPT)
