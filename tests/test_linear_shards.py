"""The linear operators over a vocabulary that two processes share."""

import itertools
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from _linear_cases import LIMIT, SHAPED, distance, grads, sample
from _processes import two_processes

import tppo_kernels as tk
from tppo_kernels.testing import sample_mask

BACKENDS = ("chunked", "cpp", "reference")
SHARDS = {"plain": {}, "shaped": {**SHAPED, "valid_vocab": 150}, "dead": {"valid_vocab": 90},
          "chunks": {"valid_vocab": 120, "memory": 4000},  # more columns here than there
          "recompute": {"memory": "recompute", **SHAPED}, "bf16": {"dtype": torch.bfloat16},
          "frozen": {"entropy_grad": False, "frozen": True, "part": "logprobs"}}


def shard_inputs(name):
    options = dict(SHARDS[name])
    hidden, weight, targets, bias = sample(2, 30, dtype=options.pop("dtype", torch.float32))
    targets = targets % options.get("valid_vocab", 190)
    if not options.get("frozen"):
        options["bias"] = bias
    return (hidden, weight, targets, sample_mask("interior", 2, 30)), options


def worker(rank, meeting, queue):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2,
                            timeout=timedelta(seconds=60))
    results, half = {}, slice(rank * 95, rank * 95 + 95)
    for name, backend in itertools.product(SHARDS, BACKENDS):
        (hidden, weight, targets, mask), options = shard_inputs(name)
        if "bias" in options:
            options["bias"] = options["bias"][half]
        with tk.use_backend(backend):
            out = grads(tk.linear_logprobs, hidden, weight[half], targets, mask,
                        group=dist.group.WORLD, **options)
        results[name, backend] = [None if x is None else x.float().numpy() for x in out]
    (hidden, weight, targets, mask), _ = shard_inputs("plain")
    h = hidden.requires_grad_()
    compiled = torch.compile(lambda h, w: tk.linear_logprobs(
        h, w, targets, mask, group=dist.group.WORLD).logprobs, fullgraph=True, backend="aot_eager")
    results["compiled"] = torch.autograd.grad(compiled(h, weight[half]).sum(), h)[0].numpy()
    loss = tk.linear_ppo_loss(h, weight[half], targets, targets * 0.0 - 5, hidden[..., 0].detach(),
                              mask, entropy_coef=0.1, group=dist.group.WORLD).loss
    results["loss"] = (loss.item(), torch.autograd.grad(loss, h)[0].numpy())
    queue.put((rank, results))
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def shards():
    """What two real processes over gloo get."""
    return two_processes(worker)


@pytest.mark.parametrize("name, backend", list(itertools.product(SHARDS, BACKENDS)))
def test_shards_of_the_vocabulary_equal_the_whole(shards, name, backend):
    """`roll` across a shard (verl#6068) and its like: two processes, one distribution."""
    (hidden, weight, targets, mask), options = shard_inputs(name)
    whole = grads(tk.linear_logprobs, hidden, weight, targets, mask, **options)
    limit = 2 * LIMIT[hidden.dtype]
    parts = [[None if x is None else torch.from_numpy(x) for x in shards[rank][name, backend]]
             for rank in range(2)]
    for part in parts:
        for a, b in zip(part[:3], whole[:3], strict=True):
            assert distance(a, b) <= limit
    for i in range(3, len(whole)):
        if whole[i] is not None:
            assert distance(torch.cat([part[i] for part in parts]), whole[i]) <= limit


def test_shards_compile_and_carry_the_loss(shards):
    (hidden, weight, targets, mask), _ = shard_inputs("plain")
    h = hidden.requires_grad_()
    expected = torch.autograd.grad(tk.linear_logprobs(h, weight, targets, mask)[0].sum(), h)[0]
    loss = tk.linear_ppo_loss(h, weight, targets, targets * 0.0 - 5, hidden[..., 0].detach(), mask,
                              entropy_coef=0.1).loss
    grad, loss = torch.autograd.grad(loss, h)[0], loss.item()
    for rank in range(2):
        assert distance(torch.from_numpy(shards[rank]["compiled"]), expected) < 1e-5
        assert abs(shards[rank]["loss"][0] - loss) < 1e-6
        assert distance(torch.from_numpy(shards[rank]["loss"][1]), grad) < 1e-5
