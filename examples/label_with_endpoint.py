"""Words and answers judged by a language model behind an OpenAI-compatible endpoint.

    export OPENAI_API_KEY=...                # or --no-key for a server of your own that wants none
    python examples/label_with_endpoint.py --base-url http://127.0.0.1:8000/v1 --model NAME
    python examples/label_with_endpoint.py --base-url ... --model NAME --data answers.jsonl

`--data` has one answer a line: {"history": [what the user did], "targets": [the true next queries],
"answer": "one query a line"}.  Every judgement is in the cache (`--out`) before the next question
is asked: the same command again asks nothing.  In a run, `tppo label --label.labeller endpoint`
does this for the answers of the SFT model; docs/labelling-endpoints.md says what each reply means.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tppo.labels.endpoint.live import Dropped, EndpointConfig, EndpointError, LabelItem, label
from tppo.labels.label import write_labels
from tppo.store.jsonl import Line, is_text, read_jsonl

MADE_UP = [
    LabelItem(
        "tent",
        history=["search: tent camping", "click: altara lightweight tent"],
        targets=["altara tent price", "lightweight tent review"],
        response="lightweight tent review\naltara tent warranty\nfootball results live",
    ),
    LabelItem(
        "desk",
        history=["search: desk for homeoffice"],
        targets=["adjustable desk premium", "desk posture"],
        response="adjustable desk\nadjustable desk",  # a repeated query is worth nothing
    ),
]


def item_of(line: Line) -> LabelItem:
    """What the labelling model is shown of the answer that a line of `--data` holds."""
    texts = "a list of texts"
    return LabelItem(
        str(line.number),
        history=line.get("history", is_texts, texts),
        targets=line.get("targets", is_texts, texts),
        response=line.get("answer", is_text, "a text that is not blank"),
    )


def is_texts(value: object) -> bool:
    return isinstance(value, list) and all(map(is_text, value))


def main(arguments: list[str] | None = None) -> list:
    """Label, print every word with its label, write labels.jsonl; returns what came back."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base-url", required=True)
    parser.add_argument("--model", required=True, help="its name at the endpoint")
    parser.add_argument("--no-key", action="store_true", help="the server asks for no key")
    parser.add_argument("--data", type=Path, help="answers as JSONL; by default two made up ones")
    parser.add_argument("--out", type=Path, default=Path("runs/labels"))
    options = parser.parse_args(arguments)
    key = None if options.no_key else "OPENAI_API_KEY"
    try:
        items = MADE_UP if options.data is None else [*map(item_of, read_jsonl(options.data))]
        config = EndpointConfig(base_url=options.base_url, model=options.model, api_key_env=key)
        options.out.mkdir(parents=True, exist_ok=True)
        results = list(label(items, config, options.out / "label-cache.jsonl", len(items)))
    except (ValueError, OSError, EndpointError) as error:
        sys.exit(str(error))
    for item, found in zip(items, results, strict=True):
        print(f"\nafter {'; '.join(item.history)}")
        if isinstance(found, Dropped):
            print(f"  no label: {found.reason}")
            continue
        words = " ".join(f"{word}{'+' if good else '-'}" for word, good in found.words)
        print(f"  {'relevant' if found.sentence else 'irrelevant'}: {words}")
    write_labels(options.out / "labels.jsonl", [r for r in results if not isinstance(r, Dropped)])
    print(f"\n+ is relevant, - is not; written to {options.out / 'labels.jsonl'}")
    return results


if __name__ == "__main__":
    main()
