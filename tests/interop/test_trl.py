"""TRL from the index: its functions against ours, and what `patch` does."""

import inspect
import os
from importlib.metadata import version

import pytest
import torch
import trl
from _trl_runs import SHORT
from trl.trainer import grpo_trainer, utils

import tppo_kernels as tk
from tppo_kernels.integrations import _peer
from tppo_kernels.integrations import trl as ours

CASES = 60 if SHORT else 500
CHUNKED = utils._ChunkedLogProbFunction
SOFTMAX, ENTROPY = utils.selective_log_softmax, utils.entropy_from_logits
BOTH = getattr(utils, "selective_log_softmax_and_entropy", None)
BIASED = "bias" in inspect.signature(CHUNKED.forward).parameters


@pytest.fixture
def patched():
    ours.patch()
    yield
    ours.unpatch()


def near(actual, expected, scale=1.0):
    """fp32, 1e-6 of the largest number that takes part."""
    bound = 1e-6 * max(1.0, scale)
    torch.testing.assert_close(actual, expected, rtol=0, atol=bound)


def gradients(function, leaves, seed):
    """The results, and the gradients of a random combination of them."""
    results = [x for x in function(*leaves) if x is not None]
    g = torch.Generator().manual_seed(seed)
    total = sum((x * torch.rand(x.shape, generator=g)).sum() for x in results)
    return results, torch.autograd.grad(total, leaves, allow_unused=True)


def compared(theirs, mine, leaves, seed, logits=None):
    results = [gradients(f, leaves, seed) for f in (theirs, mine)]
    scale = float((leaves[0] if logits is None else logits).detach().abs().max())
    for expected, actual in zip(*(values for values, _ in results), strict=True):
        near(actual, expected, scale)
    for expected, actual in zip(*(slopes for _, slopes in results), strict=True):
        near(actual, expected, max(scale, float(expected.abs().max())))


def drawn(case):
    """Logits [B, T, V] and targets of a random size; of some cases large, peaked or strided."""
    g = torch.Generator().manual_seed(case)
    b, t, v = (int(torch.randint(1, high, (), generator=g)) for high in (4, 6, 70))
    logits = torch.randn(b, t, v, generator=g) * (0.1, 1.0, 10.0, 40.0)[case % 4]
    if case % 5 == 0:
        logits = torch.randn(b, v, t, generator=g).transpose(1, 2)
    if case % 7 == 0:
        logits[..., int(torch.randint(0, v, (), generator=g))] += 50
    return logits.requires_grad_(), torch.randint(0, v, (b, t), generator=g)


def test_the_environment_holds_the_version_that_it_is_named_for():
    wanted = os.environ["TPPO_PEER"].partition("-")[2] or "1.16"
    assert trl.__version__.startswith(wanted) and version("trl") == trl.__version__ == ours.VERSION


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_selective_log_softmax(patched, dtype):
    for case in range(CASES):
        logits, index = drawn(case)
        if dtype == torch.int32 and case % 10:
            continue
        given = index.to(dtype)
        compared(lambda x, i=index: [SOFTMAX(x, i)],
                 lambda x, i=given: [utils.selective_log_softmax(x, i)], [logits], case)


def test_entropy_from_logits(patched):
    for case in range(CASES):
        logits, _ = drawn(case)
        compared(lambda x: [ENTROPY(x, 3)], lambda x: [utils.entropy_from_logits(x, 3)], [logits],
                 case)


@pytest.mark.skipif(BOTH is None, reason="of 1.14 and later")
def test_both_with_temperature_and_masks_of_rows(patched):
    for case in range(CASES):
        logits, index = drawn(case)
        rows = torch.rand(index.shape, generator=torch.Generator().manual_seed(case)) < 0.5
        rows = (rows if case % 3 else rows & False).to((torch.bool, torch.int32)[case % 2])
        given = {"temperature": (0.7, 1.0, 1.3)[case % 3], "row_mask": rows}
        compared(lambda x, i=index, k=given: BOTH(x, i, **k),
                 lambda x, i=index, k=given: utils.selective_log_softmax_and_entropy(x, i, **k),
                 [logits], case)
        near(utils.selective_log_softmax(logits, index, **given), SOFTMAX(logits, index, **given),
             float(logits.detach().abs().max()))


def test_the_chunked_function(patched):
    for case in range(CASES):
        g = torch.Generator().manual_seed(case)
        n, d, v = (int(torch.randint(1, high, (), generator=g)) for high in (9, 17, 70))
        leaves = [torch.randn(n, d, generator=g), torch.randn(v, d, generator=g) / d ** 0.5]
        if BIASED and case % 2:
            leaves.append(torch.randn(v, generator=g))
        leaves = [x.requires_grad_() for x in leaves]
        rest = (torch.randint(0, v, (n,), generator=g), (0.7, 1.0)[case % 2], 16,
                (None, 5.0)[case // 2 % 2], (1.0, 0.5)[case // 4 % 2])
        names = inspect.signature(CHUNKED.forward).parameters
        if "outputs" in names:
            rest += (("log_probs", "entropy") if case % 3 else ("log_probs",),)

        def through(kind, rest=rest):
            def call(hidden, weight, *bias):
                bias = (bias or (None,)) if BIASED else ()
                return kind.apply(hidden, weight, *bias, *rest)
            return call

        compared(through(CHUNKED), through(utils._ChunkedLogProbFunction), leaves, case,
                 leaves[0] @ leaves[1].T / rest[1])


def test_statistics_that_we_do_not_compute_are_trls(patched):
    if "outputs" not in inspect.signature(CHUNKED.forward).parameters:
        pytest.skip("of 1.15 and later")
    hidden, weight = torch.randn(5, 8), torch.randn(11, 8)
    given = hidden, weight, None, torch.arange(5), 1.0, 16
    for expected, actual in zip(CHUNKED.apply(*given), utils._ChunkedLogProbFunction.apply(*given),
                                strict=True):
        assert torch.equal(actual, expected)


def test_several_targets_a_row_are_trls(patched):
    logits, index = torch.randn(2, 3, 7), torch.randint(0, 7, (2, 3, 4))
    assert torch.equal(utils.selective_log_softmax(logits, index), SOFTMAX(logits, index))


def test_results_have_the_dtype_of_trls(patched):
    logits = torch.randn(2, 3, 7).bfloat16()
    index = torch.randint(0, 7, (2, 3))
    for mine, theirs in ((utils.selective_log_softmax(logits, index), SOFTMAX(logits, index)),
                         (utils.entropy_from_logits(logits), ENTROPY(logits))):
        assert mine.dtype == theirs.dtype == torch.bfloat16
        torch.testing.assert_close(mine, theirs, rtol=2 ** -6, atol=2 ** -6)


def test_a_logit_of_minus_infinity_makes_trls_entropy_nan_and_not_ours(patched):
    logits = torch.tensor([[[0.0, 0.0, -torch.inf]]])
    assert ENTROPY(logits).isnan().all()
    near(utils.entropy_from_logits(logits), torch.log(torch.tensor([[2.0]])))


def test_patch_and_unpatch_reach_every_module_and_are_idempotent(capsys):
    names = [n for n in ("selective_log_softmax", "entropy_from_logits", "_ChunkedLogProbFunction")
             if hasattr(grpo_trainer, n)]
    before = {n: getattr(grpo_trainer, n) for n in names}
    ours.patch()
    ours.patch()
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and f"in trl {trl.__version__}: ours are _Chunked" in told
    assert utils.selective_log_softmax is not SOFTMAX
    assert all(getattr(grpo_trainer, n) is getattr(utils, n) is not before[n] for n in names)
    ours.unpatch()
    assert utils.selective_log_softmax is SOFTMAX and utils.entropy_from_logits is ENTROPY
    assert utils._ChunkedLogProbFunction is CHUNKED
    assert all(getattr(grpo_trainer, n) is before[n] for n in names)
    assert capsys.readouterr().err == ""


def test_the_patched_functions_run_our_operators(patched):
    with torch.profiler.profile() as profile:
        utils.entropy_from_logits(torch.randn(1, 2, 5))
    assert any("tppo_kernels::entropy" in event.key for event in profile.key_averages())
    assert tk.__version__


def test_the_self_check_finds_what_the_integration_needs():
    found = {each["trainer"]: each for each in _peer.states(probe=True)}["trl"]
    assert found["state"] == "works" and found["installed"] == version("trl")
