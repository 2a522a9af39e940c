"""GRPO whose reward function pays spans of characters, each at the token that writes its end.

    python examples/integrations/trl/token_rewards.py MODEL

MODEL: the folder, or the name on the hub, of a causal language model.  What is ours is the class
of the trainer: its import and its name.  A reward function may as well return one number a token,
or, as TRL's, one number an answer.
"""

import re
import sys

from datasets import Dataset
from trl import GRPOConfig

from tppo_kernels.integrations.trl import TokenGRPOTrainer


def short_words(completions, **_):
    """-1 for each word of more than six letters, at that word."""
    return [[(word.start(), word.end(), -1.0) for word in re.finditer(r"\w{7,}", text)]
            for text in completions]


if __name__ == "__main__":
    args = GRPOConfig(output_dir="runs/trl", max_steps=20, max_completion_length=32,
                      num_generations=4, per_device_train_batch_size=8, report_to="none")
    prompts = Dataset.from_dict({"prompt": ["name a river", "name a city"] * 100})
    trainer = TokenGRPOTrainer(sys.argv[1], short_words, args, train_dataset=prompts)
    trainer.train()
