"""Rewards at spans of characters, in a script of your own: no labels, no reward model, no tokens.

    python examples/reward_by_spans.py --out runs/spans --seed 0

A model writes the next search queries of a user.  `by_words` says of every word whether it is
good; that is all that PPO is told.  The model to start from is trained first, on generated
sessions (`tppo data`, `tppo sft`, about two minutes), unless the folder has one already.  At the
end the rule judges answers to users that no training has seen, before and after.
"""

from __future__ import annotations

import argparse
import math
import re
import time
from pathlib import Path

import tppo
from tppo.cli import main as command
from tppo.labels.rule import label_by_rule
from tppo.sessions.prompts import prompt_text
from tppo.sessions.session import read_sessions


def by_words(completions, targets):
    """A word that stands in one of the true next queries pays .5, every other one costs .5.

    So does a word of a query that says again what an earlier one said, or of one too many.
    """
    rewards = []
    for text, queries in zip(completions, targets, strict=True):
        wanted = {word for query in queries for word in query.split()}
        seen, spans = set(), []
        for i, query in enumerate(re.finditer(r"[^\n]+", text)):
            words = frozenset(query[0].split())
            fresh = words not in seen and i < len(queries)
            seen.add(words)
            for word in re.finditer(r"\S+", query[0]):
                start = query.start() + word.start()
                value = 0.5 if fresh and word[0] in wanted else -0.5
                spans.append((start, start + len(word[0]), value))
        rewards.append(spans)
    return rewards


def relevant(completions, targets):
    """The judge: 1 for an answer most of whose words stand in the true next queries, else 0."""
    pairs = zip(completions, targets, strict=True)
    return [label_by_rule("", text, queries, 0.6).sentence for text, queries in pairs]


def prompts(file: Path, limit: int | None = None) -> list[dict]:
    """Prompts with the true next queries as a column, which the reward sees and the model not."""
    sessions = read_sessions(file)[:limit]
    return [{"prompt": prompt_text(s), "targets": list(s.targets)} for s in sessions]


def main(arguments: list[str] | None = None) -> dict:
    """Train, then judge SFT and the trained model on fresh users; returns the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/spans"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--config", type=Path, help="YAML settings of the stages data and sft")
    options = parser.parse_args(arguments)
    stages, model = options.out / "stages", options.out / "stages/sft/model"
    if not model.exists():
        flags = ["--out", str(stages), "--seed", str(options.seed)]
        flags += ["--config", str(options.config)] if options.config else []
        command(["data", *flags])
        command(["sft", *flags])

    trainer = tppo.PPOTrainer(
        model,
        reward=by_words,
        prompts=prompts(stages / "data/train.jsonl"),
        heldout=prompts(stages / "data/heldout.jsonl"),
        judge=relevant,
        config=tppo.PPOConfig(steps=options.steps, lr=3e-4, critic_lr=1e-3),
        generate=tppo.GenerateConfig(max_new_tokens=25),
        out=options.out,
        seed=options.seed,
    )
    fresh = prompts(stages / "data/test.jsonl")
    targets = [row["targets"] for row in fresh]
    before = relevant(trainer.answer(fresh), targets)
    start = time.monotonic()
    trainer.train()
    seconds = time.monotonic() - start
    after = relevant(trainer.answer(fresh), targets)

    n = len(fresh)
    sft, trained = sum(before) / n, sum(after) / n
    error = math.sqrt((sft * (1 - sft) + trained * (1 - trained)) / n)
    print(f"relevant answers to {n} fresh users: {sft:.3f} of SFT, {trained:.3f} after "
          f"{options.steps} steps in {seconds:.0f} s; gain {trained - sft:+.3f}, standard error "
          f"{error:.3f}")  # fmt: skip
    return {"sft": sft, "trained": trained, "standard_error": error, "seconds": seconds}


if __name__ == "__main__":
    main()
