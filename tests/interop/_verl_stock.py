"""verl's own functions, and random batches, for the tests of `tppo_kernels.integrations.verl`."""

import os
from types import FunctionType, SimpleNamespace

import torch
import verl.utils.torch_functional as verl_F
from verl.experimental.reward_loop.reward_manager import base
from verl.trainer.ppo import core_algos
from verl.utils.experimental.torch_functional import FusedLinearForPPO
from verl.workers.config import ActorConfig, PolicyLossConfig

from tppo_kernels.integrations import verl as ours

ours.unpatch()  # where the project is installed, verl has loaded it as its plugin already

SMALLEST = dict(ours.CPU_ELEMENTS)
ours.CPU_ELEMENTS = dict.fromkeys(SMALLEST, 0)  # random batches are small, and reach ours so
CASES = 40 if "TPPO_INTEROP_SHORT" in os.environ else 500
MODES = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean",
         "seq-mean-token-sum-norm")


def stock(function):
    """verl's function, which calls verl's own functions while ours stand in their place."""
    held = {**vars(core_algos), "verl_F": SimpleNamespace(**vars(verl_F))}
    return FunctionType(function.__code__, held, function.__name__, function.__defaults__)


STOCK = SimpleNamespace(
    gae=stock(core_algos.compute_gae_advantage_return), value=stock(core_algos.compute_value_loss),
    policy=stock(core_algos.compute_policy_loss_vanilla), kl=stock(core_algos.kl_penalty),
    agg=stock(core_algos.agg_loss), whiten=verl_F.masked_whiten,
    logprobs=verl_F.logprobs_from_logits, entropy=verl_F.entropy_from_logits,
    chunked=verl_F.entropy_from_logits_with_chunking, fused=FusedLinearForPPO.forward,
    scores=base.RewardManagerBase.assemble_rm_scores)


def mask_of(case: int, g: torch.Generator) -> torch.Tensor:
    """Masks by turns: random gaps, answers of random length, one long turn with a tool's tokens
    in the middle, empty rows, two valid tokens in all, everything valid; int64, bool, float."""
    b, t = (int(torch.randint(1, 7, (), generator=g)), int(torch.randint(2, 40, (), generator=g)))
    kind = case % 6
    mask = torch.rand(b, t, generator=g) < 0.6
    if kind in (1, 3):
        mask = torch.arange(t) < torch.randint(1, t + 1, (b, 1), generator=g)
    if kind == 2:
        mask = torch.ones(b, t, dtype=torch.bool)
        mask[:, t // 3:t // 2] = False
    if kind == 3 and b > 1:
        mask[::2] = False
    if kind == 4:
        mask = torch.zeros(b, t, dtype=torch.bool)
    if kind == 5:
        mask[:] = True
    mask[-1, [0, t - 1]] = True  # verl raises below two valid tokens
    return mask.to((torch.int64, torch.bool, torch.float32)[case // 6 % 3])


def cases():
    for case in range(CASES):
        g = torch.Generator().manual_seed(case)
        yield case, mask_of(case, g), g


def near(found, stock, truth, where=None, bound=1e-6):
    """Within 1e-6, of the larger of 1 and the largest stock value there, and of verl's own error
    in fp32, which is its distance from `truth`: the same by verl in fp64."""
    found, stock, truth = (torch.as_tensor(x).double() for x in (found, stock, truth))
    if where is not None:
        found, stock, truth = (x[where.bool()] for x in (found, stock, truth))
    if stock.numel():
        beyond = (found - stock).abs() - (stock - truth).abs().max()
        assert beyond.max() <= bound * stock.abs().max().clamp(min=1)


def config_of(case, batch):
    names = dict(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=2,
                 ppo_mini_batch_size=4, clip_ratio=0.2, clip_ratio_c=(3.0, 1.5, 10.0)[case % 3],
                 policy_loss=PolicyLossConfig(loss_mode="vanilla"))
    names |= {} if case % 2 else dict(clip_ratio_low=0.1, clip_ratio_high=0.3)
    config = ActorConfig(**names)
    config.global_batch_info.update(batch)
    return config


def batch_of(case, mask):
    """The counts of the whole batch, as none, all, and two ranks with a scale of the norm."""
    if case % 3 == 0:
        return {}
    tokens = int(mask.sum()) + 7
    batch = dict(dp_size=1, batch_num_tokens=tokens, global_batch_size=mask.shape[0] + 2)
    return batch if case % 3 == 1 else batch | dict(dp_size=2, loss_scale_factor=0.5 + case % 9)


def compare(stock, found, leaves, bound=1e-6):
    """Results, and gradients to `bound`, of two functions of the same leaves; the results are
    summed with different weights."""
    results = []
    for function, dtype in ((found, torch.float32), (stock, torch.float32),
                            (stock, torch.float64)):
        copies = [leaf.to(dtype, copy=True).requires_grad_() for leaf in leaves]
        out = function(*copies)
        out = out if isinstance(out, tuple) else (out,)
        sum((i + 1) * (o * torch.linspace(-1, 1, o.numel()).view(o.shape)).sum()
            for i, o in enumerate(out)).backward()
        results.append([o.detach() for o in out] + [copy.grad for copy in copies])
    for i, triple in enumerate(zip(*results, strict=True)):
        near(*triple, bound=1e-6 if i < len(out) else bound)
