"""The label stage with `--label.labeller hand`: people judge answers, on a page or by keys."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import combinations

from tppo.errors import DataError
from tppo.labels.agreement import compare, shown
from tppo.labels.hand import HandLabels, Judged
from tppo.labels.label import Label
from tppo.progress import say
from tppo.sessions.session import Session
from tppo.stages.answers import Answer
from tppo.stages.artifacts import SFT_MODEL
from tppo.stages.hand.desk import Desk
from tppo.stages.hand.server import label_in_browser
from tppo.stages.run import Run


def label_by_hand(run: Run, session_of: Callable[[Answer], Session]) -> Iterator[Label]:
    """The labels that people give, when they have given as many as are wanted or say that it is
    enough; those of an earlier time count.
    """
    path = run.beside("hand-labels.jsonl")  # a stage that is repeated must not lose it
    config, labels = run.config.label.hand, HandLabels(path)
    desk = Desk(run.iter_answers(), session_of, labels, config, run.seed)
    if desk.count() < config.answers:
        _ask(run, desk)
    texts = {answer.id: answer.text for answer in run.iter_answers()}
    stands = [found for found in labels if texts.get(found.id) == found.response]
    if strange := len(list(labels)) - len(stands):
        say(f"label: {strange} judgements in {path} are of answers that are not "
            "generated any more, and are left out")  # fmt: skip
    _say_agreement(stands)
    first: dict[str, Judged] = {}
    for found in stands:
        first.setdefault(found.id, found)
    return (first[id].label() for id in texts if id in first)


def _ask(run: Run, desk: Desk) -> None:
    """Let people judge."""
    config = run.config.label.hand
    if not desk.drawn:
        raise DataError("no generated answer has a word, so there is nothing to judge")
    threshold = run.config.label.sentence_threshold
    teacher = None
    aside = replace(run)  # what only chooses which answers are shown is no input of the stage
    if config.suggestions and aside.path(SFT_MODEL).exists():
        from tppo.stages.hand.teacher import BackgroundTeacher

        teacher = BackgroundTeacher(aside, desk.drawn, desk.model_changed)
        desk.taught_by(teacher)
    elif config.suggestions:
        say(f"label: {aside.path(SFT_MODEL)} is not there, so answers are drawn at random, and no "
            "model of the labels so far is trained")  # fmt: skip
    try:
        if config.terminal:
            from tppo.stages.hand.terminal import label_in_terminal

            label_in_terminal(desk, threshold)
        else:
            label_in_browser(desk, config.port, threshold, browser=config.browser)
    finally:
        if teacher is not None:
            teacher.close()


def _say_agreement(stands: list[Judged]) -> None:
    """How far people agree on the answers that two of them have judged."""
    of_person: dict[str, dict[str, Label]] = {}
    for found in stands:
        of_person.setdefault(found.annotator, {})[found.id] = found.label()
    for one, two in combinations(of_person, 2):
        both = of_person[one].keys() & of_person[two].keys()
        if both:
            result = compare([of_person[one][id] for id in both],
                             [of_person[two][id] for id in both])  # fmt: skip
            say(f"label: {one} and {two} judged {len(both)} answers both:\n{shown(result)}")
