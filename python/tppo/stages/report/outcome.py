"""The head of the report: the result in one sentence, and the closing table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tppo.evaluation.judge import RULE, first_figure
from tppo.evaluation.page import figure, markup, number, signed, table
from tppo.evaluation.table import columns_of, digits_of, judge_line, rows_of
from tppo.stages.report.found import Found, StageFound

NAMES = {
    "repeat_last": "the last query again", "sft": "SFT", "tppo": "TPPO",
    "sft_continued": "SFT trained on", "sft_transfer": "SFT, unseen intents",
    "tppo_transfer": "TPPO, unseen intents",
}  # fmt: skip


def called(name: str) -> str:
    """What a row of the closing table is called in a sentence."""
    if name.startswith("sft_t") and name not in NAMES:
        return f"SFT at temperature {name.removeprefix('sft_t')}"
    return NAMES.get(name, name)


def outcome(found: Found) -> str:
    """The result, or how far the run has come."""
    if found.result is None:
        return f'<p id="result">{_so_far(found)}</p>'
    result, file = dict(found.result), found.result_file
    findings = "".join(f"<p><b>{markup(text)}</b></p>" for text in result.get("findings", ()))
    judge = judge_line(result["test"], first_figure(result["tppo"]) or "relevance")
    pairs = "".join(_pair(name, found, file) for name, found in result.get("pairs", {}).items())
    return (f'<p id="result">{_sentence(result, file)}</p>{findings}{_table(result, file)}'
            f'{pairs}<p class="soft">{markup(judge[:1].upper() + judge[1:])}.</p>')  # fmt: skip


def _sentence(result: Mapping[str, Any], file: str) -> str:
    """What TPPO's answers are judged, beside SFT's, with intervals."""
    name = first_figure(result["tppo"]) or "relevance"
    users = figure(result["test"]["users"], number(result["test"]["users"]), file, "test", "users")
    share = result["test"]["judge"] == RULE
    text = percent if share else number
    tppo = _between(file, ("tppo", name), result["tppo"][name], ("tppo", f"{name}_interval"),
                    result["tppo"][f"{name}_interval"], text, "95 % interval ")  # fmt: skip
    begin = (f"Of TPPO's answers to {users} held-out users {tppo} are relevant" if share else
             f"TPPO's answers to {users} held-out users have a mean {markup(name)} of "
             f"{tppo}")  # fmt: skip
    if "sft" not in result:
        return f"{begin}."
    sft = _between(file, ("sft", name), result["sft"][name], ("sft", f"{name}_interval"),
                   result["sft"][f"{name}_interval"], text)  # fmt: skip
    begin += f", {'of ' if share else ''}SFT's {sft}"
    if "gain" not in result:
        return f"{begin}."
    gain = result["gain"]
    more = _between(file, ("gain", "difference"), gain["difference"], ("gain", "interval"),
                    gain["interval"], points if share else _signed)  # fmt: skip
    return f"{begin}: a difference of {more}{' points' if share else ''}."


def _between(
    file: str,
    key: tuple[str, ...],
    value: float,
    interval_key: tuple[str, ...],
    interval: Sequence[float],
    text: Callable[[float], str],
    called: str = "",
) -> str:
    """A figure and behind it its interval: `72.7 % (68.7 % to 76.3 %)`."""
    low, high = (figure(end, text(end), file, *interval_key, i) for i, end in enumerate(interval))
    return f"{figure(value, text(value), file, *key)} ({called}{low} to {high})"


def points(value: float) -> str:
    """A difference of two shares of 1 in percentage points: `+55.5`."""
    return signed(100 * value, 1)


def _signed(value: float) -> str:
    return signed(value, 3)


def percent(value: float) -> str:
    """A share of 1 as `72.7 %`."""
    return f"{100 * value:.1f} %"


def _table(result: Mapping[str, Any], file: str) -> str:
    columns = columns_of(dict(result))
    rows = [[markup(called(name)), *(_cell(file, name, row, key) for key in columns)]
            for name, row in rows_of(dict(result)).items()]  # fmt: skip
    return table(("answers by", *columns.values()), rows, "The closing table")


def _cell(file: str, name: str, row: Mapping[str, Any], key: str) -> str:
    value = row.get(key)
    if value is None:
        return "–"
    shown = figure(value, f"{value:.{digits_of(key)}f}", file, name, key)
    if f"{key}_interval" not in row or key != first_figure(row):
        return shown
    ends = [figure(end, f"{end:.3f}", file, name, f"{key}_interval", i)
            for i, end in enumerate(row[f"{key}_interval"])]  # fmt: skip
    return f'<span>{shown} <small class="soft">{ends[0]} to {ends[1]}</small></span>'


def _pair(name: str, pair: Mapping[str, Any], file: str) -> str:
    """Who wins how often, of the answers to the same sessions."""
    win, tie, lose = (figure(pair[key], percent(pair[key]), file, "pairs", name, key)
                      for key in ("win", "tie", "lose"))  # fmt: skip
    net = _between(file, ("pairs", name, "net"), pair["net"], ("pairs", name, "net_interval"),
                   pair["net_interval"], points)  # fmt: skip
    return (f"<p>Session by session, {markup(name)}: the answer wins in {win}, ties in {tie} and "
            f"loses in {lose} of the sessions; wins less losses in points: {net}.</p>")  # fmt: skip


def _so_far(found: Found) -> str:
    """How far a run has come that has no table yet."""
    newest = next((stage for stage in reversed(found.of("train")) if stage.rows), None)
    if newest is None:
        last = [stage for stage in found.stages if stage.finished][-1:]
        done = f"The last stage that has finished is {markup(last[0].name)}" if last else (
            "No stage has finished yet")  # fmt: skip
        return f"There is no result yet. {done}."
    return f"There is no closing table yet. {_step(newest)}"


def _step(stage: StageFound) -> str:
    file, n = stage.file("metrics.jsonl"), len(stage.rows)
    step = figure(stage.rows[-1]["step"], str(stage.rows[-1]["step"]), file, n - 1, "step")
    text = f"PPO has taken {step} steps"
    held = [i for i, row in enumerate(stage.rows) if "heldout/kl" in row]
    if not held:
        return f"{text}."
    i = held[-1]
    name = next(key for key in stage.rows[i] if key.startswith("heldout/"))
    value = stage.rows[i][name]
    at = figure(stage.rows[i]["step"], str(stage.rows[i]["step"]), file, i, "step")
    return (f"{text}; {markup(name.removeprefix('heldout/'))} of held-out answers after step {at}: "
            f"{figure(value, number(value), file, i, name)}.")  # fmt: skip


