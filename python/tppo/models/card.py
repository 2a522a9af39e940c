"""The model card of an export: what it was made of, and how, as a README.md that a hub reads."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from tppo.store.jsonl import plain, write_text

README = "README.md"
_BASE = re.compile(r"^base_model: (\".*\")$", re.MULTILINE)


def base_of(path: str | Path | None) -> str | None:
    """The hub id of the model that one in `path` was made of, None where none is known.

    Of a folder in a hub's cache its own id; of an export of ours what its card says.
    """
    if path is None:
        return None
    path = Path(path)
    owner = path.parent.parent.name
    if path.parent.name == "snapshots" and owner.startswith("models--"):
        return owner.removeprefix("models--").replace("--", "/", 1)
    try:
        text = (path / README).read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None
    found = _BASE.search(text.partition("\n---\n")[0])
    return json.loads(found[1]) if found else None


def chosen(section: Any, kind: type, without: Collection[str] = ()) -> dict[str, Any]:
    """The settings of a section of the configuration, of class `kind`, but those named `without`:
    a card says nothing that the model does not depend on.
    """
    names = [field.name for field in fields(kind) if field.name not in without]
    return {name: getattr(section, name) for name in names}


def write_card(
    folder: str | Path,
    *,
    base: str | None,
    method: str,
    data: str,
    settings: Mapping[str, Any],
    figures: Mapping[str, float],
    adapter: bool = False,
) -> None:
    """Write the card of the model in `folder`.

    base: hub id of the model it was made of.  method, data: a phrase each.  figures: on held-out
    data, by name.  adapter: the folder holds an adapter alone.
    """
    library = "peft" if adapter else "transformers"
    head = ["---", f"library_name: {library}", "pipeline_tag: text-generation",
            "tags: [tppo, token-level-ppo]"]  # fmt: skip
    # As JSON, which is YAML too: a name stays one line whatever it holds.
    head += [f"base_model: {json.dumps(base)}"] if base else []
    made_of = f"[{base}](https://huggingface.co/{base})" if base else "a model without a hub id"
    title = Path(folder).absolute().parent.name.removesuffix(".tmp")
    what = f"Trained by {method} with `tppo` of tppo-kernels, from {made_of}, on {data}."
    lines = [*head, "---", "", f"# {title}", "", what]
    if figures:
        lines += ["", "| on held-out prompts | |", "|---|---|"]
        lines += [f"| {name} | {value:.4g} |" for name, value in figures.items()]
    lines += ["", "Settings:", "", "```json", json.dumps(plain(settings), indent=2), "```", ""]
    write_text(Path(folder) / README, "\n".join(lines))
