"""`ppo_loss` in Triton against fp64, interpreted."""

import itertools

import pytest
import torch
from _loss_cases import (
    ALL_TERMS,
    check_layouts,
    check_mixed_dtypes_and_nan,
    check_nothing_but_kernels,
    check_objectives,
    check_packed,
    check_poison,
    flat,
    hold_to_fp64,
    policy_run,
    policy_sample,
    reference,
    terms_of,
)
from _matrix import third
from torch.utils._python_dispatch import _disable_current_modes
from triton.runtime.interpreter import InterpretedFunction

import tppo_kernels as tk
from tppo_kernels._core.check import REDUCTIONS
from tppo_kernels._kernels import triton_losses as _triton_losses
from tppo_kernels._math.sequence import KL_ESTIMATORS
from tppo_kernels.ops.ppo_loss import _triton
from tppo_kernels.ops.ppo_loss.reference import PolicyLossCall, PolicyLossGradient
from tppo_kernels.testing import DTYPES, MASKS, POISONS, assert_same_bits, sample_mask

VARIANTS = list(itertools.product(("token", "sequence"), REDUCTIONS, KL_ESTIMATORS))
SHAPES = (1, 7, 63, 64, 65, 300)
CASES = third(third(itertools.product(SHAPES, MASKS, (False, True))))
CASES = [(DTYPES[i % 3], *case, VARIANTS[7 * i % len(VARIANTS)]) for i, case in enumerate(CASES)]


def options_of(variant):
    ratio, reduction, estimator = variant
    return {**ALL_TERMS, "ratio": ratio, "reduction": reduction, "kl_estimator": estimator}


def test_accuracy_over_dtypes_shapes_masks_strides(triton):
    check_layouts(policy_run, policy_sample, CASES, options_of)


@pytest.mark.parametrize("estimator", KL_ESTIMATORS)
def test_every_estimator(triton, estimator):
    x = policy_sample(2, 40, seed=1, spread=3.0)  # on both sides of every clip and clamp
    hold_to_fp64(policy_run, x, None, max_log_ratio=4.0, kl_coef=0.5, kl_estimator=estimator)


@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_packed(triton, ratio):
    options = {**ALL_TERMS, "ratio": ratio, "reduction": "seq-mean-token-mean"}
    check_packed(policy_run, policy_sample, options, ("advantages", "weights"))
    check_packed(policy_run, policy_sample, {**ALL_TERMS, "ratio": ratio})


def test_a_column_is_a_value_a_sequence(triton):
    """[B, 1], also expanded to stride 0, padded and packed with N = B."""
    x, mask = policy_sample(4, 5), sample_mask("row", 4, 5)
    column = x["advantages"][:, :1]
    expected = policy_run({**x, "advantages": column.expand(4, 5).contiguous()}, mask)
    for advantages in (column, column.expand(4, 5), column[:, 0]):
        torch.testing.assert_close(flat(policy_run({**x, "advantages": advantages}, mask)),
                                   flat(expected))
    cu = torch.tensor([0, 0, 3, 3, 4], dtype=torch.int32)
    packed = {name: v[:, 0] for name, v in x.items()}
    out = [tk.ppo_loss(**{**packed, "advantages": a}, cu_seqlens=cu).loss
           for a in (column, column[[1, 1, 1, 3], 0])]
    assert_same_bits(out[0], out[1])


@pytest.mark.parametrize("poison", POISONS)
def test_poison(triton, poison):
    for ratio in ("token", "sequence"):
        check_poison(policy_run, policy_sample, poison, {**ALL_TERMS, "ratio": ratio},
                     ("advantages", "weights") if ratio == "sequence" else ())


def test_mixed_dtypes_and_nan(triton):
    for name in ("logprobs", "advantages", "ref_logprobs"):
        check_mixed_dtypes_and_nan(policy_run, policy_sample, ALL_TERMS, name)


def test_extremes(triton):
    """Ratios infinite, 0 and at the clamp; NaN where a coefficient has no term."""
    x = {"logprobs": torch.tensor([[0.0, -300.0, 80.0, -1.0]]), "old_logprobs": torch.tensor(
        [[-300.0, 0.0, 0.0, -1.0]]), "advantages": torch.tensor([[1.0, 1.0, -1.0, 1.0]])}
    for limit in (20.0, 100.0, float("inf")):
        hold_to_fp64(policy_run, x, None, max_log_ratio=limit, reduction="token-sum")
    terms = terms_of(x["old_logprobs"], x["advantages"], entropy_coef=0.5)
    loss = _triton.fwd(PolicyLossCall(x["logprobs"], None, None, terms, False, False))[0]
    assert loss.isnan()


def test_more_sequences_than_programs(triton, monkeypatch):
    """Each program then takes several sequences, and the last to end adds up all."""
    monkeypatch.setattr(_triton, "PROGRAMS", 4)
    for reduction in ("token-mean", "seq-mean-token-mean"):
        hold_to_fp64(policy_run, policy_sample(11, 9, seed=4), sample_mask("row", 11, 9),
                     **{**ALL_TERMS, "reduction": reduction})
    hold_to_fp64(policy_run, policy_sample(3, 1100, seed=4), None, **ALL_TERMS)


def test_numbers_by_pointer(triton, monkeypatch):
    x, mask = policy_sample(3, 9), sample_mask("row", 3, 9)
    options = {**ALL_TERMS, "reduction": REDUCTIONS[-1], "num_sequences": torch.tensor(5),
               "norm_length": 7, "clip_low": torch.tensor(0.25).bfloat16()}
    expected = policy_run(x, mask, **options)
    monkeypatch.setattr("tppo_kernels._kernels.losses.on_host", lambda x: False)
    torch.testing.assert_close(flat(policy_run(x, mask, **options)), flat(expected))


def test_only_what_is_asked_for(triton):
    """Entropy's gradient alone; nothing at all without autograd; empty batches."""
    x = policy_sample(2, 3)
    entropy = x.pop("entropy").half().requires_grad_()
    tk.ppo_loss(**x, entropy=entropy, entropy_coef=0.5).loss.backward()
    torch.testing.assert_close(entropy.grad, torch.full((2, 3), -0.5 / 6).half())
    alone = tk.ppo_loss(**x)
    assert_same_bits(alone.loss, reference(tk.ppo_loss, **x).loss)
    for shape in ((0, 5), (3, 0)):
        assert not policy_run(policy_sample(*shape), **ALL_TERMS)[0]


def test_ticket_is_put_back(triton, monkeypatch):
    """On a GPU one ticket serves a stream: it must be 0 again behind every launch."""
    ticket = torch.zeros(1, dtype=torch.int32)
    monkeypatch.setattr(_triton, "ticket", lambda like: ticket)
    first = policy_run(policy_sample(9, 9))
    assert not ticket.any()
    assert_same_bits(tuple(policy_run(policy_sample(9, 9))), tuple(first))
    assert _triton_losses.ticket(first[0]) is not _triton_losses.ticket(first[0])


def test_two_launches_and_nothing_else(monkeypatch):
    launches, run = [], InterpretedFunction.run

    def counted(self, *args, **options):
        launches.append(self.fn.__name__)
        with _disable_current_modes():  # the interpreter copies arguments
            return run(self, *args, **options)

    monkeypatch.setattr(InterpretedFunction, "run", counted)
    ticket = torch.zeros(1, dtype=torch.int32)
    monkeypatch.setattr(_triton, "ticket", lambda like: ticket)
    x = policy_sample(3, 5, torch.bfloat16)
    check_nothing_but_kernels(_triton, PolicyLossCall(
        x["logprobs"], x["entropy"], sample_mask("row", 3, 5), terms_of(
            x["old_logprobs"], x["advantages"], x["ref_logprobs"], x["weights"], dual_clip=1.5,
            entropy_coef=0.1, kl_coef=0.1, num_sequences=3, norm_length=5, ratio="sequence",
            kl_estimator="k3", reduction="seq-mean-token-sum-norm"), True, True),
        lambda *results: PolicyLossGradient(*results, torch.bfloat16, torch.float16))
    assert launches == ["_ppo_loss_fwd_kernel", "_ppo_loss_bwd_kernel"]


def test_objectives_and_kl_terms(triton):
    check_objectives((1, 40, 130), lambda cases: third(third(cases)))


def test_numbers_of_the_objectives_by_pointer(triton, monkeypatch):
    options = {"objective": "sapo", "kl_coef": 0.1, "tau_pos": torch.tensor(2.0).bfloat16(),
               "kl_clamp": torch.tensor(0.02)}
    monkeypatch.setattr("tppo_kernels._kernels.losses.on_host", lambda x: False)
    hold_to_fp64(policy_run, policy_sample(3, 9), sample_mask("row", 3, 9), **options)
