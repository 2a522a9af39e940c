"""vLLM as a rollout: what it samples is what transformers would, and from the same distribution."""

import os

import pytest
import torch
from _vllm import (
    EOS,
    OTHER_EOS,
    PAD,
    SIZE,
    adapted,
    assert_greedy_alike,
    engines,
    move,
    next_logprobs,
    prompts,
    tiny,
)

from tppo.errors import DataError
from tppo.models.batch import Batch
from tppo.models.policy import policy_logprobs
from tppo.models.rollout import Sampling, engine
from tppo.models.rollout.vllm import row_seed

EOS_IDS = [EOS, OTHER_EOS, 100, 150, 200, 250, 300]  # so many that answers do end


@pytest.fixture(scope="module")
def both():
    model = tiny()
    found = engines(model, eos_id=EOS_IDS)
    yield model, *found
    found[1].close()


def test_greedy_answers_are_those_of_transformers_token_by_token(both):
    model, hf, vllm = both
    asked, sampling = prompts(64), Sampling(16, 0.0)
    one, other = hf.generate(asked, sampling), vllm.generate(asked, sampling)
    ties = assert_greedy_alike(model, asked, one.response_ids, other.response_ids)
    print(f"64 greedy answers, {sum(map(len, other.response_ids))} tokens, ties: {ties}")
    assert len(ties) <= 2, ties
    assert len({tuple(row) for row in one.response_ids}) > 50  # no model that always says the same
    if not ties:
        assert one.finish == other.finish
    assert "eos" in one.finish and "length" in one.finish


def chi_square(model, ids, drawn, temperature):
    """The p-value of the drawn first tokens; rare tokens are one cell."""
    expected = next_logprobs(model, ids, temperature).exp() * len(drawn)
    counts = torch.bincount(torch.tensor(drawn), minlength=SIZE).float()
    often = expected >= 5
    e = torch.cat([expected[often], expected[~often].sum()[None]])
    o = torch.cat([counts[often], counts[~often].sum()[None]])
    if e[-1] == 0:  # no token is rare
        e, o = e[:-1], o[:-1]
    assert len(e) > 10
    statistic = ((o - e) ** 2 / e).sum().double()
    return 1 - torch.special.gammainc(torch.tensor((len(e) - 1) / 2).double(), statistic / 2).item()


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_first_tokens_are_distributed_as_the_softmax(both, temperature):
    model, _, vllm = both
    ids, n = prompts(1, seed=5)[0], 20_000
    drawn = vllm.generate([ids] * n, Sampling(1, temperature, seed=11)).response_ids
    first = [row[0] for row in drawn]
    p = chi_square(model, ids, first, temperature)
    print(f"temperature {temperature}: p {p:.3f} of {n} first tokens against the softmax")
    assert p > 1e-3
    for wrong in (0.75 * temperature, 1.33 * temperature):  # the test can fail
        assert chi_square(model, ids, first, wrong) < 1e-6


def test_log_probs_are_those_of_the_trainer_at_the_temperature(both):
    model, _, vllm = both
    asked = prompts(8, seed=9)
    found = vllm.generate(asked, Sampling(12, 0.7, seed=2))
    with torch.no_grad():
        batch = Batch(found.prompt_ids, found.response_ids, PAD, model.device)
        own = policy_logprobs(model, batch, 0.7)[0]
    for row, logprobs in enumerate(found.logprobs):
        assert len(logprobs) == len(found.response_ids[row])
        torch.testing.assert_close(own[row, : len(logprobs)], torch.tensor(logprobs),
                                   atol=1e-4, rtol=0)  # fmt: skip
    print(f"drift of the test answer: {vllm.drift:.1e} nats")


def test_a_call_is_repeatable_and_another_seed_gives_other_answers(both):
    _, _, vllm = both
    asked = [ids for ids in prompts(6) for _ in range(3)]
    first, again = (vllm.generate(asked, Sampling(10, seed=4)) for _ in range(2))
    assert first.response_ids == again.response_ids
    assert vllm.generate(asked, Sampling(10, seed=5)).response_ids != first.response_ids
    assert len({tuple(row) for row in first.response_ids[:3]}) == 3  # a row, a seed
    assert len({row_seed(seed, row) for seed in range(50) for row in range(50)}) == 2_500


def test_more_prompts_than_are_read_at_once_and_in_smaller_batches(both):
    """The seed of a row is its own, whoever is answered beside it."""
    model, _, vllm = both
    asked, before = prompts(64, length=100, seed=17), vllm.batch_size
    assert sum(map(len, asked)) > 6_000  # a step of the engine reads 4,096
    found = vllm.generate(asked, Sampling(6, seed=3))
    batch = Batch(found.prompt_ids, found.response_ids, PAD, model.device)
    own = policy_logprobs(model, batch, 1.0)[0].detach()
    for row, told in zip(own, found.logprobs, strict=True):
        torch.testing.assert_close(row[: len(told)], torch.tensor(told), atol=1e-4, rtol=0)
    try:
        vllm.batch_size = 2
        again = vllm.generate(asked, Sampling(6, seed=3)).response_ids
    finally:
        vllm.batch_size = before
    alike = [a == b for a, b in zip(found.response_ids, again, strict=True)]
    assert sum(alike) >= 63  # a rounding may decide a draw


def test_a_prompt_is_computed_once_for_its_answers(both):
    model, _, vllm = both
    asked = [ids for ids in prompts(4, length=100, seed=21) for _ in range(8)]
    before = vllm.engine.prefix_hits()
    vllm.generate(asked, Sampling(4, seed=1))
    queries, hits = (b - a for a, b in zip(before, vllm.engine.prefix_hits(), strict=True))
    assert queries >= sum(map(len, asked))
    assert hits >= 4 * 7 * 96  # the whole blocks of 32 tokens, of all answers but the first


def test_any_of_several_eos_ids_ends_an_answer_and_is_in_it():
    model = tiny(seed=2)
    hf, vllm = engines(model, eos_id=[EOS, OTHER_EOS, 7])
    try:
        asked = prompts(64, seed=3)
        found = vllm.generate(asked, Sampling(40, seed=6))
        for ids, finish in zip(found.response_ids, found.finish, strict=True):
            ends = [i for i, token in enumerate(ids) if token in (EOS, OTHER_EOS, 7)]
            assert ends == ([len(ids) - 1] if finish == "eos" else [])
            assert finish == "eos" or len(ids) == 40
        last = {row[-1] for row, why in zip(found.response_ids, found.finish, strict=True)
                if why == "eos"}
        assert len(last) > 1
    finally:
        vllm.close()


def test_forced_beginnings_are_part_of_the_answer_and_have_no_author(both):
    model, hf, vllm = both
    asked, forced = prompts(5, seed=13), [[], [9, 8], [7] * 12, [5, EOS], [4] * 3]
    sampling = Sampling(12, 0.0)
    one, other = (x.generate(asked, sampling, forced) for x in (hf, vllm))
    assert other.response_ids == one.response_ids and other.finish == one.finish
    assert other.author == one.author
    for start, logprobs in zip(forced, other.logprobs, strict=True):
        assert all(x != x for x in logprobs[: len(start)])
    nothing = vllm.generate(asked, Sampling(12, seed=3), [[]] * 5)
    assert nothing.response_ids == vllm.generate(asked, Sampling(12, seed=3)).response_ids
    with pytest.raises(ValueError, match="prefix of row 1 had 13 tokens"):
        vllm.generate(asked, sampling, [[], [3] * 13, [], [], []])


def test_the_likeliest_tokens_alone_with_top_p(both):
    model, _, vllm = both
    ids = prompts(1, seed=5)[0]
    drawn = vllm.generate([ids] * 400, Sampling(1, 1.0, seed=1, top_p=0.5)).response_ids
    order = next_logprobs(model, ids).exp().sort(descending=True)
    most = int((order.values.cumsum(0) < 0.5).sum()) + 1
    assert {row[0] for row in drawn} <= set(order.indices[:most].tolist())


def test_tokens_that_the_tokenizer_lacks_are_never_sampled():
    model = tiny(seed=4)
    model.valid_vocab = 100  # as `limit_vocabulary` sets it
    hf, vllm = engines(model, eos_id=[])
    try:
        asked = prompts(16, seed=3, size=100)
        found = vllm.generate(asked, Sampling(20, seed=6))
        assert max(map(max, found.response_ids)) < 100
        with torch.no_grad():
            batch = Batch(found.prompt_ids, found.response_ids, PAD, model.device)
            own = policy_logprobs(model, batch, 1.0)[0]
        torch.testing.assert_close(own, torch.tensor(found.logprobs), atol=1e-4, rtol=0)
        greedy = Sampling(12, 0.0)
        assert (vllm.generate(asked, greedy).response_ids
                == hf.generate(asked, greedy).response_ids)  # fmt: skip
    finally:
        vllm.close()


def test_a_longer_prompt_than_those_before_starts_another_engine(both):
    model, hf, vllm = both
    model.config.max_position_embeddings, before = 4096, model.config.max_position_embeddings
    long = [torch.randint(3, SIZE, (1300,), generator=torch.Generator().manual_seed(1)).tolist()]
    try:
        assert vllm.generate(long, Sampling(4, 0.0)).response_ids == hf.generate(
            long, Sampling(4, 0.0)).response_ids  # fmt: skip
    finally:
        model.config.max_position_embeddings = before
    with pytest.raises(ValueError, match="positions"):
        vllm.close()
        vllm.generate(long, Sampling(4, 0.0))


def test_the_process_is_left_as_it_was():
    model = tiny(seed=5)
    environ, threads, function = dict(os.environ), torch.get_num_threads(), torch.set_num_threads
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    _, vllm = engines(model)
    vllm.generate(prompts(4), Sampling(4, seed=1))
    assert torch.equal(torch.rand(3), expected)
    assert dict(os.environ) == environ and torch.set_num_threads is function
    assert torch.get_num_threads() == threads
    vllm.close()


@pytest.mark.parametrize("lora", [False, True])
def test_new_weights_are_there_before_every_call(lora):
    model = adapted(tiny(seed=6)) if lora else tiny(seed=6)
    hf, vllm = engines(model)
    asked, greedy = prompts(16, seed=8), Sampling(12, 0.0)
    seen = []
    try:
        for step in range(3):
            one, other = hf.generate(asked, greedy), vllm.generate(asked, greedy)
            assert not assert_greedy_alike(model, asked, one.response_ids, other.response_ids)
            assert vllm.drift < 1e-4
            seen.append(other.response_ids)
            move(model, step)
        assert seen[0] != seen[1] != seen[2]
    finally:
        vllm.close()


def test_two_engines_of_a_process_do_not_disturb_each_other():
    models = tiny(seed=7), tiny(seed=8)
    asked, greedy = prompts(8, seed=8), Sampling(8, 0.0)
    (hf, one), (_, two) = map(engines, models)
    expected = hf.generate(asked, greedy).response_ids
    assert one.generate(asked, greedy).response_ids == expected
    assert two.generate(asked, greedy).response_ids != expected
    two.close()
    assert one.generate(asked, greedy).response_ids == expected
    two.generate(asked, greedy)  # starts again
    del two  # without a word
    assert one.generate(asked, greedy).response_ids == expected
    one.close()


@pytest.mark.parametrize("trained", [True, False])
def test_a_call_that_was_interrupted_leaves_no_request_behind(trained):
    """As Ctrl-C in a notebook does, in the middle of answers; the next call is as any other."""
    model = tiny(seed=9).requires_grad_(trained)
    vllm = engines(model)[1]
    asked, sampling, steps = prompts(12, seed=9), Sampling(12, seed=4), []
    try:
        whole = vllm.generate(asked, sampling).response_ids
        core = vllm.engine.llm.llm_engine
        step = core.step

        def interrupted():
            steps.append(core.get_num_unfinished_requests())
            if len(steps) == 22:  # the test answer takes sixteen
                raise KeyboardInterrupt
            return step()

        core.step = interrupted
        with pytest.raises(KeyboardInterrupt):
            vllm.generate(asked, sampling)
        assert steps[0] == 1 < steps[-1]
        assert vllm.generate(asked, sampling).response_ids == whole
        with pytest.raises(IndexError):  # of the engine's own step, which cannot be repeated
            vllm.generate([[SIZE + 1]], sampling)
        assert vllm.generate(asked, sampling).response_ids == whole
    finally:
        vllm.close()


def test_what_the_engine_cannot_compute_is_refused_before_a_file_is_written(monkeypatch):
    with pytest.raises(DataError, match="weights are of float16, expected float32 or bfloat16"):
        engines(tiny(seed=9).to(torch.float16))
    vllm = engines(tiny(seed=9).to("meta"))[1]
    monkeypatch.setattr(engine, "_scratch", None)
    with pytest.raises(DataError, match="computes on cpu, the model is on meta, expected both"):
        vllm.generate(prompts(1), Sampling(4))


class Kept:
    """A keeper that is asked to stop after so many chunks, and gives them to the next call."""

    def __init__(self, stop):
        self.stop, self.step, self.rest = stop, 0, None

    def newest(self, steps):
        return self if self.rest else None

    @property
    def weights(self):
        return self.rest.weights

    @property
    def state(self):
        return self.rest.state

    def after(self, step, steps, rest):
        self.step, self.rest = step, rest()
        if step == self.stop:
            raise KeyboardInterrupt


def test_a_call_that_was_stopped_goes_on_to_the_same_answers(both):
    model, _, vllm = both
    vllm.batch_size, before = 2, vllm.batch_size
    asked = prompts(20, seed=31)
    try:
        whole = vllm.generate(asked, Sampling(6, seed=2))
        keeper = Kept(1)  # of three chunks of eight
        with pytest.raises(KeyboardInterrupt):
            vllm.generate(asked, Sampling(6, seed=2), keeper=keeper)
        calls, ask = [], vllm.engine.ask
        vllm.engine.ask = lambda prompts, wanted: calls.append(len(prompts)) or ask(prompts, wanted)
        assert vllm.generate(asked, Sampling(6, seed=2), keeper=keeper) == whole._replace(
            logprobs=again(whole))  # fmt: skip
        assert calls == [1, 8, 4]  # the test answer, and what was left
    finally:
        vllm.batch_size = before
        vars(vllm.engine).pop("ask", None)


def again(found):
    """The log-probs as float32 keeps them."""
    return [torch.tensor(row).tolist() for row in found.logprobs]
