"""Arguments that no operator takes: every one is refused by its name, and nothing is read beyond.

A sound call of an operator gets one wrong argument: offsets that do not begin at 0, end at N, are
not sorted, overflow or have another dtype; tensors of a wrong shape, dtype, layout or device;
numbers out of their range; unknown keywords. ValueError or TypeError must name the operator. An
argument of a sound kind that only looks strange must give what the plain one gives.
"""

import random
from collections.abc import Callable, Mapping
from typing import Any

import torch
from batches import operator_target
from guided import REFUSED, Wrong
from torch import Tensor

import tppo_kernels as tk

LENGTHS = (3, 0, 4, 2)
N, B = sum(LENGTHS), len(LENGTHS)
LAYOUT = tk.PrefixLayout.from_lengths([3], [[4, 2]])
Args = dict[str, Any]


def tokens(g: torch.Generator, *inner: int) -> Tensor:
    return torch.randn(N, *inner, generator=g)


def sound(name: str, g: torch.Generator) -> Args:
    """The arguments of a sound packed call, by name."""
    x = {key: tokens(g) for key in ("a", "b", "c", "d")}
    cu = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
    mask = torch.rand(N, generator=g) < 0.7
    common = {"mask": mask, "cu_seqlens": cu}
    targets, hidden = torch.randint(5, (N,), generator=g), tokens(g, 4)
    weight = torch.randn(5, 4, generator=g)
    old = {"old_logprobs": x["b"] - 2, "advantages": x["c"]}
    return {
        "gae": {"rewards": x["a"], "values": x["b"], "lam": 0.9, "gamma": 0.9, **common},
        "token_advantages": {
            "token_rewards": x["a"],
            "values": x["b"],
            "logprobs": x["c"],
            "ref_logprobs": x["d"],
            "kl_coef": 0.1,
            "lam": 0.9,
            **common,
        },
        "reduce": {"x": x["a"], "num_tokens": 7, **common},
        "ppo_loss": {"logprobs": x["a"] - 2, **old, "clip_low": 0.2, **common},
        "value_loss": {
            "values": x["a"],
            "returns": x["b"],
            "old_values": x["c"],
            "clip": 0.2,
            **common,
        },
        "linear_ppo_loss": {
            "hidden": hidden,
            "weight": weight,
            "targets": targets,
            **old,
            "temperature": 0.7,
            **common,
        },
        "token_reward_loss": {
            "logits": tokens(g, 3),
            "labels": targets % 3,
            "balance": None,
            "sentence_labels": torch.randn(B, generator=g),
            **common,
        },
        "token_rewards": {
            "class_logits": tokens(g, 3),
            "suggested_length": 3.0,
            "alpha": 2.0,
            **common,
        },
        "place_rewards": {"terminal": torch.zeros(B), "dense": torch.zeros(N), **common},
        "whiten": {"x": x["a"], "mask": mask, "eps": 1e-8},
        "kl": {"logprobs": x["a"], "ref_logprobs": x["b"], "mask": mask, "estimator": "k3"},
        "entropy": {"logits": tokens(g, 5), "mask": mask, "temperature": 0.7},
        "token_logprobs": {"logits": tokens(g, 5), "targets": targets, "mask": mask},
        "linear_logprobs": {
            "hidden": hidden,
            "weight": weight,
            "targets": targets,
            "mask": mask,
            "temperature": 0.7,
        },
        "token_head": {
            "hidden": hidden,
            "weight": weight,
            "bias": torch.randn(5, generator=g),
            "mask": mask,
        },
        "response_states": {
            "full": tokens(g, 2),
            "prompt_length": torch.tensor([1, 0, 1, 1]),
            "T": 1,
            "align": "reward",
            "mask": torch.tensor([[1], [0], [1], [1]]).bool(),
            "cu_seqlens": cu,
        },
        "response_mask": {"tokens": targets.reshape(3, 3), "eos_id": 2},
        "prefix_attention": {
            "q": torch.randn(2, N, 4, generator=g),
            "k": torch.randn(1, N, 4, generator=g),
            "v": torch.randn(1, N, 3, generator=g),
            "layout": LAYOUT,
            "scale": 0.5,
        },
    }[name]


NAMES = (
    "gae",
    "token_advantages",
    "reduce",
    "ppo_loss",
    "value_loss",
    "linear_ppo_loss",
    "token_reward_loss",
    "token_rewards",
    "place_rewards",
    "whiten",
    "kl",
    "entropy",
    "token_logprobs",
    "linear_logprobs",
    "token_head",
    "response_states",
    "response_mask",
    "prefix_attention",
)
HUGE = (2**63, 2**70, 10**400)
RANGES: Mapping[str, tuple[float, ...]] = {
    "lam": (-0.1, 1.5),
    "temperature": (0.0, -1.0),
    "clip": (-0.1,),
    "eps": (-1.0,),
    "num_tokens": (-1, 1.5, HUGE[-1]),
    "T": (-1, 1.5, N + 1, 10**15, *HUGE),
    "eos_id": (-1, 1.5, *HUGE),
    "scale": (float("inf"),),
    "clip_low": (-0.1,),
    "alpha": (-1.0,),
    "suggested_length": (-1.0,),
    "gamma": (),
    "kl_coef": (),
}


def wrong_offsets(cu: Tensor, rng: random.Random) -> Tensor:
    """Offsets that are none."""
    i = rng.randrange(len(cu))
    big = rng.choice((N + 1, -1, 2**31 - 1, -(2**31), N + 10**6))
    bad = cu.clone()
    kind = rng.randrange(8)
    if kind == 0:
        bad[0] = rng.choice((1, -1, big))
    elif kind == 1:
        bad[-1] = rng.choice((N - 1, big))
    elif kind == 2:
        bad[i] = big
    elif kind == 3:
        bad = torch.cat([cu[:1], cu[1:].flip(0)])
    elif kind == 4:
        return cu.to(rng.choice((torch.int64, torch.float32, torch.int16, torch.bool)))
    elif kind == 5:
        return cu.reshape(rng.choice(((1, -1), (-1, 1))))
    elif kind == 6:
        return cu[:0]
    else:
        return cu.to("meta")
    return bad


def wrong_tensor(x: Tensor, name: str, rng: random.Random) -> Any:
    kind = rng.randrange(9)
    if name == "weight" and kind < 2 or name == "full" and kind in (2, 8) or name == "tokens":
        kind = 3  # of V rows, of any sizes behind a token, of any sizes
    if name == "v" and kind == 8:
        kind = 3  # a value of a key may have any size
    if name in ("q", "k", "v") and kind < 2:
        return x[:, : N - 1] if kind else torch.cat([x, x[:, :1]], 1)  # any number of heads
    if kind == 0:
        return torch.cat([x, x[:1]])
    if kind == 1:
        return x[:-1]
    if kind == 2:
        return x[..., None, None]
    if kind == 3:
        return x.to(torch.complex64)
    if kind == 4 and x.dim() > 1:
        return x.to_sparse()
    if kind == 5:
        return x.tolist()
    if kind == 6:
        return x.to("meta")
    if kind == 8:
        return x[..., :0]
    if name == "mask":
        return x.float()
    if name in ("targets", "labels"):
        return torch.where(torch.ones_like(x).bool(), rng.choice((-1, 10**9, -(2**62))), x)
    return "text"


def spoilt(name: str, given: Args, rng: random.Random) -> str:
    """Makes one argument wrong, in place; which one."""
    key = rng.choice(list(given))
    value = given[key]
    if key == "cu_seqlens":
        bad = wrong_offsets(value, rng)
        if bad.dtype == value.dtype and not bad.is_meta and torch.equal(bad, value):
            return ""
        given[key] = bad
    elif isinstance(value, Tensor):
        given[key] = wrong_tensor(value, key, rng)
    elif isinstance(value, tk.PrefixLayout):
        given[key] = rng.choice(
            ("text", None, tk.PrefixLayout.from_lengths([3], [[4]]), [value])
        )
    elif isinstance(value, float | int):
        given[key] = rng.choice(
            (*RANGES.get(key, ()), float("nan"), "1", [1.0], True, torch.ones(2, 3))
        )
    elif isinstance(value, str):
        given[key] = rng.choice(("", "K1", 3, None))
    elif rng.random() < 0.5:
        given[rng.choice(("maks", "gama", "cu_seqlen", "x_"))] = 1.0
    else:
        return ""
    return key


def one(seed: int) -> str | None:
    rng, g = random.Random(seed), torch.Generator().manual_seed(seed)
    name = rng.choice(NAMES)
    given = sound(name, g)
    function: Callable[..., Any] = getattr(tk, name)
    key = spoilt(name, given, rng)
    try:
        out = function(**given)
    except (ValueError, TypeError) as error:
        if not key:
            raise
        if not str(error).startswith((name, "linear_logprobs", "token_logprobs", "ppo_loss")):
            raise Wrong(
                f"{name}: {key} = {given.get(key)}: a message without the operator's name: "
                f"{type(error).__name__}: {error}"
            ) from error
        return REFUSED
    if key:
        raise Wrong(f"{name}: {key} = {given.get(key)} was taken: {out}")
    return None


TARGETS = [operator_target("wrong arguments", one, 60_000)]
