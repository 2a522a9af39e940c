"""The trainer reads a prompt once for all its responses, and gets what dense prompts give."""

import copy
import subprocess
import sys
import time
from contextlib import nullcontext
from statistics import median

import pytest
import torch
from _weights import enlarged
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    Gemma2Config,
    Gemma2Model,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForTokenClassification,
)

from tppo import progress
from tppo.methods.config import PPOConfig, SFTConfig
from tppo.methods.experience import Models
from tppo.methods.ppo import PPO
from tppo.methods.reward_model import GuardError
from tppo.methods.sft import Examples, train_sft
from tppo.models.batch import Batch
from tppo.models.load import place
from tppo.models.policy import Critic, RewardModel, policy_logprobs
from tppo.models.rollout import HFRollout, RolloutBatch, Sampling
from tppo.rewards import Questions
from tppo.rewards.token_model import TokenModelReward

PAD, EOS, CPU = 0, 1, torch.device("cpu")
PROMPTS = [[5, 6, 7]] * 3 + [[8, 9, 4, 4, 2]] * 2 + [[10]] * 2 + [[5, 6, 7]]
RESPONSES = [[8, 9], [3], [4, 5, 6, 1], [7, 1], [11, 12, 13, 14], [1], [2, 1], [9, 9, 1]]


def models(vocab=24, hidden=16, layers=2, heads=2, positions=512, seed=0):
    """Policy, reference, critic and reward model of the demo's kind, with large weights."""
    torch.manual_seed(seed)
    settings = {
        "vocab_size": vocab, "hidden_size": hidden, "intermediate_size": hidden * 5 // 2,
        "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": heads, "max_position_embeddings": positions, "num_labels": 3,
        "tie_word_embeddings": True, "pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": 2,
    }  # fmt: skip
    policy = place(enlarged(LlamaForCausalLM(LlamaConfig(**settings))), CPU)
    critic = Critic(copy.deepcopy(policy.model), hidden)
    torch.nn.init.normal_(critic.head.weight)
    reward = place(enlarged(LlamaForTokenClassification(LlamaConfig(**settings))), CPU)
    return Models(policy, copy.deepcopy(policy), critic), RewardModel(reward)


def new_trainer(prefix, config, length, **settings):
    used, classifier = models(**settings)
    rollout = HFRollout(used.policy, pad_id=PAD, eos_id=EOS, prefix=prefix)
    reward = TokenModelReward(classifier, max_tokens=config.max_tokens)
    return PPO(
        used, rollout, config, reward=reward, sampling=Sampling(length), pad_id=PAD, eos_id=EOS,
        seed=0, prefix=prefix,
    )  # fmt: skip


def questions(prompts, length=6.0):
    """Prompts by their ids, with the suggested length of an answer."""
    return Questions(prompts, columns={"suggested_length": [length] * len(prompts)})


def score(trainer, rollout, length=6.0):
    """A rollout scored as `step` does it."""
    asked = questions(rollout.prompt_ids, length)
    return trainer.score(rollout, trainer.answers(asked, rollout))


def relative(actual, expected):
    return ((actual - expected).abs().max() / expected.abs().max()).item()


class Tokens:
    """Counts the tokens that go into the embeddings of a model."""

    def __init__(self, model):
        self.count = 0
        model.get_input_embeddings().register_forward_pre_hook(self.add)

    def add(self, module, args):
        self.count += args[0].numel()


def outputs_and_gradients(used, classifier, prefix):
    """What every model gives for a batch, and the gradients of a projection of it."""
    batch = Batch(PROMPTS, RESPONSES, PAD, prefix=prefix)
    assert batch.shares == (prefix == "shared")
    logprobs, entropy = policy_logprobs(used.policy, batch, 0.7)
    values, after = used.critic(batch)
    classes = classifier(batch)
    projection = torch.randn(logprobs.shape, generator=torch.Generator().manual_seed(0))
    loss = ((logprobs + entropy + values + classes.sum(-1)) * projection).sum() + after.sum()
    parameters = [p for model in (used.policy, used.critic, classifier.model)
                  for p in model.parameters()]  # fmt: skip
    gradients = torch.autograd.grad(loss, parameters)
    return [logprobs, entropy, values, after, classes, *gradients]


def test_every_model_and_gradient_equals_dense(monkeypatch):
    """And none of them does where the answers of a prompt see each other."""
    used, classifier = models()
    found = {prefix: outputs_and_gradients(used, classifier, prefix)
             for prefix in ("shared", "dense")}  # fmt: skip
    for shared, dense in zip(found["shared"], found["dense"], strict=True):
        assert relative(shared, dense) < 1e-5 or torch.equal(shared, dense)
    monkeypatch.setattr("tppo.models.batch.tk.shared_prefix", lambda *_: nullcontext())
    wrong = outputs_and_gradients(used, classifier, "shared")
    off = [relative(w, dense) > 1e-2 for w, dense in zip(wrong, found["dense"], strict=True)]
    assert all(off[:5]) and off.count(False) == 2  # the gradients of two biases come from no state


def test_a_prompt_is_computed_once_for_responses_that_follow_each_other():
    batch = Batch(PROMPTS, RESPONSES, PAD)
    policy = models()[0].policy
    tokens = Tokens(policy)
    policy_logprobs(policy, batch, 1.0)
    assert tokens.count == 3 + 5 + 1 + 3 + sum(map(len, RESPONSES)) + 16  # 16: its check
    assert torch.equal(batch.rows([2, 4]).targets, torch.tensor([[4, 5, 6, 1], [11, 12, 13, 14]]))
    assert not batch.rows([0, 3]).shares  # one response each: nothing to share


class Mixed(HFRollout):
    """It prefills the prompts in a wrong order."""

    def _prefill(self, prompts):
        return super()._prefill(prompts[::-1])


def test_a_prompt_is_prefilled_once_for_its_answers():
    policy = models()[0].policy
    prompts = [[5, 6, 7, 8, 9, 10, 11, 12]] * 4 + [[3]] * 2
    answers, tokens = {}, Tokens(policy)
    for prefix in ("shared", "dense"):
        engine = HFRollout(policy, pad_id=PAD, eos_id=23, prefix=prefix)
        tokens.count = 0
        answers[prefix] = engine.generate(prompts, Sampling(1, seed=3))
        if prefix == "shared":
            assert tokens.count == 2 * 7 + 6  # two prompts but their last token; six last tokens
        else:
            assert tokens.count == 6 * 8
    for seed in range(4):
        answers = [
            HFRollout(policy, pad_id=PAD, eos_id=EOS, prefix=prefix).generate(
                prompts, Sampling(12, seed=seed)
            )
            for prefix in ("shared", "dense")
        ]
        assert answers[0] == answers[1]
        assert Mixed(policy, pad_id=PAD, eos_id=EOS).generate(
            prompts, Sampling(12, seed=seed)
        ) != answers[0]  # fmt: skip


def test_a_step_with_several_answers_a_prompt():
    config = PPOConfig(
        lr=1e-3, critic_lr=1e-3, minibatch_size=6, responses_per_prompt=3, verify_prefix=True
    )
    trainer = new_trainer("shared", config, 6)
    prompts = [p for p in ([5, 6, 7], [8, 9, 4], [10, 11], [12]) for _ in range(3)]
    metrics, rollout = trainer.step(questions(prompts))
    assert metrics["episode"] == 12 and len(rollout.response_ids) == 12
    assert len({tuple(ids) for ids in rollout.response_ids}) > 6


def test_verify_prefix_says_what_it_found(capsys):
    config = PPOConfig(
        lr=1e-3, critic_lr=1e-3, minibatch_size=6, responses_per_prompt=3, verify_prefix=True
    )
    asked = questions([[5, 6, 7]] * 3 + [[8, 9, 4]] * 3)
    new_trainer("shared", config, 6).step(asked)
    assert "agrees with dense prompts" in capsys.readouterr().err
    broken = new_trainer("shared", config, 6)

    def off(module, args, output):
        """A norm that reads a packed batch a little differently."""
        return output * 1.001 if output.shape[0] == 1 else output

    broken.models.critic.trunk.norm.register_forward_hook(off)
    with pytest.raises(GuardError, match="values with a shared prefix differ .* --prefix dense"):
        broken.step(asked)


def test_a_trunk_that_cannot_share_is_read_dense_and_says_so_once(capsys):
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=24, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, head_dim=8,
    )  # fmt: skip
    trunk = place(enlarged(Gemma2Model(config)), CPU)
    progress.say_once.cache_clear()
    found = []
    for prefix in ("shared", "shared", "dense"):
        found.append(Batch(PROMPTS, RESPONSES, PAD, prefix=prefix).states(trunk, "logprob")[0])
    assert torch.equal(found[0], found[2]) and torch.equal(found[1], found[2])
    said = capsys.readouterr().err
    assert said.count("not a shared one") == 1 and "Gemma2" in said


class Largest(TorchDispatchMode):
    """The elements of the largest tensor that any operator makes."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(result):
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.numel())
        return result


@pytest.mark.parametrize("prefix", ["shared", "dense"])
def test_no_stage_makes_logits_of_its_tokens(prefix):
    """The largest tensor is smaller than half of [N, V] with the N tokens that a stage reads."""
    vocab, prompt, length, rows = 2000, 60, 8, 24
    config = PPOConfig(
        lr=1e-4, critic_lr=1e-4, epochs=1, minibatch_size=rows, responses_per_prompt=4
    )
    trainer = new_trainer(prefix, config, length, vocab=vocab)
    prompts = [[3 + i] * prompt for i in range(6) for _ in range(4)]
    with Largest() as seen:
        trainer.step(questions(prompts))
    assert rows * vocab <= seen.numel < rows * (prompt + length) * vocab / 2
    n_sft = 32 * (prompt + 30)
    for prompt_loss in (False, True):
        model = models(vocab=vocab)[0].policy
        examples = Examples([[3] * prompt] * 32, [[4] * 30] * 32)
        sft = SFTConfig(lr=1e-4, max_steps=1, prompt_loss=prompt_loss)
        with Largest() as seen:
            train_sft(model, examples, examples, sft, pad_id=PAD, seed=0)
        assert seen.numel < n_sft * vocab / 2, prompt_loss


DEMO = {"vocab": 1024, "hidden": 64, "heads": 4}
UPDATE = PPOConfig(
    lr=1e-4, critic_lr=1e-4, epochs=1, minibatch_size=32, responses_per_prompt=8
)


def update_case(prefix):
    """A trainer of the demo's models, and a rollout of P 256, R 16, G 8."""
    trainer = new_trainer(prefix, UPDATE, 16, **DEMO)
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 1024, (4, 256 + 8 * 16), generator=g).tolist()
    prompts = [row[:256] for row in ids for _ in range(8)]
    responses = [row[256 + 16 * i : 272 + 16 * i] for row in ids for i in range(8)]
    return trainer, RolloutBatch(prompts, responses, None, ["length"] * 32)


def whole_update(trainer, rollout):
    """Old and reference log-probs, values, rewards, and the update of policy and critic."""
    experience, _ = score(trainer, rollout, 16.0)
    return trainer.update(experience)


def test_a_whole_update_is_at_least_three_times_as_fast_as_dense():
    """CPU time of one thread, of updates that take turns."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        cases = {prefix: update_case(prefix) for prefix in ("shared", "dense")}
        metrics = {prefix: whole_update(*case) for prefix, case in cases.items()}
        for name, value in metrics["dense"].items():
            assert metrics["shared"][name] == pytest.approx(value, rel=1e-3, abs=1e-5), name
        start, shared, dense = (
            torch.cat([p.detach().flatten() for p in used.policy.parameters()])
            for used in (models(**DEMO)[0], *(trainer.models for trainer, _ in cases.values()))
        )
        # Adam's first step is the sign of a gradient: one of about 0 may go either way.
        assert (shared - dense).norm() < 0.005 * (dense - start).norm()
        ratios = []
        for _ in range(5):
            seconds = {}
            for prefix, case in cases.items():
                start = time.process_time()
                whole_update(*case)
                seconds[prefix] = time.process_time() - start
            ratios.append(seconds["dense"] / seconds["shared"])
    finally:
        torch.set_num_threads(threads)
    assert median(ratios) >= 3, ratios


MEMORY = """
import re, sys, torch
torch.set_num_threads(1)
sys.path[:0] = sys.argv[2:]
from test_shared_prefix import update_case, whole_update
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
case = update_case(sys.argv[1])
before = peak()
whole_update(*case)
print(peak() - before)
"""


def test_a_whole_update_takes_less_memory_than_dense(request):
    """Growth of the resident set, each in a process of its own."""
    grown = {}
    for prefix in ("shared", "dense"):
        done = subprocess.run(
            [sys.executable, "-c", MEMORY, prefix, *map(str, request.path.parents[:2])],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        grown[prefix] = int(done.stdout)
    assert grown["shared"] < grown["dense"] / 2, grown


@pytest.mark.parametrize("prefix", ["shared", "dense"])
def test_parts_hold_every_response_once_and_keep_to_the_budget(prefix):
    batch = Batch(PROMPTS, RESPONSES, PAD, prefix=prefix)
    for budget in (1, 7, 9, 12, 20, 1000):
        (parts,) = batch.parts(budget)
        assert sorted(i for part in parts for i in part) == list(range(8))
        for part in parts:
            assert part == sorted(part)
            rows = [(tuple(PROMPTS[i]), len(RESPONSES[i])) for i in part]
            groups = {prompt for prompt, _ in rows} if prefix == "shared" else [p for p, _ in rows]
            tokens = sum(map(len, groups)) + sum(length for _, length in rows)
            assert tokens <= budget or len(part) == 1, (budget, part)
    assert batch.parts(1000) == [[list(range(8))]]
    assert len(batch.parts(1)[0]) == 8
    if prefix == "shared":  # groups of 10, 11, 4 and 6 tokens
        assert len(batch.parts(12)[0]) == 3


def test_a_step_in_parts_is_the_step_at_once():
    """1 x 8 and 8 x 1: losses and gradients have the denominators of the whole minibatch."""
    results = []
    for max_tokens in (65_536, 20):
        config = PPOConfig(
            lr=1e-3, critic_lr=1e-3, minibatch_size=12, epochs=1, responses_per_prompt=3,
            max_tokens=max_tokens, value_clip=0.1,
        )  # fmt: skip
        trainer = new_trainer("shared", config, 6)
        prompts = [p for p in ([5, 6, 7], [8, 9, 4], [10, 11], [12]) for _ in range(3)]
        rollout = trainer.rollout.generate(prompts, trainer.sampling)
        experience, metrics = score(trainer, rollout)
        trainer.optimizer.step = lambda: None  # keep the gradients of the minibatch
        metrics |= trainer.update(experience)
        gradients = [
            p.grad for model in (trainer.models.policy, trainer.models.critic)
            for p in model.parameters() if p.grad is not None
        ]  # fmt: skip
        results.append((metrics, gradients, experience))
    (whole, whole_grads, one), (parts, part_grads, other) = results
    assert len(one.batch.parts(65_536)[0]) == 1 and len(one.batch.parts(20)[0]) > 2
    torch.testing.assert_close(one.advantages, other.advantages, atol=1e-5, rtol=0)
    for name, value in whole.items():
        assert parts[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    for a, b in zip(whole_grads, part_grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)
    assert all(g.abs().max() > 1e-3 for g in whole_grads)


def test_sft_on_several_answers_of_one_prompt_reads_it_once(monkeypatch):
    examples = Examples([[5, 6, 7, 8, 9, 10]] * 6, [[4, i, EOS] for i in range(11, 17)])
    losses, tokens = {}, {}
    for prefix in ("shared", "dense"):
        model = models()[0].policy
        counted = Tokens(model)
        sft = SFTConfig(lr=1e-2, max_steps=3, batch_size=6, prompt_loss=False)
        result = train_sft(model, examples, examples, sft, pad_id=PAD, seed=0, prefix=prefix)
        losses[prefix], tokens[prefix] = result.heldout_loss, counted.count
    assert losses["shared"] == pytest.approx(losses["dense"], rel=1e-5)
    assert tokens["shared"] < tokens["dense"] * 0.6, tokens
    monkeypatch.setattr("tppo.models.batch.tk.shared_prefix", lambda *_: nullcontext())
    wrong = train_sft(models()[0].policy, examples, examples, sft, pad_id=PAD, seed=0)
    assert wrong.heldout_loss != pytest.approx(losses["dense"], rel=1e-2)
