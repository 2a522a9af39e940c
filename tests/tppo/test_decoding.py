"""Rows leave a batch when they have ended, and nothing else changes: not the answers, not the
draws of a seed."""

import pytest
import torch
from _families import tiny
from transformers import GenerationConfig

from tppo.models.batch import pad
from tppo.models.folder import without_generation_settings
from tppo.models.rollout import HFRollout, Sampling, decoding

pytestmark = pytest.mark.usefixtures("one_thread")
CAP = 24
EOS = [2, *range(3, 97, 12)]  # a tenth of the vocabulary, so that answers end here and there
PROMPTS = [[(5 + 7 * i * j) % 95 for j in range(1, 2 + i)] for i in range(10)] * 2
FAMILIES = {"llama": {}, "gpt2": {}, "mistral": {"sliding_window": 4}, "jamba": {}}
WAYS = {"greedy": (0.0, 1.0), "sampled": (1.0, 1.0), "cool": (0.7, 1.0), "guide": (1.0, 0.8)}


def by_generate(model, prompts, sampling):
    """transformers' `generate` alone, in one batch, in the order in which HFRollout sorts."""
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), prompts.index(prompts[i])))
    batch = pad([prompts[i] for i in order], [[]] * len(prompts), 0, torch.device("cpu"))
    drawn = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
    warm = sampling.temperature > 0
    config = GenerationConfig(do_sample=warm, max_new_tokens=CAP, eos_token_id=EOS, pad_token_id=0,
                              **(drawn if warm else {}))  # fmt: skip
    torch.manual_seed(sampling.seed)
    with torch.no_grad(), without_generation_settings(model):
        output = model.generate(input_ids=batch.input_ids, attention_mask=batch.attention_mask,
                                generation_config=config)  # fmt: skip
    found = [[] for _ in prompts]
    for i, row in zip(order, output[:, batch.prompt_length :].tolist(), strict=True):
        end = next((n for n, token in enumerate(row, 1) if token in EOS), CAP)
        found[i] = row[:end]
    return found


def computed(model, work):
    """What the work gives, and how many rows the model computed a token of."""
    rows = []

    def count(module, args, kwargs):
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        rows.append(ids.shape[0])

    handle = model.base_model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        return work(), sum(rows)
    finally:
        handle.remove()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_answers_of_a_seed_are_those_of_generate(family, way):
    model, (temperature, top_p) = tiny(family, **FAMILIES[family]), WAYS[way]
    sampling = Sampling(CAP, temperature, seed=4, top_p=top_p)
    prefix = "dense" if way == "sampled" else "shared"
    engine = HFRollout(model, pad_id=0, eos_id=EOS, prefix=prefix)
    found, few = computed(model, lambda: engine.generate(PROMPTS, sampling).response_ids)
    expected, all_rows = computed(model, lambda: by_generate(model, PROMPTS, sampling))
    assert found == expected
    lengths = sorted(map(len, found))
    assert lengths[0] < lengths[-1] / 2  # else nobody could have left
    if family == "jamba":  # it keeps states that are no keys and values: none may leave
        assert all_rows <= few <= all_rows + len(PROMPTS)  # a prefill that could not be shared
    else:  # more than three quarters of the rows are open, until three are left
        assert few <= sum(lengths) / 0.75 + 3 * CAP + len(PROMPTS) and few < 0.8 * all_rows
    # The control: drawn among those that are left, the answers of a seed would be others.
    assert temperature == 0 or family == "jamba" or drawn_apart(engine, sampling) != expected


def drawn_apart(engine, sampling):
    """What would be sampled if a row's draw depended on who is left."""
    begun = decoding._Drawn.__init__

    def forgetful(self, rows, whole, temperature, top_p):
        begun(self, torch.arange(len(rows)), len(rows), temperature, top_p)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoding._Drawn, "__init__", forgetful)
        return engine.generate(PROMPTS, sampling).response_ids


def test_a_batch_that_does_not_fit_is_sampled_in_turn_with_the_same_answers(capsys):
    """The allocator refuses more than six rows at the fourth token of an answer."""
    model, sampling = tiny("llama"), Sampling(CAP, seed=4)
    expected = HFRollout(model, pad_id=0, eos_id=EOS, batch_size=16).generate(PROMPTS, sampling)
    calls, most = [], 6

    def full(module, args, kwargs):
        calls.append(kwargs["input_ids"].shape[0])
        if calls[-1] > most and len(calls) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    handle = model.base_model.register_forward_pre_hook(full, with_kwargs=True)
    engine = HFRollout(model, pad_id=0, eos_id=EOS, batch_size=16)
    try:
        assert engine.generate(PROMPTS, sampling) == expected  # the second batch: the noise behind
        assert engine.at_once == 4
        said = capsys.readouterr().err
        assert said.count("WARNING: out of memory") == 2
        assert "8 answers sampled at once; from here on 4, with the same draws" in said
        most = 0
        with pytest.raises(torch.OutOfMemoryError, match=r"One answer alone .*--generate.max-new-"):
            engine.generate(PROMPTS, sampling)
    finally:
        handle.remove()


def test_rows_take_their_own_keys_and_values_with_them():
    """The control of the test above, of greedy answers too: rows that get another's cache."""
    model, sampling = tiny("llama"), Sampling(CAP, 0.0)
    engine = HFRollout(model, pad_id=0, eos_id=EOS)
    expected = engine.generate(PROMPTS, sampling).response_ids
    select = decoding.DynamicCache.batch_select_indices
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoding.DynamicCache, "batch_select_indices",
                      lambda self, indices: select(self, indices.flip(0)))  # fmt: skip
        assert engine.generate(PROMPTS, sampling).response_ids != expected


def test_no_id_ends_and_an_answer_of_one_token():
    model = tiny("llama")
    for eos, cap in (([], 5), (EOS, 1)):
        engine = HFRollout(model, pad_id=0, eos_id=eos)
        found = engine.generate(PROMPTS, Sampling(cap, 1.0, seed=2)).response_ids
        assert {len(row) for row in found} == {cap}
