"""Writes the figures of `make faults`, `make fuzz` and `make soak` into README.md.

    make faults FAULTS="--json tests/faults/results/faults.json"
    make fuzz FUZZ="--json tests/faults/results/fuzz.json"
    make soak SOAK="--json tests/faults/results/soak.json"
    python tests/faults/proof.py

The paragraph between the marks `proof` of README.md is that of the files in `results/`.
"""

import json
import textwrap
from pathlib import Path

from tppo.stages.study.summary import replace_between

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results"


def paragraph(faults, fuzz, soak):
    """What the three commands have found, with each figure that could be other than hoped."""
    calls, crashes, wrong = (
        sum(target[name] for target in fuzz["targets"]) for name in ("calls", "crashes", "wrong")
    )
    weights = "the same" if soak["identical"] else "OTHER"
    return textwrap.fill(
        f"Is anything lost? Every command, ended at a moment of its work and started again: "
        f"**{faults['killed']:,} moments killed, {faults['identical']:,} identical** to the bit. "
        f"Full and read-only disks, harmed files, signals, dead endpoints, memory, NaN: "
        f"**{faults['injected']:,} faults, {faults['survived']:,} survived**, without loss or in "
        f"a sentence (`make faults`). Hostile input (`make fuzz`): **{calls:,} calls, "
        f"{crashes:,} crashes, {wrong:,} wrong values**. `make soak`: "
        f"**{soak['steps_soaked']:,} steps of PPO, {soak['grew']:,} of {len(soak['growth'])} "
        f"measures grew beyond bounds**; stopped {soak['stopped']} times, it ends in {weights} "
        "weights.",
        124,
    )


def written(readme, results=RESULTS):
    """The text of a README with this paragraph."""
    found = {name: json.loads((results / f"{name}.json").read_text())
             for name in ("faults", "fuzz", "soak")}  # fmt: skip
    return replace_between(readme, "proof", paragraph(**found), "README.md")


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(written(path.read_text()))
