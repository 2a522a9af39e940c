"""The closing figures as tables of text, which the report and Markdown show alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from tppo.stages.study.figures import AT_KL, LEVELS

Point = Sequence[float | None]  # figure, low, high
AFTER = "; relevance after PPO of equal steps, fresh users, by the rule"
MIN_FORMAT, MAX_KL, MIN_DISTINCT = 0.9, 10.0, 0.95  # outside of them a relevance is no gain
LIMITS = (f" Distinct queries as a share of SFT's. *: format below {MIN_FORMAT:g}, KL above "
          f"{MAX_KL:g} or distinct queries below {MIN_DISTINCT:.0%}.")  # fmt: skip


class Table(NamedTuple):
    """A table with what has to be known to read it."""

    title: str
    note: str
    head: list[str]
    rows: list[list[str]]


def tables(figures: Mapping[str, Any]) -> list[Table]:
    """Every table that the figures of study.json hold."""
    found: list[Table] = []
    rated = [_labels_of(setting) for setting in figures["labels"] if not setting["steps"]]
    for setting in figures["labels"]:
        if setting["seeds"]:
            # Reward models without PPO are more, and say the same of the correlation.
            told = ["relevance"] if setting["steps"] and _labels_of(setting) in rated else None
            found += [_labels(setting), *_more(setting),
                      *_needed(setting, figures.get("label_cost"), told)]  # fmt: skip
    for setting in figures.get("choice", ()):
        if setting["seeds"]:
            found += [_labels(setting, "Which answers are labelled"), _added(setting)]
    if figures.get("label_cost"):
        found.append(_cost(figures["label_cost"]))
    for setting in figures["credit"]:
        if setting["seeds"]:
            found.append(_credit(setting))
        if setting["others"]:
            found.append(_without_ppo(setting))
    return found


def _labels_of(setting: Mapping[str, Any]) -> tuple[Any, Any]:
    return setting["queries"], setting["noise"]


def named(setting: Mapping[str, Any]) -> str:
    """What a setting is called: queries, noise, answers a step where they tell it apart, seeds."""
    noise, seeds = setting.get("noise"), setting["seeds"]
    parts = [f"{setting['queries']} queries"]
    if noise is not None:
        wrong = f"{noise['words']:.1%} of words, {noise['sentences']:.1%} of sentences flipped"
        parts.append(wrong if noise["words"] or noise["sentences"] else "clean labels")
    if setting.get("step_answers") is not None:
        parts.append(f"{setting['step_answers']} answers a step")
    return ", ".join([*parts, f"{len(seeds)} seed{'s' if len(seeds) > 1 else ''}"])


def _labels(setting: Mapping[str, Any], title: str = "What labels of words buy") -> Table:
    head, after = ["labelled answers"], bool(setting["steps"])
    width = 5 if after else 1
    for name in setting["arms"]:
        head += [f"{name}: rank correlation", f"{name}: relevance", "KL", "format",
                 "distinct queries"][:width]  # fmt: skip
    sizes = sorted({n for arm in setting["arms"].values() for n in arm["answers"]})
    rows = []
    for n in sizes:
        row = [f"{n:,.0f}"]
        for arm in setting["arms"].values():
            if n not in arm["answers"]:
                row += [""] * width
                continue
            k = arm["answers"].index(n)
            beside = arm["beside"][k]
            if not after:
                row.append(share(arm["correlation"][k]))
                continue
            row += [share(arm["correlation"][k]),
                    share(arm["relevance"][k]) + ("" if within_limits(beside) else " *"),
                    f"{beside['kl']:.1f}", number(beside["format"]),
                    f"{beside['distinct_share']:.0%}"]  # fmt: skip
        rows.append(row)
    return Table(
        f"{title}: {named(setting)}",
        "Rank correlation (Spearman) of the reward model's score with the true share of relevant "
        f"words, fresh answers{after * AFTER}.{after * LIMITS}{after * _sft(setting)} "
        "95 % intervals: paired bootstrap over seeds and users.",
        head,
        rows,
    )


def _sft(setting: Mapping[str, Any]) -> str:
    """What arms begin with; empty without PPO."""
    sft = next(iter(setting["arms"].values()))["beside"][0].get("sft")
    if sft is None:
        return ""
    return (f" SFT: relevance {number(sft['relevance'])}, format {number(sft['format'])}, "
            f"{sft['distinct_queries']:.2f} distinct queries.")  # fmt: skip


def within_limits(beside: Mapping[str, float]) -> bool:
    """Whether a relevance was not had at the cost of KL, of the form, or by repeating a query."""
    return (beside["format"] >= MIN_FORMAT and beside["kl"] <= MAX_KL
            and beside["distinct_share"] >= MIN_DISTINCT)  # fmt: skip


def _more(setting: Mapping[str, Any]) -> list[Table]:
    figure, arms = "relevance" if setting["steps"] else "correlation", setting["arms"]
    sizes = sorted({n for arm in arms.values() for n in arm["answers"]})
    rows = [
        [f"{n:,.0f}", *(share(arm["more"][figure][arm["answers"].index(n)])
                        if n in arm["answers"][:-1] else "" for arm in arms.values())]
        for n in sizes[:-1]
    ]  # fmt: skip
    if not rows:
        return []
    return [Table(
        f"What more labelled answers add: {named(setting)}",
        f"The {figure} with the most labelled answers less that with so many.",
        ["labelled answers", *arms],
        rows,
    )]  # fmt: skip


def _added(setting: Mapping[str, Any]) -> Table:
    """What each way to choose answers has more than the first way, paired."""
    first = next(iter(setting["arms"]))
    known: Mapping[str, Any] = next(iter(setting["added"].values()), {})
    head = ["answers chosen", "labelled"]
    for figure in known:
        head += [f"{figure}: more than {first}", f"as many {first}"]
    rows = []
    for name, figures in setting["added"].items():
        for together in zip(*figures.values(), strict=True):
            row = [name, f"{together[0]['answers']:,.0f}"]
            for point in together:
                row += [share(point["more"]), _as_many(point)]
            rows.append(row)
    return Table(
        f"What the choice of answers adds: {named(setting)}",
        f"Paired by seed and user. As many {first}: the number of answers labelled so that have as "
        "much, by interpolation on its logarithm; <= : the smallest number of them has as much.",
        head,
        rows,
    )


def _as_many(point: Mapping[str, Any]) -> str:
    value, low, high = point["like"]
    mark = "<= " if value is not None and value <= point["smallest"] else ""
    ends = ["more" if end is None else f"{end:,.0f}" for end in (low, high)]
    return f"{mark}{'more' if value is None else f'{value:,.0f}'} ({' to '.join(ends)})"


def _needed(
    setting: Mapping[str, Any], cost: Mapping[str, Any] | None, told: Sequence[str] | None
) -> list[Table]:
    """Of the figures told, by default of all."""
    found = []
    head = ["labelled as a whole", "{} there", "answers by word / as a whole"]
    price = None
    if cost is not None:
        each = cost["templates"]
        price = each["words"]["price"] / each["sentence"]["price"]
        head.append("their price")
    for figure, rows in setting["needed"].items():
        if told is not None and figure not in told:
            continue
        cells = [[f"{row['sentences']:,.0f}", number(row["level"]), _bounded(row, 1.0)]
                 + ([] if price is None else [_bounded(row, price)]) for row in rows]  # fmt: skip
        found.append(Table(
            f"Labelled answers for an equal {figure}: {named(setting)}",
            "Answers labelled by word over answers labelled as a whole, where both have the level "
            "that the latter have, and the same for what the labels cost; between numbers of "
            "answers by interpolation on their logarithm. <= : labels of words are above that "
            "level at the smallest number already.",
            [text.format(figure) for text in head],
            cells,
        ))  # fmt: skip
    return found


def _bounded(row: Mapping[str, Any], price: float) -> str:
    """A ratio of answers, or with a price of what they cost; marked where it is a bound, as it is
    where it is the smallest that the study can tell.
    """
    value, low, high = (None if end is None else end * price for end in row["ratio"])
    end = "not reached" if high is None else number(high)
    if row["level"] is None:
        return "-"
    if value is None:
        return f"not reached ({number(low)} to {end})"
    mark = "<= " if row["ratio"][0] <= row["smallest"] * (1 + 1e-9) else ""
    return f"{mark}{number(value)} ({number(low)} to {end})"


def _cost(cost: Mapping[str, Any]) -> Table:
    rows = [
        [{"words": "words and whole", "sentence": "whole alone"}[template],
         f"{each['read']:.0f}", f"{each['written']:.0f}", f"{each['price']:.0f}"]
        for template, each in cost["templates"].items()
    ]  # fmt: skip
    return Table(
        "What a label costs",
        f"Tokens of an answer's question and reply by the labelling endpoint's templates "
        f"({cost['tokenizer']}), and their price in tokens read where a token written costs "
        f"{cost['price_ratio']:g}.",
        ["template", "tokens read", "tokens written", "price"],
        rows,
    )


def _shown(setting: Mapping[str, Any]) -> list[str]:
    """The levels that a table shows: the highest that every arm surely reaches, with the whole of
    its interval, and the highest that the first arm surely reaches.
    """
    arms = [*setting["arms"].values()]
    found = []
    for asked in (arms, arms[:1]):
        sure = [str(level) for level in LEVELS
                if all(arm["reached"][str(level)][2] is not None for arm in asked)]  # fmt: skip
        found += sure[-1:]
    return sorted(set(found))


def _credit(setting: Mapping[str, Any]) -> Table:
    levels, first = _shown(setting), next(iter(setting["arms"]))
    head, gains = ["arm"], setting.get("gains")  # which older studies do not have
    for level in levels:
        head += [f"answers to {float(level):g}", f"{first} / arm"]
    head += [
        f"relevance at KL {AT_KL:g}", "relevance at the end",
        *([] if gains is None else [f"less {first}'s"]), "KL", "format", "distinct queries",
        "explained variance: known, fit, first, last",
    ]  # fmt: skip
    rows = []
    for name, arm in setting["arms"].items():
        row = [name]
        for level in levels:
            ratio = setting["ratios"].get(name, {}).get(level)
            row += [_reached(arm["reached"][level]), "" if ratio is None else share(ratio)]
        last = arm["rows"][-1]
        variance = [r["explained_variance"] for r in arm["rows"] if "explained_variance" in r]
        fit = setting["critic_fits"].get(name, {})
        known = [fit.get(key) for key in ("explained_by_paid", "explained_variance_after")]
        row += [
            share(arm["at_kl"]), share(arm["relevance"][-1]),
            *([] if gains is None else [share(gains[name]) if name in gains else ""]),
            f"{last['kl']:.1f}", number(last["format"]), f"{last['distinct_queries']:.2f}",
            ", ".join(map(number, (*known, variance[0], variance[-1]))) if variance else "",
        ]  # fmt: skip
        rows.append(row)
    start = setting["arms"][first]["rows"][0]
    title, models = {
        "credit": ("Where the same rewards are paid", "One token reward model"),
        "settings": ("What settings do", "Each arm's token reward model"),
        "guides": ("A guide that writes a part of the answers", "A reward model a kind of labels"),
    }[setting["question"]]
    return Table(
        f"{title}: {named(setting)}",
        f"{models}, {setting['arms'][first]['answers'][-1]:,.0f} answers sampled; "
        "answers until the mean relevance of fresh users, made nondecreasing, reaches a level. "
        f"The SFT model that all start from: relevance "
        f"{share(setting['arms'][first]['relevance'][0])}, format {number(start['format'])}, "
        f"{start['distinct_queries']:.2f} distinct queries. Explained variance of the rewards to "
        "come: of a fitted critic on held-out answers what can be known (a line, one a position, "
        "through what the tokens before have earned) and what it explains after its fit; of every "
        "critic over the first and the last answers of PPO. 95 % intervals: paired bootstrap over "
        "seeds and users.",
        head,
        rows,
    )


def _without_ppo(setting: Mapping[str, Any]) -> Table:
    rows = [
        [name, share(arm["relevance"]), f"{arm['beside']['kl']:.1f}",
         number(arm["beside"]["format"]), f"{arm['beside']['distinct_queries']:.2f}"]
        for name, arm in setting["others"].items()
    ]  # fmt: skip
    seeds = next(iter(setting["others"].values()))["seeds"]
    return Table(
        f"Without PPO: {named({**setting, 'seeds': seeds})}",
        "DPO on the true next queries against the answers that the others were labelled for; the "
        "best of n samples of the SFT model by the token reward model, with the bound of its KL.",
        ["arm", "relevance", "KL", "format", "distinct queries"],
        rows,
    )


def _reached(point: Point) -> str:
    value, low, high = point
    if value is None:
        return "not reached"
    end = "never" if high is None else f"{high:,.0f}"
    return f"{value:,.0f} ({low:,.0f} to {end})" if low is not None else f"{value:,.0f}"


def number(value: float | None) -> str:
    """`.71`, `1.30`, `-` for what is not known or not reached."""
    if value is None:
        return "-"
    text = f"{value:.2f}"
    return text.replace("0.", ".", 1) if text.startswith(("0.", "-0.")) else text


def share(point: Point) -> str:
    """A figure with its interval."""
    value, low, high = point
    return f"{number(value)} ({number(low)} to {number(high)})"


def markdown(found: Sequence[Table]) -> str:
    """The tables as Markdown."""
    parts = []
    for table in found:
        lines = [f"**{table.title}**", "", table.note, "", _md(table.head),
                 "|" + "---|" * len(table.head)]  # fmt: skip
        parts.append("\n".join([*lines, *map(_md, table.rows)]))
    return "\n\n".join(parts)


def _md(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
