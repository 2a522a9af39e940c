"""Cases of `ppo_loss` and `value_loss` that every backend must pass, wherever it runs."""

import itertools

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import tppo_kernels as tk
from tppo_kernels._core.check import REDUCTIONS, Reduction
from tppo_kernels._math.sequence import KL_ESTIMATORS
from tppo_kernels.ops.ppo_loss.reference import Formula, PolicyTerms, token_terms, tokens_of
from tppo_kernels.testing import (
    DTYPES,
    MASKS,
    POISONS,
    assert_accurate,
    assert_same_bits,
    pack,
    poisoned,
    sample_mask,
    strided,
)

ALL_TERMS = {"dual_clip": 1.5, "entropy_coef": 0.1, "kl_coef": 0.3, "kl_estimator": "k3"}


def policy_sample(batch, tokens, dtype=torch.float32, seed=0, spread=0.4):
    """Tensor arguments of a call, all [B, T]; the ratios lie on both sides of the clip edges."""
    g = torch.Generator().manual_seed(seed)
    old = -3 * torch.rand(batch, tokens, generator=g)
    x = {"logprobs": old + spread * torch.randn(batch, tokens, generator=g), "old_logprobs": old,
         "advantages": torch.randn(batch, tokens, generator=g),
         "entropy": torch.rand(batch, tokens, generator=g),
         "ref_logprobs": old + 0.3 * torch.randn(batch, tokens, generator=g),
         "weights": (2 * torch.rand(batch, tokens, generator=g) - 0.4).clamp(min=0)}
    return {name: value.to(dtype) for name, value in x.items()}


def policy_run(x, mask=None, scale=1.0, **options):
    """(loss, gradient of logprobs, gradient of entropy or None, metrics)."""
    x = dict(x)
    leaves = [x[name].detach().requires_grad_() for name in ("logprobs", "entropy") if name in x]
    x.update(zip(("logprobs", "entropy"), leaves, strict=False))
    out = tk.ppo_loss(mask=mask, **x, **options)
    grads = torch.autograd.grad(out.loss * scale, leaves)
    return out.loss.detach(), grads[0], grads[1] if len(grads) > 1 else None, out.metrics


def policy_magnitude(x, mask=None, cu_seqlens=None, **options):
    """What `ppo_loss` adds up: the same sum of |policy term|, |KL term| and |entropy term| of each
    token, in fp64."""
    if options.get("objective") == "sapo":
        options = {"tau_pos": 1.0, "tau_neg": 1.05, **options}  # the defaults
    x = {name: value.double() for name, value in x.items()}
    nothing, found = torch.zeros_like(x["old_logprobs"]), 0.0
    for name, term in (("", {**x, "ref_logprobs": None, "entropy": None}),
                       ("ref_logprobs", {**x, "weights": nothing, "entropy": None}),
                       ("entropy", {**x, "weights": nothing, "ref_logprobs": None})):
        if name and x.get(name) is None:
            continue
        terms = terms_of(term["old_logprobs"], term["advantages"], term.get("ref_logprobs"),
                         term.get("weights"), cu_seqlens=cu_seqlens, **options)
        found += token_terms(term["logprobs"], term.get("entropy"), tokens_of(
            terms, mask, torch.float64), terms.formula, cu_seqlens).loss.abs().sum()
    return found


def policy_eager(x, mask, ratio):
    """What a user would write without this operator, in the inputs' dtype."""
    lp, h = x["logprobs"].clone().requires_grad_(), x["entropy"].clone().requires_grad_()
    valid = torch.ones_like(lp) if mask is None else mask.to(lp.dtype)
    d = (lp - x["old_logprobs"]) * valid
    if ratio == "sequence":
        d = (d.sum(1) / valid.sum(1).clamp(min=1))[:, None]
    r, a = d.exp(), x["advantages"]
    term = torch.max(-a * r, -a * r.clamp(0.8, 1.2))
    term = torch.where(a < 0, torch.min(term, -1.5 * a), term) * x["weights"]
    k = lp - x["ref_logprobs"]
    term = term - 0.1 * h + 0.3 * (torch.exp(-k) - 1 + k)
    loss = (term * valid).sum() / valid.sum().clamp(min=1)
    return loss.detach(), *torch.autograd.grad(loss, (lp, h))


def critic_sample(batch, tokens, dtype=torch.float32, seed=0):
    """Values, returns and old values [B, T]; about half of the values lie beyond a clip of 0.2."""
    g = torch.Generator().manual_seed(seed)
    old = torch.randn(batch, tokens, generator=g)
    x = {"values": old + 0.3 * torch.randn(batch, tokens, generator=g),
         "returns": 1 + 2 * torch.randn(batch, tokens, generator=g), "old_values": old}
    return {name: value.to(dtype) for name, value in x.items()}


def critic_run(x, mask=None, scale=1.0, **options):
    """(loss, gradient of values, metrics)."""
    leaf = x["values"].detach().requires_grad_()
    out = tk.value_loss(**{**x, "values": leaf}, mask=mask, **options)
    gradient, = torch.autograd.grad(out.loss * scale, leaf)
    return out.loss.detach(), gradient, out.metrics


def critic_eager(x, mask):
    """What a user would write without this operator, in the inputs' dtype; clip 0.2."""
    v = x["values"].clone().requires_grad_()
    valid = torch.ones_like(v) if mask is None else mask.to(v.dtype)
    held = x["old_values"] + (v - x["old_values"]).clamp(-0.2, 0.2)
    term = 0.5 * torch.max((v - x["returns"]) ** 2, (held - x["returns"]) ** 2)
    loss = (term * valid).sum() / valid.sum().clamp(min=1)
    return loss.detach(), *torch.autograd.grad(loss, v)


def reference(run, *args, **options):
    """The same call on the reference."""
    with tk.use_backend("reference"):
        return run(*args, **options)


def flat(results):
    """Loss, gradients and metrics as one list of tensors."""
    return [*(x for x in results[:-1] if x is not None), torch.stack(tuple(results[-1]))]


def hold_to_fp64(run, x, mask, **options):
    """A call on the present backend against fp64, judged by the reference in fp32; run twice."""
    actual = run(x, mask, **options)
    exact = reference(run, {k: v.double() for k, v in x.items()}, mask, **options)
    eager = reference(run, x, mask, **options)
    added = policy_magnitude(x, mask, **options) if run is policy_run else None
    for i, (a, e, p) in enumerate(zip(*map(flat, (actual, exact, eager)), strict=True)):
        assert_accurate(a, e, p, scale=None if i else added, name=f"result {i} of {options}")
    assert_same_bits(tuple(run(x, mask, **options)), tuple(actual))
    return actual


def check_layouts(run, sample, cases, options_of):
    """Each of (dtype, tokens, mask, strided, variant), padded; `options_of(variant)`."""
    for seed, (dtype, tokens, kind, apart, variant) in enumerate(cases):
        x, mask = sample(3, tokens, dtype, seed=seed), sample_mask(kind, 3, tokens, seed)
        if apart:
            x = {k: strided(v) for k, v in x.items()}
            mask = mask if mask is None else strided(mask)
        actual = hold_to_fp64(run, x, mask, **options_of(variant))
        if mask is not None:
            assert not any(g[~mask].any() for g in actual[1:-1] if g is not None)


def check_packed(run, sample, options, per_sequence=()):
    """Packed sequences, one of them empty, give the numbers of padded rows."""
    lengths = [13, 1, 0, 70]
    x, mask = sample(4, 70, seed=9), torch.arange(70) < torch.tensor(lengths)[:, None]
    x.update({name: x[name][:, 0] for name in per_sequence})
    padded = hold_to_fp64(run, x, mask, **options)
    packed = {k: pack(v, lengths)[0] if v.dim() == 2 else v for k, v in x.items()}
    got = run(packed, cu_seqlens=pack(mask, lengths)[1], **options)
    expected = [padded[0], *(pack(g, lengths)[0] for g in padded[1:-1]), torch.stack(
        tuple(padded[-1]))]
    torch.testing.assert_close(flat(got), expected, rtol=1e-5, atol=1e-6)


def check_poison(run, sample, poison, options, per_sequence=()):
    """Whatever stands behind the mask, in [B] arguments of dead sequences too, changes no bit."""
    mask = sample_mask("row", 4, 9, seed=2)
    x, results = sample(4, 9, seed=3), []
    for value in (0.0, poison):
        given = {k: poisoned(v, mask, value) for k, v in x.items()}
        given.update({k: poisoned(x[k][:, 0], mask.any(1), value) for k in per_sequence})
        results.append(tuple(run(given, mask, **options)))
    assert_same_bits(results[1], results[0])
    assert all(v.isfinite().all() for v in flat(results[1]))


def check_mixed_dtypes_and_nan(run, sample, options, name):
    """Columns of several dtypes at once; NaN at a valid token shows; a gradient in bf16."""
    x = sample(2, 40, seed=5)
    mixed = {k: v.to((torch.bfloat16, torch.float16, torch.float32)[i % 3])
             for i, (k, v) in enumerate(x.items())}
    actual = hold_to_fp64(run, mixed, None, **options)
    assert actual[1].dtype == torch.bfloat16
    x[name][1, 1] = float("nan")
    loss, gradient = run(x, **options)[:2]
    assert loss.isnan() and gradient[1, 1].isnan() and gradient[0].isfinite().all()


class Launching(TorchDispatchMode):
    """Torch's own operations inside that would be launches on a GPU: not views, not memory."""

    SILENT = ("empty", "empty_like", "detach", "_local_scalar_dense")

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name not in self.SILENT:
            self.names.append(name)
        return function(*args, **(kwargs or {}))


def numbers(*values):
    """Numbers as raw ops take them."""
    return [torch.tensor(v, dtype=torch.float64) for v in values]


def check_nothing_but_kernels(backend, forward, gradients):
    """Forward and backward of raw ops on a backend: torch itself launches nothing.

    gradients: the record of backward from (loss, scale, slopes ...).
    """
    with Launching() as launching:
        loss, *slopes, _, scale = backend.fwd(forward)
        backend.bwd(gradients(loss, scale, *slopes))
    assert launching.names == []


def check_long_sequences(monkeypatch, backend, run, sample, options):
    """Sequences of which there are fewer than blocks are shared out: each block has tokens of its
    own, whatever the mask's address, and a short or an empty sequence loses none."""
    rooms = []

    def workspace(like):
        rooms.append(torch.full((1024 * 13,), float("nan"), dtype=torch.float64))
        return rooms[-1]

    monkeypatch.setattr(backend, "workspace", workspace)
    for reduction in ("seq-mean-token-mean", "seq-mean-token-sum"):
        x = sample(1, 3075, seed=4)
        mask = (torch.rand(1, 3083) < 0.9)[:, 3:-5]
        hold_to_fp64(run, x, mask, reduction=reduction, **options)
        by_block = rooms[-1][:int(rooms[-1].isfinite().sum())].reshape(4, -1)
        assert (by_block[:, 1] > 0).all() and int(by_block[:, 1].sum()) == int(mask.sum())
        lengths = [0, 3000]
        packed = {k: v[0, :3000] for k, v in x.items()}
        got = run(packed, mask[0, :3000], cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).to(
            torch.int32), reduction=reduction, **options)
        alone = {k: v[:, :3000] for k, v in x.items()}
        expected = reference(run, alone, mask[:, :3000], reduction=reduction, **options)
        torch.testing.assert_close([y.reshape(-1) for y in flat(got)],
                                   [y.reshape(-1) for y in flat(expected)], rtol=1e-5, atol=1e-6)


def terms_of(old_logprobs, advantages, ref_logprobs=None, weights=None, *, ratio="token",
             kl_estimator="k2", kl_ratio_weighted=False, objective="clip", reduction="token-mean",
             cu_seqlens=None, **given):
    """The record of the loss's own arguments; any scalar by name, None is none."""
    scalars = {"clip_low": 0.2, "clip_high": 0.2, "dual_clip": None, "max_log_ratio": 20.0,
               "entropy_coef": 0.0, "kl_coef": 0.0, "kl_clamp": None, "tau_pos": None,
               "tau_neg": None, "num_tokens": None, "num_sequences": None, "norm_length": None,
               **given}
    numbers = [v if v is None else torch.as_tensor(v) for v in scalars.values()]
    return PolicyTerms(old_logprobs, advantages, ref_logprobs, weights,
                       Formula(*numbers[:9], ratio, kl_estimator, kl_ratio_weighted, objective),
                       Reduction(*numbers[9:], reduction), cu_seqlens)


# every objective with every KL term, but those of the plain clipped loss
OBJECTIVES = [{"objective": objective, "kl_clamp": clamp, "kl_ratio_weighted": weighted}
              for objective, clamp, weighted in itertools.product(
                  ("clip", "cispo", "sapo"), (None, 0.05), (False, True))][1:]


def objective_options(variant):
    """The options of (ratio, reduction, estimator, of OBJECTIVES)."""
    ratio, reduction, estimator, terms = variant
    return {"entropy_coef": 0.1, "kl_coef": 0.3, "tau_pos": 0.7, "tau_neg": 1.9, "clip_high": 0.3,
            "kl_estimator": estimator, "ratio": ratio, "reduction": reduction, **terms,
            "dual_clip": 1.5 if terms["objective"] == "clip" else None}


def check_objectives(shapes, chosen=list):
    """Every objective and KL term on the present backend against fp64: accuracy over dtypes,
    shapes, masks and strides; packed; poisoned; NaN and infinite ratios.

    chosen: which of all combinations of each kind.
    """
    ratios = ("token", "sequence")
    variants = chosen(itertools.product(ratios, KL_ESTIMATORS, OBJECTIVES))
    cases = [(DTYPES[i % 3], shapes[i % len(shapes)], MASKS[i % len(MASKS)], i % 2 == 1,
              (ratio, REDUCTIONS[i % len(REDUCTIONS)], estimator, terms))
             for i, (ratio, estimator, terms) in enumerate(variants)]
    check_layouts(policy_run, policy_sample, cases, objective_options)
    for i, (terms, ratio) in enumerate(chosen(itertools.product(OBJECTIVES, ratios))):
        options = objective_options((ratio, REDUCTIONS[i % 4], "k3", terms))
        per_sequence = ("advantages", "weights")
        check_packed(policy_run, policy_sample, options, per_sequence)
        check_poison(policy_run, policy_sample, POISONS[i % len(POISONS)], options, per_sequence)
    for objective, name in chosen(itertools.product(("cispo", "sapo"), (
            "logprobs", "advantages", "ref_logprobs"))):
        check_mixed_dtypes_and_nan(policy_run, policy_sample, {
            "objective": objective, "kl_coef": 0.1, "kl_clamp": 0.5, "kl_ratio_weighted": True},
            name)
    extreme = {"logprobs": torch.tensor([[-1.0, -300.0, 80.0, -1.0]]), "old_logprobs": torch.tensor(
        [[-300.0, 0.0, 0.0, -1.0]]), "advantages": torch.tensor([[1.0, 1.0, -1.0, 1.0]])}
    for objective, limit in itertools.product(("cispo", "sapo"), (20.0, float("inf"))):
        hold_to_fp64(policy_run, extreme, None, max_log_ratio=limit, reduction="token-sum",
                     objective=objective)
