"""The label stage with `--label.labeller hand`: people judge answers, on a page or by keys."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from tppo.errors import DataError
from tppo.labels.hand import HandLabels
from tppo.labels.label import Label
from tppo.progress import say
from tppo.sessions.session import Session
from tppo.stages.answers import Answer
from tppo.stages.artifacts import SFT_MODEL
from tppo.stages.hand.desk import Desk
from tppo.stages.hand.forms import WordForm
from tppo.stages.hand.server import label_in_browser
from tppo.stages.run import Run


def label_by_hand(
    run: Run, session_of: Callable[[Answer], Session], *, ask: bool = True
) -> list[Label]:
    """What everybody has judged, when it is as much as is wanted or somebody says that it is
    enough; what was judged at an earlier time counts.

    The labels are in the order of the answers, so that what is trained on them does not depend on
    when somebody judged which; those of one answer the oldest first.  ask: whether more may be
    asked for.
    """
    labels = judgements_of(run, journal_of(run))
    config = run.config.label.hand
    desk = Desk(run.iter_answers(), session_of, labels, config, run.seed)
    if ask and desk.count() < config.answers:
        _ask(run, desk)
    judged = {found.id for found in labels}
    places = {a.id: place for place, a in enumerate(run.iter_answers()) if a.id in judged}
    return [found.label() for found in sorted(labels, key=lambda found: places[found.id])]


def journal_of(run: Run) -> Path:
    """The journal of a run, where a stage that is repeated does not lose it."""
    return run.beside("hand-labels.jsonl")


def judgements_of(run: Run, path: Path) -> HandLabels:
    """A journal, but for what it says of answers that the run has generated anew since then."""
    labels = HandLabels(path)
    if stale := labels.keep({answer.id: answer.text for answer in run.iter_answers()}):
        say(f"label: {stale} judgements in {path} are of answers that are not generated any more, "
            "and are left out")  # fmt: skip
    return labels


def _ask(run: Run, desk: Desk) -> None:
    """Let people judge."""
    config = run.config.label.hand
    if not desk.drawn:
        raise DataError("no generated answer has a word, so there is nothing to judge")
    form = WordForm(desk, run.config.label.sentence_threshold)
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

            label_in_terminal(form)
        else:
            label_in_browser(form, config.port, f"label: judge {config.answers} answers",
                             browser=config.browser)  # fmt: skip
    finally:
        if teacher is not None:
            teacher.close()

