"""What a stage that trains leaves on the disk while it does: figures, and sample answers.

`metrics.jsonl` has a row a step, `samples.jsonl` a row a sample answer; both grow line by line, so
that a step of a long training costs what one of a short training does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tppo.evaluation.judge import SESSION, finish
from tppo.store.rows import RowFile

if TYPE_CHECKING:
    from tppo.evaluation.metrics import Evaluated

METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"
KEPT_ANSWERS = 8  # of each evaluation, to the same questions every time


class Journal:
    """The two files in the folder of a stage."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.metrics, self.samples = RowFile(out / METRICS), RowFile(out / SAMPLES)

    def resume(self, rows: Sequence[Mapping[str, Any]], samples: Sequence[Any] = ()) -> None:
        """Write again what a checkpoint has kept: of a stage's folder it alone was left."""
        self.write(rows, samples)

    def write(self, rows: Sequence[Mapping[str, Any]], samples: Sequence[Any] = ()) -> None:
        """Bring both files up to all rows and samples so far."""
        self.metrics.write(rows)
        if samples:
            self.samples.write(samples)


def sample_rows(step: int, found: Evaluated) -> list[dict[str, Any]]:
    """The first held-out answers after a step (0: before the first), each with its question, the
    true next queries where they are known, and the judge's figures.
    """
    answers = found.answers
    sessions = answers.columns.get(SESSION)
    rows = []
    for i, end in enumerate(finish(answers)[:KEPT_ANSWERS]):
        row = {"step": step, "id": str(i) if sessions is None else sessions[i].id}
        row["prompt"] = answers.prompts[i] if answers.prompts else ""
        if sessions is not None:
            row["targets"] = [*sessions[i].targets]
        row |= {"answer": answers.texts[i], "finish": end}
        rows.append(row | {"figures": {name: given[i] for name, given in found.each.items()}})
    return rows
