"""A GRPO script as TRL's users write it, with our log-probs and entropy under TRL's names.

    python examples/integrations/trl/patch.py MODEL

MODEL: the folder, or the name on the hub, of a causal language model.  What is ours are the two
lines that name `patch`; the losses stay what they were.
"""

import sys

from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from tppo_kernels.integrations.trl import patch


def brevity(completions, **_):
    """-1 for each character of an answer."""
    return [-float(len(text)) for text in completions]


if __name__ == "__main__":
    patch()
    args = GRPOConfig(output_dir="runs/trl", max_steps=20, max_completion_length=32,
                      num_generations=4, per_device_train_batch_size=8, report_to="none")
    prompts = Dataset.from_dict({"prompt": ["name a river", "name a city"] * 100})
    trainer = GRPOTrainer(sys.argv[1], brevity, args, train_dataset=prompts)
    trainer.train()
