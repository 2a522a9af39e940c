"""The stage prefer: people say which of two answers to one history is better, for `tppo ser`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

from tppo.errors import DataError
from tppo.labels.hand import BY_HAND, HandPairs, Preferred
from tppo.labels.shares import wilson
from tppo.progress import say
from tppo.sessions.prompts import prompt_text
from tppo.sessions.session import Session, session_of
from tppo.stages.answer_pairs import AnswerPair, answer_pairs
from tppo.stages.artifacts import ANSWERS, EQUALS, PREFERENCES, TRAIN_SESSIONS
from tppo.stages.hand.forms import PairForm
from tppo.stages.hand.pairs import PairDesk, side_of
from tppo.stages.hand.server import label_in_browser
from tppo.stages.label import asked
from tppo.stages.run import Run
from tppo.store.jsonl import write_jsonl
from tppo.store.line_index import LineIndex


def prefer(run: Run) -> None:
    """Let people compare pairs, until as many are judged as are wanted or they say that it is
    enough; those of an earlier time count.
    """
    path = run.beside("hand-pairs.jsonl")  # a stage that is repeated must not lose it
    with (
        run.stage("prefer") as out,
        LineIndex(run.path(TRAIN_SESSIONS), session_of) as sessions,
    ):
        def of(pair: AnswerPair) -> Session:
            return asked(sessions, pair.first)

        labels, config = HandPairs(path), run.config.label.hand
        pairs = answer_pairs(run.paths(ANSWERS))
        known = {pair.id: pair for pair in pairs}

        def gone(said: Preferred) -> bool:
            pair = known.get(said.id)
            return pair is None or (pair.first.text, pair.second.text) != said.responses

        if strange := labels.leave_out(gone):
            say(f"prefer: {strange} judgements in {path} are of answers that are not generated any "
                "more, and are left out")  # fmt: skip
        desk = PairDesk(pairs, of, labels, config, run.seed)
        if not desk.drawn:
            raise DataError(f"{run.paths(ANSWERS)[-1].parent}: no session has two answers with "
                            "other words; `tppo generate --round 2` writes a second answer to each "
                            "history, which `tppo prefer --round 2` reads")  # fmt: skip
        if desk.count() < config.pairs:
            _ask(desk)
        of_pair: dict[str, list[Preferred]] = {}
        for said in labels:
            of_pair.setdefault(said.id, []).append(said)
        if not of_pair:
            raise DataError(f"{path}: no pair is compared, expected one or more")
        # In the order of the pairs: what is trained on them must not depend on when each was said.
        rows = [_row(pair, of(pair), of_pair[id]) for id, pair in known.items() if id in of_pair]
        for artifact, with_better in ((PREFERENCES, True), (EQUALS, False)):
            if chosen := [row for row in rows if ("chosen" in row) == with_better]:
                write_jsonl(out / artifact.name, chosen)
        _tell(of_pair)


def _ask(desk: PairDesk) -> None:
    form, config = PairForm(desk), desk.config
    if config.terminal:
        from tppo.stages.hand.terminal_pairs import compare_in_terminal

        compare_in_terminal(form)
    else:
        label_in_browser(form, config.port, f"prefer: compare {config.pairs} pairs of answers",
                         browser=config.browser)  # fmt: skip


def _row(pair: AnswerPair, session: Session, said: Sequence[Preferred]) -> dict[str, Any]:
    """A pair as files of preferences have it; without a better one where people do not say so."""
    texts = (pair.first.text, pair.second.text)
    row: dict[str, Any] = {
        "id": pair.id, "prompt": prompt_text(session),
        "labeller": ", ".join(f"{BY_HAND}{found.annotator}" for found in said),
    }  # fmt: skip
    (better, *others) = {found.better for found in said}
    if better is None or others:
        return row | {"answers": texts}
    return row | {"chosen": texts[better], "rejected": texts[1 - better]}


def _tell(of_pair: Mapping[str, Sequence[Preferred]]) -> None:
    """What came of it, whether one side was liked more, and how far people agree."""
    verdicts = [{found.better for found in said} for said in of_pair.values()]
    better = sum(len(found) == 1 and None not in found for found in verdicts)
    differ = sum(len(found) > 1 for found in verdicts)
    sides = [side_of(found) for said in of_pair.values() for found in said]
    chosen, left = sum(side != "equal" for side in sides), sides.count("left")
    say(f"prefer: {len(of_pair)} pairs are compared, {better} have a better answer, "
        f"{len(of_pair) - better - differ} are equally good; on {differ} people disagree")
    if chosen:
        say(f"prefer: the one on the left was better {_of(left, chosen)}: half of them are "
            "expected, because sides are drawn")  # fmt: skip
    people = sorted({found.annotator for said in of_pair.values() for found in said})
    for one, two in combinations(people, 2):
        both = [{found.annotator: found.better for found in said} for said in of_pair.values()]
        both = [found for found in both if one in found and two in found]
        if both:
            alike = sum(found[one] == found[two] for found in both)
            say(f"prefer: {one} and {two} say the same {_of(alike, len(both))}")


def _of(k: int, n: int) -> str:
    """A count of a number, with its share's 95 % interval."""
    low, high = wilson(k / n, n)
    return f"{k} of {n} times ({k / n:.0%}, {low:.0%} to {high:.0%})"
