"""Trainings of which every process of a world runs its share: `_trl_process.py MODEL OUT`.

Answers are not sampled: each is a function of the step and of its row in the batch of all
processes, so that one process and two train on the same ones.
"""

import json
import os
import sys
from pathlib import Path

import torch
from _trl_runs import LETTERS, count_vowels, logged_by, made, pay_vowels, settled

from tppo_kernels.integrations.trl import TokenGRPOTrainer

ROWS, LONGEST = 8, 10  # of all processes; one group of eight lies on two of them


def numbers_for_some(completions, completion_ids, **_):
    """One number for answers that begin with "a", which are those of the first half of the rows."""
    paid = zip(completions, count_vowels(completions), pay_vowels(completion_ids), strict=True)
    return [total if text.startswith("a") else tokens for text, total, tokens in paid]


RUNS = {
    "tokens": {"reward": pay_vowels, "loss_type": "dapo", "gamma": 0.9},
    "leave-one-out": {"reward": pay_vowels, "loss_type": "grpo", "token_advantages": "rloo",
                      "scale_rewards": "batch"},
    "whitened": {"reward": pay_vowels, "loss_type": "dr_grpo", "token_advantages": "whitened"},
    # The first process has numbers alone, the second none.
    "numbers in one process": {"reward": numbers_for_some, "loss_type": "grpo",
                               "importance_sampling_level": "sequence"},
    "numbers": {"reward": count_vowels, "loss_type": "grpo",
                "importance_sampling_level": "sequence"},
}


def answers(first):
    """In the place of a model's `generate`: answers of rows from `first` on, of any length."""
    calls = 0

    def generate(input_ids, **_):
        nonlocal calls
        rows = []
        for row in range(first, first + len(input_ids)):
            g = torch.Generator().manual_seed(1000 * calls + row)
            ids = torch.randint(2, len(LETTERS) + 2, (LONGEST,), generator=g)
            ids[0] = 2 + LETTERS.index("a" if row < ROWS // 2 else "b")
            length = int(torch.randint(1, LONGEST + 1, (), generator=g))
            if length < LONGEST:
                ids[length], ids[length + 1:] = 1, 0
            rows.append(ids)
        calls += 1
        return torch.cat([input_ids, torch.stack(rows)], 1)

    return generate


def trained(model, folder):
    """What each run logs, and by how much each of its parameters has moved."""
    rank, world = (int(os.environ.get(name, default)) for name, default in (
        ("RANK", 0), ("WORLD_SIZE", 1)))
    found = {}
    for name, settings in RUNS.items():
        trainer = made(TokenGRPOTrainer, model, folder, per_device_train_batch_size=ROWS // world,
                       num_generations=ROWS, num_iterations=2, beta=0.1, max_steps=4, optim="sgd",
                       learning_rate=0.3, lr_scheduler_type="constant", **settings)
        trainer.model.generate = answers(rank * ROWS // world)
        assert trainer.accelerator.num_processes == world
        start = [x.detach().clone() for x in trainer.model.parameters()]
        found[name] = {"log": logged_by(trainer), "moved": [
            float((x.detach() - before).abs().sum())
            for x, before in zip(trainer.model.parameters(), start, strict=True)]}
    return found


if __name__ == "__main__":
    settled()
    result = trained(sys.argv[1], Path(sys.argv[2]).parent)
    if os.environ["RANK"] == "0":
        Path(sys.argv[2]).write_text(json.dumps(result))
