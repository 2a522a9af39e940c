"""What a label costs: tokens of the two templates of the labelling endpoint, read and written."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from tppo.labels.endpoint.prompt import (
    SENTENCE_TAG,
    WORDS_TAG,
    LabelItem,
    Template,
    parse,
    prompt,
)
from tppo.labels.label import Label

ENCODING = "o200k_base"
PRICE_RATIO = 4.0  # of a token written to a token read, as most endpoints charge
TEMPLATES: tuple[Template, ...] = ("words", "sentence")


class LabelCost(NamedTuple):
    """Mean tokens of one labelled answer."""

    read: float
    written: float

    def price(self, ratio: float = PRICE_RATIO) -> float:
        """In tokens read, where a token written costs `ratio` of them."""
        return self.read + ratio * self.written


def reply(label: Label, template: Template) -> str:
    """The shortest reply that the template asks for and the checks of replies take."""
    sentence = f'<{SENTENCE_TAG}>\n{{"label": {label.sentence}}}\n</{SENTENCE_TAG}>'
    if template == "sentence":
        return sentence
    listed = [{"word": word, "label": value} for word, value in label.words]
    words = json.dumps(listed, ensure_ascii=False)
    return f"<{WORDS_TAG}>\n{words}\n</{WORDS_TAG}>\n{sentence}"


def label_costs(
    items: Sequence[LabelItem], labels: Sequence[Label], count: Callable[[str], int]
) -> dict[Template, LabelCost]:
    """Mean tokens of the prompts and replies of some labelled answers, by template.

    count: tokens of a text.  Errors: BadAnswer where a reply is none that the product would take.
    """
    found = {}
    for template in TEMPLATES:
        replies = [reply(label, template) for label in labels]
        for text, label in zip(replies, labels, strict=True):
            parse(text, label.response, template)
        found[template] = LabelCost(
            sum(count(prompt(item, template)) for item in items) / len(items),
            sum(map(count, replies)) / len(replies),
        )
    return found


def openai_tokens() -> Callable[[str], int] | None:
    """Counts tokens as OpenAI's newer models do; None where `bpe-openai` is not installed."""
    try:
        import bpe_openai
    except ImportError:
        return None
    encoding = bpe_openai.get_encoding(ENCODING)
    return lambda text: len(encoding.encode(text))


def costs_as_json(costs: dict[Template, LabelCost]) -> dict[str, Any]:
    """What study.json holds of it."""
    return {
        "tokenizer": ENCODING,
        "price_ratio": PRICE_RATIO,
        "templates": {
            template: {**cost._asdict(), "price": cost.price()} for template, cost in costs.items()
        },
    }
