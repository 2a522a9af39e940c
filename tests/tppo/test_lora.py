"""LoRA: adapters of every role over one base in memory, and the arithmetic of one adapter."""

import copy
import gc
import json
import re
from dataclasses import replace

import peft
import pytest
import torch
from _families import tiny
from test_ppo import CONFIG, EOS, GROUPS, PAD, folder, questions  # noqa: F401
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from tppo.methods.config import RewardModelConfig
from tppo.methods.optimizer import AdamW
from tppo.methods.ppo import PPO
from tppo.methods.reward_model import (
    GuardError,
    LabelledAnswer,
    PolicyTokens,
    train_reward_model,
)
from tppo.models.adapters import (
    NAME,
    Origin,
    add_adapter,
    add_to_classifier,
    load_adapter,
    merged,
    save_adapter,
    save_classifier,
    shared_copy,
)
from tppo.models.batch import Batch
from tppo.models.config import AdapterConfig, ModelConfig
from tppo.models.guards import trainable
from tppo.models.load import load_policy, load_reward_model
from tppo.models.meta import Holding, meta_model, sizes
from tppo.models.own_tokens import load_frozen
from tppo.models.policy import (
    RewardModel,
    load_trained,
    policy_head,
    policy_logprobs,
    policy_states,
    snapshot,
    trained_state,
)
from tppo.models.recompute import recompute_layers
from tppo.models.rollout import HFRollout, Sampling
from tppo.rewards.token_model import TokenModelReward
from tppo.stages.models import ppo_models

CPU = torch.device("cpu")
LORA = AdapterConfig(rank=2)
RESPONSES = [[5 + (i * 3 + j) % 11 for j in range(1 + i % 4)] + [EOS] for i in range(16)]


def batch(way="shared"):
    return Batch(GROUPS, RESPONSES, PAD, prefix=way)


def moved(model, seed=0, std=0.2):
    """The model with random numbers in its adapter and head."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trainable(model):
            parameter += std * torch.randn(parameter.shape, generator=generator)
    return model


def classifier(path, to):
    """An adapter and a head over the model in `path`, written into `to`."""
    torch.manual_seed(3)
    model = load_reward_model(path, CPU)
    save_classifier(moved(add_to_classifier(model, LORA, seed=5, origin=Origin(str(path)))), to)
    return model


def trainer(path, reward_path, lora=LORA, config=CONFIG, recompute=False, dtype="auto"):
    """PPO with the four roles over one base, as the stage puts it together."""
    ref = load_policy(path, CPU, dtype)
    policy = add_adapter(shared_copy(ref), lora, seed=0)
    held = ModelConfig(dtype=dtype, gradient_checkpointing=recompute)
    models = ppo_models(policy, ref, path, CPU, held, lora, critics=1, seed=0)
    reward = TokenModelReward(load_frozen(reward_path, None, CPU, dtype=dtype, base=ref))
    rollout = HFRollout(policy, pad_id=PAD, eos_id=EOS)
    return PPO(models, rollout, config, reward=reward, sampling=Sampling(8), pad_id=PAD,
               eos_id=EOS, seed=0)  # fmt: skip


@pytest.fixture(scope="module")
def reward_folder(folder, tmp_path_factory):  # noqa: F811
    path = tmp_path_factory.mktemp("reward") / "model"
    classifier(folder, path)
    return path


def tensors(*owners):
    """Bytes of the distinct storages behind tensors."""
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in owners}
    return sum(storages.values())


def of(*modules):
    return [x for module in modules for x in (*module.parameters(), *module.buffers())]


def state_of(optimizer):
    return [x for state in optimizer.state.values() for x in state.values()]


def test_a_step_holds_one_base(folder, reward_folder):  # noqa: F811
    """Four roles: at most 1.25 times the base, the adapters and their optimiser; found from the
    models, and among everything that is alive in the process.
    """
    gc.collect()
    others = [x for x in gc.get_objects() if isinstance(x, torch.Tensor)]  # kept: no id is reused
    before = {id(x) for x in others}
    ppo = trainer(folder, reward_folder)
    ppo.step(questions(GROUPS))
    roles = [ppo.models.policy, ppo.models.ref, ppo.models.critic, ppo.reward]
    base = tensors(*of(ppo.models.ref))
    own = [x for role in (*roles[:1], *roles[2:]) for n, x in role.state_dict().items()
           if re.search(rf"\.{NAME}\.|^head\.|\.score\.", n)]  # fmt: skip
    adapters, state = tensors(*own), tensors(*state_of(ppo.optimizer))
    held = tensors(*of(*roles), *state_of(ppo.optimizer))
    assert held <= 1.25 * base + adapters + state
    assert held == base + adapters + state
    trained = sum(p.numel() for m in (roles[0], roles[2]) for p in trainable(m))
    assert sum(x.numel() for x in state_of(ppo.optimizer) if x.dim()) == 2 * trained
    ppo.optimizer.zero_grad()
    gc.collect()
    alive = [x for x in gc.get_objects() if isinstance(x, torch.Tensor) and id(x) not in before
             and x.is_floating_point()]  # not the ids of prompts
    assert held <= tensors(*alive) <= 1.25 * base + adapters + state


def test_the_reference_stays_to_the_bit_while_the_policy_trains(folder, reward_folder):  # noqa: F811
    ppo = trainer(folder, reward_folder)
    plain = load_policy(folder, CPU)
    weights = {name: x.clone() for name, x in plain.state_dict().items()}
    with torch.no_grad():
        expected, _ = policy_logprobs(plain, batch(), 1.0)
        start, _ = policy_logprobs(ppo.models.policy, batch(), 1.0)
    assert torch.equal(start, expected)  # B is zero
    for _ in range(2):
        ppo.step(questions(GROUPS))
        with torch.no_grad():
            found, _ = policy_logprobs(ppo.models.ref, batch(), 1.0)
            now, _ = policy_logprobs(ppo.models.policy, batch(), 1.0)
        assert torch.equal(found, expected) and not torch.equal(now, expected)
    for name, tensor in ppo.models.ref.state_dict().items():
        assert torch.equal(tensor, weights[name]), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_first_step_passes_its_guards(folder, reward_folder, dtype, capsys):  # noqa: F811
    """Ratios of 1, a shared prompt as dense ones forward and backward, gradients that are there."""
    config = replace(CONFIG, verify_prefix=True)
    ppo = trainer(folder, reward_folder, config=config, dtype=dtype)
    metrics, _ = ppo.step(questions(GROUPS))
    assert "agrees with dense prompts, forward and backward" in capsys.readouterr().err
    assert metrics["loss/value_avg"] > 0
    assert {p.dtype for p in trainable(ppo.models.policy)} == {getattr(torch, dtype)}


class Shapes(TorchDispatchMode):
    """The shapes of all that is made inside the block."""

    def __init__(self):
        super().__init__()
        self.made = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        flat = out if isinstance(out, tuple | list) else [out]
        if func is torch.ops.aten.t.default:  # a weight that is there, read otherwise
            flat = []
        self.made |= {tuple(x.shape) for x in flat if isinstance(x, torch.Tensor)}
        return out


@pytest.mark.parametrize("targets", [("all-linear",), ("q_proj", "lm_head")])
def test_no_gradient_of_a_frozen_weight_is_made(folder, reward_folder, targets):  # noqa: F811
    """The head's would be [24, 16]; a LoRA of the head makes it, which shows that it is looked for.
    A frozen layer's would have the layer's shape, which no tensor else has.
    """
    ppo = trainer(folder, reward_folder, AdapterConfig(rank=2, target_modules=targets))
    policy, critic = ppo.models.policy, ppo.models.critic
    head = policy_head(policy)
    logprobs, entropy = head(policy_states(policy, batch()), batch().targets, batch().mask)
    values, _ = critic(batch())
    with Shapes() as shapes:
        (logprobs.sum() + entropy.sum() + values.sum()).backward()
    assert ((24, 16) in shapes.made) == ("lm_head" in targets)
    assert (32, 16) not in shapes.made  # of gate_proj and up_proj
    for module in (policy, critic, ppo.models.ref, ppo.reward):
        for name, parameter in module.named_parameters():
            frozen = NAME not in name and not name.startswith("head.")
            assert not (frozen and (parameter.requires_grad or parameter.grad is not None)), name


@pytest.mark.parametrize("way", ["shared", "dense"])
def test_layers_computed_again_have_their_own_roles_adapter(folder, reward_folder, way):  # noqa: F811
    """One backward pass through policy and critic: each role's layers run again with its own."""
    found = []
    for recompute in (False, True):
        ppo = trainer(folder, reward_folder, recompute=recompute)
        policy, critic = moved(ppo.models.policy, 1), moved(ppo.models.critic, 2)
        calls = []
        for model in (policy, critic):
            model.get_submodule("model" if model is policy else "trunk").layers[
                0].mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        logprobs, entropy = policy_logprobs(policy, batch(way), 0.7)
        values, after = critic(batch(way))
        calls.clear()
        (logprobs.sum() + entropy.sum() + values.square().sum() + after.sum()).backward()
        assert len(calls) == 2 * recompute
        found.append([p.grad for m in (policy, critic) for p in trainable(m)])
    for plain, again in zip(*found, strict=True):
        assert torch.equal(plain, again) and plain.any()


@pytest.mark.parametrize("family", ["llama", "gpt2"])  # gpt2's layers are stored transposed
def test_a_step_at_full_rank_is_a_step_of_all_weights(family):
    """With A = I and B = 0 the gradient by B is s G, where G is that by the weight: a step of
    lr / s^2 of the adapter changes the sum by -lr G, as one of the weight does.
    """
    lr, lora = 0.1, AdapterConfig(rank=48 if family == "llama" else 128, alpha=31.0)
    ids = torch.arange(24).reshape(3, 8)
    full, base = tiny(family), tiny(family)
    adapted = add_adapter(shared_copy(base), lora, seed=0)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_A" in name:
                parameter.copy_(torch.eye(*parameter.shape))
    full(input_ids=ids, labels=ids).loss.backward()
    adapted(input_ids=ids, labels=ids).loss.backward()
    scale = 31.0 / lora.rank
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter -= lr / scale**2 * parameter.grad
    steps = merged(adapted).state_dict()
    layers = [name.removesuffix(".lora_A") for name, m in adapted.named_modules()
              if name.endswith(".lora_A")]  # fmt: skip
    assert len(layers) == (14 if family == "llama" else 8)
    for layer in layers:
        before = base.get_submodule(layer).weight
        wanted = -lr * full.get_submodule(layer).weight.grad
        found = steps[f"{layer}.weight"] - before
        assert wanted.abs().max() > 1e-4
        torch.testing.assert_close(found, wanted, atol=2e-6, rtol=1e-3)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma", "mixtral"])
@pytest.mark.parametrize("targets", [("all-linear",), ("lm_head",)])
def test_adapter_merged_model_and_peft_are_one_model(family, targets, tmp_path):
    base = tiny(family, tie_word_embeddings=True)
    lora = AdapterConfig(rank=3, alpha=5.0, target_modules=targets)
    model = moved(add_adapter(shared_copy(base), lora, seed=0, origin=Origin(str(tmp_path / "b"))))
    ids = torch.arange(12)[None]
    expected = model(input_ids=ids).logits
    scale = expected.abs().max().item()
    save_adapter(model, tmp_path / "a")
    assert (expected - base(input_ids=ids).logits).abs().max() > 0.01 * scale
    again = load_adapter(shared_copy(base), tmp_path / "a")
    assert torch.equal(again(input_ids=ids).logits, expected)
    base.save_pretrained(tmp_path / "b")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "a")
    merged(model).save_pretrained(tmp_path / "m")
    for name, other in {
        "peft": theirs,
        "merged": AutoModelForCausalLM.from_pretrained(tmp_path / "m"),
        "loaded": load_policy(tmp_path / "a", CPU),
    }.items():
        error = (other(input_ids=ids).logits - expected).abs().max().item()
        assert error < 2e-6 * max(scale, 1) * 10, name
    with torch.no_grad():
        before, _ = policy_logprobs(model, batch(), 1.0)
        torch.testing.assert_close(policy_logprobs(merged(model), batch(), 1.0)[0], before,
                                   atol=2e-5, rtol=1e-5)  # fmt: skip


def test_a_reward_model_is_the_same_over_the_shared_base(folder, tmp_path):  # noqa: F811
    trained = classifier(folder, tmp_path / "rm")
    config = json.loads((tmp_path / "rm" / "adapter_config.json").read_text())
    assert config["task_type"] == "TOKEN_CLS" and config["modules_to_save"] == ["score"]
    with torch.no_grad():
        expected = RewardModel(trained)(batch())
        base = load_policy(folder, CPU)
        assert torch.equal(load_frozen(tmp_path / "rm", None, CPU, base=base)(batch()), expected)
        alone = load_frozen(tmp_path / "rm", None, CPU)(batch())
        torch.testing.assert_close(alone, expected, atol=2e-5, rtol=1e-5)
    assert expected.std() > 0.1


def test_the_reward_model_trains_adapters_and_head(folder):  # noqa: F811
    rows = [LabelledAnswer(p, r, [1 + t % 2 for t in r], 1 + r[0] % 2)
            for p, r in zip(GROUPS, RESPONSES, strict=True)]  # fmt: skip
    torch.manual_seed(0)
    model = add_to_classifier(load_reward_model(folder, CPU), AdapterConfig(rank=4), seed=0)
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    config = RewardModelConfig(epochs=12, batch_size=8, lr=1e-2)
    history = train_reward_model(PolicyTokens(model, PAD), rows, config, seed=0)
    assert history[-1]["loss"] < 0.5 * history[0]["loss"]
    assert all(torch.equal(model.get_parameter(n), x) for n, x in frozen.items())
    for name, parameter in model.named_parameters():  # none reaches the lowest layer
        if "layers.0" in name:
            parameter.requires_grad_(False)
    for parameter in trainable(model.base_model):
        parameter.register_hook(torch.zeros_like)
    with pytest.raises(GuardError, match="lowest adapters is zero"):
        train_reward_model(PolicyTokens(model, PAD), rows, config, seed=0)


def test_what_is_trained_is_kept_and_put_back_alone(folder):  # noqa: F811
    model = add_adapter(load_policy(folder, CPU), LORA, seed=0)
    start = snapshot(model)
    assert start.keys() == trained_state(model).keys()
    assert all(f".{NAME}." in name for name in start)
    AdamW(trainable(moved(model)), lr=1.0)
    load_trained(model, start)
    assert all(torch.equal(trained_state(model)[name], x) for name, x in start.items())
    other = add_adapter(load_policy(folder, CPU), AdapterConfig(rank=2, target_modules=("q_proj",)),
                        seed=0)  # fmt: skip
    with pytest.raises(ValueError, match="28 weights were given of 4 that are trained.*--lora"):
        load_trained(other, start)


@pytest.mark.parametrize(("targets", "message"), [
    (("q_prj",), "had 'q_prj', expected linear layers of LlamaForCausalLM: down_proj, gate_proj"),
    (("embed_tokens",), "had 'embed_tokens', which is a Embedding, expected linear layers"),
])  # fmt: skip
def test_layers_that_cannot_have_an_adapter_are_named(folder, targets, message):  # noqa: F811
    with pytest.raises(ValueError, match=message):
        add_adapter(load_policy(folder, CPU), AdapterConfig(rank=2, target_modules=targets), seed=0)


def test_a_critic_without_an_adapter_is_refused(folder, reward_folder):  # noqa: F811
    with pytest.raises(ValueError, match="of which LlamaModel has none: critic and reward model"):
        trainer(folder, reward_folder, AdapterConfig(rank=2, target_modules=("lm_head",)))


def test_an_adapter_of_another_model_is_named(folder, tmp_path):  # noqa: F811
    model = add_adapter(load_policy(folder, CPU), LORA, seed=0)
    save_adapter(model, tmp_path)
    for other in (tiny("gpt2"), tiny("llama", num_hidden_layers=1)):
        with pytest.raises(ValueError, match="no adapter for|weights of an adapter, expected"):
            load_adapter(other, tmp_path)


def test_layers_are_not_recomputed_twice(folder):  # noqa: F811
    """A copy of a model whose layers are computed again computes its own, once."""
    base = recompute_layers(load_policy(folder, CPU))
    model = recompute_layers(moved(add_adapter(shared_copy(base), LORA, seed=0)))
    calls = []
    policy_head(model)  # which is checked once
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    policy_logprobs(model, batch(), 1.0)[0].sum().backward()
    assert len(calls) == 2


@pytest.mark.parametrize("family", ["llama", "qwen2", "opt"])
def test_the_plan_counts_what_is_trained(family):
    base = tiny(family)
    model = add_adapter(shared_copy(base), AdapterConfig(rank=3), seed=0)
    planned = meta_model(base.config, Holding(lora=3))
    for role, part in (("language", model), ("value", model.base_model)):
        assert sizes(planned, role).trained == sum(p.numel() for p in trainable(part)) > 0
