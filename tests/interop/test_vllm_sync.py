"""What is given to vLLM is checked by an answer: each fault that is put into the real engine stops
the run before anything is sampled.
"""

import copy

import pytest
import torch
from _vllm import adapted, engines, move, prompts, tiny
from safetensors.torch import load_file, save_file

from tppo.models.guards import GuardError
from tppo.models.rollout import Sampling, engine
from tppo.models.rollout.vllm import BOUNDS

ASKED, SAMPLING = prompts(2, length=70), Sampling(4, seed=1)


@pytest.fixture(scope="module", params=["tied", "untied"])
def whole(request):
    model = tiny(seed=10, tied=request.param == "tied")
    vllm = engines(model)[1]
    vllm.generate(ASKED, SAMPLING)
    yield model, vllm
    vllm.close()


@pytest.fixture(scope="module")
def with_adapter():
    model = adapted(tiny(seed=11))
    vllm = engines(model)[1]
    vllm.generate(ASKED, SAMPLING)
    yield model, vllm
    vllm.close()


def assert_stopped(vllm, words="all weights"):
    """The call fails with a sentence, and the next one, without the fault, is fine."""
    ask, asked = engine.VLLMEngine.ask, []

    def counted(self, prompts, wanted):
        asked.append(len(prompts))
        return ask(self, prompts, wanted)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(GuardError) as found:
        patch.setattr(engine.VLLMEngine, "ask", counted)
        vllm.generate(ASKED, SAMPLING)
    text = str(found.value)
    assert "\n" not in text and text.startswith(f"vLLM was given {words}, and has others: token ")
    assert "expected at most 0.001 in float32" in text and "in the trainer" in text
    assert asked == [1]  # the test answer alone
    assert vllm.drift > BOUNDS[torch.float32]


def test_the_engine_goes_on_after_a_fault_is_gone(whole, monkeypatch):
    model, vllm = whole
    move(model, 1)
    with monkeypatch.context() as patch:
        patch.setattr(engine.VLLMEngine, "hand_over", lambda self, model: None)
        assert_stopped(vllm)  # stale weights
    vllm.generate(ASKED, SAMPLING)
    assert vllm.drift < 1e-4


NAMES = ["model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight",
         "model.layers.1.self_attn.v_proj.weight", "model.norm.weight",
         "model.layers.0.input_layernorm.weight", "model.embed_tokens.weight"]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_one_perturbed_tensor_is_caught(whole, monkeypatch, name):
    model, vllm = whole

    def spoilt(given):
        found = dict(engine_checkpoint(given))
        generator = torch.Generator().manual_seed(1)
        noise = torch.randn(found[name].shape, generator=generator)
        found[name] = found[name] * (1 + 0.1 * noise)
        return found

    engine_checkpoint = engine.checkpoint
    with monkeypatch.context() as patch:
        patch.setattr(engine, "checkpoint", spoilt)
        assert_stopped(vllm)
    vllm.generate(ASKED, SAMPLING)
    assert vllm.drift < 1e-4


def test_weights_that_are_not_all_there_are_caught(whole, monkeypatch):
    model, vllm = whole
    move(model, 2)
    complete = engine.checkpoint
    with monkeypatch.context() as patch:
        patch.setattr(engine, "checkpoint", lambda given: {
            name: x for name, x in complete(given).items() if "layers.1" not in name})
        assert_stopped(vllm)
    vllm.generate(ASKED, SAMPLING)
    assert vllm.drift < 1e-4


def test_a_head_tied_to_embeddings_that_keeps_the_old_ones_is_caught(monkeypatch):
    """As vLLM by itself leaves it on a CPU after `reload_weights`: the packed copy is the old one.
    The weights change as little as in a step of PPO with a large learning rate.
    """
    model = tiny(seed=12)
    vllm = engines(model)[1]
    vllm.generate(ASKED, SAMPLING)
    try:
        move(model, 3, size=0.02)
        with monkeypatch.context() as patch:
            patch.setattr(engine, "pack_tied_heads", lambda module: None)
            assert_stopped(vllm)
        assert 0.01 < vllm.drift < 0.5
        vllm.generate(ASKED, SAMPLING)
        assert vllm.drift < 1e-4
    finally:
        vllm.close()


def test_keys_and_values_of_older_weights_are_caught(whole, monkeypatch):
    model, vllm = whole
    vllm.generate(ASKED, SAMPLING)
    move(model, 4)
    with monkeypatch.context() as patch:
        patch.setattr(vllm.engine.llm, "reset_prefix_cache", lambda: True)
        assert_stopped(vllm)
        patch.setattr(vllm.engine.llm, "reset_prefix_cache", lambda: False)
        with pytest.raises(RuntimeError, match="keys and values of older weights"):
            vllm.generate(ASKED, SAMPLING)
    vllm.generate(ASKED, SAMPLING)
    assert vllm.drift < 1e-4


def test_an_adapter_of_another_is_caught(with_adapter, monkeypatch):
    model, vllm = with_adapter
    other = copy.deepcopy(model)
    move(other, 5)
    save = engine.save_adapter
    words = "the base with this step's adapter"
    with monkeypatch.context() as patch:
        patch.setattr(engine, "save_adapter", lambda given, folder: save(other, folder))
        assert_stopped(vllm, words)
    vllm.generate(ASKED, SAMPLING)
    assert vllm.drift < 1e-4


@pytest.mark.parametrize("name", ["0.self_attn.q_proj.lora_A", "1.mlp.up_proj.lora_B"])
def test_one_perturbed_tensor_of_an_adapter_is_caught(with_adapter, monkeypatch, name):
    model, vllm = with_adapter
    save = engine.save_adapter

    def spoilt(given, folder):
        save(given, folder)
        (file,) = folder.glob("*.safetensors")
        tensors = load_file(file)
        (found,) = (key for key in tensors if name in key)
        noise = torch.randn(tensors[found].shape, generator=torch.Generator().manual_seed(1))
        save_file(tensors | {found: tensors[found] * (1 + 0.1 * noise)}, file)

    with monkeypatch.context() as patch:
        patch.setattr(engine, "save_adapter", spoilt)
        assert_stopped(vllm, "the base with this step's adapter")
    vllm.generate(ASKED, SAMPLING)
    assert vllm.drift < 1e-4


def test_an_adapter_of_the_step_before_is_caught(with_adapter, monkeypatch):
    model, vllm = with_adapter
    vllm.generate(ASKED, SAMPLING)
    move(model, 6)
    with monkeypatch.context() as patch:
        patch.setattr(vllm.engine, "hand_over", lambda model: None)
        assert_stopped(vllm, "the base with this step's adapter")
    vllm.generate(ASKED, SAMPLING)
    assert vllm.drift < 1e-4


def test_an_adapter_that_is_not_asked_is_caught(with_adapter, monkeypatch):
    model, vllm = with_adapter
    hand_over = vllm.engine.hand_over

    def without(given):
        hand_over(given)
        vllm.engine.adapter = None

    with monkeypatch.context() as patch:
        patch.setattr(vllm.engine, "hand_over", without)
        assert_stopped(vllm)
    vllm.generate(ASKED, SAMPLING)
    assert vllm.drift < 1e-4


@pytest.mark.parametrize("lora", [False, True])
def test_in_bfloat16_rounding_passes_and_weights_of_another_model_do_not(monkeypatch, lora):
    model = tiny(seed=14).to(torch.bfloat16)
    vllm = engines(adapted(model) if lora else model)[1]
    try:
        vllm.generate(ASKED, SAMPLING)
        assert 1e-4 < vllm.drift < 0.3  # above what float32 allows, below what bfloat16 does
        move(vllm.model, 7, size=1.0)
        with monkeypatch.context() as patch:
            patch.setattr(engine.VLLMEngine, "hand_over", lambda self, model: None)
            with pytest.raises(GuardError, match="expected at most 0.5 in bfloat16"):
                vllm.generate(ASKED, SAMPLING)
        vllm.generate(ASKED, SAMPLING)
        assert vllm.drift < 0.3
    finally:
        vllm.close()


def test_a_model_that_is_not_trained_is_given_once(monkeypatch):
    """When an engine starts, or is that of another model."""
    models = [tiny(seed=seed).requires_grad_(False) for seed in (13, 14)]
    vllm, other = (engines(model)[1] for model in models)
    given, hand_over = [], engine.VLLMEngine.hand_over
    monkeypatch.setattr(engine.VLLMEngine, "hand_over",
                        lambda self, model: given.append(self) or hand_over(self, model))
    try:
        for _ in range(3):
            vllm.generate(ASKED, SAMPLING)
            assert vllm.drift < 1e-4
        assert not given
        for one, times in ((other, 1), (other, 1), (vllm, 2), (vllm, 2)):
            one.generate(ASKED, SAMPLING)
            assert one.drift < 1e-4 and len(given) == times
    finally:
        vllm.close()


def test_a_log_prob_that_is_no_number_is_caught_wherever_it_stands(with_adapter, monkeypatch):
    model, vllm = with_adapter
    ask = vllm.engine.ask

    def spoilt(prompts, wanted):
        (said,) = ask(prompts, wanted)
        return [said._replace(logprobs=[*said.logprobs[:5], float("nan"), *said.logprobs[6:]])]

    with monkeypatch.context() as patch:
        patch.setattr(vllm.engine, "ask", spoilt)
        with pytest.raises(GuardError, match="token 5 of a test answer"):
            vllm.generate(ASKED, SAMPLING)
    vllm.generate(ASKED, SAMPLING)
    assert vllm.drift < 1e-4
