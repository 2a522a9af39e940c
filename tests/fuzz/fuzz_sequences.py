"""Operators without gradients in numbers of Python, and those that move or project states.

`gae`, `whiten`, `token_advantages`, `token_rewards` and `place_rewards` are computed token by token
from the contract, in fp64 and once more with numbers of fp32; `entropy`, `linear_logprobs`,
`linear_ppo_loss`, `prefix_attention`, `response_states` and `align.transfer` in torch.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from batches import (
    FLOOR,
    SEQUENTIAL,
    Batch,
    NearAnEdge,
    compare,
    exactly_zero,
    hold,
    operator_target,
)
from fuzz_losses import policy_terms, ppo_options
from guided import REFUSED, Wrong
from torch import Tensor

import tppo_kernels as tk

Number = Callable[[float], Any]
KINDS: tuple[Number, Number] = (float, np.float32)


def numbers(batch: Batch, x: Tensor, of: Number) -> list[list[Any]]:
    return [[of(v) for v in part.double().tolist()] for part in batch.of(x)]


def whole(batch: Batch, parts: Sequence[Sequence[Any]]) -> Tensor:
    return batch.back(
        [torch.tensor([float(v) for v in part], dtype=torch.float64) for part in parts]
    )


def check(
    name: str,
    batch: Batch,
    got: Tensor,
    made: Sequence[Sequence[Sequence[Any]]],
    floor: float = SEQUENTIAL,
    scale: float = 0.0,
) -> None:
    """A result against its values in fp64 and in fp32."""
    exact, eager = (whole(batch, parts) for parts in made)
    hold(name, got, exact, eager, scale, floor)
    exactly_zero(name, got, batch)


def advantages(rewards: list[Any], values: list[Any], gamma: Any, lam: Any, end: Any) -> list[Any]:
    """The textbook's recursion over the steps of one sequence."""
    found, later, after = [], gamma * 0, end
    for r, v in zip(reversed(rewards), reversed(values), strict=True):
        later = r + gamma * after - v + gamma * lam * later
        after = v
        found.append(later)
    return found[::-1]


class Discounts:
    """The options of `gae`, and of each sequence its numbers."""

    def __init__(self, batch: Batch) -> None:
        pick = batch.choose.choice
        self.gamma, self.batch = pick((1.0, 0.99, 0.9, 0.0)), batch
        self.lam = self._share(pick((0.95, 1.0, 0.0, "each")))
        self.value_lam = pick((None, None, self._share(pick((1.0, "each")))))
        self.bootstrap = batch.sequences() if pick((False, True)) else None
        self.options = {
            "gamma": self.gamma,
            "lam": self.lam,
            "value_lam": self.value_lam,
            "bootstrap": self.bootstrap,
        }

    def _share(self, kind: Any) -> Any:
        if kind != "each":
            return kind
        shares = torch.rand(self.batch.batch, generator=self.batch.g)
        for b, rows in enumerate(self.batch.rows):
            if not len(rows):
                shares[b] = self.batch.poison
        return shares

    def of(self, b: int, lam: Any, number: Number) -> tuple[Any, Any, Any]:
        end = 0.0 if self.bootstrap is None else float(self.bootstrap[b])
        lam = float(lam[b]) if isinstance(lam, Tensor) else lam
        return number(np.float32(self.gamma)), number(np.float32(lam)), number(end)

    def run(
        self, rewards: Tensor | list[list[list[Any]]], values: Tensor
    ) -> tuple[list[list[list[Any]]], list[list[list[Any]]]]:
        """(advantages, returns), each in fp64 and in fp32."""
        batch, made, back = self.batch, [], []
        for kind, number in enumerate(KINDS):
            r = numbers(batch, rewards, number) if isinstance(rewards, Tensor) else rewards[kind]
            v = numbers(batch, values, number)
            made.append(
                [
                    advantages(r[b], v[b], *self.of(b, self.lam, number)) if v[b] else []
                    for b in range(batch.batch)
                ]
            )
            lam = self.lam if self.value_lam is None else self.value_lam
            other = [
                advantages(r[b], v[b], *self.of(b, lam, number)) if v[b] else []
                for b in range(batch.batch)
            ]
            back.append(
                [[x + y for x, y in zip(a, b, strict=True)] for a, b in zip(other, v, strict=True)]
            )
        return made, back


def gae(seed: int) -> None:
    batch = Batch(seed)
    scale = batch.choose.choice((1.0, 1.0, 1e4, 1e-3))
    rewards, values = batch.tokens(scale=scale), batch.tokens(scale=scale)
    discounts = Discounts(batch)
    got = tk.gae(rewards, values, **batch.layout(), **discounts.options)  # type: ignore[arg-type]
    made, back = discounts.run(rewards, values)
    size = max(
        (
            float(x.double().abs().max())
            for part in (*batch.of(rewards), *batch.of(values))
            for x in [part]
            if len(part)
        ),
        default=0.0,
    )
    check("gae.advantages", batch, got.advantages, made, scale=size)
    check("gae.returns", batch, got.returns, back, scale=size)


def whitened(parts: list[list[Any]], unbiased: bool, shift: bool, eps: float) -> list[list[Any]]:
    """(x - mean) / sqrt(var + eps) over all of the values."""
    flat = [x for part in parts for x in part]
    if not flat:
        return parts
    one = type(flat[0])
    mean = sum(flat[1:], flat[0]) / one(len(flat))
    square = [(x - mean) * (x - mean) for x in flat]
    var = sum(square[1:], square[0]) / one(max(len(flat) - int(unbiased), 1))
    back, largest = (one(0) if shift else mean), max(abs(x) for x in flat)
    tiny = float(largest) * 1e-6
    if len(flat) > 1 and tiny * 0.02 < math.sqrt(float(var)) < tiny * 50:
        raise NearAnEdge  # whether the values vary at all is a matter of rounding
    if len(flat) < 2 or float(var) <= tiny * tiny:
        return [[back for _ in part] for part in parts]
    factor = one(1) / one(math.sqrt(var + one(eps)))
    return [[(x - mean) * factor + back for x in part] for part in parts]


def whiten(seed: int) -> None:
    batch = Batch(seed)
    pick = batch.choose.choice
    x = batch.tokens(scale=pick((1.0, 1e4, 1e-3, 0.0)), shift=pick((0.0, 0.0, 100.0)))
    unbiased, shift, eps = pick((True, False)), pick((True, False)), pick((1e-8, 1e-3))
    made = [whitened(numbers(batch, x, number), unbiased, shift, eps) for number in KINDS]
    got = tk.whiten(x, batch.given, unbiased=unbiased, shift_mean=shift, eps=eps)
    flat = [abs(v) for part in numbers(batch, x, float) for v in part]
    mean = sum(flat) / max(len(flat), 1)  # what a mean that stays adds up, which may cancel
    check("whiten", batch, got, made, scale=0.0 if shift else mean * FLOOR / SEQUENTIAL)


def estimate(kind: str, d: Any) -> Any:
    d = max(min(d, type(d)(20)), type(d)(-20))
    exp = math.expm1(-d) if isinstance(d, float) else np.expm1(-d)
    return {"k1": d, "k2": d * d / 2, "k3": exp + d, "abs": abs(d), "k1+": d, "k3+": exp + d}[kind]


def token_advantages(seed: int) -> None:
    batch = Batch(seed)
    pick = batch.choose.choice
    given, values = batch.tokens(), batch.tokens()
    lp, ref = batch.tokens(shift=-2.0), batch.tokens(shift=-2.0)
    coef, kind = pick((0.0, 0.1, 1.3)), pick(("k1", "k2", "k3", "abs"))
    train = batch.valid & (torch.rand(batch.shape, generator=batch.g) < 0.7)
    train_given = pick((None, train))
    train = batch.valid if train_given is None else train
    normalize, unbiased = pick((True, False)), pick((True, False))
    discounts, shaped = Discounts(batch), []
    for number in KINDS:
        rows = [numbers(batch, x, number) for x in (given, lp, ref)]
        shaped.append(
            [
                [
                    r - number(np.float32(coef)) * estimate(kind, a - b)
                    for r, a, b in zip(*of_one, strict=True)
                ]
                for of_one in zip(*rows, strict=True)
            ]
        )
    made, back = discounts.run(shaped, values)
    got = tk.token_advantages(
        given,
        values,
        train_mask=train_given,
        logprobs=lp,
        ref_logprobs=ref,
        kl_coef=coef,
        kl_estimator=kind,
        normalize=normalize,
        unbiased=unbiased,
        **batch.layout(),
        **discounts.options,
    )  # type: ignore[arg-type]
    check("token_advantages.rewards", batch, got.rewards, shaped)
    size = max((abs(x) for part in made[0] for x in part), default=0.0)
    check("token_advantages.returns", batch, got.returns, back, scale=4 + size)
    if int(got.stats.n) != int(batch.valid.sum()):
        raise Wrong(f"n is {int(got.stats.n)}, expected {int(batch.valid.sum())}")
    if normalize:
        kept = [[bool(t) for t in part] for part in batch.of(train)]
        made = [
            [
                [x for x, k in zip(part, keep, strict=True) if k]
                for part, keep in zip(parts, kept, strict=True)
            ]
            for parts in made
        ]
        spread = [x for part in made[0] for x in part]
        if len(spread) > 1 and np.std(spread) < 0.03 * (1 + size):
            raise NearAnEdge  # rounding of the advantages is blown up
        made = [whitened(parts, unbiased, True, 1e-8) for parts in made]
        exact, eager = (
            [torch.tensor([float(x) for x in part]).double() for part in parts] for parts in made
        )
        flat = got.advantages.reshape(-1)
        rows = [r[torch.tensor(k, dtype=torch.bool)] for r, k in zip(batch.rows, kept, strict=True)]
        for b, r in enumerate(rows):
            hold(
                "token_advantages.advantages",
                flat[r].double(),
                exact[b],
                eager[b],
                1.0,
                30 * SEQUENTIAL,
            )
    else:
        check("token_advantages.advantages", batch, got.advantages, made, scale=4 + size)
    exactly_zero("token_advantages", got.advantages, batch)


def token_rewards(seed: int) -> None:
    batch = Batch(seed)
    pick = batch.choose.choice
    logits = batch.tokens(3, scale=pick((1.0, 30.0, 0.0)))
    mode, values = pick(("argmax", "expected")), pick(((0.0, -0.5, 0.5), (0.0, 1.0, 2.0)))
    length = pick((None, 3.5, batch.sequences().abs() if batch.batch else None))
    got = tk.token_rewards(
        logits, mode=mode, suggested_length=length, values=values, alpha=1.7, **batch.layout()
    )
    made: list[list[list[Any]]] = []
    classes: list[list[int]] = []
    for _ in KINDS:  # the sigmoid and the softmax of fp32 are those of fp64 but for the last bits
        made.append([])
        classes = []
        for b, part in enumerate(batch.of(logits)):
            rows, found = part.double().tolist(), []
            classes.append([max(range(3), key=row.__getitem__) for row in rows])
            for place, row in enumerate(rows, 1):
                top = max(row)
                p = [math.exp(z - top) for z in row]
                worth = (
                    values[classes[-1][place - 1]]
                    if mode == "argmax"
                    else sum(v * q for v, q in zip(values, p, strict=True)) / sum(p)
                )
                if length is not None:
                    over = place - (float(length[b]) if isinstance(length, Tensor) else length)
                    worth /= 1 + math.exp(min(700.0, 1.7 * over - 6))
                found.append(worth)
            made[-1].append(found)
    check("token_rewards", batch, got.rewards, made, 3e-6, 1.0)
    if bool((got.category.double() != whole(batch, classes)).any()):
        raise Wrong(f"category {got.category}, expected {whole(batch, classes)}")


def place_rewards(seed: int) -> str | None:
    batch = Batch(seed)
    pick = batch.choose.choice
    starts = [0] * batch.batch
    lengths = [batch.shape[-1]] * batch.batch
    if batch.cu is not None:
        starts = batch.cu[:-1].tolist()
        lengths = (batch.cu[1:] - batch.cu[:-1]).tolist()
    elif batch.batch:
        starts = [b * batch.shape[1] for b in range(batch.batch)]
    valid = batch.valid.reshape(-1).tolist()
    terminal = torch.randint(-1, 3, (batch.batch,), generator=batch.g).float()
    dense = (
        (
            torch.rand(batch.shape, generator=batch.g)
            * (torch.rand(batch.shape, generator=batch.g) < 0.3)
        )
        if pick((False, True))
        else None
    )
    spans = []
    for b, n in enumerate(lengths):
        if n and pick((False, True)):
            start = batch.choose.randrange(n)
            spans.append((b, start, batch.choose.randint(start + 1, n), pick((0.0, 1.0, -2.5))))
    at, masked = pick(("last", "each", "spread")), pick(("error", "move_back", "drop"))
    wanted, dropped, refused = [0.0] * len(valid), 0, False

    def put(b: int, slot: int, value: float) -> None:
        nonlocal dropped, refused
        place = starts[b] + slot
        if value and not valid[place]:
            if masked == "drop":
                dropped += 1
                return
            while masked == "move_back" and place > starts[b] and not valid[place]:
                place -= 1
            if not valid[place]:
                refused = True
                return
        if value:
            wanted[place] += value

    for b, start, end, value in spans:
        slots = [end - 1] if at == "last" else range(start, end)
        for slot in slots:
            put(b, slot, value / (end - start) if at == "spread" else value)
    for b, n in enumerate(lengths):
        own = [i for i in range(n) if valid[starts[b] + i]]
        if own:
            put(b, own[-1], float(terminal[b]))
        elif float(terminal[b]):
            refused = True
        for i in range(n) if dense is not None else ():
            put(b, i, float(dense.reshape(-1)[starts[b] + i]))  # type: ignore[union-attr]
    mask = batch.valid if batch.given is None else batch.given
    try:
        got = tk.place_rewards(
            mask,
            terminal=terminal,
            spans=spans,
            dense=dense,
            span_at=at,
            on_masked=masked,
            cu_seqlens=batch.cu,
        )
    except ValueError as error:
        if not refused or "place_rewards: " not in str(error):
            raise Wrong(f"refused: {error}") from error
        return REFUSED
    if refused:
        raise Wrong(f"{got.rewards}: a reward without a slot was no error")
    exact = torch.tensor(wanted).double().reshape(batch.shape)
    hold("place_rewards", got.rewards, exact, exact.float())
    if int(got.dropped) != dropped:
        raise Wrong(f"dropped {int(got.dropped)}, expected {dropped}")
    return None


def entropy(seed: int) -> None:
    batch = Batch(seed)
    v, scale = batch.choose.choice((1, 2, 7, 65, 300)), batch.choose.choice((1.0, 10.0, 1e4))
    logits = batch.tokens(v, scale=scale)
    logits = logits.clamp(-6e4, 6e4) if logits.dtype == torch.float16 else logits
    flat = logits.reshape(-1, v).clone()
    for rows in batch.rows:
        if len(rows) and v > 1 and batch.choose.random() < 0.3:  # all but one column impossible
            flat[rows[0], 1:] = float("-inf")
    logits = flat.reshape(logits.shape)
    temperature = batch.choose.choice((1.0, 0.7))
    targets = torch.zeros(batch.shape, dtype=torch.long)
    got = tk.token_logprobs(logits, targets, batch.given, temperature=temperature)
    alone = tk.entropy(logits, batch.given, temperature=temperature)
    z = [part.double() / temperature for part in batch.of(logits)]
    log_p = [torch.log_softmax(part, -1) if len(part) else part for part in z]
    wanted = batch.back([-(part.exp() * part.clamp(min=-1e300)).sum(-1) for part in log_p])
    for rows, part, p in zip(batch.rows, z, log_p, strict=True):
        top = part.clamp(min=-1e30).masked_fill(part.isinf(), 0).abs().amax(-1) if len(part) else 0
        allowed = 1e-5 + 2.4e-7 * top
        off = (got.logprobs.reshape(-1)[rows].double() - p[:, 0]).abs() if len(part) else part
        if len(part) and not bool((off <= allowed).all()):
            raise Wrong(f"token_logprobs: off by {off}, allowed {allowed}")
    top = max((float(part.masked_fill(part.isinf(), 0).abs().max()) for part in z if len(part)),
              default=0.0)
    size = 1 + math.log(v) + 0.1 * top  # |z| is rounded to fp32, as of the log-probs
    hold("entropy", alone, wanted, wanted.float(), size, 4e-6)
    hold("token_logprobs.entropy", got.entropy, wanted, wanted.float(), size, 4e-6)
    for x in (got.logprobs, got.entropy, alone):
        exactly_zero("token_logprobs", x, batch)


def linear_ppo(seed: int) -> None:
    """The loss through the head, against the logits of fp64 and the formula of `ppo_loss`."""
    batch = Batch(seed)
    pick = batch.choose.choice
    d, v = pick((2, 8, 24)), pick((2, 7, 65, 130))
    options, over = ppo_options(batch)
    options["max_log_ratio"] = 20.0
    leaves = {"hidden": batch.tokens(d).float(), "weight": batch.randn(v, d, scale=d**-0.5)}
    targets = torch.randint(v, batch.shape, generator=batch.g)
    targets = torch.where(batch.valid, targets, torch.tensor(pick((-100, 0, 10**6))))
    old, a = batch.tokens(scale=0.5, shift=-math.log(v)), batch.tokens()
    ref = batch.tokens(scale=0.5, shift=-math.log(v)) if options["kl_coef"] else None
    if ref is None:
        options.update(kl_clamp=None, kl_ratio_weighted=False)
    memory = "store" if options["ratio"] == "sequence" else pick(("auto", "store", "recompute"))
    sizes: list[float] = []

    def formula(x: dict[str, Tensor]) -> Any:
        dtype, parts = x["weight"].dtype, []
        for b, h in enumerate(batch.of(x["hidden"])):
            log_p = torch.log_softmax(h @ x["weight"].T, -1)
            lp = log_p.gather(1, batch.of(targets)[b][:, None])[:, 0]
            entropy = -(log_p.exp() * log_p).sum(-1)
            third = None if ref is None else batch.of(ref.to(dtype))[b]
            parts.append(
                policy_terms(
                    lp,
                    batch.of(old.to(dtype))[b],
                    batch.of(a.to(dtype))[b],
                    None,
                    third,
                    entropy,
                    options,
                )
            )
        total, size = over.sum(parts)
        sizes.append(size * math.log(v + 1))
        return {"loss": (total, sizes[-1])}

    formula({k: x.double() for k, x in leaves.items()})
    scale = 30 * sizes[0] * (1 + d**0.5)
    compare(
        f"linear_ppo_loss {memory} {options}",
        batch,
        leaves,
        lambda x: {
            "loss": tk.linear_ppo_loss(
                x["hidden"],
                x["weight"],
                targets,
                old,
                a,
                ref_logprobs=ref,
                memory=memory,
                **batch.layout(),
                **options,
            ).loss
        },
        formula,
        {"hidden": scale, "weight": scale},
    )


def visible(prompts: list[int], answers: list[list[int]]) -> Tensor:
    """Which keys a query sees: its prompt up to itself, or all of it, and its answer."""
    total = sum(prompts) + sum(map(sum, answers))
    sees, at = torch.zeros(total, total, dtype=torch.bool), 0
    for prompt, of_one in zip(prompts, answers, strict=True):
        first, at = at, at + prompt
        sees[first:at, first:at] = torch.ones(prompt, prompt).tril().bool()
        for n in of_one:
            sees[at : at + n, first : first + prompt] = True
            sees[at : at + n, at : at + n] = torch.ones(n, n).tril().bool()
            at += n
    return sees


def spoil(batch: Batch, leaves: dict[str, Tensor], sees: Tensor) -> Tensor:
    """Makes tokens of the leaves NaN or infinite, in place; which queries may be no number."""
    groups = leaves["q"].shape[0] // leaves["k"].shape[0]
    spoilt, rng = torch.zeros(leaves["q"].shape[:2], dtype=torch.bool), batch.choose
    for key in rng.choice(("q", "k", "v", "qk", "kv")):
        x = leaves[key]
        head, token, place = (rng.randrange(n) for n in x.shape)
        x[head, token, place] = rng.choice((float("nan"), float("inf"), float("-inf")))
        if key == "q":
            spoilt[head, token] = True
        else:
            spoilt[head * groups : (head + 1) * groups] |= sees[:, token]
    return spoilt


def prefix_attention(seed: int) -> None:
    batch = Batch(seed)
    pick, rng = batch.choose.choice, batch.choose
    prompts = [rng.randint(1, 5) for _ in range(pick((1, 1, 2, 3)))]
    answers = [[rng.randint(1, 4) for _ in range(pick((1, 2, 3)))] for _ in prompts]
    layout = tk.PrefixLayout.from_lengths(prompts, answers)
    heads, groups, size = pick((1, 2)), pick((1, 2)), pick((4, 8))
    total = sum(prompts) + sum(map(sum, answers))
    spread = pick((1.0, 4.0))
    leaves = {
        "q": batch.randn(heads * groups, total, size, scale=spread),
        "k": batch.randn(heads, total, size, scale=spread),
        "v": batch.randn(heads, total, size),
    }
    scale = pick((None, 0.31))

    sees = visible(prompts, answers)

    def formula(x: dict[str, Tensor]) -> Any:
        """The result, and what a rounding of every product in the scores costs it."""
        k, v = (y.repeat_interleave(groups, 0) for y in (x["k"], x["v"]))
        factor = size**-0.5 if scale is None else scale
        z = x["q"] @ k.transpose(1, 2) * factor
        p = torch.softmax(z.masked_fill(~sees, float("-inf")), -1)
        out = p @ v
        with torch.no_grad():
            terms = x["q"].abs() @ k.abs().transpose(1, 2) * factor
            apart = (v[:, None] - out[:, :, None]).abs()  # [heads, query, key, size]
            cost = ((p * terms)[..., None] * apart).sum(2).max()
        return {"out": (out, float(cost))}

    fresh = {
        kind: {key: x.detach().to(kind).requires_grad_() for key, x in leaves.items()}
        for kind in (torch.float32, torch.float64)
    }
    slopes = batch.randn(heads * groups, total, size)
    ours = {key: x.detach().clone().requires_grad_() for key, x in leaves.items()}
    got = tk.prefix_attention(ours["q"], ours["k"], ours["v"], layout, scale=scale)
    found = {kind: formula(x)["out"] for kind, x in fresh.items()}
    outs = {kind: out for kind, (out, _) in found.items()}
    hold(
        "prefix_attention",
        got.detach(),
        outs[torch.float64].detach(),
        outs[torch.float32].detach(),
        max(1.0, found[torch.float64][1] * 2.0**-23 / FLOOR),
    )
    mine = torch.autograd.grad((got * slopes).sum(), list(ours.values()))
    e, t = (
        torch.autograd.grad((outs[kind] * slopes.to(kind)).sum(), list(fresh[kind].values()))
        for kind in (torch.float32, torch.float64)
    )
    for key, one, two, three in zip(leaves, mine, e, t, strict=True):
        hold(f"prefix_attention: gradient of {key}", one, three, two, spread * total)
    if rng.random() < 0.3:
        return
    hostile = {key: x.detach().clone() for key, x in leaves.items()}
    spoilt = spoil(batch, hostile, sees)
    q = hostile.pop("q").requires_grad_()
    out = tk.prefix_attention(q, **hostile, layout=layout, scale=scale)
    dq = torch.autograd.grad((out * slopes).sum(), q)[0]
    for name, x, sound in (("result", out.detach(), got.detach()), ("gradient of q", dq, mine[0])):
        if not torch.equal(x.isnan(), spoilt[..., None].expand_as(x)):
            raise Wrong(f"prefix_attention: the {name} is {x}, expected NaN at {spoilt.nonzero()}")
        if not torch.equal(x[~spoilt], sound[~spoilt]):
            raise Wrong(f"prefix_attention: the {name} at the others is {x}, was {sound}")


def response_states(seed: int) -> str | None:
    batch = Batch(seed)
    rng, pick = batch.choose, batch.choose.choice
    n, length, size = pick((1, 2, 3)), rng.randint(1, 12), pick((1, 4))
    full = batch.strided(batch.randn(n, length, size)).requires_grad_()
    prompt = torch.tensor([rng.randint(0, length) for _ in range(n)])
    tokens = rng.randint(0, 6)
    align = pick(("logprob", "value", "reward"))
    first = [int(p) - (align != "reward") for p in prompt]
    fits = all(tokens == 0 or (a >= 0 and a + tokens <= length) for a in first)
    try:
        got = tk.response_states(full, prompt, tokens, align)
    except ValueError as error:
        if fits or "response_states: " not in str(error):
            raise Wrong(f"refused: {error}") from error
        return REFUSED
    if not fits:
        raise Wrong(f"positions {first} of {length} were no error")
    wanted = torch.stack(
        [full[b, a : a + tokens] if tokens else full[b, :0] for b, a in enumerate(first)]
    )
    if not torch.equal(got, wanted):
        raise Wrong(f"states {got}, expected {wanted}")
    slopes = batch.randn(*got.shape)
    mine, theirs = (
        torch.autograd.grad((x * slopes).sum(), full, allow_unused=True)[0] for x in (got, wanted)
    )
    if not torch.equal(mine, theirs):
        raise Wrong(f"gradient {mine}, expected {theirs}")
    return None


def transfer(seed: int) -> None:
    """Values by characters, of tokens of two tokenizers of one text, some of which share one."""
    rng = Batch(seed).choose
    length = rng.randint(0, 12)

    def spans() -> list[tuple[int, int]]:
        found, at = [], 0
        while at < length:
            end = min(length, at + rng.choice((0, 1, 1, 2, 3)))
            found.append((at, end))
            if end > at and rng.random() < 0.2:
                found.append((end - 1, end))  # another byte of its last character
            at = end
        return found

    source, target = spans(), spans()
    x = torch.randn(len(source), generator=torch.Generator().manual_seed(seed % 2**63))
    got = tk.align.transfer(source, target, x)
    for j, (a, b) in enumerate(target):
        covers = [i for i, (c, d) in enumerate(source) if d > c and c <= b - 1 < d] if b > a else []
        ends = min((source[i][1] for i in covers), default=0)
        choice = [float(x[i]) for i in covers if source[i][1] == ends] or [0.0]
        if float(got[j]) not in choice:
            raise Wrong(f"token {(a, b)} got {float(got[j])}, expected one of {choice} of {source}")
    if not torch.equal(
        tk.align.transfer(source, source, x),
        torch.where(torch.tensor([d > c for c, d in source], dtype=torch.bool), x, 0.0),
    ):
        raise Wrong(f"{source} to itself: {tk.align.transfer(source, source, x)} of {x}")


TARGETS = [
    operator_target(*given)
    for given in (
        ("gae", gae, 40_000),
        ("whiten", whiten, 30_000),
        ("token_advantages", token_advantages, 30_000),
        ("token_rewards", token_rewards, 20_000),
        ("place_rewards", place_rewards, 25_000),
        ("entropy, token_logprobs", entropy, 25_000),
        ("linear_ppo_loss", linear_ppo, 20_000),
        ("prefix_attention", prefix_attention, 10_000),
        ("response_states", response_states, 20_000),
        ("align.transfer", transfer, 20_000),
    )
]
