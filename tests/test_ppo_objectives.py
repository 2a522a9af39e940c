"""The objectives and KL terms of `ppo_loss` beside the clipped one: "cispo", "sapo", a clamped KL,
one that the ratio weights, and sequences that have no valid token."""

import math

import _emulated
import pytest
import torch
from _loss_cases import check_objectives, hold_to_fp64, terms_of
from _loss_cases import policy_run as run
from _loss_cases import policy_sample as sample
from _matrix import third

import tppo_kernels as tk
from tppo_kernels._core import record
from tppo_kernels._core.check import REDUCTIONS
from tppo_kernels._math.sequence import KL_ESTIMATORS
from tppo_kernels.ops.ppo_loss.reference import PolicyLossCall
from tppo_kernels.testing import assert_same_bits, count_graphs, pack, sample_mask

OBJECTIVES = ("clip", "cispo", "sapo")
RATIOS = ("token", "sequence")
KL = {"kl_coef": 0.3, "kl_clamp": 0.1, "kl_ratio_weighted": True}


def published(x, mask, *, objective, ratio, reduction, kl_estimator, kl_clamp, kl_ratio_weighted,
              sequences):
    """The loss by autograd, as the papers and peers write it; low .1, high .25, KL .3, entropy .1.
    """
    x = {name: value.double() for name, value in x.items()}
    lp, h = (x[name].requires_grad_() for name in ("logprobs", "entropy"))
    valid = (torch.ones_like(lp) if mask is None else mask).double()
    lengths = valid.sum(1, keepdim=True).clamp(min=1)
    d = (lp - x["old_logprobs"]).clamp(-0.7, 0.7)
    if ratio == "sequence":
        d = (d * valid).sum(1, keepdim=True) / lengths
    a, r = x["advantages"], d.exp()
    if objective == "clip":
        term = -torch.min(r * a, r.clamp(0.9, 1.25) * a)
    elif objective == "cispo":
        term = -r.clamp(0.9, 1.25).detach() * a * lp
    else:
        tau = torch.where(a > 0, 1.2, 1.7 + 0 * a)
        term = -torch.sigmoid(tau * (r - 1)) * 4 / tau * a
    k = lp - x["ref_logprobs"]
    value = {"k1": k, "k2": k * k / 2, "k3": (-k).exp() - 1 + k, "abs": k.abs()}[
        kl_estimator.rstrip("+")]
    value = value if kl_clamp is None else value.clamp(-kl_clamp, kl_clamp)
    if kl_estimator.endswith("+"):
        value = value.detach() + k * k / 2 - (k * k / 2).detach()
    term = term * x["weights"] - 0.1 * h + 0.3 * value * (r if kl_ratio_weighted else 1)
    count = len(lp) if sequences == "all" else (valid.sum(1) > 0).sum().clamp(min=1)
    loss = {"token-mean": lambda: (term * valid).sum() / valid.sum().clamp(min=1),
            "token-sum": lambda: (term * valid).sum(),
            "seq-mean-token-sum": lambda: (term * valid).sum() / count,
            "seq-mean-token-mean": lambda: (term * valid / lengths).sum() / count,
            "seq-mean-token-sum-norm": lambda: (term * valid).sum() / count / lp.shape[1],
            }[reduction]()
    kl = (value * (r if kl_ratio_weighted else 1) * valid).sum()
    return loss.detach(), *torch.autograd.grad(loss, (lp, h)), kl.detach()


CASES = [(o, r, reduction, e, clamp, weighted, s, m)
         for o in OBJECTIVES for r in RATIOS for reduction in REDUCTIONS for e in KL_ESTIMATORS
         for clamp in (None, 0.04) for weighted in (False, True) for s in (None, "all")
         for m in ("none", "interior", "row", "left")]


@pytest.mark.parametrize("objective, ratio, reduction, estimator, clamp, weighted, sequences, mask",
                         third(third(third(third(CASES, 1), 2), 3)))
def test_as_published(objective, ratio, reduction, estimator, clamp, weighted, sequences, mask):
    """MiniMax-M1's CISPO, Qwen's SAPO, the KL of DeepSeek-V3.2 and verl's clamp of it."""
    x, valid = sample(4, 5, torch.float64, seed=len(reduction)), sample_mask(mask, 4, 5, seed=4)
    options = dict(objective=objective, ratio=ratio, reduction=reduction, kl_estimator=estimator,
                   kl_clamp=clamp, kl_ratio_weighted=weighted)
    expected = published(x, valid, sequences=sequences, **options)
    options |= dict(num_sequences=sequences, clip_low=0.1, clip_high=0.25, tau_pos=1.2, tau_neg=1.7,
                    entropy_coef=0.1, kl_coef=0.3, max_log_ratio=0.7)
    actual = run(x, valid, **options)
    for a, e in zip((*actual[:3], actual[3].kl_sum), expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-9)
    every = torch.ones(4, 5, dtype=torch.bool) if valid is None else valid
    packed = run({k: v.flatten() for k, v in x.items()}, every.flatten(), norm_length=5,
                 cu_seqlens=torch.arange(5, dtype=torch.int32) * 5, **options)
    for a, e in zip(packed[:3], actual[:3], strict=True):
        torch.testing.assert_close(a.reshape(e.shape), e, rtol=1e-9, atol=1e-9)


def test_by_hand():
    """logprob ln(1/2), r = 2, 1/2, 1 and A = 1, -1, 2, clip(r) = 1.2, .8, 1 for cispo.

    cispo: l = -A clip(r) ln(1/2) and dl = -A clip(r). sapo with tau 2 and 4: l = -A (4 / tau)
    sigmoid(tau (r - 1)): -2 sigmoid(2), sigmoid(-2), -2, and dl = -A 4 sigmoid (1 - sigmoid) r.
    """
    half, s = math.log(0.5), 1 / (1 + math.exp(-2.0))
    logprobs = torch.full((1, 3), half, dtype=torch.float64, requires_grad=True)
    old = half - torch.tensor([[2.0, 0.5, 1.0]], dtype=torch.float64).log()
    advantages = torch.tensor([[1.0, -1.0, 2.0]], dtype=torch.float64)
    for objective, losses, slopes in (
            ("cispo", (-1.2 * half, 0.8 * half, -2 * half), (-1.2, 0.8, -2.0)),
            ("sapo", (-2 * s, 1 - s, -2.0), (-8 * s * (1 - s), 2 * s * (1 - s), -2.0))):
        loss, m = tk.ppo_loss(logprobs, old, advantages, objective=objective, tau_pos=2.0,
                              tau_neg=4.0, reduction="token-sum")
        gradient, = torch.autograd.grad(loss, logprobs)
        torch.testing.assert_close(loss.item(), sum(losses))
        torch.testing.assert_close(gradient, torch.tensor([slopes], dtype=torch.float64))
        assert [float(c) for c in m[:5]] == [3, 1, 1, 0, 0]
        assert float(m.clip_fraction) == pytest.approx(2 / 3)


def test_a_kl_clamped_and_weighted_by_hand():
    """r = 2, d = -ln 2, so k3 = 2 - 1 - ln 2 = .307, times r .614; dk3 = 1 - 2, so that the
    gradient is r dk3 + r k3 = -2 + .614. Clamped at .3 it is .6, with the gradient of r alone."""
    ln2 = math.log(2.0)
    logprobs = torch.zeros(1, 1, dtype=torch.float64, requires_grad=True)
    x = {"old_logprobs": torch.full((1, 1), -ln2).double(), "ref_logprobs": torch.full(
        (1, 1), ln2).double(), "advantages": torch.zeros(1, 1).double()}
    for clamp, estimator, value, slope in (
            (None, "k3", 2 * (1 - ln2), -2 + 2 * (1 - ln2)), (0.3, "k3", 0.6, 0.6),
            (0.3, "k3+", 0.6, -2 * ln2 + 0.6), (0.3, "k1", -0.6, -0.6), (0.5, "k2", ln2**2,
                                                                         -2 * ln2 + ln2**2)):
        loss, m = tk.ppo_loss(logprobs, kl_coef=1.0, kl_clamp=clamp, kl_ratio_weighted=True,
                              kl_estimator=estimator, **x)
        gradient, = torch.autograd.grad(loss, logprobs)
        torch.testing.assert_close((loss.item(), gradient.item(), m.kl.item()),
                                   (value, slope, value))


def test_the_edge_of_the_clamp_has_a_gradient():
    """As torch.clamp: exactly at the bound the gradient passes, beyond it is 0."""
    logprobs = torch.tensor([[1.0, 1.5, -1.0, -1.5]], requires_grad=True)
    zero = torch.zeros(1, 4)
    loss = tk.ppo_loss(logprobs, logprobs.detach(), zero, ref_logprobs=zero, kl_coef=1.0,
                       kl_estimator="k1", kl_clamp=1.0, reduction="token-sum").loss
    gradient, = torch.autograd.grad(loss, logprobs)
    assert gradient.tolist() == [[1, 0, 1, 0]]
    twin = logprobs.detach().requires_grad_()
    assert torch.equal(torch.autograd.grad(twin.clamp(-1, 1).sum(), twin)[0], gradient)


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_gradcheck(objective, ratio):
    """cispo's weight is a constant: its derivative is checked against the frozen weight."""
    x, mask = sample(3, 4, torch.float64, seed=5), sample_mask("interior", 3, 4)
    logprobs, entropy = x.pop("logprobs").requires_grad_(), x.pop("entropy").requires_grad_()
    if objective == "cispo":
        d = torch.where(mask, logprobs.detach() - x["old_logprobs"], 0.0)
        n = mask.sum(1, keepdim=True).clamp(min=1)
        r = (d.sum(1, keepdim=True) / n if ratio == "sequence" else d).exp().clamp(0.8, 1.2)
        given, = torch.autograd.grad(tk.ppo_loss(
            logprobs, mask=mask, **x, objective=objective, ratio=ratio).loss, logprobs)
        expected, = torch.autograd.grad(
            -(torch.where(mask, r * x["advantages"] * x["weights"] * logprobs, 0.0)).sum()
            / mask.sum(), logprobs)
        torch.testing.assert_close(given, expected)
        return
    for estimator in ("k1", "k2", "k3", "abs"):
        def loss(lp, h, estimator=estimator):
            return tk.ppo_loss(lp, mask=mask, entropy=h, entropy_coef=0.1, objective=objective,
                               ratio=ratio, kl_estimator=estimator, **KL, **x).loss
        assert torch.autograd.gradcheck(loss, (logprobs, entropy))


def test_extreme_ratios():
    """sapo's gate is flat there: infinity times 0 is 0. A sequence whose ratio overflows is clipped
    and leaves its masked tokens alone."""
    x = {"logprobs": torch.tensor([[0.0, -300.0, 80.0, -1.0]]), "old_logprobs": torch.tensor(
        [[-300.0, 0.0, 0.0, -1.0]]), "advantages": torch.tensor([[1.0, 1.0, -1.0, 1.0]])}
    loss, gradient, _, _ = run(x, max_log_ratio=math.inf, objective="sapo", reduction="token-sum")
    tau_neg, gate = 1.05, 4 / (1 + math.e)
    torch.testing.assert_close(loss, torch.tensor(-4 - gate + 4 / tau_neg - 2))
    torch.testing.assert_close(gradient, torch.tensor([[0.0, 0.0, 0.0, -1.0]]))
    mask = torch.tensor([[True, False]])
    for objective in OBJECTIVES:
        with tk.use_backend("reference"):
            loss, gradient, _, m = run(
                {"logprobs": torch.tensor([[0.0, -1.0]]), "old_logprobs": torch.tensor(
                    [[-200.0, -1.0]]), "advantages": torch.ones(1, 2)}, mask, ratio="sequence",
                max_log_ratio=math.inf, objective=objective)
        assert loss.isfinite() and gradient.isfinite().all() and m.ratio_max.isinf(), objective


def test_sequences_without_a_valid_token_count_where_all_do():
    """TRL and SkyRL divide by every row; here that is to be asked for, in both losses."""
    x, lengths = sample(4, 6, seed=3), [6, 0, 2, 0]
    mask = torch.arange(6) < torch.tensor(lengths)[:, None]
    for reduction in REDUCTIONS:
        options = {"reduction": reduction, "norm_length": 6}
        every, four = (run(x, mask, num_sequences=n, **options) for n in ("all", 4))
        assert_same_bits(tuple(every), tuple(four))
        half = 2.0 if reduction.startswith("seq") else 1.0
        torch.testing.assert_close(half * every[1], run(x, mask, **options)[1])
        packed = {k: pack(v, lengths)[0] for k, v in x.items()}
        got = run(packed, cu_seqlens=pack(mask, lengths)[1], num_sequences="all", **options)
        torch.testing.assert_close(got[0], every[0])
        critic = [tk.value_loss(x["logprobs"], x["old_logprobs"], mask, num_sequences=n,
                                **options).loss for n in ("all", 4)]
        assert_same_bits(*critic)
    empty = torch.zeros(0, 3)
    assert tk.ppo_loss(empty, empty, empty, reduction="seq-mean-token-mean",
                       num_sequences="all").loss == 0


X = torch.ones(2, 3)


@pytest.mark.parametrize("change, error, words", [
    ({"objective": "ppo"}, ValueError, "objective is 'ppo'.*'clip', 'cispo', 'sapo'"),
    ({"objective": "cispo", "dual_clip": 3.0}, ValueError,
     "dual_clip is float 3.0, expected None, because objective is 'cispo'"),
    ({"objective": "sapo", "dual_clip": torch.tensor(3.0)}, ValueError,
     "dual_clip is a tensor.*expected None, because objective is 'sapo'"),
    ({"tau_pos": 0.0}, ValueError, "tau_pos is 0.0.*> 0"),
    ({"objective": "sapo", "tau_neg": math.inf}, ValueError, "tau_neg is inf.*finite"),
    ({"objective": "sapo", "tau_neg": torch.tensor(-1.0)}, ValueError, "tau_neg holds -1"),
    ({"kl_clamp": 0.0}, ValueError, "kl_clamp is 0.0.*> 0"),
    ({"kl_clamp": torch.tensor(math.nan)}, ValueError, "kl_clamp holds nan"),
    ({"kl_ratio_weighted": 1}, ValueError, "kl_ratio_weighted is 1.*False, True"),
    ({"num_sequences": "every"}, ValueError, "num_sequences is 'every', expected .*'all'"),
])
def test_bad_input(change, error, words):
    for op, before in (("ppo_loss", (X,)), ("linear_ppo_loss", (torch.ones(2, 3, 4), torch.ones(
            5, 4), torch.ones(2, 3).long()))):
        with pytest.raises(error, match=f"{op}: {words}"):
            getattr(tk, op)(*before, X, X, **change)


def test_cpp():
    with tk.use_backend("cpp"):
        check_objectives((1, 255, 256, 257, 600, 24, 64), third)


def test_cuda_kernel_emulated(monkeypatch):
    """csrc/ppo_loss.cu run on the CPU; numbers that lie on a GPU are read by pointer."""
    _emulated.on_the_cpu(monkeypatch, "ppo_loss", "loss", "ppo_loss", "value_loss")
    check_objectives((1, 255, 257, 1030, 24), lambda cases: third(third(cases)))
    monkeypatch.setattr("tppo_kernels._kernels.losses.on_host", lambda x: False)
    hold_to_fp64(run, sample(3, 9), sample_mask("row", 3, 9), objective="sapo", kl_coef=0.1,
                 tau_pos=torch.tensor(2.0).bfloat16(), kl_clamp=torch.tensor(0.02))


@pytest.mark.parametrize("objective", ("cispo", "sapo"))
def test_opcheck(objective):
    x, mask = sample(3, 4), sample_mask("interior", 3, 4)
    taus = {"tau_pos": 1.0, "tau_neg": 1.05} if objective == "sapo" else {}
    terms = terms_of(x["old_logprobs"], x["advantages"], x["ref_logprobs"], x["weights"],
                     objective=objective, kl_ratio_weighted=True, kl_clamp=0.1, kl_coef=0.1,
                     num_sequences=3, reduction="seq-mean-token-mean", **taus)
    call = PolicyLossCall(x["logprobs"], x["entropy"], mask, terms, True, True)
    torch.library.opcheck(torch.ops.tppo_kernels.ppo_loss_fwd.default, record.flat(call))


def test_compile():
    """One graph and the same bits; one or two for 50 lengths, batches, bounds and temperatures."""
    def loss(x, mask, tau, bound):
        return sum(tk.ppo_loss(mask=mask, **x, objective=objective, tau_neg=tau, kl_clamp=bound,
                               kl_ratio_weighted=True, kl_coef=0.1, num_sequences="all",
                               reduction="seq-mean-token-mean").loss for objective in OBJECTIVES)
    calls = [({k: v.requires_grad_(k == "logprobs") for k, v in sample(t, 51 - t).items()},
              torch.ones(t, 51 - t, dtype=torch.bool), torch.tensor(0.1 + t / 100),
              torch.tensor(t / 100)) for t in range(2, 50)]
    expected = loss(*calls[7])
    assert count_graphs(loss, calls) <= 2
    assert_same_bits(torch.compile(loss, fullgraph=True, backend="aot_eager")(*calls[7]).detach(),
                     expected.detach())


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_from_hidden_states(objective, ratio):
    """`linear_ppo_loss` has the numbers of `ppo_loss(linear_logprobs(...))` in every backend."""
    g = torch.Generator().manual_seed(1)
    hidden, weight = torch.randn(3, 7, 8, generator=g), torch.randn(20, 8, generator=g)
    targets, mask = torch.randint(20, (3, 7), generator=g), sample_mask("row", 3, 7)
    with torch.no_grad():
        logprobs = tk.linear_logprobs(hidden, weight, targets, mask).logprobs
    old, ref = (logprobs + 0.3 * torch.randn(3, 7, generator=g) for _ in range(2))
    advantages = torch.randn(3, 7, generator=g)
    options = dict(objective=objective, ratio=ratio, ref_logprobs=ref, kl_estimator="k3",
                   entropy_coef=0.1, num_sequences="all", reduction="seq-mean-token-mean", **KL)
    results = []
    for backend in ("apart", "reference", "chunked", "cpp"):
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        if backend == "apart":
            row = tk.linear_logprobs(*leaves, targets, mask)
            out = tk.ppo_loss(row.logprobs, old, advantages, mask, entropy=row.entropy, **options)
        else:
            with tk.use_backend(backend):
                out = tk.linear_ppo_loss(*leaves, targets, old, advantages, mask, **options)
        results.append((out.loss.detach(), *torch.autograd.grad(out.loss, leaves),
                        torch.stack(tuple(out.metrics))))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-5, atol=1e-6)
