"""The label stage, and what `tppo label` does instead with one of its flags."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path

from tppo.errors import DataError
from tppo.labels.agreement import compare_files
from tppo.labels.config import ENOUGH
from tppo.labels.endpoint.batch import export_batch, import_batch
from tppo.labels.endpoint.config import NoKey
from tppo.labels.endpoint.live import EndpointError, LabelItem, label
from tppo.labels.endpoint.lost import forget, lost_by_endpoint, recorded
from tppo.labels.label import Label, write_labels
from tppo.labels.rule import label_by_rule
from tppo.progress import say, track
from tppo.sessions.prompts import history_lines
from tppo.sessions.session import Session, session_of
from tppo.stages.answers import Answer
from tppo.stages.artifacts import ANSWERS, LABELS, TRAIN_SESSIONS
from tppo.stages.hand.stage import label_by_hand
from tppo.stages.run import Run
from tppo.store.jsonl import read_lines
from tppo.store.line_index import LineIndex


def label_answers(run: Run) -> None:
    """Word and answer labels, by the rule, by an endpoint or by hand."""
    train, config = run.path(TRAIN_SESSIONS), run.config.label
    with (
        run.stage("label") as out,
        LineIndex(train, session_of) as sessions,
        ExitStack() as open_until_then,
    ):
        counts: Counter[str] = Counter()
        labels: Iterable[Label]
        if config.labeller == "hand":
            forget(run.label_lost)
            labels = label_by_hand(run, lambda answer: _asked(sessions, answer))
        elif config.labeller == "rule":
            forget(run.label_lost)
            labels = (
                label_by_rule(a.id, a.text, _asked(sessions, a).targets, config.sentence_threshold)
                for a in track(run.iter_answers(), "label")
            )
        else:
            answers = sum(1 for _ in read_lines(run.path(ANSWERS)))
            if answers > ENOUGH:
                say(
                    f"label: {answers:,} answers; {ENOUGH} labelled by word did what more did in a "
                    f"study (docs/evidence.md): --generate.samples {ENOUGH} begins with as many"
                )
            found = label(_items(run, sessions), config.endpoint, run.label_cache, answers)
            labels = open_until_then.enter_context(recorded(found, run.label_lost))
        write_labels(out / LABELS.name, _counted(labels, counts))
        if not counts["labels"]:
            raise DataError("none of the generated answers got a label")
        relevant = counts["relevant"] / counts["labels"]
        say(f"label: {counts['labels']} answers, {relevant:.1%} of them relevant")
    if lost := lost_by_endpoint(run.label_lost):
        say(
            f"label: the endpoint lost {lost} items ({run.label_lost}): the next `tppo run` asks "
            "them again; new labels change what map and train-rm read, so that these and the "
            "stages after them run again"
        )


def label_lost_again(run: Run) -> bool:
    """Ask for the labels that a finished stage lost to the endpoint, if it lost any; without an
    endpoint that answers, the labels stay as they were.
    """
    lost = lost_by_endpoint(run.label_lost)
    if not lost:
        return False
    say(f"label: the endpoint lost {lost} items, asked again")
    try:
        label_answers(run)
    except (EndpointError, NoKey) as error:
        say(f"label: its labels stay as they were: {error}")
    return True


def export_labels(run: Run, path: Path) -> None:
    """The questions that an endpoint has not answered yet, as an OpenAI batch file."""
    run.inputs("label")  # are whole
    with LineIndex(run.path(TRAIN_SESSIONS), session_of) as sessions:
        export_batch(_items(run, sessions), run.config.label.endpoint, run.label_cache, path)


def import_labels(run: Run, path: Path) -> None:
    """Answers of an OpenAI batch, checked, to where the label stage finds them."""
    run.inputs("label")  # are whole
    with LineIndex(run.path(TRAIN_SESSIONS), session_of) as sessions:
        import_batch(_items(run, sessions), run.config.label.endpoint, run.label_cache, path)


def compare_labels(run: Run, path: Path) -> None:
    """Print how far the run's labels agree with those of a file."""
    own = run.path(LABELS)
    if not own.exists():
        raise DataError(f"{own}: no such file; run `tppo label --out {run.out}` first")
    run.folder.verify(own)
    print(compare_files(own, path))


def _items(run: Run, sessions: LineIndex[Session]) -> Iterator[LabelItem]:
    """What an endpoint is to judge, one at a time; the history as the policy sees it."""
    for answer in run.iter_answers():
        yield label_item(answer, _asked(sessions, answer))


def label_item(answer: Answer, session: Session) -> LabelItem:
    """What an endpoint is to judge of an answer to a session."""
    return LabelItem(answer.id, history_lines(session), list(session.targets), answer.text)


def _asked(sessions: LineIndex[Session], answer: Answer) -> Session:
    """The session that an answer belongs to."""
    session = sessions.get(answer.session)
    if session is None:
        raise DataError(
            f"answers of session {answer.session!r}, which {TRAIN_SESSIONS.path} lacks"
        )
    return session


def _counted(labels: Iterable[Label], counts: Counter[str]) -> Iterator[Label]:
    for item in labels:
        counts["labels"] += 1
        counts["relevant"] += item.sentence
        yield item
