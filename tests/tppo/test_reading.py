"""Padded, packed and alone, a model reads the same; with a wrong mask or position it does not.

Each comparison stands beside controls: the same code with one part broken must fail it.
"""

import contextlib
import copy
from typing import Any, NamedTuple

import pytest
import torch
from _weights import enlarged
from transformers import (
    GPT2Config,
    GPT2ForTokenClassification,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForTokenClassification,
)

from tppo.methods.config import PPOConfig, SFTConfig
from tppo.methods.experience import Models
from tppo.methods.ppo import PPO
from tppo.methods.reward_model import PolicyTokens
from tppo.methods.sft import Examples, answer_loss, sft_step
from tppo.models import batch as batches
from tppo.models.batch import Batch
from tppo.models.policy import Critic, RewardModel, policy_logprobs
from tppo.models.rollout import HFRollout, RolloutBatch, Sampling
from tppo.models.rollout import hf as rollouts
from tppo.rewards import Questions
from tppo.rewards.token_model import TokenModelReward

PAD, EOS = 0, 1
PROMPTS = [[5, 6, 7, 12, 19, 4, 3]] * 3 + [[8, 9]] * 2 + [[10, 3, 3, 22]]
RESPONSES = [[8, 9], [3], [4, 5, 6, 1], [7, 1], [11, 12, 13, 14, 15], [2, 1]]
FAMILIES = ("llama", "gpt2")  # rotary and absolute positions
SIZES = {"vocab_size": 24, "num_labels": 3, "pad_token_id": PAD, "eos_token_id": EOS,
         "bos_token_id": 2, "tie_word_embeddings": True}  # fmt: skip
TOLERANCE = 2e-5  # of the largest value, in fp32


class Used(NamedTuple):
    """What PPO reads with."""

    policy: Any
    ref: Any
    critic: Any
    reward: Any


def models(family):
    """Policy, reference, critic and reward model of one family, each with weights of its own."""
    torch.manual_seed(0)
    if family == "llama":
        config = LlamaConfig(hidden_size=16, intermediate_size=40, num_hidden_layers=2,
                             num_attention_heads=2, **SIZES)  # fmt: skip
        causal, classifier = LlamaForCausalLM, LlamaForTokenClassification
    else:
        config = GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=64, **SIZES)
        causal, classifier = GPT2LMHeadModel, GPT2ForTokenClassification
    policy, ref, start = (enlarged(causal(config)).eval() for _ in range(3))
    critic = Critic(copy.deepcopy(start.base_model), 16).eval()
    torch.nn.init.normal_(critic.head.weight)
    return Used(policy, ref, critic, RewardModel(enlarged(classifier(config)).eval()))


@torch.no_grad()
def alone(used, prompt, response):
    """What one answer gives by the models' own forward passes, unpadded."""
    ids, start = torch.tensor([prompt + response]), len(prompt)
    logits = used.policy(ids).logits[0, start - 1 : -1]
    every = (logits / 0.7).log_softmax(-1)
    values = used.critic.head(used.critic.trunk(ids).last_hidden_state)[0, :, 0]
    return {
        "log-probs": every.gather(1, ids[0, start:, None])[:, 0],
        "entropy": -(every.exp() * every).sum(-1),
        "values": values[start - 1 : -1],
        "values after": values[-1:],
        "classes": used.reward.model(ids).logits[0, start:],
    }


@torch.no_grad()
def together(used, way):
    """The same of every row of a batch."""
    batch = Batch(PROMPTS, RESPONSES, PAD, prefix=way)
    assert batch.shares == (way == "shared")
    logprobs, entropy = policy_logprobs(used.policy, batch, 0.7)
    values, after = used.critic(batch)
    logits, mask = PolicyTokens(used.reward.model, PAD, way)(PROMPTS, RESPONSES)
    assert torch.equal(logits, used.reward(batch)) and torch.equal(mask, batch.mask)
    figures = {"log-probs": logprobs, "entropy": entropy, "values": values, "classes": logits}
    for figure in figures.values():
        assert not figure[~batch.mask].any()
    rows = [{name: x[i, : len(r)] for name, x in figures.items()} for i, r in enumerate(RESPONSES)]
    return [row | {"values after": after[i : i + 1]} for i, row in enumerate(rows)]


def worst(actual, expected):
    """{figure: its largest error over its largest value}, over all rows."""
    found = {}
    for name in expected[0]:
        right = torch.cat([row[name].flatten() for row in expected])
        error = torch.cat([row[name].flatten() for row in actual]) - right
        found[name] = (error.abs().max() / right.abs().max()).item()
    return found


@contextlib.contextmanager
def broken(how):
    """Within the block, one part of how the trainer reads is wrong."""
    padded = batches.pad

    def wrong(*args):
        result = padded(*args)
        if how == "padding is seen":
            return result._replace(attention_mask=torch.ones_like(result.attention_mask))
        if how == "padding counts as a position":
            columns = torch.arange(result.input_ids.shape[1]).expand_as(result.input_ids)
            return result._replace(position_ids=columns)
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batches, "pad", wrong)
        patch.setattr(rollouts, "pad", wrong)
        if how == "answers see each other":
            patch.setattr(batches.tk, "shared_prefix", lambda *_: contextlib.nullcontext())
        yield


# A shift of all positions changes nothing where they are rotary.
CONTROLS = [
    ("llama", "dense", "padding is seen"), ("gpt2", "dense", "padding is seen"),
    ("gpt2", "dense", "padding counts as a position"),
    ("llama", "shared", "answers see each other"), ("gpt2", "shared", "answers see each other"),
]  # fmt: skip


@pytest.mark.parametrize("way", ["dense", "shared"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_model_reads_a_batch_as_each_answer_alone(family, way):
    used = models(family)
    expected = [alone(used, p, r) for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    errors = worst(together(used, way), expected)
    assert max(errors.values()) < TOLERANCE, errors


@pytest.mark.parametrize(("family", "way", "how"), CONTROLS)
def test_a_batch_that_is_read_wrongly_shows_in_every_model(family, way, how):
    used = models(family)
    expected = [alone(used, p, r) for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    together(used, way)  # the check of the policy's head is behind us
    with broken(how):
        errors = worst(together(used, way), expected)
    assert min(errors.values()) > 1000 * TOLERANCE, errors


def sft_losses(used, way):
    """Loss of the answers, by the two functions that compute it, and of prompts and answers."""
    batch = Batch(PROMPTS, RESPONSES, PAD, prefix=way)
    still = torch.optim.SGD(used.policy.parameters(), lr=0.0)
    return {
        "held-out": answer_loss(used.policy, Examples(PROMPTS, RESPONSES), SFTConfig(), PAD, way),
        "step": sft_step(used.policy, batch, still, SFTConfig(prompt_loss=False), 1),
        "step on prompts too": sft_step(used.policy, batch, still, SFTConfig(prompt_loss=True), 1),
    }


def sft_losses_alone(used):
    answers, whole = [], []
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        ids = torch.tensor([prompt + response])
        every = used.policy(ids).logits[0, :-1].log_softmax(-1)
        found = -every.gather(1, ids[0, 1:, None])[:, 0].detach()
        whole.append(found)
        answers.append(found[len(prompt) - 1 :])
    loss = torch.cat(answers).mean().item()
    return {"held-out": loss, "step": loss, "step on prompts too": torch.cat(whole).mean().item()}


@pytest.mark.parametrize("way", ["dense", "shared"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_losses_of_sft_are_those_of_each_answer_alone(family, way):
    used = models(family)
    assert sft_losses(used, way) == pytest.approx(sft_losses_alone(used), rel=TOLERANCE)


@pytest.mark.parametrize(("family", "way", "how"), CONTROLS)
def test_a_batch_that_is_read_wrongly_shows_in_the_losses_of_sft(family, way, how):
    used = models(family)
    expected = sft_losses_alone(used)
    sft_losses(used, way)
    with broken(how):
        found = sft_losses(used, way)
    affected = {"held-out", "step"} if way == "shared" else {*expected}  # prompts are never shared
    for name in affected:
        assert abs(found[name] / expected[name] - 1) > 100 * TOLERANCE, name


@pytest.mark.parametrize("way", ["dense", "shared"])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_experience_and_with_it_the_heat_map_is_that_of_each_answer_alone(family, way):
    """Rewards, values, log-probs and advantages of a batch with padding, unwhitened."""
    config = PPOConfig(lr=1e-3, critic_lr=1e-3, normalize=False, kl_coef=0.3)

    def score(prompts, responses, way):
        used = models(family)
        engine = HFRollout(used.policy, pad_id=PAD, eos_id=EOS)
        ppo = PPO(
            Models(*used[:3]), engine, config, reward=TokenModelReward(used.reward),
            sampling=Sampling(8, 0.7), pad_id=PAD, eos_id=EOS, seed=0, prefix=way,
        )  # fmt: skip
        finish = ["eos" if row[-1] == EOS else "length" for row in responses]
        rollout = RolloutBatch(prompts, responses, None, finish)
        asked = Questions(prompts, columns={"suggested_length": [6.0] * len(prompts)})
        found, _ = ppo.score(rollout, ppo.answers(asked, rollout))
        names = ("rewards", "logprobs", "values", "advantages", "returns")
        return [{name: getattr(found, name)[i, : len(row)] for name in names}
                for i, row in enumerate(responses)]  # fmt: skip

    pairs = zip(PROMPTS, RESPONSES, strict=True)
    expected = [score([p], [r], "dense")[0] for p, r in pairs]
    errors = worst(score(PROMPTS, RESPONSES, way), expected)
    assert max(errors.values()) < TOLERANCE, errors
    for _, _, how in (c for c in CONTROLS if c[:2] == (family, way)):
        with broken(how):
            errors = worst(score(PROMPTS, RESPONSES, way), expected)
        assert min(errors.values()) > 1000 * TOLERANCE, errors


def greedy(used, prompts, prefix="dense", engine=HFRollout):
    """Answers at a temperature at which nothing is left to chance; no id ends them."""
    sampling = Sampling(12, temperature=1e-4)
    return engine(used.policy, pad_id=PAD, eos_id=[], prefix=prefix).generate(
        prompts, sampling
    ).response_ids  # fmt: skip


class Mixed(HFRollout):
    """It prefills the prompts in a wrong order."""

    def _prefill(self, prompts):
        return super()._prefill(prompts[::-1])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_is_answered_as_if_it_were_alone(family):
    """Padded on the left beside longer ones, prefilled once for several answers or not."""
    used = models(family)
    expected = [greedy(used, [prompt])[0] for prompt in PROMPTS]
    assert len({tuple(row) for row in expected}) == len({tuple(p) for p in PROMPTS})
    for prefix in ("dense", "shared"):
        assert greedy(used, PROMPTS, prefix) == expected
    assert greedy(used, PROMPTS, "shared", Mixed) != expected
    with broken("padding is seen"):
        seen = greedy(used, PROMPTS)
    assert seen[:3] == expected[:3]  # the longest prompts have no padding
    assert seen[3:] != expected[3:]
