"""`gae`: the textbook on compressed sequences, every layout and mask, and the bugs of its peers."""

import itertools

import _emulated
import pytest
import torch
from _loss_cases import Launching
from _matrix import third
from hypothesis import given, settings
from hypothesis import strategies as st

import tppo_kernels as tk
from tppo_kernels._core.op import missing
from tppo_kernels.ops.gae.reference import GaeCall
from tppo_kernels.testing import (
    DTYPES,
    MASKS,
    POISONS,
    SEQUENTIAL_FLOOR,
    assert_accurate,
    assert_same_bits,
    count_graphs,
    max_error,
    pack,
    poisoned,
    sample_mask,
    strided,
)

BACKENDS = [pytest.param(b, marks=pytest.mark.skipif(bool(missing(b)), reason=str(missing(b))))
            for b in ("cpp", "reference")]


def textbook(rewards, values, gamma, lam, bootstrap=0.0):
    """Advantages of one unmasked sequence of Python floats, from the definition as a sum."""
    behind = [*values, bootstrap][1:]
    delta = [r + gamma * n - v for r, v, n in zip(rewards, values, behind, strict=True)]
    return [sum((gamma * lam) ** (s - t) * delta[s] for s in range(t, len(delta)))
            for t in range(len(delta))]


def compressed(rewards, values, mask, gamma, lam, value_lam, bootstrap):
    """The textbook on the valid tokens alone, put back where they were."""
    advantages, returns = torch.zeros_like(rewards), torch.zeros_like(rewards)
    for b in range(rewards.shape[0]):
        at = mask[b].nonzero()[:, 0]
        r, v = rewards[b, at].tolist(), values[b, at].tolist()
        advantages[b, at] = torch.tensor(
            textbook(r, v, gamma, float(lam[b]), float(bootstrap[b])), dtype=rewards.dtype)
        returns[b, at] = values[b, at] + torch.tensor(
            textbook(r, v, gamma, float(value_lam[b]), float(bootstrap[b])), dtype=rewards.dtype)
    return advantages, returns


def batch(B=4, T=9, seed=0, dtype=torch.float32, mask="interior"):
    g = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn(2, B, T, generator=g, dtype=torch.float64).to(dtype)
    return rewards, values, sample_mask(mask, B, T, seed)


@pytest.mark.parametrize("backend", BACKENDS)
def test_by_hand(backend):
    r, v = torch.tensor([[1., 9., 2.]]), torch.tensor([[0.5, 7., 0.25]])
    mask = torch.tensor([[True, False, True]])
    with tk.use_backend(backend):
        cut = tk.gae(r, v, mask, gamma=0.9, lam=0.8, bootstrap=torch.tensor([4.]))
        ended = tk.gae(r, v, mask, gamma=0.9, lam=0.8)
    # A_3 = 2 - .25; A_1 = 1 + .9 * .25 - .5 + .72 A_3; with a bootstrap A_3 = 2 + .9 * 4 - .25
    torch.testing.assert_close(ended.advantages, torch.tensor([[1.985, 0., 1.75]]))
    torch.testing.assert_close(ended.returns, torch.tensor([[2.485, 0., 2.]]))
    torch.testing.assert_close(cut.advantages, torch.tensor([[0.725 + 0.72 * 5.35, 0., 5.35]]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_carry_equals_compression_200_cases(backend):
    """Masked tokens are not steps: the carry walks over them."""
    for seed in range(200):
        rewards, values, mask = batch(2, 10, seed, torch.float64, "row" if seed % 9 else "interior")
        g = torch.Generator().manual_seed(seed)
        lam, value_lam, bootstrap = torch.rand(3, 2, generator=g, dtype=torch.float64)
        gamma = 0.9 + 0.1 * float(torch.rand((), generator=g))
        exact = compressed(rewards, values, mask, gamma, lam, value_lam, bootstrap)
        with tk.use_backend(backend):
            dtype = torch.float64 if backend == "reference" else torch.float32
            actual = tk.gae(*(x.to(dtype) for x in (rewards, values)), mask, gamma=gamma,
                            lam=lam.to(dtype), value_lam=value_lam.to(dtype),
                            bootstrap=bootstrap.to(dtype))
        allowed = 1e-13 if backend == "reference" else 5e-6
        for a, e in zip(actual, exact, strict=True):
            assert max_error(a, e) <= allowed * max(1, float(e.abs().max()))


@pytest.mark.skipif(bool(missing("cpp")), reason=str(missing("cpp")))
def test_step_functors_are_the_kernel():
    """The step that the C++ and the CUDA kernel share, walked in Python."""
    import tppo_kernels._C as compiled

    rewards, values, mask = batch(3, 12)
    actual = tk.gae(rewards, values, mask, gamma=0.97, lam=0.9, value_lam=0.6,
                    bootstrap=torch.ones(3))
    for b in range(3):
        carry = (1.0, 1.0)
        for t in reversed(range(12)):
            if mask[b, t]:
                token = (float(rewards[b, t]), float(values[b, t]))
                advantage, back = compiled.gae_result(*token, *carry, 0.97)
                assert advantage == pytest.approx(float(actual.advantages[b, t]), abs=1e-6)
                assert back == pytest.approx(float(actual.returns[b, t]), abs=1e-6)
                carry = compiled.gae_apply(compiled.gae_map(*token, 0.97, 0.9, 0.6), *carry)


@pytest.mark.skipif(bool(missing("cpp")), reason=str(missing("cpp")))
@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10**6), st.integers(1, 30), st.data())
def test_maps_join_wherever_a_stretch_is_cut(seed, T, data):
    """Associativity: applying the join of two stretches is applying one, then the other."""
    import tppo_kernels._C as compiled

    g = torch.Generator().manual_seed(seed)
    gamma, lam, value_lam, x, y = torch.rand(5, generator=g).tolist()
    tokens = torch.randn(T, 2, generator=g).tolist()
    maps = [compiled.gae_map(*token, gamma, lam, value_lam) for token in tokens]
    identity = (1.0, 0.0, 1.0, 0.0)

    def joined(part):
        """By a random tree over the maps of a part."""
        if len(part) < 2:
            return part[0] if part else identity
        cut = data.draw(st.integers(1, len(part) - 1))
        return compiled.gae_join(joined(part[:cut]), joined(part[cut:]))

    carry = (x, y)
    for one in reversed(maps):
        carry = compiled.gae_apply(one, *carry)
    assert compiled.gae_apply(joined(maps), x, y) == pytest.approx(carry, rel=1e-5, abs=1e-5)
    assert compiled.gae_join(identity, maps[0]) == compiled.gae_join(maps[0], identity) == maps[0]


SHAPES = [(2, 1), (3, 7), (2, 63), (2, 64), (2, 65), (2, 1000), (0, 5), (3, 0), (65, 3)]
CASES = third(itertools.product(DTYPES, SHAPES, MASKS, (False, True)), seed=1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_accuracy_over_dtypes_shapes_masks_strides(backend):
    """Error against fp64 at most twice that of eager fp32, plus 1e-5 of the largest value."""
    for case, (dtype, (B, T), kind, wide) in enumerate(CASES):
        if T == 1000 and backend == "reference" and case % 5:
            continue  # its loop over T is the slow one, the other lengths show the same
        rewards, values, mask = batch(B, T, case, dtype, kind)
        bootstrap = torch.randn(B).to(dtype)
        kwargs = {"gamma": 0.99, "lam": 0.95, "value_lam": 1.0 if case % 2 else None}
        exact = tk.gae(rewards.double(), values.double(), mask, bootstrap=bootstrap.double(),
                       **kwargs)
        with tk.use_backend("reference"):
            eager = tk.gae(rewards, values, mask, bootstrap=bootstrap, **kwargs)
        with tk.use_backend(backend):
            if wide:
                rewards, values = strided(rewards), strided(values)
                mask = mask if mask is None else strided(mask)
            actual = tk.gae(rewards, values, mask, bootstrap=bootstrap, **kwargs)
        for name in ("advantages", "returns"):
            a = getattr(actual, name)
            assert a.dtype == torch.float32 and a.shape == (B, T)
            assert_accurate(a, getattr(exact, name), getattr(eager, name),
                            floor=SEQUENTIAL_FLOOR, name=f"{name} of {CASES[case]}")
            if mask is not None:
                assert not a[~mask].any()


# (B, T) and how the kernel walks it: (a block a sequence, parts); a block takes 2,048 at once
WALKS = [((9, 1), (False, 1)), ((5, 7), (True, 1)), ((3, 64), (False, 1)), ((2, 257), (True, 1)),
         ((9, 1000), (False, 1)), ((2, 2049), (True, 1)), ((2, 4098), (True, 1)),
         ((2, 4099), (True, 2)), ((1, 6200), (True, 4)), ((3, 100), (True, 4)),
         ((0, 5), (True, 1)), ((3, 0), (True, 1))]
EMULATED = [(walk, DTYPES[i % 3], kind, ("", "rows", "columns")[i // 3 % 3])
            for i, (walk, kind) in enumerate(third(itertools.product(WALKS, MASKS), seed=3))]


def test_cuda_kernel_emulated(monkeypatch):
    """The kernel's own source on the CPU, thread by thread, through its host code."""
    backend = _emulated.on_the_cpu(monkeypatch, "gae")
    for case, (((B, T), plan), dtype, kind, layout) in enumerate(EMULATED):
        monkeypatch.setattr(backend, "plan", lambda *_, plan=plan: plan)
        rewards, values, mask = batch(B, T, case, dtype, kind)
        values = values.float() if case % 3 == 0 else values
        bootstrap, lam = torch.randn(B).to(dtype), torch.rand(B)
        args = {"gamma": 0.99, "lam": lam if case % 2 else 0.95, "value_lam": case % 5 / 4 or None}
        exact = tk.gae(rewards.double(), values.double(), mask, bootstrap=bootstrap.double(),
                       **args)
        cpp = _emulated.undone(monkeypatch, "gae", lambda: tk.gae(
            rewards, values, mask, bootstrap=bootstrap, **args))  # noqa: B023
        if layout == "rows":  # a view with rows apart, at another phase than the results
            rewards, values = (torch.nn.functional.pad(x, (3, 2))[:, 3:3 + T]
                               for x in (rewards, values))
            mask = mask if mask is None else torch.nn.functional.pad(mask, (1, 0))[:, 1:]
        elif layout == "columns":
            rewards, values = strided(rewards), strided(values)
            mask = mask if mask is None else strided(mask)
        actual = tk.gae(rewards, values, mask, bootstrap=bootstrap, **args)
        for a, e, c in zip(actual, exact, cpp, strict=True):
            assert_accurate(a, e, c, floor=SEQUENTIAL_FLOOR, name=str(EMULATED[case]))
            assert mask is None or not a[~mask].any()


def test_cuda_kernel_emulated_packed_poisoned_and_far_apart(monkeypatch):
    backend = _emulated.on_the_cpu(monkeypatch, "gae")
    lengths = [5, 0, 300, 1, 2050, 0, 3]
    rewards, values, mask = batch(7, 2050)
    (rewards, cu), values, mask = pack(rewards, lengths), pack(values, lengths)[0], pack(
        mask, lengths)[0]
    alive = torch.stack([part.any() for part in mask.split(lengths)])
    args = [torch.rand(7) for _ in range(3)]
    for plan in ((False, 1), (True, 1), (True, 3)):
        monkeypatch.setattr(backend, "plan", lambda *_, plan=plan: plan)

        def run(fill, dtype=torch.float32):
            lam, value_lam, bootstrap = (poisoned(x, alive, fill).to(dtype) for x in args)
            return tk.gae(poisoned(rewards, mask, fill).to(dtype),
                          poisoned(values, mask, fill).to(dtype), mask, gamma=0.98, lam=lam,
                          value_lam=value_lam, bootstrap=bootstrap, cu_seqlens=cu)

        for a, e in zip(run(0.0), run(0.0, torch.float64), strict=True):
            assert_accurate(a, e, floor=SEQUENTIAL_FLOOR)
        for poison in POISONS:
            assert_same_bits(run(poison), run(0.0))


def test_cuda_launches_nothing_else_and_reads_scalars_by_pointer(monkeypatch):
    backend = _emulated.on_the_cpu(monkeypatch, "gae")
    rewards, values, mask = batch(3, 6)
    call = GaeCall(rewards.bfloat16(), values, mask, torch.tensor(0.9),
                   torch.tensor([0.9, 0.5, 1.0]).bfloat16(), torch.tensor(0.7),
                   torch.randn(3).half(), None)
    with Launching() as launching:
        expected = backend.fwd(call)
    assert launching.names == []
    monkeypatch.setattr(backend, "scalar", lambda x: (0.0, x.to(torch.float32)))
    assert_same_bits(backend.fwd(call), expected)


def test_default_dtype_is_not_asked():
    """A trainer that builds its model under a bf16 default calls operators there, too."""
    rewards, values, mask = batch()
    expected = tk.gae(rewards, values, mask)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert_same_bits(tk.gae(rewards, values, mask), expected)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_default_device_is_not_asked(backend):
    """CPU tensors under `torch.set_default_device("cuda")`: results were written to nowhere."""
    rewards, values, mask = batch()
    with tk.use_backend(backend):
        expected = tk.gae(rewards, values, mask)
        with torch.device("meta"):
            assert_same_bits(tk.gae(rewards, values, mask), expected)


def test_cuda_plan_spreads_any_shape_over_the_chip():
    """By shapes alone; a GPU has some hundred places for a block."""
    if missing("cpp"):
        pytest.skip(missing("cpp"))
    from tppo_kernels.ops.gae._cuda import plan

    assert plan(8192, 8192 * 24) == (False, 1)  # a warp a sequence
    assert plan(512, 512 * 2048) == plan(8192, 8192 * 4096) == plan(64, 64 * 512) == (True, 1)
    assert plan(1, 131_072) == (True, 64) and plan(8, 8 * 131_072) == (True, 33)
    assert plan(100, 100 * 32_768) == (True, 3) and plan(264, 264 * 32_768) == (True, 1)
    assert plan(0, 0) == plan(3, 0) == (True, 1)


def test_cuda_kernel_emulated_gives_a_block_what_is_long_among_the_short(monkeypatch):
    """One warp walked a sequence of 32k tokens among a thousand of 300, alone."""
    _emulated.on_the_cpu(monkeypatch, "gae")
    from tppo_kernels.ops.gae import _cuda as backend

    monkeypatch.setattr(backend, "plan", lambda *_: (False, 1))
    lengths = [3, 0, 1024, 5, 1, 1025, 2, 7, 9, 4100, 6]
    cu = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    rewards, values = torch.randn(2, sum(lengths))
    mask, bootstrap = torch.rand(sum(lengths)) < 0.9, torch.randn(len(lengths))
    for flags in (mask, None, (mask * 2).to(torch.uint8).view(torch.bool)):
        args = {"gamma": 0.99, "lam": 0.97, "bootstrap": bootstrap, "cu_seqlens": cu}
        exact = tk.gae(rewards.double(), values.double(), None if flags is None else mask, **args)
        for a, e in zip(tk.gae(rewards, values, flags, **args), exact, strict=True):
            assert_accurate(a, e, floor=SEQUENTIAL_FLOOR)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("poison", POISONS)
def test_poison(backend, poison):
    """verl#3805, trl#7024, ROLL#447, SkyRL#1305: padding leaks into GAE.

    Whatever stands in masked slots, and in the arguments of an empty sequence, changes no bit."""
    for kind in ("left", "right", "interior", "row", "all-false"):
        rewards, values, mask = batch(4, 9, mask=kind)
        alive = mask.any(1)
        args = [torch.rand(4) for _ in range(3)]

        def run(fill, rewards=rewards, values=values, mask=mask, alive=alive, args=args):
            lam, value_lam, bootstrap = (poisoned(x, alive, fill) for x in args)
            return tk.gae(poisoned(rewards, mask, fill), poisoned(values, mask, fill), mask,
                          lam=lam, value_lam=value_lam, bootstrap=bootstrap)

        with tk.use_backend(backend):
            assert_same_bits(run(poison), run(0.0))
            assert_same_bits(run(poison), run(poison))
            assert not run(poison).advantages[~mask].any() and not run(poison).returns[~mask].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_equals_padded(backend):
    lengths = [5, 0, 9, 1, 0]
    rewards, values, mask = batch(5, 9)
    valid = torch.arange(9) < torch.tensor(lengths)[:, None]
    lam, value_lam, bootstrap = torch.rand(3, 5)
    with tk.use_backend(backend):
        for m in (mask, None):
            padded = tk.gae(rewards, values, valid if m is None else m & valid, lam=lam,
                            value_lam=value_lam, bootstrap=bootstrap, gamma=0.98)
            (r, cu), (v, _) = pack(rewards, lengths), pack(values, lengths)
            packed = tk.gae(r, v, None if m is None else pack(m, lengths)[0], lam=lam, gamma=0.98,
                            value_lam=value_lam, bootstrap=bootstrap, cu_seqlens=cu)
            for a, e in zip(packed, padded, strict=True):
                torch.testing.assert_close(a, pack(e, lengths)[0], rtol=0, atol=1e-6)
        nothing = torch.zeros(0)
        for cu in ([0], [0, 0, 0]):
            empty = tk.gae(nothing, nothing, cu_seqlens=torch.tensor(cu, dtype=torch.int32))
            assert empty.advantages.shape == empty.returns.shape == (0,)


@pytest.mark.parametrize("backend", BACKENDS)
def test_twice_and_permuted(backend):
    rewards, values, mask = batch(70, 33)
    order = torch.randperm(70)
    with tk.use_backend(backend):
        once = tk.gae(rewards, values, mask)
        assert_same_bits(tk.gae(rewards, values, mask), once)
        permuted = tk.gae(rewards[order], values[order], mask[order])
    for a, e in zip(permuted, once, strict=True):
        torch.testing.assert_close(a, e[order], rtol=0, atol=1e-6)


def test_tool_tokens_are_no_steps():
    """miles#1827, verl#7278: GAE across tool tokens. The action before a tool answer bootstraps
    from the action behind it, undiscounted by the answer's length."""
    rewards = torch.tensor([[0., 0., 0., 0., 1.]])
    values = torch.tensor([[0.5, 99., 99., 99., 0.25]])
    mask = torch.tensor([[True, False, False, False, True]])
    inside = tk.gae(rewards, values, mask, gamma=0.9, lam=0.5)
    alone = tk.gae(rewards[mask][None], values[mask][None], gamma=0.9, lam=0.5)
    torch.testing.assert_close(inside.advantages[mask], alone.advantages[0])
    assert not inside.returns[~mask].any()


def test_padding_length_changes_nothing():
    """trl#7024, verl#3805: more padding, or padding on the other side, gives the same numbers."""
    rewards, values, _ = batch(2, 6)
    exact = tk.gae(rewards, values, bootstrap=torch.ones(2))
    for left, right in ((0, 40), (40, 0), (7, 9)):
        wide = [torch.nn.functional.pad(x, (left, right), value=5.0) for x in (rewards, values)]
        mask = torch.nn.functional.pad(torch.ones(2, 6, dtype=torch.bool), (left, right))
        out = tk.gae(*wide, mask, bootstrap=torch.ones(2))
        for a, e in zip(out, exact, strict=True):
            torch.testing.assert_close(a[:, left:left + 6], e, rtol=0, atol=1e-6)


def test_decoupled_and_per_sequence_lambda():
    rewards, values, mask = batch(4, 9)
    lam, value_lam = torch.tensor([0., 0.3, 0.95, 1.]), torch.tensor([1., 0.5, 0., 0.9])
    both = tk.gae(rewards, values, mask, lam=lam, value_lam=value_lam)
    for b in range(4):
        row = [x[b:b + 1] for x in (rewards, values, mask)]
        torch.testing.assert_close(both.advantages[b:b + 1],
                                   tk.gae(*row, lam=float(lam[b])).advantages)
        torch.testing.assert_close(both.returns[b:b + 1],
                                   tk.gae(*row, lam=float(value_lam[b])).returns)
    same = tk.gae(rewards, values, mask, lam=lam)
    torch.testing.assert_close(same.returns[mask], (same.advantages + values)[mask])


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(1, 12), st.floats(0.5, 1),
       st.floats(0, 1))
def test_linear_in_rewards_values_and_bootstrap(seed, B, T, gamma, lam):
    r1, v1, mask = batch(B, T, seed, torch.float64)
    r2, v2, _ = batch(B, T, seed + 1, torch.float64)
    b1, b2 = torch.randn(2, B, dtype=torch.float64)
    one = tk.gae(r1, v1, mask, gamma=gamma, lam=lam, bootstrap=b1)
    two = tk.gae(r2, v2, mask, gamma=gamma, lam=lam, bootstrap=b2)
    mixed = tk.gae(3 * r1 - r2, 3 * v1 - v2, mask, gamma=gamma, lam=lam, bootstrap=3 * b1 - b2)
    for m, a, b in zip(mixed, one, two, strict=True):
        torch.testing.assert_close(m, 3 * a - b, rtol=0, atol=1e-10)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(1, 40))
def test_gamma_lambda_one_telescopes(seed, B, T):
    """With gamma = lam = 1 the return is the sum of the rewards from there on, plus bootstrap."""
    rewards, values, mask = batch(B, T, seed)
    bootstrap = torch.randn(B)
    out = tk.gae(rewards, values, mask, gamma=1.0, lam=1.0, bootstrap=bootstrap)
    to_go = torch.where(mask, rewards, 0).flip(1).cumsum(1).flip(1) + bootstrap[:, None]
    torch.testing.assert_close(out.returns, torch.where(mask, to_go, 0), rtol=0, atol=3e-5)
    torch.testing.assert_close(out.advantages, torch.where(mask, to_go - values, 0), rtol=0,
                               atol=3e-5)


def test_results_are_detached_everywhere():
    rewards, values, mask = batch()
    rewards, values = rewards.requires_grad_(), values.requires_grad_()
    plain = tk.gae(rewards, values, mask)
    assert not plain.advantages.requires_grad and not plain.returns.requires_grad
    with torch.inference_mode():
        assert_same_bits(tk.gae(rewards, values, mask), plain)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert tk.gae(rewards.bfloat16(), values, mask).returns.dtype == torch.float32


def test_fp64_goes_to_the_reference():
    rewards, values, mask = batch(dtype=torch.float64)
    assert tk.gae(rewards, values, mask).returns.dtype == torch.float64
    assert tk.explain(tk.gae, rewards, values, mask).backend == "reference"
    with tk.use_backend("cpp"), pytest.raises(tk.BackendError, match="fp64"):
        tk.gae(rewards, values, mask)


def raw_arguments(packed=False):
    rewards, values, mask = batch(3, 6)
    if packed:
        (rewards, cu), (values, _) = pack(rewards, [6, 0, 4]), pack(values, [6, 0, 4])
        mask = pack(mask, [6, 0, 4])[0]
    return (rewards, values, mask, torch.tensor(0.9), torch.tensor([0.9, 0.5, 1.0]),
            torch.tensor(0.7), torch.randn(3), cu if packed else None)


@pytest.mark.parametrize("packed", (False, True))
def test_opcheck(packed):
    raw = torch.ops.tppo_kernels.gae_fwd.default
    torch.library.opcheck(raw, raw_arguments(packed))
    rewards, values = batch()[:2]
    torch.library.opcheck(raw, (rewards.bfloat16(), values, None, torch.tensor(1.0),
                                torch.tensor(0.9), None, None, None))


def test_compiles_as_one_graph_and_exports():
    rewards, values, mask = batch()

    def call(r, v, m, lam, bootstrap):
        return tk.gae(r * 2, v, m, gamma=0.9, lam=lam, bootstrap=bootstrap)

    args = (rewards, values, mask, torch.tensor(0.8), torch.ones(4))
    compiled = torch.compile(call, fullgraph=True)
    assert_same_bits(tuple(compiled(*args)), tuple(call(*args)))

    class Module(torch.nn.Module):
        def forward(self, *inputs):
            return call(*inputs)

    program = torch.export.export(Module(), args)
    assert_same_bits(tuple(program.module()(*args)), tuple(call(*args)))


def test_fifty_lengths_and_scalars_two_graphs():
    """Liger#146, fla#533: a recompilation for every length or scalar."""
    calls = [(*batch(3, 2 + t)[:2], sample_mask("interior", 3, 2 + t), torch.tensor(0.5 + t / 100),
              torch.tensor(1 - t / 100)) for t in range(50)]
    assert count_graphs(lambda r, v, m, gamma, lam: tk.gae(r, v, m, gamma=gamma, lam=lam),
                        calls) <= 2


X = torch.zeros(2, 3)
CU = torch.tensor([0, 2, 6], dtype=torch.int32)


@pytest.mark.parametrize("error, words, args, kwargs", [
    (TypeError, "rewards is list .*expected a tensor", ([[1.0]], X), {}),
    (ValueError, r"rewards has shape \[6\], expected \[B, T\]", (X.flatten(), X), {}),
    (ValueError, r"values has shape \[2, 4\].*\[2, 3\] as rewards", (X, torch.zeros(2, 4)), {}),
    (TypeError, "values has dtype int64, expected float32", (X, X.long()), {}),
    (TypeError, "mask has dtype float32, expected bool", (X, X, X), {}),
    (ValueError, r"mask has shape \[3\]", (X, X, torch.ones(3).bool()), {}),
    (ValueError, r"lam is 1.5, expected a number >= 0 and <= 1", (X, X), {"lam": 1.5}),
    (ValueError, "lam is nan", (X, X), {"lam": float("nan")}),
    (ValueError, r"lam holds 1.5, expected values in \[0, 1\]", (X, X),
     {"lam": torch.tensor([0.5, 1.5])}),
    (ValueError, r"value_lam holds -0.5", (X, X), {"value_lam": torch.tensor(-0.5)}),
    (ValueError, r"lam has shape \[3\].*\[2\]", (X, X), {"lam": torch.zeros(3)}),
    (TypeError, "gamma is str", (X, X), {"gamma": "1"}),
    (ValueError, r"gamma is a tensor of shape \[2\]", (X, X), {"gamma": torch.ones(2)}),
    (ValueError, r"bootstrap has shape \[3\].*\[2\]", (X, X), {"bootstrap": torch.zeros(3)}),
    (TypeError, "bootstrap is float", (X, X), {"bootstrap": 0.0}),
    (ValueError, r"rewards has shape \[2, 3\], expected \[N\]", (X, X), {"cu_seqlens": CU}),
    (TypeError, "cu_seqlens has dtype int64, expected int32", (X.flatten(), X.flatten()),
     {"cu_seqlens": CU.long()}),
    (ValueError, "cu_seqlens is .*end at N = 6", (X.flatten(), X.flatten()),
     {"cu_seqlens": CU.clamp(max=5)}),
    (ValueError, "cu_seqlens is .*start at 0", (X.flatten(), X.flatten()),
     {"cu_seqlens": CU.clamp(min=1)}),
    (ValueError, "cu_seqlens is .*never decrease", (X.flatten(), X.flatten()),
     {"cu_seqlens": torch.tensor([0, 5, 3, 6], dtype=torch.int32)}),
    (ValueError, r"cu_seqlens has shape \[0\]", (X.flatten(), X.flatten()), {"cu_seqlens": CU[:0]}),
    (TypeError, "lamda", (X, X), {"lamda": 0.9}),
    (ValueError, "values is on meta, expected cpu as rewards", (X, X.to("meta")), {}),
    (TypeError, "layout", (X.to_sparse(), X), {}),
])
def test_bad_input_names_the_argument(error, words, args, kwargs):
    with pytest.raises(error, match=words):
        tk.gae(*args, **kwargs)
