"""Prompts for verl: a row of JSON lines to a row of the parquet file that its dataset reads.

    python examples/integrations/verl/data.py cluster/train.jsonl cluster/train.parquet

The first file is that of cluster_data.py, or any with a `prompt` a line: a chat of messages, or a
text, which becomes one message of the user.  What else a line has is kept under `extra_info`,
where verl hands it to the reward.
"""

import argparse
import json
import os
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet


def row(line: str, number: int) -> dict:
    """A row of verl.  Errors: ValueError, which says what is wrong with the line."""
    try:
        given = json.loads(line)
        prompt = given.pop("prompt")
    except (ValueError, KeyError, AttributeError, TypeError):
        raise ValueError(f"line {number} is no JSON object with a `prompt`") from None
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if not prompt or not all(isinstance(m, dict) and m.keys() >= {"role", "content"}
                             for m in prompt):
        raise ValueError(f"line {number}: `prompt` is neither a text nor a list of messages with "
                         "`role` and `content`")
    return {"data_source": "tppo", "prompt": prompt, "ability": "session",
            "reward_model": {"style": "model", "ground_truth": ""},
            "extra_info": {"index": number - 1, **given}}


def convert(source: Path, target: Path) -> int:
    """Writes the parquet file, whole or not at all, and gives its number of rows."""
    with source.open(encoding="utf-8") as lines:
        rows = [row(line, i) for i, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise ValueError(f"{source} has no line")
    part = target.with_name(f"{target.name}.{os.getpid()}")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), part)
    part.replace(target)
    return len(rows)


def main() -> int:
    """0, or 2 with a sentence on stderr."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("source", type=Path, help="JSON lines")
    parser.add_argument("target", type=Path, help="the parquet file to write")
    given = parser.parse_args()
    try:
        print(f"{convert(given.source, given.target)} rows in {given.target}")
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
