"""`FusedLMHead` against the logits of real (tiny, random) models of every family it takes."""

import pytest
import torch
from _families import tiny
from _processes import two_processes
from torch import nn

import tppo_kernels as tk
from tppo_kernels.models.lm_head import FAMILIES

transformers = pytest.importorskip("transformers")

MAIN = ("llama", "qwen2", "qwen3", "gemma2", "cohere", "granite", "gpt2", "gpt_neox", "phi")


def rows():
    """(input_ids [2, 9], targets [2, 9], mask)."""
    ids = torch.randint(3, 97, (2, 10), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[:, :3] = False
    return ids[:, :-1], ids[:, 1:], mask


def dense(model, ids, targets, mask, **options):
    return tk.token_logprobs(model(input_ids=ids, use_cache=False).logits, targets, mask, **options)


def fused(head, ids, targets, mask, **options):
    return head(head.hidden(input_ids=ids, use_cache=False), targets, mask, **options)


def gradients(model, out):
    """Of a projection of both results, by every parameter."""
    model.zero_grad()
    g = torch.linspace(-1, 1, out.logprobs.numel()).reshape(out.logprobs.shape)
    (out.logprobs * g + 0.3 * out.entropy * g).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal(model, head):
    given = rows()
    expected, actual = dense(model, *given, temperature=0.7), fused(head, *given, temperature=0.7)
    torch.testing.assert_close(tuple(actual), tuple(expected), rtol=1e-4, atol=1e-4)
    others = given[0].clone()
    others[:, 0] = 3  # control: states that have read another first token
    wrong = fused(head, others, *given[1:], temperature=0.7).logprobs - expected.logprobs
    assert wrong[given[2]].abs().max() > 0.1
    wanted = gradients(model, dense(model, *given, temperature=0.7))
    found = gradients(model, fused(head, *given, temperature=0.7))
    assert found.keys() == wanted.keys()
    for name, g in wanted.items():
        assert float((found[name] - g).norm()) <= 1e-3 * float(g.norm()) + 1e-6, name


@pytest.mark.parametrize("family", MAIN)
def test_equals_the_logits_of_the_model(family):
    """lm_head on prompt positions (OpenRLHF#467), tied embeddings (trl#6372)."""
    model = tiny(family)
    assert_equal(model, tk.FusedLMHead(model))


@pytest.mark.parametrize("family", ("llama", "qwen3", "gpt2", "gemma2"))
@pytest.mark.parametrize("tied", (False, True))
def test_tied_and_own_heads(family, tied):
    model = tiny(family, tie_word_embeddings=tied)
    weight = model.get_output_embeddings().weight
    assert (weight is model.get_input_embeddings().weight) == tied
    assert_equal(model, tk.FusedLMHead(model, verify=True))


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_listed_family_is_verified(family):
    model = tiny(family)
    head = tk.FusedLMHead(model, verify=True)
    given = rows()
    with torch.no_grad():
        torch.testing.assert_close(tuple(fused(head, *given)), tuple(dense(model, *given)),
                                   rtol=1e-3, atol=2e-3)


def test_what_the_configuration_says_is_used():
    """A softcap or a scale that is forgotten shows."""
    given = rows()
    for family, name in (("gemma2", "softcap"), ("cohere", "logit_scale"),
                         ("granite", "logit_scale")):
        model = tiny(family)
        head = tk.FusedLMHead(model)
        right = fused(head, *given)
        setattr(head, name, None if name == "softcap" else 1.0)
        assert (fused(head, *given).logprobs - right.logprobs).abs().max() > 0.1
        with pytest.raises(ValueError, match="they differ by"):
            head._verify()


def test_a_frozen_head_and_the_loss():
    model, given = tiny("llama"), rows()
    model.get_output_embeddings().weight.requires_grad_(False)
    head = tk.FusedLMHead(model)
    ids, targets, mask = given
    old, advantages = torch.full((2, 9), -4.0), torch.randn(2, 9)
    hidden = head.hidden(input_ids=ids, use_cache=False)
    frozen = head(hidden, targets, mask, entropy_grad=False)
    assert frozen.logprobs.requires_grad and not frozen.entropy.requires_grad
    loss = head.loss(hidden, targets, old, advantages, mask, entropy_coef=0.1, clip_high=9.0)
    logprobs, entropy = dense(model, *given)
    expected = tk.ppo_loss(logprobs, old, advantages, mask, entropy=entropy, entropy_coef=0.1,
                           clip_high=9.0)
    torch.testing.assert_close(loss.loss, expected.loss, rtol=1e-4, atol=1e-5)
    norm = model.model.norm.weight
    torch.testing.assert_close(torch.autograd.grad(loss.loss, norm, retain_graph=True),
                               torch.autograd.grad(expected.loss, norm), rtol=1e-3, atol=1e-5)


def test_the_weight_is_read_at_every_call():
    model, given = tiny("llama"), rows()
    head = tk.FusedLMHead(model)
    before = fused(head, *given).logprobs
    with torch.no_grad():
        model.lm_head.weight.mul_(0.5)
    after = fused(head, *given).logprobs
    assert (before - after).abs().max() > 0.1
    torch.testing.assert_close(after, dense(model, *given).logprobs, rtol=1e-4, atol=1e-4)
    model.resize_token_embeddings(101)
    torch.testing.assert_close(fused(head, *given).logprobs, dense(model, *given).logprobs,
                               rtol=1e-4, atol=1e-4)


def test_wrappers():
    model, given = tiny("llama"), rows()
    expected = dense(model, *given).logprobs
    actual = fused(tk.FusedLMHead(torch.compile(model)), *given).logprobs
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def with_lora(**more):
    peft = pytest.importorskip("peft")
    base = tiny("llama", tie_word_embeddings=False)
    wrapped = peft.get_peft_model(base, peft.LoraConfig(
        **{"r": 3, "lora_alpha": 7, "target_modules": ["q_proj", "lm_head"], **more}))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    return wrapped


def test_lora_on_the_head_is_merged():
    """LoRA (NeMo-RL#2363): adapters of the head count, and get their gradients."""
    model = with_lora()
    head = tk.FusedLMHead(model)
    assert_equal(model, head)
    names = gradients(model, fused(head, *rows()))
    assert any("lm_head.lora_A" in n for n in names) and not any("base_layer" in n for n in names)
    with model.disable_adapter():
        torch.testing.assert_close(fused(head, *rows())[0], dense(model, *rows())[0], rtol=1e-4,
                                   atol=1e-4)
    model.merge_adapter()
    torch.testing.assert_close(fused(head, *rows())[0], dense(model, *rows())[0], rtol=1e-4,
                               atol=1e-4)


def test_lora_elsewhere_and_a_head_that_is_saved_whole():
    model = with_lora(target_modules=["q_proj", "v_proj"])
    assert_equal(model, tk.FusedLMHead(model))
    model = with_lora(target_modules=["q_proj"], modules_to_save=["lm_head"])
    assert_equal(model, tk.FusedLMHead(model))


@pytest.mark.parametrize("more, training, words", [
    ({"use_dora": True}, False, "DoRA"), ({"lora_dropout": 0.5}, True, "lora_dropout=0"),
    ({"lora_bias": True}, False, "its adapter has a bias")])
def test_other_adapters_are_refused(more, training, words):
    with pytest.raises(ValueError, match=words):
        tk.FusedLMHead(with_lora(**more).train(training))


class Linear8bitLt(nn.Linear):
    """Stands for every quantised head: a Linear whose product is its own."""


class Quantised(torch.Tensor):
    """Stands for a weight that is a tensor subclass, as torchao's are."""


def test_heads_that_are_no_plain_matrix_are_refused_with_the_reason():
    """lm_head weight under ZeRO-3, FSDP2 (trl#6372): never a silent wrong product."""
    def refused(words, change):
        model = tiny("llama", tie_word_embeddings=False)
        head = tk.FusedLMHead(model)
        change(model)
        with pytest.raises(ValueError, match=words):
            fused(head, *rows())

    def put(layer):
        return lambda model: setattr(model, "lm_head", layer)

    refused("quantis", put(Linear8bitLt(32, 97, bias=False)))
    refused("not known here", put(nn.Sequential(nn.Linear(32, 97))))
    refused("Quantised", lambda m: setattr(m.lm_head, "weight", nn.Parameter(
        m.lm_head.weight.detach().as_subclass(Quantised))))
    refused("forward hooks", lambda m: m.lm_head.register_forward_hook(lambda *_: None))
    refused("DeepSpeed", lambda m: setattr(m.lm_head.weight, "ds_id", 0))
    refused("meta", lambda m: m.lm_head.to("meta"))


SHARDINGS = ("model", "model at once", "head", "frozen head", "tied")


def sharded(name, mesh):
    """A model under FSDP2, its layers each alone; the head with the rest, or alone too."""
    from torch.distributed.fsdp import fully_shard
    model = tiny("llama", tie_word_embeddings=name == "tied")
    if name == "frozen head":
        model.lm_head.weight.requires_grad_(False)
    if mesh is None:
        return model
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    if name.endswith("head"):
        fully_shard(model.lm_head, mesh=mesh)
    return fully_shard(model, mesh=mesh,
                       reshard_after_forward=True if name == "model at once" else None)


def sharded_steps(name, mesh=None, rank=None):
    """[log-probs, entropy, loss and all gradients], of the rows of a rank, or of both.

    The second rank has no valid token in the second step. The sums are added up over ranks.
    """
    model, results = sharded(name, mesh), []
    head = tk.FusedLMHead(model)
    ids, targets, mask = rows()
    for step in range(2):
        mask = mask.clone()
        mask[1] &= step == 0
        here = slice(None) if rank is None else slice(rank, rank + 1)
        hidden = head.hidden(input_ids=ids[here], use_cache=False)
        out = head(hidden, targets[here], mask[here], entropy_grad=name != "frozen head")
        loss = head.loss(hidden, targets[here], torch.full_like(out.logprobs, -4.0).detach(),
                         torch.ones(1 if rank is not None else 2), mask[here], clip_high=9.0,
                         num_tokens=12).loss
        (0.3 * out.logprobs.sum() + 0.2 * out.entropy.detach().sum() + loss).backward()
        full = {k: p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
                for k, p in model.named_parameters() if p.grad is not None}
        results.append([out.logprobs.detach().numpy().copy(), loss.item(),
                        {k: g.numpy().copy() for k, g in full.items()}])
        model.zero_grad()
    return results


def sharded_worker(rank, meeting, queue):
    import torch.distributed as dist
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    queue.put((rank, {name: sharded_steps(name, mesh, rank) for name in SHARDINGS}))
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def both_ranks():
    return two_processes(sharded_worker)


@pytest.mark.parametrize("name", SHARDINGS)
def test_fsdp2_gathers_the_head_by_its_own_hooks(both_ranks, name):
    """An empty shard read as the weight (trl#6372); a rank without a valid token takes part."""
    for step, (logprobs, loss, wanted) in enumerate(sharded_steps(name)):
        first, second = (both_ranks[rank][name][step] for rank in range(2))
        for row, part in enumerate((first, second)):
            assert abs(part[0][0] - logprobs[row]).max() <= 1e-4
        assert abs(first[1] + second[1] - loss) < 1e-4
        assert first[2].keys() == second[2].keys() == wanted.keys()
        for key, g in wanted.items():  # FSDP2 takes the mean over ranks
            for part in (first, second):
                error = torch.from_numpy(2 * part[2][key] - g).norm()
                assert error <= 1e-3 * torch.from_numpy(g).norm() + 1e-5, (key, step)


def test_mixed_precision_of_fsdp2(tmp_path):
    """The states keep the dtype in which the head is gathered: products are of one dtype."""
    import torch.distributed as dist
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh, model = dist.device_mesh.init_device_mesh("cpu", (1,)), tiny("llama")
        fully_shard(model, mesh=mesh, mp_policy=MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32, output_dtype=torch.float32))
        head, (ids, targets, mask) = tk.FusedLMHead(model), rows()
        hidden = head.hidden(input_ids=ids, use_cache=False)
        assert hidden.dtype == torch.bfloat16
        out = head(hidden, targets, mask)
        assert out.logprobs.dtype == torch.float32
        out.logprobs.sum().backward()
        assert model.lm_head.weight.grad.dtype == torch.float32
        assert model.lm_head.weight.grad.full_tensor().any()
    finally:
        dist.destroy_process_group()


def test_a_shard_that_nothing_has_gathered_is_refused(tmp_path):
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = tiny("llama")
        head = tk.FusedLMHead(model)
        fully_shard(model.model, mesh=dist.device_mesh.init_device_mesh("cpu", (1,)))
        fully_shard(model.lm_head, mesh=dist.device_mesh.init_device_mesh("cpu", (1,)))
        model.lm_head.register_forward_hook(lambda *_: None)
        with pytest.raises(ValueError, match="forward hooks"):
            fused(head, *rows())
        parallel = tiny("llama", tie_word_embeddings=False)
        head = tk.FusedLMHead(parallel)
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        parallel.lm_head.weight = nn.Parameter(dist.tensor.distribute_tensor(
            parallel.lm_head.weight.detach(), mesh))
        with pytest.raises(ValueError, match="DTensor"):
            fused(head, *rows())
    finally:
        dist.destroy_process_group()


def test_bad_input():
    with pytest.raises(TypeError, match="model is Linear, expected a transformers model"):
        tk.FusedLMHead(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="without an output head"):
        tk.FusedLMHead(tiny("llama").model)
    model = tiny("llama")
    model.config.model_type = "unheard_of"
    with pytest.raises(ValueError, match="family 'unheard_of', expected one of cohere"):
        tk.FusedLMHead(model)
    head = tk.FusedLMHead(model, verify=True)
    for name in ("weight", "bias", "softcap", "logit_scale"):
        with pytest.raises(TypeError, match=f"got {name}"):
            fused(head, *rows(), **{name: None})
    with pytest.raises(ValueError, match="temperature is 0"):
        fused(head, *rows(), temperature=0)
