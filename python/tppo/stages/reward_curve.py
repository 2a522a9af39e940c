"""What the train-rm stage learns from and holds out, by labeller, and what fewer labels gave."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tppo.evaluation.judge import spoken
from tppo.labels.sources import by_hand
from tppo.methods.auc import (
    Rated,
    area_under_curve,
    auc_interval,
    drawn_aucs,
    interval,
    shown_auc,
)
from tppo.methods.config import RewardModelConfig
from tppo.methods.reward_model import (
    LabelledAnswer,
    Reader,
    enough_passes,
    rate_tokens,
    train_reward_model,
    weighed,
)
from tppo.models.keeper import Rest, weights_of
from tppo.progress import say, silent
from tppo.store.checkpoint import Checkpoints

FIRST = 25  # labels by hand of the shortest refit; each longer one has twice as many
REFITS_BELOW = 1_000  # labelled sessions: a refit of so many costs more than it tells
Rows = Mapping[str, Sequence[LabelledAnswer]]  # by session


@dataclass(frozen=True)
class LabelledParts:
    """The labelled answers of a run, in the reward model's tokens."""

    rows: Rows
    """Of every session, in the order of labelling."""
    twins: Rows
    """The same with a query repeated."""
    train: Sequence[str]
    """Sessions that are learnt from, in the order of training."""
    held: Sequence[str]
    """Sessions that are held out."""
    hand_weight: float

    @property
    def sessions(self) -> int:
        """How many there are."""
        return len(self.rows)

    @property
    def heldout(self) -> list[LabelledAnswer]:
        """The answers that are held out."""
        return _of(self.rows, self.held)

    @property
    def heldout_sessions(self) -> list[str]:
        """Whose session each of them is."""
        return [session for session in self.held for _ in self.rows[session]]

    @property
    def unseen(self) -> list[LabelledAnswer]:
        """The twins of those that are held out."""
        return _of(self.twins, self.held)

    @property
    def answers(self) -> list[LabelledAnswer]:
        """All of them without the twins."""
        return _of(self.rows, [*self.train, *self.held])

    def training(self, hand: int | None = None) -> list[LabelledAnswer]:
        """What is learnt from, twins behind, with weights; with the first `hand` labels by hand
        alone, and all others.
        """
        left_out: set[str] = set()
        if hand is not None:
            left_out = set(self.hand_sessions()[hand:])
        chosen = [session for session in self.train if session not in left_out]
        found = [*_of(self.rows, chosen), *_of(self.twins, chosen)]
        return weighed(found, [self.hand_weight if by_hand(row.labeller) else 1.0
                               for row in found])  # fmt: skip

    def hand_sessions(self) -> list[str]:
        """Sessions that are learnt from and in which a person labelled, in the order of labelling.
        """
        train = set(self.train)
        return [session for session, rows in self.rows.items()
                if session in train and any(by_hand(row.labeller) for row in rows)]  # fmt: skip

    def sources(self, rated: Rated) -> dict[str, dict[str, Any]]:
        """Of each labeller how many answers are labelled and held out, and the AUC on the latter.
        """
        heldout, whose = self.heldout, self.heldout_sessions
        found: dict[str, dict[str, Any]] = {}
        for name in dict.fromkeys(row.labeller for row in _of(self.rows, [*self.rows])):
            own = [i for i, row in enumerate(heldout) if row.labeller == name]
            part = rated.of(own)
            found[name] = {
                "answers": sum(row.labeller == name for row in self.answers),
                "heldout": len(own),
                "auc": area_under_curve(part.score, part.relevant),
                "auc_interval": auc_interval(part, whose),
            }
        return found


def _of(rows: Rows, sessions: Sequence[str]) -> list[LabelledAnswer]:
    return [row for session in sessions for row in rows.get(session, ())]


def split_labelled(
    rows: Rows, twins: Rows, order: Sequence[str], checks: set[str], config: RewardModelConfig
) -> LabelledParts:
    """Hold out a share of the sessions, in a given order; those drawn for it come first, and all of
    them are held out, unless they are more than a half.
    """
    order = sorted(order, key=lambda session: session not in checks)
    share = max(1, round(config.heldout_share * len(order)))
    n = min(max(share, min(len(checks), len(order) // 2)), len(order) - 1)
    return LabelledParts(rows, twins, order[n:], order[:n], config.hand_weight)


def passes(config: RewardModelConfig, rows: Sequence[LabelledAnswer]) -> RewardModelConfig:
    """The settings with enough passes where people label: they label few, and a pass over few is
    no training.
    """
    return enough_passes(config, len(rows)) if any(by_hand(r.labeller) for r in rows) else config


def learning_curve(
    parts: LabelledParts,
    rated: Rated,
    start: Callable[[], Reader],
    config: RewardModelConfig,
    seed: int,
    folder: Path,
) -> list[dict[str, Any]]:
    """What the first 25, 50, 100, ... labels by hand gave and what all of them give: reward models
    trained on so many, rated on the same held-out answers, those by hand.

    rated: by the reward model of all.  start: gives a model before its training.  folder: gets
    the checkpoints of the refits, each in a folder of its own, and what those that are done gave.

    A row has the labels learnt from, `by_hand` and `others`, the `auc` on the held-out answers
    with its `auc_interval`, and how much `more` all labels give, with `more_interval` of paired
    draws.  [] without labels by hand, with too few for two rows, with too many, and
    without an AUC.
    """
    held = [i for i, row in enumerate(parts.heldout) if by_hand(row.labeller)]
    sessions = parts.hand_sessions()
    others = sum(not by_hand(row.labeller) for row in _of(parts.rows, parts.train))
    sizes = [0] if others else []
    sizes += [n for k in range(20) if (n := FIRST << k) < len(sessions)]
    own = rated.of(held)
    if not sessions or not sizes or area_under_curve(own.score, own.relevant) is None:
        return []
    if parts.sessions >= REFITS_BELOW:
        say(f"reward model: no learning curve of {parts.sessions:,} labelled sessions, it is made "
            f"of fewer than {REFITS_BELOW:,}")  # fmt: skip
        return []
    kept = Checkpoints(folder / "curve", "train-rm, learning curve", "refit")
    before, found = kept.newest(len(sizes)), list[Rated]()
    if before is not None:
        found = [Rated(**weights_of(before, f"refit-{k}", *Rated._fields))
                 for k in range(before.step)]  # fmt: skip
    for done, n in enumerate(sizes[len(found) :], len(found) + 1):
        reader, rows, place = start(), parts.training(n), folder / f"curve-{n}"
        with silent():
            train_reward_model(reader, rows, passes(config, rows), seed=seed,
                               keeper=Checkpoints(place, "train-rm, a refit"))  # fmt: skip
            found.append(rate_tokens(reader, parts.heldout, config)[0].of(held))
        del reader
        kept.after(done, len(sizes), lambda: Rest(
            {f"refit-{k}": one._asdict() for k, one in enumerate(found)}, {}, {}))  # fmt: skip
        shutil.rmtree(place, ignore_errors=True)
    found.append(own)
    return _rows(parts, [*sizes, len(sessions)], others, found)


def _rows(
    parts: LabelledParts, sizes: Sequence[int], others: int, rated: Sequence[Rated]
) -> list[dict[str, Any]]:
    draws = drawn_aucs(rated, parts.heldout_sessions)
    aucs = [area_under_curve(one.score, one.relevant) for one in rated]
    rows = []
    for k, (n, auc) in enumerate(zip(sizes, aucs, strict=True)):
        chosen = _of(parts.rows, parts.hand_sessions()[:n])
        row: dict[str, Any] = {
            "by_hand": sum(by_hand(answer.labeller) for answer in chosen), "others": others,
            "auc": auc, "auc_interval": None if draws is None else interval(draws[k]),
            "more": None, "more_interval": None,
        }  # fmt: skip
        if k < len(sizes) - 1 and auc is not None and aucs[-1] is not None:
            row["more"] = aucs[-1] - auc
            row["more_interval"] = None if draws is None else interval(draws[-1] - draws[k])
        rows.append(row)
    return rows


def tell(report: Mapping[str, Any]) -> None:
    """The AUC by labeller, where there are several, and the learning curve."""
    sources = report["sources"]
    if len(sources) > 1:
        for name, part in sources.items():
            auc = f": AUC {shown_auc(part['auc'], part['auc_interval'])}" if part["heldout"] else ""
            say(f"reward model: {part['answers']} answers labelled by {spoken(name)}, "
                f"{part['heldout']} held out{auc}")  # fmt: skip
    if report["curve"]:
        say("reward model: what fewer labels by hand gave, on the same held-out answers\n"
            + curve_table(report["curve"]))  # fmt: skip


def curve_table(curve: Sequence[Mapping[str, Any]]) -> str:
    """The learning curve as a table, with 95 % intervals."""
    lines = [f"{'by hand':>8}{'others':>8}{'AUC':>7}{'95 %':>12}{'all give':>10}{'95 %':>14}"]
    for row in curve:
        auc = "-" if row["auc"] is None else f"{row['auc']:.3f}"
        more = "-" if row["more"] is None else f"{row['more']:+.3f}"
        lines.append(f"{row['by_hand']:>8}{row['others']:>8}{auc:>7}"
                     f"{_between(row['auc_interval'], ''):>12}{more:>10}"
                     f"{_between(row['more_interval'], '+'):>14}")  # fmt: skip
    return "\n".join(lines)


def _between(ends: Sequence[float] | None, sign: str) -> str:
    return "-" if ends is None else "..".join(f"{end:{sign}.2f}" for end in ends)
