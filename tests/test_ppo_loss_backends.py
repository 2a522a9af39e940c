"""The compiled backends of `ppo_loss` against the formula of the reference."""

import math

import _emulated
import torch
from _loss_cases import (
    ALL_TERMS,
    check_layouts,
    check_long_sequences,
    check_mixed_dtypes_and_nan,
    check_nothing_but_kernels,
    check_packed,
    check_poison,
    flat,
    hold_to_fp64,
    terms_of,
)
from _loss_cases import policy_run as run
from _loss_cases import policy_sample as sample

import tppo_kernels as tk
from tppo_kernels._core.check import REDUCTIONS
from tppo_kernels._math.sequence import KL_ESTIMATORS
from tppo_kernels.ops.ppo_loss.reference import PolicyLossCall, PolicyLossGradient
from tppo_kernels.testing import DTYPES, MASKS, POISONS, assert_same_bits, sample_mask

RATIOS = ("token", "sequence")
VARIANTS = [(ratio, reduction, estimator) for ratio in RATIOS for reduction in REDUCTIONS
            for estimator in KL_ESTIMATORS]


def every_variant(variant):
    return {**ALL_TERMS, **dict(zip(("ratio", "reduction", "kl_estimator"), variant,
                                    strict=True))}


def check_compiled(shapes):
    cases = [(DTYPES[i % 3], t, MASKS[i % len(MASKS)], i % 2 == 1, variant)
             for i, (variant, t) in enumerate(zip(VARIANTS, 8 * shapes, strict=False))]
    check_layouts(run, sample, cases, every_variant)
    for ratio in RATIOS:
        options = {**ALL_TERMS, "ratio": ratio, "reduction": "seq-mean-token-mean"}
        check_packed(run, sample, options, ("advantages", "weights"))
        for poison in POISONS:
            check_poison(run, sample, poison, options, ("advantages", "weights"))
    check_mixed_dtypes_and_nan(run, sample, ALL_TERMS, "logprobs")
    check_mixed_dtypes_and_nan(run, sample, ALL_TERMS, "advantages")
    extreme = {"logprobs": torch.tensor([[0.0, -300.0, 80.0, -1.0]]), "old_logprobs": torch.tensor(
        [[-300.0, 0.0, 0.0, -1.0]]), "advantages": torch.tensor([[1.0, 1.0, -1.0, 1.0]])}
    for limit in (20.0, 100.0, math.inf):
        hold_to_fp64(run, extreme, None, max_log_ratio=limit, reduction="token-sum")


def test_cpp_holds_to_the_formula_of_the_reference():
    """Two writings of one formula would drift (Liger#1082, trl#7063); blocks are of 256 tokens."""
    with tk.use_backend("cpp"):
        check_compiled((1, 255, 256, 257, 700, 1000, 24, 64))


def test_cpp_does_not_depend_on_threads():
    x, mask = sample(200, 3000), sample_mask("interior", 200, 3000)  # rows of 4,096 tokens
    before = torch.get_num_threads()
    options = {**ALL_TERMS, "ratio": "sequence"}
    with tk.use_backend("cpp"):
        hold_to_fp64(run, x, mask, **ALL_TERMS)
        try:
            torch.set_num_threads(1)
            expected = [run(x, mask, **o) for o in (ALL_TERMS, options)]
            torch.set_num_threads(3)
            assert_same_bits(*(tuple(flat(r)) for r in (run(x, mask, **ALL_TERMS), expected[0])))
            assert_same_bits(*(tuple(flat(r)) for r in (run(x, mask, **options), expected[1])))
        finally:
            torch.set_num_threads(before)


def test_cuda_kernel_emulated(monkeypatch):
    """csrc/ppo_loss.cu run on the CPU by a grid of four blocks: several sequences for each."""
    backend = _emulated.on_the_cpu(monkeypatch, "ppo_loss", "loss", "ppo_loss", "value_loss")
    x = sample(3, 5, torch.bfloat16)
    check_nothing_but_kernels(backend, PolicyLossCall(
        x["logprobs"], x["entropy"], sample_mask("row", 3, 5), terms_of(
            x["old_logprobs"], x["advantages"], x["ref_logprobs"], x["weights"], dual_clip=1.5,
            entropy_coef=0.1, kl_coef=0.1, num_sequences=3, norm_length=5, ratio="sequence",
            kl_estimator="k3", reduction="seq-mean-token-sum-norm"), True, True),
        lambda *results: PolicyLossGradient(*results, torch.bfloat16, torch.float16))
    check_compiled((1, 255, 256, 257, 1030, 24, 64))
    hold_to_fp64(run, sample(11, 600, seed=1), sample_mask("row", 11, 600), **ALL_TERMS)
    check_long_sequences(monkeypatch, backend, run, sample, {"kl_coef": 0.1})
    options = {**ALL_TERMS, "reduction": REDUCTIONS[-1], "num_sequences": torch.tensor(5),
               "norm_length": 7, "clip_low": torch.tensor(0.25).bfloat16()}
    expected = flat(run(sample(3, 9), **options))
    monkeypatch.setattr("tppo_kernels._kernels.losses.on_host", lambda x: False)
    torch.testing.assert_close(flat(run(sample(3, 9), **options)), expected)  # read by pointer
