"""Holds the result of a run to what the demo promises: `python tests/tppo/learning.py DIR ...`.

Over at least 300 held-out users, token-level PPO is more relevant than SFT at every temperature and
than SFT continued for as many steps, by two standard errors of the difference; its answers hold as
many distinct queries, keep their format and length, and stay near the SFT policy.

Distinct queries and format are held to 95 % of SFT's, because PPO starts from SFT: a repeated query
is a fault of the format, and SFT's own answers have one or another fault in 5 to 9 of 100, by seed.
For format it is the bound by which the trainer keeps weights (`--ppo.min-format`); the table's
users are others.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tppo.labels.shares import difference

RIVALS = ("sft", "sft_t0.5", "sft_t0.2", "sft_continued")
KEPT_OF_SFT = 0.95


def shortfalls(result: dict) -> list[str]:
    """What a `result.json` fails to hold; empty where it holds everything."""
    tppo, failed = result["tppo"], []
    if tppo["users"] < 300:
        failed.append(f"{tppo['users']} held-out users, expected at least 300")
    for name in RIVALS:
        rival = result[name]
        gain = tppo["relevance"] - rival["relevance"]
        shares = [(row["relevance"], row["users"]) for row in (tppo, rival)]
        _, low, _ = difference(*shares, z=2.0)
        if not low > 0:
            failed.append(f"relevance is {gain:+.3f} over {name}, which may be chance")
    for name in ("distinct_queries", "format"):
        kept = tppo[name] / result["sft"][name]
        if not kept >= KEPT_OF_SFT:
            failed.append(f"{name}: {kept:.1%} of SFT's, expected at least {KEPT_OF_SFT:.0%}")
    off = tppo["length"] - result["test"]["true_length"]
    if not abs(off) <= 2:
        failed.append(f"answers are {off:+.1f} tokens off the true ones, expected at most 2")
    if not tppo["kl"] < 10:
        failed.append(f"KL per response is {tppo['kl']:.1f} nats, expected under 10")
    return failed


def main(folders: list[str]) -> int:
    """Prints a line a run; the exit status is 1 where one falls short."""
    status = 0
    for folder in folders:
        result = json.loads((Path(folder) / "result.json").read_text())
        failed = shortfalls(result)
        rows = ", ".join(f"{name} {result[name]['relevance']:.3f}" for name in ("tppo", *RIVALS))
        distinct = [f"{result[name]['distinct_queries']:.2f}" for name in ("tppo", "sft")]
        print(f"{folder}: {'; '.join(failed) if failed else 'holds'} ({rows}, "
              f"KL {result['tppo']['kl']:.1f}, format {result['tppo']['format']:.2f}, "
              f"distinct queries {' of '.join(distinct)})")
        status |= bool(failed)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
