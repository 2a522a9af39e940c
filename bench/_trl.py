"""TRL 1.12's PPOTrainer on the models and the rollout of `bench_step`: its update alone is timed.

The last TRL with a PPO trainer; `pip install trl==1.12.0` beside this library. Its update reads
every answer with its prompt, through full logits, and pays one scalar an answer; the log-probs of
the policy that sampled come with its generation, for nothing, where ours are computed again.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import tempfile
import time
import warnings
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast

VERSION = "1.12.0"


def available() -> bool:
    """Whether that very version is here."""
    if importlib.util.find_spec("trl") is None:
        return False
    from importlib.metadata import version

    return version("trl") == VERSION


class TrlUpdate:
    """One update a call, in seconds."""

    def __init__(self, policy: Any, ref: Any, settings: dict[str, Any], batch: Any, device: str,
                 tokens_at_once: int):
        os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
        from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

        rows, self.rounds = len(batch.prompt_ids), 0
        values, reward = (LlamaForSequenceClassification(
            LlamaConfig(**{**settings, "num_labels": 1})).to(device, policy.dtype)
            for _ in "vr")
        ids = torch.tensor([p + r for p, r in
                            zip(batch.prompt_ids, batch.response_ids, strict=True)], device=device)
        length = len(batch.response_ids[0])
        held = max(1, tokens_at_once // ids.shape[1])
        at_once = max(k for k in range(1, rows + 1) if rows % k == 0 and k <= held)
        with torch.no_grad():
            logits = policy(ids, logits_to_keep=length + 1, use_cache=False).logits[:, :-1]
        words = {f"w{i}": i for i in range(settings["vocab_size"])}
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(WordLevel(words, unk_token="w2")), pad_token="w0",
            eos_token="w1")
        self.started = self.ended = 0.0

        def generated(*_: Any) -> tuple[torch.Tensor, torch.Tensor]:
            self.wait(device)
            self.started = time.perf_counter()
            return ids, logits

        ppo_trainer.batch_generation = generated
        with warnings.catch_warnings(), contextlib.redirect_stdout(None):
            warnings.simplefilter("ignore")
            self.trainer = PPOTrainer(
                PPOConfig(
                    output_dir=tempfile.mkdtemp(), report_to="none", save_strategy="no",
                    per_device_train_batch_size=at_once,
                    gradient_accumulation_steps=rows // at_once,
                    local_rollout_forward_batch_size=at_once,
                    num_mini_batches=1, num_ppo_epochs=1, response_length=length,
                    total_episodes=rows, num_sample_generations=0, learning_rate=1e-5,
                    use_cpu=device == "cpu", bf16=False, fp16=False, disable_tqdm=True),
                tokenizer, policy, ref, reward,
                [{"input_ids": prompt} for prompt in batch.prompt_ids], values)

        def logged(metrics: Any, *_: Any) -> None:
            self.wait(device)
            self.ended = time.perf_counter()

        self.trainer.log = logged

    def wait(self, device: str) -> None:
        """Until the device has done what was asked."""
        if device != "cpu":
            torch.cuda.synchronize()

    def __call__(self) -> float:
        with contextlib.redirect_stdout(None):
            self.trainer.train()
        return self.ended - self.started
