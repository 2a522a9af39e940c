"""The label stage, and what `tppo label` does instead with one of its flags."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

from tppo.errors import DataError
from tppo.evaluation.judge import spoken
from tppo.labels.agreement import Pair, compare_files, pairwise, shown
from tppo.labels.config import ENOUGH
from tppo.labels.endpoint.batch import export_batch, import_batch
from tppo.labels.endpoint.config import NoKey
from tppo.labels.endpoint.live import EndpointError, LabelItem, label
from tppo.labels.endpoint.lost import forget, lost_by_endpoint, recorded
from tppo.labels.hand import is_journal
from tppo.labels.label import Label, iter_labels, machine_of, write_labels
from tppo.labels.rule import label_by_rule
from tppo.labels.sources import Sources, mixed
from tppo.progress import say, track
from tppo.sessions.prompts import history_lines
from tppo.sessions.session import Session, session_of
from tppo.stages.answers import Answer, answer_of
from tppo.stages.artifacts import ANSWERS, LABELS, TRAIN_SESSIONS
from tppo.stages.hand.stage import judgements_of, label_by_hand
from tppo.stages.run import Run
from tppo.store.jsonl import read_lines, write_json
from tppo.store.line_groups import grouped_lines
from tppo.store.line_index import LineIndex


def label_answers(run: Run, *, ask: bool = True) -> None:
    """Word and answer labels, by the rule, by an endpoint, by hand, or by hand and one of these.

    ask: whether people may be asked for more than they have judged.
    """
    train, config = run.path(TRAIN_SESSIONS), run.config.label
    with (
        run.stage("label") as out,
        LineIndex(train, session_of) as sessions,
        ExitStack() as open_until_then,
    ):
        people, sources, both = list[Label](), Sources(), list[tuple[Label, Label]]()
        if config.labeller == "hand":
            people = label_by_hand(run, lambda answer: asked(sessions, answer), ask=ask)
        hand: dict[str, Label] = {}
        for one in people:
            hand.setdefault(one.id, one)  # who judged an answer first
        others = _by_machine(run, sessions, open_until_then)
        write_labels(out / LABELS.name, sources.counted(mixed(hand, others, both)))
        total = sources.total()
        if not total.answers:
            raise DataError("none of the generated answers got a label")
        pairs = pairwise([*people, *(other for _, other in both)])
        write_json(out / "report.json", {"sources": sources.of, "agreement": pairs})
        say(f"label: {total.answers} answers, {total.relevant / total.answers:.1%} of them relevant"
            f"{_each(sources)}")  # fmt: skip
        _tell(pairs)
    if lost := lost_by_endpoint(run.label_lost):
        say(
            f"label: the endpoint lost {lost} items ({run.label_lost}): the next `tppo run` asks "
            "them again; new labels change what map and train-rm read, so that these and the "
            "stages after them run again"
        )


def _by_machine(run: Run, sessions: LineIndex[Session], until: ExitStack) -> Iterable[Label]:
    """The labels of whoever labels besides people; what the endpoint lost is known when `until` is
    closed.
    """
    config = run.config.label
    machine = machine_of(config)
    if machine != "endpoint":
        forget(run.label_lost)
    if machine is None:
        return ()
    if machine == "rule":
        return (
            label_by_rule(a.id, a.text, asked(sessions, a).targets, config.sentence_threshold)
            for a in track(run.iter_answers(), "label")
        )
    answers = sum(1 for _ in read_lines(run.path(ANSWERS)))
    if answers > ENOUGH:
        say(
            f"label: {answers:,} answers; {ENOUGH} labelled by word did what more did in a "
            f"study (docs/evidence.md): --generate.samples {ENOUGH} begins with as many"
        )
    found = label(_items(run, sessions), config.endpoint, run.label_cache, answers)
    return until.enter_context(recorded(found, run.label_lost))


def _each(sources: Sources) -> str:
    """What each labeller gave, where there are several."""
    if len(sources.of) < 2:
        return ""
    return ": " + "; ".join(
        f"{part.answers} by {spoken(name)} ({part.relevant / part.answers:.1%})"
        for name, part in sources.of.items()
    )


def _tell(pairs: Sequence[Pair]) -> None:
    for pair in pairs:
        say(f"label: {spoken(pair.one)} and {spoken(pair.two)} both judged {pair.result.answers} "
            f"answers:\n{shown(pair.result)}")  # fmt: skip


def label_lost_again(run: Run) -> bool:
    """Ask for the labels that a finished stage lost to the endpoint, if it lost any; without an
    endpoint that answers, the labels stay as they were.
    """
    lost = lost_by_endpoint(run.label_lost)
    if not lost:
        return False
    say(f"label: the endpoint lost {lost} items, asked again")
    try:
        label_answers(run, ask=False)
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
    """Print how far the run's labels agree with those of a file; of a journal of labels by hand,
    how far everybody in it agrees with the others, and with who labelled the run.
    """
    own = run.path(LABELS)
    if not own.exists():
        raise DataError(f"{own}: no such file; run `tppo label --out {run.out}` first")
    run.folder.verify(own)
    if not is_journal(path):
        print(compare_files(own, path))
        return
    people = [found.label() for found in judgements_of(run, path)]
    pairs = pairwise([*iter_labels(own), *people])
    if not pairs:
        raise DataError(
            f"{path}: no answer in it was judged by a second labeller, expected one that another "
            "annotator judged, or another labeller of the run"
        )
    for pair in pairs:
        print(f"{spoken(pair.one)} and {spoken(pair.two)}\n{shown(pair.result)}")


def _items(run: Run, sessions: LineIndex[Session]) -> Iterator[LabelItem]:
    """What an endpoint is to judge, one at a time; the history as the policy sees it.

    Answers to one history follow each other: a server that keeps what it has read (prefix caching)
    reads their common beginning once.
    """
    for line in grouped_lines(run.path(ANSWERS), lambda line: answer_of(line).session):
        answer = answer_of(line)
        yield label_item(answer, asked(sessions, answer))


def label_item(answer: Answer, session: Session) -> LabelItem:
    """What an endpoint is to judge of an answer to a session."""
    return LabelItem(answer.id, history_lines(session), list(session.targets), answer.text)


def asked(sessions: LineIndex[Session], answer: Answer) -> Session:
    """The session that an answer belongs to."""
    session = sessions.get(answer.session)
    if session is None:
        raise DataError(
            f"answers of session {answer.session!r}, which {TRAIN_SESSIONS.path} lacks"
        )
    return session
