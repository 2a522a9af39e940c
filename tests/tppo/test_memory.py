"""Less memory, the same result: batches in parts, layers computed again, one copy of the best."""

import copy
import weakref

import pytest
import torch
from test_shared_prefix import PAD, PROMPTS, RESPONSES, models, relative

from tppo.cli import main
from tppo.evaluation.metrics import _kl
from tppo.methods.config import RewardModelConfig, SFTConfig
from tppo.methods.doubt import answer_doubts
from tppo.methods.pit import GapReader
from tppo.methods.reward_model import (
    LabelledAnswer,
    PolicyTokens,
    evaluate_reward_model,
    train_reward_model,
)
from tppo.methods.sentence_model import SentenceReader, bernoulli_loss
from tppo.methods.sft import Examples, answer_loss, sft_step
from tppo.models.batch import Batch
from tppo.models.policy import policy_logprobs, snapshot
from tppo.models.recompute import recompute_layers
from tppo.rewards.dense import ABC, RED
from tppo.rewards.gap import GapReward
from tppo.rewards.implicit import ImplicitReward, ImplicitScore
from tppo.rewards.sentence_model import SentenceModel, SentenceModelReward
from tppo.rewards.token_model import TokenModelReward

ROUNDING = 2e-5  # of the largest value, in fp32
BUDGET = 14  # tokens; the whole batch has 31 with shared prompts, more without


class Read:
    """The real tokens of every call of a model's trunk."""

    def __init__(self, model):
        self.tokens = []
        model.get_input_embeddings().register_forward_pre_hook(self.add)

    def add(self, module, args):
        self.tokens.append(args[0].numel())


def gradients(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def sft_of(max_tokens, prompt_loss, way):
    """Loss, gradients and the tokens read of one step."""
    model = models()[0].policy
    still = torch.optim.SGD(model.parameters(), lr=0.0)
    config = SFTConfig(prompt_loss=prompt_loss, grad_norm=1e9, max_tokens=max_tokens)
    batch = Batch(PROMPTS, RESPONSES, PAD, prefix=way)
    sft_step(model, batch, still, config, 1)  # the check of the head reads tokens too
    read = Read(model)
    loss = sft_step(model, batch, still, config, 1)
    heldout = answer_loss(model, Examples(PROMPTS, RESPONSES), config, PAD, way)
    return loss, heldout, gradients(model), read.tokens


@pytest.mark.parametrize("prompt_loss", [False, True])
@pytest.mark.parametrize("way", ["shared", "dense"])
def test_an_sft_step_in_parts_is_that_of_the_batch_in_one_piece(prompt_loss, way):
    loss, heldout, whole, read = sft_of(65_536, prompt_loss, way)
    assert len(read) == 2
    in_parts = sft_of(BUDGET, prompt_loss, way)
    assert len(in_parts[3]) >= 6 and max(in_parts[3]) <= BUDGET + 4  # padding
    assert in_parts[0] == pytest.approx(loss, rel=1e-5)
    assert in_parts[1] == pytest.approx(heldout, rel=1e-5)
    assert relative(in_parts[2], whole) < ROUNDING


def labelled():
    labels = [[1 + (i + j) % 2 if i % 3 else 0 for j, _ in enumerate(r)]
              for i, r in enumerate(RESPONSES)]  # fmt: skip
    return [LabelledAnswer(*row, 1 + row[1][0] % 2)
            for row in zip(PROMPTS, RESPONSES, labels, strict=True)]  # fmt: skip


def reward_model_of(max_tokens, way):
    """The row of losses, the figures, the weights after two steps, and how often it read."""
    reader = PolicyTokens(models()[1].model, PAD, way)
    calls = []
    reader.model.get_input_embeddings().register_forward_pre_hook(lambda *_: calls.append(1))
    config = RewardModelConfig(
        epochs=2, batch_size=8, lr=1e-2, balance=0.5, max_tokens=max_tokens
    )
    history = train_reward_model(reader, labelled(), config, seed=3)
    trained, seen = len(calls), evaluate_reward_model(reader, labelled(), config)
    weights = torch.cat([p.detach().flatten() for p in reader.model.parameters()])
    return history, seen, weights, trained


@pytest.mark.parametrize("way", ["shared", "dense"])
def test_a_reward_model_trained_in_parts_is_that_of_whole_batches(way):
    """The balance drops tokens of the larger class, counted over the whole batch."""
    history, seen, weights, reads = reward_model_of(65_536, way)
    assert reads == 2
    in_parts = reward_model_of(BUDGET, way)
    assert in_parts[3] >= 12
    for row, expected in zip(in_parts[0], history, strict=True):
        assert row == pytest.approx(expected, rel=1e-4)
    assert in_parts[1].pop("confusion") == seen.pop("confusion")
    for ours, whole in zip(in_parts[1].pop("calibration"), seen.pop("calibration"), strict=True):
        assert ours == pytest.approx(whole, rel=1e-5)
    assert in_parts[1] == pytest.approx(seen, rel=1e-5)
    assert relative(in_parts[2], weights) < 1e-3  # Adam's first steps enlarge rounding


def refuse(most, monkeypatch):
    """The allocator refuses more than so many tokens at once; the tokens of every reading."""
    real = torch.nn.Embedding.forward
    read = []

    def forward(layer, ids):
        if ids.dim() == 2:
            read.append(ids.numel())
            if ids.numel() > most:
                raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(layer, ids)

    monkeypatch.setattr(torch.nn.Embedding, "forward", forward)
    return read


def test_sft_and_reward_model_go_on_with_half_of_a_batch_that_does_not_fit(monkeypatch, capsys):
    expected = [sft_of(65_536, False, "dense")[:3], reward_model_of(65_536, "dense")[::2]]
    read = refuse(40, monkeypatch)
    found = [sft_of(65_536, False, "dense")[:3], reward_model_of(65_536, "dense")[::2]]
    assert max(read) > 40 and len(read) > 12
    (loss, heldout, gradient), (history, weights) = found
    (right, right_heldout, right_gradient), (right_history, right_weights) = expected
    assert (loss, heldout) == pytest.approx((right, right_heldout), rel=1e-5)
    assert relative(gradient, right_gradient) < ROUNDING
    for row, other in zip(history, right_history, strict=True):
        assert row == pytest.approx(other, rel=1e-4)
    assert relative(weights, right_weights) < 1e-3
    said = capsys.readouterr().err
    for flag in ("--sft.max-tokens", "--reward-model.max-tokens"):
        assert f"with the same result: {flag} " in said


def dense():
    return Batch(PROMPTS, RESPONSES, PAD, prefix="dense")


def of_answers(used, model):
    """Loss, gradients and scores of a sentence model."""
    reader = SentenceReader(SentenceModel(used.policy.model, 16, "mean"), PAD, "dense")
    reader.model.head.bias.grad = torch.ones(1)  # of a pass that was not ended
    loss = reader.backward(reader.batch(labelled()), bernoulli_loss(labelled()))
    return [loss, gradients(reader.model), reader.scores(labelled())]


def of_gaps(used, model):
    reader = GapReader(SentenceModel(used.policy.model, 16, "mean"), PAD, "dense")
    return [reader.gaps(PROMPTS, RESPONSES)]


def of_rewards(used, model):
    score = SentenceModel(used.policy.model, 16, "mean")
    paid = [TokenModelReward(model, length_alpha=None), SentenceModelReward(score),
            GapReward(score, tokens=True), RED(score), ABC(score),
            ImplicitReward(ImplicitScore(used.policy, models(seed=1)[0].policy))]  # fmt: skip
    return [reward(dense(), None).rewards for reward in paid]


def of_doubts(used, model):
    """Three batches, of which the first one finds out how many tokens fit."""
    reader = PolicyTokens(model.model, PAD, "dense")
    found = answer_doubts(reader, labelled() * 3, RewardModelConfig(batch_size=len(PROMPTS)))
    return [torch.tensor(found)]


def of_kl(used, model):
    return [torch.tensor(_kl(used.policy, models(seed=1)[0].policy, [dense()] * 2, 0.7))]


@pytest.mark.parametrize("work", [of_answers, of_gaps, of_rewards, of_doubts, of_kl])
def test_whatever_reads_answers_goes_on_with_half_of_them(work, monkeypatch, capsys):
    expected = work(*models())
    read = refuse(40, monkeypatch)
    for found, right in zip(work(*models()), expected, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-5)
    assert max(read) > 40
    assert capsys.readouterr().err.count("WARNING: out of memory") == (
        6 if work is of_rewards else 1)  # fmt: skip
    refuse(3, monkeypatch)
    with pytest.raises(torch.OutOfMemoryError, match=r"One answer of \d+ tokens .*--generate.max-"):
        work(*models())


def backward_of(model, way):
    batch = Batch(PROMPTS, RESPONSES, PAD, prefix=way)
    logprobs, entropy = policy_logprobs(model, batch, 0.7)
    (logprobs.sum() + entropy.sum()).backward()
    return gradients(model)


@pytest.mark.parametrize("way", ["shared", "dense"])
def test_layers_computed_again_give_the_same_bits(way):
    model = models()[0].policy
    backward_of(model, way)  # the check of its head is behind it
    model.zero_grad()
    again = recompute_layers(recompute_layers(copy.deepcopy(model)))
    alike = copy.deepcopy(again)  # whose layers are its own, not those of the model it copies
    expected = backward_of(model, way)
    again.model.layers[0].register_forward_hook(lambda *_: calls.append("layer"))
    again.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append("inside"))
    calls = []
    assert torch.equal(backward_of(again, way), expected)
    assert calls == ["inside", "layer", "inside"]
    with torch.no_grad():
        policy_logprobs(again, Batch(PROMPTS, RESPONSES, PAD, prefix=way), 1.0)
    assert calls[3:] == ["inside", "layer"]
    assert torch.equal(backward_of(alike, way), expected)


def test_the_memory_of_a_model_that_is_no_longer_used_is_free_at_once():
    model = recompute_layers(copy.deepcopy(models()[0].ref))
    model(torch.tensor([[3, 4]])).logits.sum().backward()
    gone = weakref.ref(model)
    del model
    assert gone() is None  # without Python's search for cycles


def test_what_cannot_be_computed_again_is_refused():
    with pytest.raises(ValueError, match=r"gradient_checkpointing is on, but Linear has no layers"):
        recompute_layers(torch.nn.Linear(2, 2))


def test_the_best_weights_are_kept_once():
    model = models()[0].policy
    model.lm_head.weight = model.model.embed_tokens.weight
    best = snapshot(model)
    places = {tensor.data_ptr() for tensor in best.values()}
    assert len(places) == len(best) - 1 == sum(1 for _ in model.parameters())
    before = {name: tensor.clone() for name, tensor in best.items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1
    assert all(torch.equal(best[name], tensor) for name, tensor in before.items())
    newer = snapshot(model, best)
    assert {tensor.data_ptr() for tensor in newer.values()} == places
    assert all(torch.equal(newer[name], tensor) for name, tensor in model.state_dict().items())
    model.load_state_dict(newer)


TINY = ["--sessions.train-users", "40", "--sessions.heldout-users", "4", "--sft.max-steps", "4",
        "--sft.eval-every", "2", "--scratch.hidden-size", "16", "--scratch.intermediate-size", "16",
        "--scratch.vocab-size", "300", "--scratch.heads", "2"]  # fmt: skip


def test_the_command_line_turns_it_on_and_the_model_is_the_same(tmp_path, monkeypatch):
    written = []
    for flag in ("no-gradient-checkpointing", "gradient-checkpointing"):
        calls = []
        monkeypatch.setattr("tppo.stages.sft.recompute_layers",
                            lambda m, c=calls: c.append(m) or recompute_layers(m))  # fmt: skip
        out = tmp_path / flag
        main(["data", "--out", str(out), *TINY])
        main(["sft", "--out", str(out), f"--model.{flag}", *TINY])
        written.append((out / "sft/model/model.safetensors").read_bytes())
        assert len(calls) == (flag == "gradient-checkpointing")
    assert written[0] == written[1]
