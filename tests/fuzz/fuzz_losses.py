"""`kl`, `reduce`, `ppo_loss`, `value_loss`, `token_head`, `token_reward_loss` against formulas.

The formulas are those of the operators' contract, of the valid tokens of each sequence, written
here and differentiated by torch. A call near an edge, where the gradient jumps within rounding, is
left out and counted as refused.
"""

from typing import Any

import torch
from batches import Batch, NearAnEdge, Results, compare, operator_target
from torch import Tensor

import tppo_kernels as tk

EDGE = 2e-4
ESTIMATORS = ("k1", "k2", "k3", "abs", "k1+", "k3+")
REDUCTIONS = (
    "token-mean",
    "token-sum",
    "seq-mean-token-sum",
    "seq-mean-token-mean",
    "seq-mean-token-sum-norm",
)


def clear_of(x: Tensor, edge: float) -> None:
    if bool(((x.detach() - edge).abs() < EDGE * (1 + abs(edge))).any()):
        raise NearAnEdge


def estimate(kind: str, lp: Tensor, ref: Tensor, clamp: float | None) -> Tensor:
    """KL of each token; the value of k1+ and k3+ with the gradient of k2."""
    clear_of((lp - ref).abs(), 20.0)
    d = (lp - ref).clamp(-20, 20)
    value = {
        "k1": d,
        "k2": d * d / 2,
        "k3": torch.exp(-d) - 1 + d,
        "abs": d.abs(),
        "k1+": d,
        "k3+": torch.exp(-d) - 1 + d,
    }[kind]
    if kind == "k3" and lp.dtype == torch.float32:  # as anybody writes it who knows that it cancels
        value = torch.expm1(-d) + d
    if clamp is not None:
        clear_of(value.abs(), clamp)
        value = value.clamp(-clamp, clamp)
    if kind.endswith("+"):
        slope = d * d / 2
        value = value.detach() + (slope - slope.detach())
    return value


class Reducing:
    """One of the reductions, and how it adds up the tokens of each sequence."""

    def __init__(self, batch: Batch) -> None:
        pick = batch.choose.choice
        self.kind = pick(REDUCTIONS)
        self.tokens, self.sequences = pick((None, None, 7, 0)), pick((None, None, 5, "all"))
        wanted = batch.packed and self.kind.endswith("norm")
        self.length = 11 if wanted else pick((None, 6))
        self.options = {
            "reduction": self.kind,
            "num_tokens": self.tokens,
            "num_sequences": self.sequences,
            "norm_length": self.length,
        }
        self.lengths = [len(rows) for rows in batch.rows]
        self.longest = 0 if batch.packed else batch.shape[1]

    def weights(self) -> list[float]:
        """The weight of a token of each sequence."""
        tokens = sum(self.lengths) if self.tokens is None else self.tokens
        count = sum(n > 0 for n in self.lengths)
        count = (
            len(self.lengths)
            if self.sequences == "all"
            else (count if self.sequences is None else self.sequences)
        )
        count, length = max(count, 1), max(self.longest if self.length is None else self.length, 1)
        return [
            {
                "token-mean": 1 / max(tokens, 1),
                "token-sum": 1.0,
                "seq-mean-token-sum": 1 / count,
                "seq-mean-token-mean": 1 / count / max(n, 1),
                "seq-mean-token-sum-norm": 1 / count / length,
            }[self.kind]
            for n in self.lengths
        ]

    def sum(self, parts: list[list[Tensor]]) -> tuple[Tensor, float]:
        """The sum over terms of each sequence, and over their magnitudes."""
        zero = torch.zeros((), dtype=parts[0][0].dtype if parts and parts[0] else torch.float64)
        whole, size = zero, 0.0
        for weight, terms in zip(self.weights(), parts, strict=True):
            for term in terms:
                whole = whole + weight * term.sum()
                size += float(weight * term.detach().abs().double().sum())
        return whole, size


def kl(seed: int) -> None:
    batch = Batch(seed)
    pick = batch.choose.choice
    scale = pick((0.5, 0.5, 3.0, 30.0))
    leaves = {"lp": batch.tokens(scale=scale), "ref": batch.tokens(scale=scale)}
    kind, clamp = pick(ESTIMATORS), pick((None, None, 0.3, 10.0))

    def formula(x: dict[str, Tensor]) -> Results:
        parts = [
            estimate(kind, a, b, clamp)
            for a, b in zip(batch.of(x["lp"]), batch.of(x["ref"]), strict=True)
        ]
        flat = torch.zeros(batch.valid.numel(), dtype=x["lp"].dtype)
        for rows, part in zip(batch.rows, parts, strict=True):
            flat = flat.index_copy(0, rows, part)
        return {"kl": (flat.reshape(batch.shape), 0.0)}

    compare(
        f"kl {kind} {clamp}",
        batch,
        leaves,
        lambda x: {"kl": tk.kl(x["lp"], x["ref"], batch.given, estimator=kind, clamp=clamp)},
        formula,
    )


def reduce(seed: int) -> None:
    batch = Batch(seed)
    over = Reducing(batch)
    leaves = {"x": batch.tokens(scale=batch.choose.choice((1.0, 1e4, 1e-40)))}
    compare(
        f"reduce {over.options}",
        batch,
        leaves,
        lambda x: {"sum": tk.reduce(x["x"], **batch.layout(), **over.options)},  # type: ignore[arg-type]
        lambda x: {"sum": over.sum([[part] for part in batch.of(x["x"])])},
    )


def value(seed: int) -> None:
    batch = Batch(seed)
    over, pick = Reducing(batch), batch.choose.choice
    scale = pick((1.0, 1.0, 100.0))
    leaves = {"values": batch.tokens(scale=scale)}
    returns, old = batch.tokens(scale=scale, shift=pick((0.0, 10.0))), batch.tokens(scale=scale)
    clip = pick((None, 0.217, 0.513))
    given = {} if clip is None else {"old_values": old, "clip": clip}

    def formula(x: dict[str, Tensor]) -> Results:
        dtype, parts = x["values"].dtype, []
        for v, r, o in zip(
            batch.of(x["values"]), batch.of(returns.to(dtype)), batch.of(old.to(dtype)), strict=True
        ):
            loss = (v - r).square() / 2
            if clip is not None:
                clear_of((v - o).abs(), clip)
                held = (o + (v - o).clamp(-clip, clip) - r).square() / 2
                same = (v - o).abs() <= clip
                off = (loss - held).detach()[~same].abs()
                if bool((off < EDGE * (1 + loss.detach()[~same])).any()):
                    raise NearAnEdge
                loss = torch.where(same, loss, torch.maximum(loss, held))
            parts.append([loss])
        return {"loss": over.sum(parts)}

    compare(
        f"value_loss {clip} {over.options}",
        batch,
        leaves,
        lambda x: {
            "loss": tk.value_loss(
                x["values"], returns, **batch.layout(), **given, **over.options
            ).loss
        },  # type: ignore
        formula,
    )


def ppo_options(batch: Batch) -> tuple[dict[str, Any], Reducing]:
    """The scalars of a policy loss."""
    pick, over = batch.choose.choice, Reducing(batch)
    objective = pick(("clip", "clip", "cispo", "sapo"))
    options = {
        "clip_low": pick((0.213, 0.11)),
        "clip_high": pick((0.213, 0.287)),
        "objective": objective,
        "ratio": pick(("token", "token", "sequence")),
        "max_log_ratio": pick((20.0, 20.0, 1.37)),
        "kl_coef": pick((0.0, 0.3)),
        "kl_estimator": pick(ESTIMATORS),
        "kl_clamp": pick((None, None, 0.71)),
        "kl_ratio_weighted": pick((False, True)),
        "entropy_coef": pick((0.0, 0.1)),
        "dual_clip": pick((None, 1.53)) if objective == "clip" else None,
    }
    if objective == "sapo":
        options |= {"tau_pos": 0.7, "tau_neg": 1.9}
    return options | over.options, over


def policy_terms(
    lp: Tensor,
    old: Tensor,
    a: Tensor,
    w: Tensor | None,
    ref: Tensor | None,
    entropy: Tensor | None,
    o: dict[str, Any],
) -> list[Tensor]:
    """What the tokens of a sequence add to the loss."""
    if not len(lp):
        return [lp]
    raw = lp - old
    clear_of(raw.abs(), o["max_log_ratio"])
    d = raw.clamp(-o["max_log_ratio"], o["max_log_ratio"])
    if o["ratio"] == "sequence":
        d = d.mean().expand(len(lp))
    r, low, high = d.exp(), 1 - o["clip_low"], 1 + o["clip_high"]
    clear_of(r, low)
    clear_of(r, high)
    held = r.clamp(low, high)
    if o["objective"] == "clip":
        term = torch.where((-a * held) > (-a * r), -a * held, -a * r)
        if o["dual_clip"] is not None:
            ceiling = -o["dual_clip"] * a
            if bool(
                ((term - ceiling).detach()[a < 0].abs() < EDGE * (1e-3 + a[a < 0].abs())).any()
            ):
                raise NearAnEdge
            term = torch.where((a < 0) & (term > ceiling), ceiling, term)
    elif o["objective"] == "cispo":
        term = -a * held.detach() * lp
    else:
        tau = torch.where(a > 0, o["tau_pos"], o["tau_neg"]).to(lp.dtype)
        x = tau * (r - 1)  # 1 - sigmoid(x) is sigmoid(-x): its slope does not round to 0
        term = -a * 4 / tau * torch.where(x > 0, 1 - torch.sigmoid(-x), torch.sigmoid(x))
    if w is not None:
        term = torch.where(w == 0, 0.0, w * term)
    terms = [term]
    if entropy is not None:
        terms.append(-o["entropy_coef"] * entropy)
    if ref is not None:
        k = estimate(o["kl_estimator"], lp, ref, o["kl_clamp"])
        terms.append(o["kl_coef"] * (r * k if o["kl_ratio_weighted"] else k))
    return terms


def ppo(seed: int) -> None:
    batch = Batch(seed)
    pick = batch.choose.choice
    options, over = ppo_options(batch)
    spread = pick((0.2, 0.4, 2.0))
    old = batch.tokens(scale=0.5, shift=-2.0)
    leaves = {"lp": (old.float() + spread * batch.randn(*batch.shape)).to(batch.dtype())}
    column = pick((False, False, True))
    a = batch.sequences() if column else batch.tokens(scale=pick((1.0, 1.0, 50.0)))
    w = batch.tokens(scale=1.0).relu() if pick((False, True)) else None
    ref = batch.tokens(scale=0.5, shift=-2.0) if options["kl_coef"] or pick((False, True)) else None
    if options["entropy_coef"] or pick((False, True)):
        leaves["entropy"] = batch.tokens().abs()
    if ref is None:
        options.update(kl_clamp=None, kl_ratio_weighted=False)

    def formula(x: dict[str, Tensor]) -> Results:
        dtype, parts = x["lp"].dtype, []

        def of(t: Tensor | None) -> list[Any]:
            return [None] * batch.batch if t is None else batch.of(t.to(dtype))

        advantages = (
            [a[b].to(dtype).expand(len(rows)) for b, rows in enumerate(batch.rows)]
            if column
            else of(a)
        )
        for lp, o, adv, weight, r, h in zip(
            of(x["lp"]), of(old), advantages, of(w), of(ref), of(x.get("entropy")), strict=True
        ):
            parts.append(policy_terms(lp, o, adv, weight, r, h, options))
        whole, size = over.sum(parts)
        sizes.append(size)
        return {"loss": (whole, size)}

    sizes: list[float] = []
    scales: dict[str, float] = {}
    formula({k: v.double() for k, v in leaves.items()})
    if options["ratio"] == "sequence" or ref is not None:  # sums of terms of either sign
        scales["lp"] = sizes[0] * (1 + options["max_log_ratio"] if ref is not None else 1)
    given = {"weights": w, "ref_logprobs": ref, **options}
    a_given = a[:, None] if column and batch.shape == (batch.batch,) else a  # [N] is of tokens
    compare(
        f"ppo_loss {options}",
        batch,
        leaves,
        lambda x: {
            "loss": tk.ppo_loss(
                x["lp"], old, a_given, entropy=x.get("entropy"), **batch.layout(), **given
            ).loss
        },
        formula,
        scales,
    )


def head(seed: int) -> None:
    batch = Batch(seed)
    pick = batch.choose.choice
    size, outputs = pick((1, 3, 8, 24)), pick((1, 1, 2, 3, 5))
    hidden = batch.tokens(size, scale=pick((1.0, 100.0)))
    kind = hidden.dtype
    leaves = {"hidden": hidden, "weight": batch.strided(batch.randn(outputs, size).to(kind))}
    if pick((False, True)):
        leaves["bias"] = batch.randn(outputs).to(kind)
    inner = () if outputs == 1 else (outputs,)

    def formula(x: dict[str, Tensor]) -> Results:
        flat = torch.zeros((batch.valid.numel(), outputs), dtype=x["hidden"].dtype)
        for rows, h in zip(batch.rows, batch.of(x["hidden"]), strict=True):
            flat = flat.index_copy(0, rows, h @ x["weight"].T + x.get("bias", 0.0))
        size_of = max(
            (
                float((h.detach().abs() @ x["weight"].detach().abs().T).max())
                for h in batch.of(x["hidden"])
                if len(h)
            ),
            default=0.0,
        )
        return {"out": (flat.reshape(*batch.shape, *inner), size_of)}

    parts = [h.double().abs() for h in batch.of(hidden) if len(h)]
    total = sum((float(h.sum()) for h in parts), 0.0)
    weight = float(leaves["weight"].double().abs().sum())
    compare(
        "token_head",
        batch,
        leaves,
        lambda x: {"out": tk.token_head(x["hidden"], x["weight"], x.get("bias"), batch.given)},
        formula,
        {"weight": 3 * total, "hidden": 3 * weight, "bias": 3.0 * batch.valid.numel()},
    )


def reward(seed: int) -> None:
    batch = Batch(seed)
    pick = batch.choose.choice
    leaves = {"logits": batch.tokens(3, scale=pick((1.0, 1.0, 30.0)))}
    labels = torch.randint(3, batch.shape, generator=batch.g)
    labels = torch.where(batch.valid, labels, torch.tensor(pick((-100, 7, 0))))
    sentences = batch.sequences() if pick((False, True)) else None
    weights, local = (0.5, 1.0, 2.0), pick(("token", "sequence"))
    alpha, beta = pick((0.4, 1.0)), pick((0.6, 0.0, 2.0))

    def formula(x: dict[str, Tensor]) -> Results:
        z, dtype = x["logits"], x["logits"].dtype
        zero = torch.zeros((), dtype=dtype)
        first, second, n_first, n_second, size, size_2 = zero, zero, 0, 0, 0.0, 0.0
        for b, (logits, label) in enumerate(zip(batch.of(z), batch.of(labels), strict=True)):
            if not len(label):
                continue
            log_p = torch.log_softmax(logits, -1)
            cost = -log_p.gather(1, label[:, None])[:, 0] * torch.tensor(weights).to(dtype)[label]
            first, size = first + cost.sum(), size + float(cost.detach().abs().sum())
            n_first += len(label) if local == "token" else 1
            judged = label > 0
            if sentences is not None and bool(judged.any()):
                mean = (log_p.exp() @ torch.arange(3).to(dtype))[judged].mean()
                off = mean - sentences[b].to(dtype)
                second, n_second = second + off.square(), n_second + 1
                size_2 += float(off.detach().square()) + 4
        first, second = first / max(n_first, 1), second / max(n_second, 1)
        size, size_2 = size / max(n_first, 1), size_2 / max(n_second, 1)
        return {
            "loss": (alpha * first + beta * second, alpha * size + beta * size_2),
            "local": (first, size),
            "global": (second, size_2),
        }

    def actual(x: dict[str, Tensor]) -> dict[str, Tensor]:
        found = tk.token_reward_loss(
            x["logits"],
            labels,
            sentence_labels=sentences,
            local_weight=alpha,
            global_weight=beta,
            class_weights=weights,
            balance=None,
            local_reduction=local,
            **batch.layout(),
        )
        return {"loss": found.loss, "local": found.local_loss, "global": found.global_loss}

    compare(f"token_reward_loss {local}", batch, leaves, actual, formula, {"logits": 4.0})


TARGETS = [
    operator_target("kl", kl, 20_000),
    operator_target("reduce", reduce, 25_000),
    operator_target("value_loss", value, 25_000),
    operator_target("ppo_loss", ppo, 50_000),
    operator_target("token_head", head, 15_000),
    operator_target("token_reward_loss", reward, 20_000),
]
