"""`token_advantages`: the composition, its three masks, its statistics, and the peers' loop."""

import itertools

import _emulated
import pytest
import torch
from _loss_cases import Launching
from _matrix import third
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import tppo_kernels as tk
from tppo_kernels._core.op import missing
from tppo_kernels.ops.token_advantages.reference import AdvantagesCall, WhitenAdvantages
from tppo_kernels.testing import (
    DTYPES,
    MASKS,
    POISONS,
    SEQUENTIAL_FLOOR,
    assert_accurate,
    assert_same_bits,
    count_graphs,
    pack,
    poisoned,
    sample_mask,
    strided,
)

BACKENDS = [pytest.param(b, marks=pytest.mark.skipif(bool(missing(b)), reason=str(missing(b))))
            for b in ("cpp", "reference")]
ESTIMATORS = ("k1", "k2", "k3", "abs", "k1+", "k3+")


def textbook(rewards, values, mask=None, *, train_mask=None, logprobs=None, ref_logprobs=None,
             kl_coef=0.0, kl_estimator="k1", gamma=1.0, lam=0.95, bootstrap=None, normalize=True,
             unbiased=True):
    """Shape, GAE by a loop, whitening by torch, in the dtype of the inputs."""
    B, T = rewards.shape
    mask = torch.ones(B, T, dtype=torch.bool) if mask is None else mask
    kl = torch.zeros_like(rewards)
    if logprobs is not None:
        d = torch.where(mask, logprobs - ref_logprobs, 0).clamp(-20, 20)
        kl = {"k1": d, "k2": d * d / 2, "k3": torch.exp(-d) - 1 + d, "abs": d.abs()}[
            kl_estimator.removesuffix("+")]
    shaped = torch.where(mask, rewards - kl_coef * kl, 0)
    advantages = torch.zeros_like(shaped)
    for b in range(B):
        behind = 0.0 if bootstrap is None else bootstrap[b]
        following = torch.zeros((), dtype=shaped.dtype)
        for t in reversed(range(T)):
            if mask[b, t]:
                following = (shaped[b, t] + gamma * behind - values[b, t]
                             + gamma * lam * following)
                advantages[b, t], behind = following, values[b, t]
    returns = torch.where(mask, advantages + values, 0)
    trained = mask if train_mask is None else train_mask
    if normalize:
        valid = advantages[trained]
        scale = torch.rsqrt(valid.var(correction=int(unbiased)) + 1e-8) if len(valid) > 1 else 0.0
        advantages = torch.where(trained, (advantages - valid.sum() / max(len(valid), 1)) * scale,
                                 0)
    return advantages, returns, shaped, torch.where(mask, kl, 0)


def batch(B=4, T=9, seed=0, dtype=torch.float32, mask="interior"):
    g = torch.Generator().manual_seed(seed)
    rewards, values, logprobs, noise = torch.randn(4, B, T, generator=g, dtype=torch.float64)
    ref = logprobs + 0.3 * noise
    return (*(x.to(dtype) for x in (rewards, values, logprobs, ref)),
            sample_mask(mask, B, T, seed))


def test_by_hand():
    rewards = torch.tensor([[1.0, 9.0, 2.0]])
    values = torch.tensor([[0.5, 9.0, 0.25]])
    logprobs, ref = torch.tensor([[-1.0, 9.0, -2.0]]), torch.tensor([[-1.5, -9.0, -1.0]])
    mask = torch.tensor([[True, False, True]])
    out = tk.token_advantages(rewards, values, mask, logprobs=logprobs, ref_logprobs=ref,
                              kl_coef=0.2, gamma=0.9, lam=0.8)
    # shaped 1 - .2 * .5 = .9 and 2 + .2 = 2.2; A_3 = 2.2 - .25; A_1 = .9 + .225 - .5 + .72 A_3
    torch.testing.assert_close(out.rewards, torch.tensor([[0.9, 0.0, 2.2]]))
    torch.testing.assert_close(out.returns, torch.tensor([[2.529, 0.0, 2.2]]))
    half = 0.5 ** 0.5  # two tokens, n - 1: (x - mean) / std = -+ sqrt(1/2)
    torch.testing.assert_close(out.advantages, torch.tensor([[half, 0.0, -half]]))
    stats = out.stats
    assert stats.n == 2 and stats.n.dtype == torch.int64
    expected = {"reward_mean": 1.55, "reward_std": 1.3 * half, "kl_mean": -0.25,
                "advantage_mean": (2.029 + 1.95) / 2, "advantage_std": 0.079 * half,
                "return_mean": (2.529 + 2.2) / 2, "return_std": 0.329 * half}
    for name, value in expected.items():
        scalar = getattr(stats, name)
        assert scalar.shape == () and scalar.dtype == torch.float32
        assert float(scalar) == pytest.approx(value, rel=1e-4), name


SHAPES = [(2, 1), (3, 7), (2, 63), (2, 64), (2, 65), (1, 1000), (0, 5), (3, 0), (65, 3)]
CASES = third(itertools.product(DTYPES, SHAPES, MASKS, (False, True)), seed=5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_accuracy_over_dtypes_shapes_masks_strides(backend):
    for case, (dtype, (B, T), kind, wide) in enumerate(CASES):
        if T == 1000 and case % 4:
            continue  # the loops over T are the slow part
        *tensors, mask = batch(B, T, case, dtype, kind)
        train = None if case % 2 else torch.rand(B, T) < 0.8
        train = train if train is None or mask is None else train & mask
        options = {"kl_coef": 0.1, "kl_estimator": ESTIMATORS[case % 6], "gamma": 0.99,
                   "bootstrap": torch.randn(B).to(dtype), "unbiased": bool(case % 4 < 2)}
        results = {}
        for name, to in (("exact", torch.float64), ("eager", torch.float32)):
            r, v, lp, ref = (x.to(to) for x in tensors)
            results[name] = textbook(r, v, mask, train_mask=train, logprobs=lp, ref_logprobs=ref,
                                     **{**options, "bootstrap": options["bootstrap"].to(to)})
        if wide:
            tensors = [strided(x) for x in tensors]
            mask, train = (x if x is None else strided(x) for x in (mask, train))
        with tk.use_backend(backend):
            out = tk.token_advantages(*tensors[:2], mask, train_mask=train, logprobs=tensors[2],
                                      ref_logprobs=tensors[3], **options)
        for i, name in enumerate(("advantages", "returns", "rewards")):
            assert_accurate(getattr(out, name), results["exact"][i], results["eager"][i],
                            floor=SEQUENTIAL_FLOOR, name=f"{name} of {CASES[case]}")
            assert getattr(out, name).dtype == torch.float32
        check_stats(out, mask, results["exact"][3], options["unbiased"])


def check_stats(out, mask, kl, unbiased, advantages=None):
    valid = torch.ones(out.returns.shape, dtype=torch.bool) if mask is None else mask
    assert int(out.stats.n) == int(valid.sum())
    for name, x in (("reward", out.rewards), ("return", out.returns), ("advantage", advantages)):
        if x is None:
            continue
        x = x[valid].double()
        mean = x.sum() / max(len(x), 1)
        std = x.std(correction=int(unbiased)) if len(x) > 1 else torch.zeros(())
        torch.testing.assert_close(getattr(out.stats, f"{name}_mean").double(), mean.double(),
                                   rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(getattr(out.stats, f"{name}_std").double(), std.double(),
                                   rtol=1e-5, atol=1e-5)
    mean = kl[valid].double().sum() / max(int(valid.sum()), 1)
    torch.testing.assert_close(out.stats.kl_mean.double(), mean, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("packed", (False, True))
def test_equals_the_public_operators_composed(backend, packed):
    rewards, values, logprobs, ref, mask = batch(5, 11)
    train = mask & (torch.rand(5, 11) < 0.7)
    tensors, cu = [rewards, values, logprobs, ref, mask, train], None
    if packed:
        cu = pack(rewards, [11, 0, 4, 1, 9])[1]
        tensors = [pack(x, [11, 0, 4, 1, 9])[0] for x in tensors]
    r, v, lp, rf, m, tr = tensors
    walk = {"gamma": 0.98, "lam": torch.rand(5), "value_lam": 1.0, "bootstrap": torch.randn(5),
            "cu_seqlens": cu}
    options = {"train_mask": tr, "logprobs": lp, "ref_logprobs": rf, "kl_coef": 0.2,
               "kl_estimator": "k3", **walk}
    with tk.use_backend(backend):
        out = tk.token_advantages(r, v, m, **options)
        raw = tk.token_advantages(r, v, m, normalize=False, **options)
        d = torch.where(m, lp - rf, 0)
        shaped = torch.where(m, r - 0.2 * (torch.exp(-d) - 1 + d), 0)
        gae = tk.gae(shaped, v, m, **walk)
    torch.testing.assert_close(out.rewards, shaped, rtol=0, atol=1e-6)
    torch.testing.assert_close(out.returns, gae.returns, rtol=0, atol=3e-6)
    torch.testing.assert_close(raw.advantages, gae.advantages, rtol=0, atol=3e-6)
    torch.testing.assert_close(out.advantages, tk.whiten(gae.advantages, tr), rtol=0, atol=3e-6)
    assert_same_bits(raw.returns, out.returns)  # returns come from raw advantages
    check_stats(raw, m, torch.where(m, torch.exp(-d) - 1 + d, 0), True, raw.advantages)
    assert not out.advantages[~tr].any()
    assert not raw.advantages[~m].any() and not out.rewards[~m].any() and not out.returns[~m].any()


def test_three_masks():
    """KL and GAE run over the action mask, whitening over the train mask: a token that is acted
    but not trained still carries reward, KL and value to the tokens before it."""
    rewards, values, logprobs, ref, mask = batch(3, 8, mask="right")
    train = mask.clone()
    train[:, 1] = False
    options = {"logprobs": logprobs, "ref_logprobs": ref, "kl_coef": 0.5}
    both = tk.token_advantages(rewards, values, mask, train_mask=train, **options)
    whole = tk.token_advantages(rewards, values, mask, **options)
    assert_same_bits(both.returns, whole.returns)
    assert_same_bits(both.rewards, whole.rewards)
    assert_same_bits(both.stats, whole.stats)
    chosen = both.advantages[train]
    assert abs(float(chosen.mean())) < 1e-5 and float(chosen.std()) == pytest.approx(1, abs=1e-5)
    assert not both.advantages[~train].any()


def test_padding_and_tool_tokens_pay_nothing():
    """miles#1827, verl#7278 (GAE across tool tokens); verl#3805, trl#7024, SkyRL#1305 (padding
    leaks into GAE or means): compressing masked tokens away gives the same numbers."""
    rewards, values, logprobs, ref, mask = batch(4, 20)
    lengths = mask.sum(1).tolist()
    cu = torch.tensor([0, *lengths]).cumsum(0).int()
    options = {"kl_coef": 0.3, "gamma": 0.97}
    padded = tk.token_advantages(rewards, values, mask, logprobs=logprobs, ref_logprobs=ref,
                                 **options)
    dense = tk.token_advantages(rewards[mask], values[mask], logprobs=logprobs[mask],
                                ref_logprobs=ref[mask], cu_seqlens=cu, **options)
    for name in ("advantages", "returns", "rewards"):
        torch.testing.assert_close(getattr(padded, name)[mask], getattr(dense, name), rtol=0,
                                   atol=2e-6)
    torch.testing.assert_close(torch.stack(padded.stats[1:]), torch.stack(dense.stats[1:]), rtol=0,
                               atol=2e-6)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_estimators(estimator):
    rewards, values, logprobs, ref, mask = batch()
    b, t = mask.nonzero()[0].tolist()
    logprobs[b, t] += 100  # clamped to 20
    out = tk.token_advantages(rewards, values, mask, logprobs=logprobs, ref_logprobs=ref,
                              kl_coef=0.1, kl_estimator=estimator)
    shaped = textbook(rewards.double(), values.double(), mask, logprobs=logprobs.double(),
                      ref_logprobs=ref.double(), kl_coef=0.1, kl_estimator=estimator)[2]
    torch.testing.assert_close(out.rewards.double(), shaped, rtol=1e-5, atol=1e-5)


def test_kl_coef_zero_measures_and_tensor_equals_number():
    rewards, values, logprobs, ref, mask = batch()
    free = tk.token_advantages(rewards, values, mask)
    assert free.stats.kl_mean == 0
    measured = tk.token_advantages(rewards, values, mask, logprobs=logprobs, ref_logprobs=ref)
    assert_same_bits(measured.advantages, free.advantages)
    assert float(measured.stats.kl_mean) == pytest.approx(float((logprobs - ref)[mask].mean()),
                                                          rel=1e-5)
    one, two = (tk.token_advantages(rewards, values, mask, logprobs=logprobs, ref_logprobs=ref,
                                    kl_coef=c) for c in (0.25, torch.tensor(0.25)))
    assert_same_bits(one, two)


@pytest.mark.parametrize("backend", (*BACKENDS, "cuda"))
def test_kl_coef_zero_is_off(monkeypatch, backend):
    """Of two log-probs of -inf the KL is NaN: measured as such, and no part of a reward."""
    if backend == "cuda":
        _emulated.on_the_cpu(monkeypatch, "token_advantages")
    rewards, values, logprobs, ref, mask = batch()
    with tk.use_backend(backend):
        free = tk.token_advantages(rewards, values, mask)
        logprobs[mask.nonzero()[0].unbind()] = ref[mask.nonzero()[0].unbind()] = -float("inf")
        off = tk.token_advantages(rewards, values, mask, logprobs=logprobs, ref_logprobs=ref)
    assert_same_bits(tuple(off[:3]), tuple(free[:3]))
    assert off.stats.kl_mean.isnan()
    assert torch.stack(off.stats[1:3] + off.stats[4:]).isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("poison", POISONS)
def test_poison(backend, poison):
    for kind, packed in itertools.product(("left", "interior", "row", "all-false"), (False, True)):
        *tensors, mask = batch(4, 9, mask=kind)
        train = mask & (torch.rand(4, 9) < 0.7)
        alive, per_sequence = mask.any(1), [torch.rand(4) for _ in range(3)]
        cu = torch.arange(5, dtype=torch.int32) * 9 if packed else None
        if packed:
            tensors, mask, train = [x.flatten() for x in tensors], mask.flatten(), train.flatten()

        def run(fill, tensors=tensors, mask=mask, train=train, alive=alive, cu=cu,
                per_sequence=per_sequence):
            rewards, values, logprobs, ref = (poisoned(x, mask, fill) for x in tensors)
            lam, value_lam, bootstrap = (poisoned(x, alive, fill) for x in per_sequence)
            return tk.token_advantages(
                rewards, values, mask, train_mask=train, logprobs=logprobs, ref_logprobs=ref,
                kl_coef=0.1, kl_estimator="k3", lam=lam, value_lam=value_lam, bootstrap=bootstrap,
                cu_seqlens=cu)

        with tk.use_backend(backend):
            assert_same_bits(run(poison), run(0.0))
            assert all(not x[~mask].any() for x in run(poison)[:3])


# (B, T) and how the kernel walks it: (a block a sequence, parts); a block takes 2,048 at once
WALKS = [((9, 7), (False, 1)), ((20, 300), (False, 1)), ((5, 65), (True, 1)),
         ((2, 2500), (True, 1)), ((1, 4300), (True, 2)), ((1, 1), (True, 1)),
         ((0, 5), (True, 1)), ((3, 0), (True, 1))]
EMULATED = [(walk, DTYPES[i % 3], kind, ("", "rows", "columns")[i // 3 % 3])
            for i, (walk, kind) in enumerate(third(itertools.product(WALKS, MASKS), seed=4))]


def test_cuda_kernels_emulated(monkeypatch):
    """The kernels' own source on the CPU, thread by thread, through their host code."""
    _emulated.on_the_cpu(monkeypatch, "token_advantages")
    from tppo_kernels.ops.gae import _cuda as walk

    for case, (((B, T), plan), dtype, kind, layout) in enumerate(EMULATED):
        monkeypatch.setattr(walk, "plan", lambda *_, plan=plan: plan)
        *tensors, mask = batch(B, T, case, dtype, kind)
        train = None if case % 2 else torch.rand(B, T) < 0.8
        train = train if train is None or mask is None else train & mask
        options = {"kl_coef": 0.1, "kl_estimator": ESTIMATORS[case % 6], "gamma": 0.99,
                   "lam": torch.rand(B), "value_lam": (None, 0.5)[case // 2 % 2],
                   "bootstrap": torch.randn(B).to(dtype), "unbiased": bool(case % 4 < 2),
                   "normalize": case % 5 > 0}

        def run(*inputs, mask=mask, train=train, options=options):
            return tk.token_advantages(*inputs[:2], mask, train_mask=train, logprobs=inputs[2],
                                       ref_logprobs=inputs[3], **options)

        exact = run(*(x.double() for x in tensors))
        eager = _emulated.undone(monkeypatch, "token_advantages", lambda: run(*tensors))  # noqa: B023
        if layout == "rows":
            tensors = [torch.nn.functional.pad(x, (3, 2))[:, 3:3 + T] for x in tensors]
        elif layout == "columns":
            tensors = [strided(x) for x in tensors]
            mask, train = (x if x is None else strided(x) for x in (mask, train))
        out = run(*tensors, mask=mask, train=train)
        for name in ("advantages", "returns", "rewards"):
            assert_accurate(getattr(out, name), getattr(exact, name), getattr(eager, name),
                            floor=SEQUENTIAL_FLOOR, name=f"{name} of {EMULATED[case]}")
        assert int(out.stats.n) == int(exact.stats.n) and out.stats.n.dtype == torch.int64
        for name, a, e in zip(out.stats._fields[1:], out.stats[1:], exact.stats[1:], strict=True):
            torch.testing.assert_close(a.double(), e, rtol=1e-5, atol=1e-5, msg=name)


def test_cuda_kernels_emulated_packed_poisoned_and_in_a_group(monkeypatch):
    """Poison changes no bit; moments that a group merged whiten as the process's own do."""
    _emulated.on_the_cpu(monkeypatch, "token_advantages")
    from tppo_kernels.ops.gae import _cuda as walk

    lengths = [5, 0, 300, 1, 2050, 0, 3]
    *tensors, mask = batch(7, 2050)
    cu = pack(mask, lengths)[1]
    *tensors, mask = (pack(x, lengths)[0] for x in (*tensors, mask))
    train, args = mask & (torch.rand(len(mask)) < 0.7), [torch.rand(7) for _ in range(3)]
    alive = torch.stack([part.any() for part in mask.split(lengths)])
    for plan in ((False, 1), (True, 2)):
        monkeypatch.setattr(walk, "plan", lambda *_, plan=plan: plan)

        def run(fill, dtype=torch.float32, normalize=True):
            r, v, lp, ref = (poisoned(x, mask, fill).to(dtype) for x in tensors)
            lam, value_lam, bootstrap = (poisoned(x, alive, fill).to(dtype) for x in args)
            return tk.token_advantages(
                r, v, mask, train_mask=train, logprobs=lp, ref_logprobs=ref, kl_coef=0.2,
                kl_estimator="k3", lam=lam, value_lam=value_lam, bootstrap=bootstrap,
                cu_seqlens=cu, normalize=normalize)

        clean = run(0.0)
        for a, e in zip(clean[:3], run(0.0, torch.float64)[:3], strict=True):
            assert_accurate(a, e, floor=SEQUENTIAL_FLOOR)
        for poison in POISONS:
            assert_same_bits(run(poison), clean)
        raw = run(0.0, normalize=False).advantages
        moments = torch.ops.tppo_kernels.whiten_stats(raw, train)
        apart = torch.ops.tppo_kernels.token_advantages_whiten(raw, train, moments, True)
        torch.testing.assert_close(apart, clean.advantages, rtol=0, atol=1e-6)


def test_cuda_launches_nothing_else_and_reads_scalars_by_pointer(monkeypatch):
    backend = _emulated.on_the_cpu(monkeypatch, "token_advantages")
    from tppo_kernels.ops.gae import _cuda as walk

    *tensors, mask = batch(3, 6, dtype=torch.bfloat16)
    call = AdvantagesCall(
        *tensors[:2], mask, mask, *tensors[2:], torch.tensor(0.1), torch.tensor(0.9),
        torch.rand(3), torch.tensor(0.7), torch.randn(3), None, "k3", True, True)
    with Launching() as launching:
        expected = backend.fwd(call)
    assert launching.names == []
    monkeypatch.setattr(walk, "scalar", lambda x: (0.0, x.to(torch.float32)))
    assert_same_bits(backend.fwd(call), expected)


def test_cuda_kernels_emulated_many_blocks_and_no_variance(monkeypatch):
    """More tasks than blocks, more blocks than threads; no variance but rounding gives 0."""
    backend = _emulated.on_the_cpu(monkeypatch, "token_advantages")
    from tppo_kernels.ops.gae import _cuda as walk

    for plan, blocks, B in (((False, 1), 3, 50), ((True, 1), 3, 50), ((True, 1), 1024, 300)):
        monkeypatch.setattr(backend, "BLOCKS", blocks)
        monkeypatch.setattr(walk, "plan", lambda *_, plan=plan: plan)
        rewards, values, _, _, mask = batch(B, 5)
        out, exact = tk.token_advantages(rewards, values, mask), tk.token_advantages(
            rewards.double(), values.double(), mask)
        assert_accurate(out.advantages, exact.advantages, floor=SEQUENTIAL_FLOOR)
        torch.testing.assert_close(torch.stack(out.stats[1:]).double(),
                                   torch.stack(exact.stats[1:]), rtol=1e-5, atol=1e-5)
        same = tk.token_advantages(torch.full((50, 5), 0.1), torch.zeros(50, 5), lam=0.0, gamma=0.0)
        assert not same.advantages.any() and same.stats.advantage_std < 1e-7


def test_cuda_whitening_emulated_of_more_tokens_than_threads(monkeypatch):
    backend = _emulated.on_the_cpu(monkeypatch, "token_advantages")
    x = torch.randn(1_050_001) + 3  # a turn of all threads takes 2^20
    trained = torch.rand(len(x)) < 0.7
    moments = torch.ops.tppo_kernels.whiten_stats(x, trained)
    actual = backend.whiten(WhitenAdvantages(x, trained, moments, False))
    assert_accurate(actual, tk.whiten(x.double(), trained, unbiased=False), floor=SEQUENTIAL_FLOOR)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (3, 5)])
def test_empty_is_zero_never_nan(backend, shape):
    x, none = torch.randn(shape), torch.zeros(shape, dtype=torch.bool)
    with tk.use_backend(backend):
        out = tk.token_advantages(x, x, none, logprobs=x, ref_logprobs=x, kl_coef=0.1)
        one = tk.token_advantages(torch.ones(1, 1), torch.zeros(1, 1))
    assert all(y.shape == shape and not y.any() for y in out[:3])
    assert all(float(s) == 0 for s in out.stats)
    assert one.advantages.tolist() == [[0.0]] and one.returns.tolist() == [[1.0]]
    assert one.stats.reward_std == 0


def test_twice_permuted_detached_and_apart():
    rewards, values, logprobs, ref, mask = batch(70, 33)
    rewards = rewards.requires_grad_()
    options = {"logprobs": logprobs, "ref_logprobs": ref, "kl_coef": 0.1}
    once = tk.token_advantages(rewards, values, mask, **options)
    assert_same_bits(tk.token_advantages(rewards, values, mask, **options), once)
    assert not any(x.requires_grad for x in (*once[:3], *once.stats))
    order = torch.randperm(70)
    moved = tk.token_advantages(rewards[order], values[order], mask[order], kl_coef=0.1,
                                logprobs=logprobs[order], ref_logprobs=ref[order])
    torch.testing.assert_close(moved.advantages, once.advantages[order], rtol=0, atol=2e-6)
    plain = tk.token_advantages(rewards.detach(), values)
    plain.rewards.zero_()  # the results share no memory with the arguments
    assert rewards.detach().any()
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same_bits(tk.token_advantages(rewards, values, mask, **options), once)


def test_fp64():
    *tensors, mask = batch(dtype=torch.float64)
    out = tk.token_advantages(*tensors[:2], mask, logprobs=tensors[2], ref_logprobs=tensors[3],
                              kl_coef=0.1)
    exact = textbook(*tensors[:2], mask, logprobs=tensors[2], ref_logprobs=tensors[3], kl_coef=0.1)
    for a, e in zip(out[:3], exact, strict=False):
        assert a.dtype == torch.float64
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12)
    assert out.stats.return_std.dtype == torch.float64
    assert tk.explain(tk.token_advantages, *tensors[:2]).backend == "reference"
    with tk.use_backend("cpp"), pytest.raises(tk.BackendError, match="fp64"):
        tk.token_advantages(*tensors[:2])


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(2, 9))
def test_whitened_advantages_ignore_scale_and_shift_of_the_critic(seed, B, T):
    """With gamma = lam = 1, a reward scaled and a value shifted at every token scale and shift
    the raw advantages alike: whitened ones stay."""
    rewards, values, _, _, mask = batch(B, T, seed, torch.float64)
    options = {"gamma": 1.0, "lam": 1.0}
    one = tk.token_advantages(rewards, values, mask, **options)
    assume(float(one.stats.advantage_std) > 0.1)  # below, eps shows
    two = tk.token_advantages(3 * rewards, 3 * values - 5, mask, **options)
    torch.testing.assert_close(two.advantages, one.advantages, rtol=0, atol=1e-6)
    torch.testing.assert_close(two.returns, 3 * one.returns, rtol=0, atol=1e-9)


@pytest.mark.parametrize("packed", (False, True))
def test_opcheck(packed):
    rewards, values, logprobs, ref, mask = batch(3, 6)
    train = mask & (torch.rand(3, 6) < 0.7)
    tensors, cu = [rewards, values, mask, train, logprobs, ref], None
    if packed:
        cu = pack(rewards, [6, 0, 4])[1]
        tensors = [pack(x, [6, 0, 4])[0] for x in tensors]
    raw = torch.ops.tppo_kernels.token_advantages_fwd.default
    scalars = (torch.tensor(0.1), torch.tensor(0.9), torch.tensor([0.9, 0.5, 1.0]))
    torch.library.opcheck(raw, (*tensors, *scalars, torch.tensor(0.7), torch.randn(3), cu, "k3",
                                True, True))
    torch.library.opcheck(raw, (*tensors[:2], None, None, None, None, *scalars, None, None, cu,
                                "k1", False, False))


def test_compiles_as_one_graph_and_exports():
    *tensors, mask = batch()

    def call(rewards, values, logprobs, ref, mask, coef, gamma):
        out = tk.token_advantages(rewards * 2, values, mask, logprobs=logprobs, ref_logprobs=ref,
                                  kl_coef=coef, gamma=gamma)
        return (*out[:3], *out.stats)

    args = (*tensors, mask, torch.tensor(0.1), torch.tensor(0.99))
    eager = call(*args)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert_same_bits(compiled(*args), eager)
    for a, e in zip(torch.compile(call, fullgraph=True)(*args), eager, strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=2e-6)  # inductor fuses the whitening

    class Module(torch.nn.Module):
        def forward(self, *inputs):
            return call(*inputs)

    assert_same_bits(tuple(torch.export.export(Module(), args).module()(*args)), eager)


def test_fifty_lengths_and_scalars_two_graphs():
    """Liger#146, fla#533: a recompilation for every length or scalar."""
    calls = [(*batch(3, 2 + t), *(torch.tensor(0.5 + t / 200) for _ in range(3)))
             for t in range(50)]
    assert count_graphs(
        lambda r, v, lp, ref, m, coef, gamma, lam: tk.token_advantages(
            r, v, m, logprobs=lp, ref_logprobs=ref, kl_coef=coef, gamma=gamma, lam=lam).advantages,
        calls) <= 2


X = torch.zeros(2, 3)
M = torch.tensor([[True, True, False], [True, True, True]])


@pytest.mark.parametrize("error, words, args, kwargs", [
    (TypeError, "token_rewards is list", ([[1.0]], X), {}),
    (ValueError, r"token_rewards has shape \[3\], expected \[B, T\]", (X[0], X), {}),
    (ValueError, r"values has shape \[3, 2\].*\[2, 3\] as token_rewards", (X, X.t()), {}),
    (TypeError, "mask has dtype float32", (X, X, X), {}),
    (ValueError, r"train_mask has shape \[3\]", (X, X), {"train_mask": M[0]}),
    (ValueError, r"train_mask is True at \[0, 2\], where mask is False, expected a subset",
     (X, X, M), {"train_mask": torch.ones(2, 3).bool()}),
    (ValueError, "logprobs is None, expected a tensor because kl_coef is 0.1", (X, X),
     {"kl_coef": 0.1, "ref_logprobs": X}),
    (ValueError, "ref_logprobs is None, expected a tensor because kl_coef is 0.1", (X, X),
     {"kl_coef": 0.1, "logprobs": X}),
    (ValueError, "logprobs is None.*because kl_coef is", (X, X), {"kl_coef": torch.tensor(0.1)}),
    (ValueError, "ref_logprobs is None.*the other", (X, X), {"logprobs": X}),
    (ValueError, r"logprobs has shape \[2, 4\]", (X, X),
     {"logprobs": torch.zeros(2, 4), "ref_logprobs": X}),
    (TypeError, "kl_coef is str", (X, X), {"kl_coef": "0.1"}),
    (ValueError, "kl_coef is nan", (X, X), {"kl_coef": float("nan")}),
    (ValueError, r"kl_coef is a tensor of shape \[2\]", (X, X),
     {"kl_coef": torch.zeros(2), "logprobs": X, "ref_logprobs": X}),
    (ValueError, "kl_estimator is 'k4', expected one of 'k1'", (X, X), {"kl_estimator": "k4"}),
    (ValueError, "lam is -0.1", (X, X), {"lam": -0.1}),
    (ValueError, "token_advantages: value_lam holds 2", (X, X), {"value_lam": torch.tensor(2.0)}),
    (ValueError, r"bootstrap has shape \[3\]", (X, X), {"bootstrap": torch.zeros(3)}),
    (ValueError, "normalize is 'yes', expected one of True, False", (X, X), {"normalize": "yes"}),
    (ValueError, "unbiased is 0", (X, X), {"unbiased": 0}),
    (TypeError, "group is int 0", (X, X), {"group": 0}),
    (ValueError, "cu_seqlens is .*end at N = 6", (X.flatten(), X.flatten()),
     {"cu_seqlens": torch.tensor([0, 5], dtype=torch.int32)}),
    (TypeError, "whiten", (X, X), {"whiten": True}),
])
def test_bad_input_names_the_argument(error, words, args, kwargs):
    with pytest.raises(error, match=words):
        tk.token_advantages(*args, **kwargs)


@pytest.mark.skipif(bool(missing("cpp")), reason=str(missing("cpp")))
def test_no_python_loop_over_tokens():
    """verl, TRL, OpenRLHF, SkyRL walk T in Python: a thousand tokens cost no more torch calls."""
    def calls(T):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            tk.token_advantages(torch.randn(2, T), torch.randn(2, T))
        return sum(event.count for event in profile.key_averages())

    assert tk.explain(tk.token_advantages, X, X).backend == "cpp"
    calls(5)
    assert calls(1000) == calls(10)
