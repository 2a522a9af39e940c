"""The whole report, and where it is written."""

from __future__ import annotations

from pathlib import Path

from tppo.errors import DataError
from tppo.evaluation.page import markup, page
from tppo.evaluation.style import HEAT
from tppo.stages.report.answers import samples, side_by_side
from tppo.stages.report.course import settings, stages, versions
from tppo.stages.report.curves import curves
from tppo.stages.report.found import REPORT, Found, read_folder
from tppo.stages.report.outcome import outcome
from tppo.stages.report.reward_model import reward_model
from tppo.store.jsonl import write_text

RELOAD_S = 15  # of a page whose run goes on
CSS = HEAT + """
nav { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; margin: 1rem 0; font-size: .875rem; }
#result { font-size: 1.2rem; line-height: 1.4; max-width: 60rem; }
.state { display: inline-block; padding: .1rem .7rem; border: 1px solid var(--line);
  border-radius: 999px; background: var(--card); font-size: .875rem; color: var(--soft); }
.charts > h3 { grid-column: 1 / -1; margin: 0; }
td small { white-space: nowrap; }
dl { margin: 0 0 .6rem; } dt { color: var(--soft); font-size: .8125rem; }
dd { margin: 0 0 .5rem; white-space: pre-wrap; }
"""


def report_html(found: Found) -> str:
    """The page of what lies in a run folder."""
    parts = {
        "Curves": curves(found),
        "SFT and TPPO, token by token": side_by_side(found),
        "Samples over training": samples(found),
        "Reward model": reward_model(found),
        "Stages": stages(found) + versions(found),
        "Settings": settings(found),
    }
    kept = {f"part-{i}": (name, body) for i, (name, body) in enumerate(parts.items(), 1) if body}
    links = "".join(f'<a href="#{id}">{name}</a>' for id, (name, _) in kept.items())
    sections = "\n".join(f'<section><h2 id="{id}">{name}</h2>\n{body}</section>'
                         for id, (name, body) in kept.items())  # fmt: skip
    title = f"Report of {found.out.resolve().name}"
    body = f"""<header>
<h1>{markup(title)}</h1>
<p><span class="state">{_state(found)}</span></p>
</header>
<main>
{outcome(found)}
<nav>{links}</nav>
{sections}
</main>"""
    return page(title, CSS, body, reload_s=RELOAD_S if found.process else None)


def _state(found: Found) -> str:
    if found.process:
        open_ = [stage.name for stage in found.stages if not stage.finished]
        at = f", at stage {markup(open_[-1])}" if open_ else ""
        return (f"running since {markup(str(found.process['since']))}{at}; this page loads itself "
                f"again every {RELOAD_S} seconds")  # fmt: skip
    if found.result is not None:
        return "finished"
    return "stopped; the same command goes on"


def write_report(out: Path) -> Path:
    """Write `report.html` into a run folder; its path.

    Errors: DataError where it is no run folder, or a file that is shown is damaged.
    """
    found = read_folder(out)
    try:
        text = report_html(found)
    except (LookupError, TypeError, AttributeError, ArithmeticError) as error:
        # Files of finished stages are those that were written: it is one of those beside them.
        raise DataError(
            f"{out}: {found.result_file}, or a file of a stage under way, holds what tppo does not "
            f"write ({type(error).__name__}: {error}); restore it, or run the command that wrote "
            "it again"
        ) from error
    write_text(out / REPORT, text)
    return out / REPORT
