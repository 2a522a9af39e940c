"""Pairs compared in the terminal, by the keys of the page."""

from __future__ import annotations

from tppo.evaluation.page import visible
from tppo.stages.hand.forms import PairForm
from tppo.stages.hand.pairs import PairItem
from tppo.stages.hand.terminal import CLEAR, CLIENT, Keys, in_terminal, lines_above

HELP = (
    "1 or left: answer 1 is better   2 or right: answer 2 is better   0: they are equally good\n"
    "u: take the last one back   s: leave out   q: stop comparing"
)
SIDES = {"1": "left", "left": "left", "2": "right", "right": "right", "0": "equal"}


def compare_in_terminal(form: PairForm) -> None:
    """Ask until enough is compared or the person ends it.

    Errors: DataError where standard input is no terminal.
    """
    in_terminal(lambda keys: _ask(form, keys))


def _ask(form: PairForm, keys: Keys) -> None:
    desk = form.desk
    me, note, before = desk.config.annotator, "", ""
    item = desk.next(CLIENT, me)
    while item is not None:
        _draw(form, item, note or before)
        key = next(keys, "q")
        note = ""
        try:
            if key == "q":
                return
            if key in SIDES:
                desk.judge(CLIENT, me, item.id, SIDES[key])
            elif key == "s":
                desk.skip(CLIENT, me, item.id)
            elif key == "u":
                found = desk.undo(CLIENT, me)
                if found is None:
                    raise ValueError("there is nothing of yours to take back")
                before = f"You had said: {form.said(found[1])['better']}."
                item = found[0]
                continue
            else:
                continue
        except ValueError as error:
            note = str(error)
            continue
        before = ""
        item = desk.next(CLIENT, me)


def _draw(form: PairForm, item: PairItem, note: str) -> None:
    found = form.shown(item)
    lines = lines_above(form.desk, found)
    for number, side in enumerate(found["sides"], 1):
        lines += [f"  Answer {number}", *(f"    {visible(line)}" for line in side), ""]
    print(CLEAR + "\n".join([*lines, HELP, note]), flush=True)
