"""RED, ABC and RTO: their formulas in fp64, over small models with large weights."""

import inspect

import pytest
import torch
from _weights import enlarged
from test_shared_prefix import PAD, PROMPTS, RESPONSES, models
from transformers import GPT2Config, GPT2Model

import tppo
from tppo.models.batch import Batch
from tppo.models.load import place
from tppo.models.policy import policy_logprobs
from tppo.rewards import Answers
from tppo.rewards.dense import ABC, RED, RTO
from tppo.rewards.implicit import ImplicitReward, ImplicitScore
from tppo.rewards.sentence_model import SentenceModel, SentenceModelReward

CPU = torch.device("cpu")
EXACT = {"rtol": 1e-9, "atol": 1e-10}


def sentence_model(kind="llama", pooling="last"):
    """A model of whole answers in double precision, whose scores differ."""
    torch.manual_seed(5)
    if kind == "llama":
        trunk, size = models()[0].ref.model, 16
    else:
        config = GPT2Config(vocab_size=24, n_embd=16, n_layer=2, n_head=2, n_positions=64)
        trunk, size = enlarged(GPT2Model(config)), 16
    model = SentenceModel(trunk, size, pooling)
    torch.nn.init.normal_(model.head.weight)
    torch.nn.init.constant_(model.head.bias, 0.7)
    return place(model.double(), CPU)


def batch_of(prefix="shared"):
    return Batch(PROMPTS, RESPONSES, PAD, CPU, prefix)


def alone(model, prompt, response):
    """The score of one answer, read without any other."""
    with torch.no_grad():
        return model(Batch([prompt], [response], PAD, CPU, "dense"))[0].item()


@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_red_pays_what_each_token_changes_of_the_score(kind, pooling):
    model = sentence_model(kind, pooling)
    batch = batch_of("dense" if kind == "gpt2" else "shared")
    once, each = RED(model), RED(lambda part: model(part), max_tokens=40)
    for red in (once, each):
        rewards = red(batch, None).rewards
        for b, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
            scores = [0.0] + [alone(model, prompt, response[: t + 1]) for t in range(len(response))]
            wanted = [after - before for before, after in zip(scores, scores[1:], strict=False)]
            found = rewards[b, : len(response)]
            torch.testing.assert_close(found, torch.tensor(wanted, dtype=found.dtype), **EXACT)
            assert found.sum().item() == pytest.approx(scores[-1], rel=1e-9)
            assert not rewards[b, len(response) :].any()
    assert rewards.dtype == torch.float64 and rewards.abs().max() > 0.1


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_abc_pays_the_score_in_shares_of_the_last_tokens_attention(kind):
    model = sentence_model(kind)
    trunk, batch = model.trunk, batch_of("dense" if kind == "gpt2" else "shared")
    before = trunk.config._attn_implementation
    rewards = ABC(model, max_tokens=30)(batch, None).rewards
    assert trunk.config._attn_implementation == before != "eager"
    scores = [alone(model, *pair) for pair in zip(PROMPTS, RESPONSES, strict=True)]
    trunk.set_attn_implementation("eager")  # whose softmax is in float32
    for b, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        with torch.no_grad():
            maps = trunk(torch.tensor([[*prompt, *response]]), output_attentions=True).attentions
        row = maps[-1][0].mean(0)[-1][len(prompt) :]  # last layer, mean over heads, last token
        score, n = scores[b], len(response)
        wanted = score * row / row.sum()
        torch.testing.assert_close(rewards[b, :n], wanted, rtol=1e-5, atol=1e-7)
        assert rewards[b].sum().item() == pytest.approx(score, rel=1e-9)
        assert not rewards[b, n:].any()
    assert (rewards[2, :4] / rewards[2, :4].sum() - 0.25).abs().max() > 0.05  # not evenly spread


def test_rto_pays_the_log_ratio_at_each_token_and_the_score_at_the_last():
    policy, ref = models()[0].policy.double(), models(seed=4)[0].ref.double()
    whole = SentenceModelReward(sentence_model(), mode="score")
    rewards = RTO(ImplicitReward(ImplicitScore(policy, ref, beta=0.3)), whole)(
        batch_of(), None
    ).rewards
    for b, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        one = Batch([prompt], [response], PAD, CPU, "dense")
        with torch.no_grad():
            ratio = policy_logprobs(policy, one, 1.0)[0] - policy_logprobs(ref, one, 1.0)[0]
        wanted = 0.3 * ratio[0]
        wanted[-1] += alone(whole.model, prompt, response)
        torch.testing.assert_close(rewards[b, : len(response)].double(), wanted.double(),
                                   rtol=1e-5, atol=1e-5)  # fmt: skip


def test_a_trunk_without_attention_is_refused():
    model = sentence_model()

    class Nothing:
        attentions = None

    model.trunk.forward = lambda **_: Nothing
    with pytest.raises(ValueError, match="gave no attention of its last layer"):
        model.attention(batch_of())


def test_each_has_at_most_forty_lines():
    for kind in (RED, ABC, RTO):
        assert len(inspect.getsource(kind).splitlines()) <= 40


def test_they_are_public_and_take_what_the_loop_gives():
    assert tppo.RED is RED and tppo.ABC is ABC and tppo.RTO is RTO
    answers = Answers(PROMPTS, RESPONSES, {}, None, [1], list(range(len(PROMPTS))))
    model = sentence_model().float()
    for reward in (RED(model), ABC(model)):
        found = reward(batch_of(), answers)
        assert found.rewards.shape == batch_of().mask.shape and found.category is None
