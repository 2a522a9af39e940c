"""What a study leaves: study.json, report.html, and its tables in a Markdown file."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tppo.errors import DataError
from tppo.stages.study.config import StudyConfig
from tppo.stages.study.figures import all_figures
from tppo.stages.study.report import report
from tppo.stages.study.tables import markdown, tables
from tppo.stages.study.work import Outcome, versions
from tppo.store.jsonl import plain, read_object, write_json, write_text

EVERY_S = 120.0
MARK = "study"  # of the lines between which figures stand


class Summary:
    """Writes what is known of a study; as a function of outcomes at most every two minutes."""

    def __init__(self, study: StudyConfig, folder: Path):
        self.study, self.folder = study, folder
        self.written = time.monotonic()

    def __call__(self, outcomes: Sequence[Outcome]) -> None:
        """Write, unless that was done a moment ago."""
        if time.monotonic() - self.written >= EVERY_S:
            self.write(outcomes)

    def write(self, outcomes: Sequence[Outcome]) -> None:
        """study.json and report.html."""
        found: dict[str, Any] = {
            "study": plain(self.study),
            "versions": versions(),
            "trained": len(outcomes),
            "wanted": len(self.study.cells()),
            "seconds": sum(outcome.found["seconds"] for outcome in outcomes),
            "figures": all_figures(self.study, outcomes)
            | {"label_cost": self.label_cost()},
            "outcomes": [{"cell": plain(o.cell), **_in_short(o)} for o in outcomes],
        }
        write_json(self.folder / "study.json", found)
        write_text(self.folder / "report.html", report(plain(found)))
        self.written = time.monotonic()

    def label_cost(self) -> dict[str, Any] | None:
        """What labels cost, as the answers of the first seed say; None where nobody could count."""
        found = sorted((self.folder / "material").glob("*/label-cost.json"))
        return read_object(found[0]) if found else None


def _in_short(outcome: Outcome) -> dict[str, Any]:
    """An outcome without the figures of single fresh answers, which outcomes.jsonl holds."""
    found = plain(outcome.found)
    return {name: value for name, value in found.items() if name not in ("scores", "shares")}


def write_into(study: Path, target: Path, mark: str = MARK) -> None:
    """Replace what stands between the marks of a Markdown file by the tables of a study.json.

    mark: of the lines <!-- mark --> and <!-- /mark -->, so that a file can hold several studies.
    Errors: DataError where the study is none, or the file has not each mark once, in order.
    """
    found = read_object(study)
    if found is None or "figures" not in found:
        raise DataError(f"{study}: not a study.json; `tppo study` writes one")
    try:
        text = target.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"{target}: cannot be read: {error.strerror}") from None
    body = markdown(tables(found["figures"]))
    write_text(target, replace_between(text, mark, f"\n{body}\n", str(target)))


def replace_between(text: str, mark: str, body: str, name: str) -> str:
    """A text of Markdown, called `name`, with `body` between the lines of a mark.

    Errors: DataError where it has not each of them once, in order.
    """
    begin, end = f"<!-- {mark} -->", f"<!-- /{mark} -->"
    before, first, rest = text.partition(begin)
    _, last, after = rest.partition(end)
    if not first or not last or begin in rest or end in after:
        raise DataError(f"{name}: expected a line {begin} and behind it a line {end}, each once")
    return f"{before}{begin}\n{body}\n{end}{after}"
