"""slime 0.4: its batched GAE on our operator, and token-level advantages by its custom function.

slime is installed from its repository, not from the index: what is said here is held by tests
against a stand-in of the same signatures and formula, and the interface of a real slime is probed.

Without a patch, in any of its processes:

    --custom-advantage-function-path tppo_kernels.integrations.slime.token_advantages

pays a number for each token of an answer, and walks over what tools wrote (loss mask 0) as over no
step. Without it, `patch()` replaces `get_advantages_and_returns_batch` with the same numbers as
slime's: there every token of an answer is a step, those of tools too. In processes of Ray, `HOOK`
is what a driver gives to `ray.init(runtime_env={"worker_process_setup_hook": HOOK})`.

Under context parallelism slime's own function runs. It slices each answer by the length of the
last one there (`resp_len` is left over from the loop before), which is right only where all are of
one length.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import tppo_kernels as tk

from . import _peer
from ._peer import Part, Replacements

VERSIONS = _peer.PEERS["slime"].versions
HOOK = "tppo_kernels.integrations.slime.patch_when_imported"
_UTILS = "slime.utils.ppo_utils"
_GAE = f"{_UTILS}:get_advantages_and_returns_batch"
_INTERFACE: dict[str, str | None] = {
    _GAE: "total_lengths, response_lengths, values_list, rewards_list, gamma, lambd, chunked"}
_swap = Replacements("slime")


def _offsets(lengths: Sequence[int], device: Any) -> Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32, device=device).cumsum(
        0, dtype=torch.int32)


def get_advantages_and_returns_batch(
        total_lengths: Sequence[int], response_lengths: Sequence[int],
        values_list: Sequence[Tensor], rewards_list: Sequence[Tensor], gamma: float, lambd: float,
        chunked: bool = True) -> tuple[list[Tensor], list[Tensor]]:
    """Advantages and returns of each answer by one packed `tk.gae`; slime's signature. Nothing is
    padded, so `chunked` has nothing to choose."""
    parallel = sys.modules.get("megatron.core.parallel_state")
    if parallel is not None and parallel.get_context_parallel_world_size() > 1:
        return _swap.original(_GAE)(total_lengths, response_lengths, values_list, rewards_list,
                                    gamma, lambd, chunked)
    lengths = list(response_lengths)
    values, rewards = (
        torch.cat([x[:length] for x, length in zip(part, lengths, strict=True)])
        for part in (values_list, rewards_list))
    found = tk.gae(rewards.detach(), values.detach(), gamma=gamma, lam=lambd,
                   cu_seqlens=_offsets(lengths, values.device))
    return list(found.advantages.split(lengths)), list(found.returns.split(lengths))


def token_advantages(args: Any, rollout_data: dict[str, Any]) -> None:
    """slime's custom advantage function, for rewards of tokens: writes `advantages` and `returns`.

        r_t = reward_t - kl_coef KL_t,   A, returns = tk.gae(r, values, loss mask, gamma, lambd)

    rollout_data: `rewards`, for each answer a number (at its last token that the policy wrote) or
    one for each of its tokens, none paid where all of it is masked; `kl`, `loss_masks`, and
    `values` (zeros where there is no critic), each a list of [R_i]. Whitening stays slime's
    (`--normalize-advantages`).

    Raises ValueError where an answer's tensors have other lengths than the answer: under context
    parallelism a process holds a part of it.
    """
    kl, lengths = rollout_data["kl"], list(rollout_data["response_lengths"])
    device = kl[0].device
    values = rollout_data.get("values") or [torch.zeros_like(x) for x in kl]
    mask = torch.cat([x.bool() for x in rollout_data["loss_masks"]]).to(device)
    dense, terminal = [], []
    for i, (reward, length) in enumerate(zip(rollout_data["rewards"], lengths, strict=True)):
        given = torch.as_tensor(reward, dtype=torch.float32, device=device)
        sizes = {"kl": len(kl[i]), "values": len(values[i]),
                 "rewards": len(given) if given.dim() else length}
        for name, size in sizes.items():
            if size != length:
                raise ValueError(f"token_advantages: {name} of answer {i} has {size} tokens, "
                                 f"expected {length}, its response length; context parallelism "
                                 "splits answers and is not supported here")
        given = given if rollout_data["loss_masks"][i].any() else torch.zeros_like(given)
        dense.append(given if given.dim() else given.new_zeros(length))
        terminal.append(given.new_zeros(()) if given.dim() else given)
    offsets = _offsets(lengths, device)
    rewards = tk.place_rewards(mask, terminal=torch.stack(terminal), dense=torch.cat(dense),
                               on_masked="move_back", cu_seqlens=offsets).rewards
    found = tk.gae(rewards - args.kl_coef * torch.cat(list(kl)).detach(),
                   torch.cat(list(values)).detach(), mask, gamma=args.gamma, lam=args.lambd,
                   cu_seqlens=offsets)
    rollout_data["advantages"] = list(found.advantages.split(lengths))
    rollout_data["returns"] = list(found.returns.split(lengths))


_PART = Part(_swap, _INTERFACE, {_GAE: get_advantages_and_returns_batch},
             "get_advantages_and_returns_batch is ours, with slime's numbers")


def patch() -> None:
    """Puts our GAE in the place of slime's, in this process, and says so on one line. Twice is
    once. Raises PeerError where slime is absent, outside `VERSIONS`, or has another interface."""
    _peer.patch_parts(VERSIONS, _PART)


def probe() -> str:
    """slime's version, where it has every name that this file needs; raises PeerError."""
    return _peer.probe_parts(VERSIONS, _PART)


def unpatch() -> None:
    """Puts slime's own function back; says so where another library has replaced it since."""
    _peer.unpatch_parts(_PART)


def patch_when_imported() -> None:
    """For a process that Ray starts: patches slime once its functions are imported there. A slime
    that we do not know is told and kept."""
    _peer.patch_when_imported(VERSIONS, {_UTILS: _PART})
