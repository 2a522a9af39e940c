"""Runs one stage of the trainer and prints its peak: that of torch's allocator, and of the process.

`python _peak.py STAGE SETTINGS` in a process of its own; SETTINGS is JSON, see test_plan.py.  The
allocator's events are those of torch's profiler: exact, and the same at every run.  The resident
memory of the process, over that after the imports, is coarser: it has the scratch memory of
libraries too, and under pressure the system takes pages of them away.
"""

import json
import re
import sys
from itertools import accumulate
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForTokenClassification, Qwen2Config, Qwen2ForCausalLM

from tppo.methods.config import PPOConfig, RewardModelConfig, SFTConfig
from tppo.methods.experience import Models
from tppo.methods.ppo import PPO
from tppo.methods.reward_model import LabelledAnswer, PolicyTokens, train_reward_model
from tppo.methods.sft import Examples, train_sft
from tppo.models.policy import Critic, RewardModel
from tppo.models.recompute import recompute_layers
from tppo.models.rollout import HFRollout, Sampling
from tppo.rewards import Questions
from tppo.rewards.token_model import TokenModelReward

EOS, PAD = 1, 0


def resident(name):
    """VmRSS or VmHWM, in bytes."""
    text = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"{name}:\s+(\d+) kB", text).group(1))


def texts(rows, prompt, response, group):
    """Prompts, each in `group` rows, and answers; every second is a token shorter: they pad."""
    prompts = [[3 + i // group % 90] * (prompt - i // group % 2) for i in range(rows)]
    return prompts, [[5] * (response - i % 2) for i in range(rows)]


def allocated(prof):
    """The largest sum of what torch's allocator gave and had not got back."""
    events = sorted(
        (event.start_ns(), event.nbytes())
        for event in prof.profiler.kineto_results.events()
        if event.name() == "[memory]"
    )
    return max(accumulate(nbytes for _, nbytes in events))


def main(stage, **settings):
    base = resident("VmRSS")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        run(stage, **settings)
    print(allocated(prof), resident("VmHWM") - base)


def run(stage, shape, rows, prompt, response, group, max_tokens, recompute):
    config = Qwen2Config(**shape, max_position_embeddings=4096, num_labels=3, pad_token_id=PAD)
    model = Qwen2ForCausalLM(config).eval()
    if recompute:
        recompute_layers(model)
    prompts, answers = texts(rows, prompt, response, group)
    if stage == "sft":
        examples = Examples(prompts, answers)
        settings = SFTConfig(lr=1e-5, batch_size=rows, max_steps=3, max_tokens=max_tokens,
                             eval_every=1, patience=9)  # fmt: skip
        train_sft(model, examples, Examples(prompts[:2], answers[:2]), settings, pad_id=PAD, seed=0)
    elif stage == "generate":
        rollout = HFRollout(model, pad_id=PAD, eos_id=[], batch_size=rows)
        rollout.generate(prompts, Sampling(response))
    elif stage == "train-rm":
        del model
        reward = AutoModelForTokenClassification.from_config(config).eval()
        if recompute:
            recompute_layers(reward)
        labelled = [LabelledAnswer(p, a, [1 + i % 2] * len(a), 1 + i % 2)
                    for i, (p, a) in enumerate(zip(prompts, answers, strict=True))]  # fmt: skip
        settings = RewardModelConfig(
            lr=1e-5, batch_size=rows, epochs=2, balance=3.0, max_tokens=max_tokens
        )
        train_reward_model(PolicyTokens(reward, PAD), labelled, settings, seed=0)
    else:
        trunk = Qwen2ForCausalLM(config).eval()
        models = Models(model, Qwen2ForCausalLM(config).eval(),
                        Critic(trunk.base_model, config.hidden_size))  # fmt: skip
        del trunk
        if recompute:
            recompute_layers(models.critic)
        reward = RewardModel(AutoModelForTokenClassification.from_config(config).eval())
        settings = PPOConfig(
            lr=1e-5, critic_lr=1e-5, responses_per_prompt=group, minibatch_size=rows, epochs=1,
            max_tokens=max_tokens,
        )  # fmt: skip
        trainer = PPO(
            models, HFRollout(model, pad_id=PAD, eos_id=[], batch_size=rows), settings,
            reward=TokenModelReward(reward, max_tokens=max_tokens), sampling=Sampling(response),
            pad_id=PAD, eos_id=[], seed=0,
        )  # fmt: skip
        columns = {"suggested_length": [float(response)] * rows}
        for _ in range(2):
            trainer.step(Questions(prompts, columns=columns))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], **json.loads(sys.argv[2]))
