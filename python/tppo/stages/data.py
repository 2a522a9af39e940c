"""The data stage: sessions, generated or read from a log, split by user."""

from __future__ import annotations

from tppo.progress import say
from tppo.sessions.split import split_log, write_generated
from tppo.stages.run import Run


def data(run: Run) -> None:
    """Sessions, generated or read, split by user into train, heldout, test (and transfer)."""
    with run.stage("data") as out:
        if run.data is None:
            counts = write_generated(run.config.sessions, run.seed, out)
        else:
            counts = split_log(run.data, run.config.sessions, run.seed, out)
        say("data: " + ", ".join(f"{count} sessions to {name}" for name, count in counts.items()))
