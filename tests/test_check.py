"""Every message names the argument, what it was, and what was expected."""

import pytest
import torch

from tppo_kernels._core.check import Check, offsets
from tppo_kernels._kernels.values import values_between


def test_letters_bind_at_first_use():
    check = Check("op")
    check.tensor("x", torch.zeros(2, 3), "B T")
    check.tensor("y", torch.zeros(2), "B")
    message = r"op: z has shape \[3, 3\], expected \[B, T\] = \[2, 3\] as x"
    with pytest.raises(ValueError, match=message):
        check.tensor("z", torch.zeros(3, 3), "B T")


def test_a_shape_of_which_nothing_is_bound_is_said_once():
    with pytest.raises(ValueError, match=r"expected \[B, T, 3\]$"):
        Check("op").tensor("x", torch.zeros(2, 3, 4), "B T 3")
    with pytest.raises(ValueError, match=r"expected \[B\+1\]$"):
        Check("op").tensor("cu", torch.zeros(1, 1), "B+1")


def test_alternatives_and_leading_sizes():
    check = Check("op")
    check.tensor("x", torch.zeros(4, 2, 5), "... V")
    check.tensor("t", torch.zeros(4, 2), "...")
    with pytest.raises(ValueError, match=r"u has shape \[8\]"):
        check.tensor("u", torch.zeros(8), "...")
    check.tensor("w", torch.zeros(5), "... V | V")


@pytest.mark.parametrize("value", [None, 3, [1.0], "text"])
def test_not_a_tensor(value):
    with pytest.raises(TypeError, match="op: x is .*, expected a tensor"):
        Check("op").tensor("x", value, "B T")


def test_dtype_device_and_layout():
    with pytest.raises(TypeError, match="x has dtype int64, expected float32, bfloat16"):
        Check("op").tensor("x", torch.zeros(2, dtype=torch.int64), "N")
    check = Check("op")
    check.tensor("x", torch.zeros(2), "N")
    with pytest.raises(ValueError, match="y is on meta, expected cpu as x"):
        check.tensor("y", torch.zeros(2, device="meta"), "N")
    with pytest.raises(TypeError, match="torch.strided"):
        Check("op").tensor("x", torch.zeros(2).to_sparse(), "N")


@pytest.mark.parametrize("value", [True, "0.5", None, [0.5]])
def test_scalars_are_numbers(value):
    with pytest.raises(TypeError, match="op: lam is .*expected a number"):
        Check("op").scalar("lam", value)


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan"), float("inf")])
def test_scalars_stay_in_range(value):
    with pytest.raises(ValueError, match="op: lam is .*, expected a number >= 0 and <= 1"):
        Check("op").scalar("lam", value, low=0.0, high=1.0)


def test_scalars_above():
    with pytest.raises(ValueError, match="temperature is 0.0, expected a number > 0"):
        Check("op").scalar("temperature", 0.0, above=0.0)
    assert float(Check("op").scalar("temperature", 2, above=0.0)) == 2.0


def test_scalar_tensors_are_detached_and_zero_dimensional():
    given = torch.tensor(0.5, requires_grad=True)
    assert not Check("op").scalar("lam", given).requires_grad
    with pytest.raises(ValueError, match="expected a number or a 0-d floating tensor"):
        Check("op").scalar("lam", torch.zeros(1))


@pytest.mark.parametrize("read", ["scalar", "count"])
def test_a_scalar_is_on_the_cpu_or_with_the_others(read):
    """A kernel was given the address of a number on another GPU, or of none."""
    check, far = Check("op"), torch.empty((), device="meta")
    assert getattr(check, read)("lam", far) is not None  # nothing else is known yet
    check.tensor("x", torch.zeros(3), "N")
    with pytest.raises(ValueError, match="op: lam is on meta, expected cpu as x, or cpu"):
        getattr(check, read)("lam", far)
    there = Check("op")
    there.tensor("x", torch.empty(3, device="meta"), "N")
    assert getattr(there, read)("lam", torch.ones(())).is_cpu
    assert getattr(there, read)("lam", far).is_meta


def test_offsets():
    good = torch.tensor([0, 2, 2, 5], dtype=torch.int32)
    offsets("op", good, 5)
    for bad in ([1, 5], [0, 4], [0, 3, 2, 5]):
        with pytest.raises(ValueError, match="cu_seqlens is .*end at N = 5"):
            offsets("op", torch.tensor(bad, dtype=torch.int32), 5)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_labels_are_held_to_both_bounds_in_any_layout(dtype):
    labels = torch.tensor([[0, 3], [1, 4], [2, 5]], dtype=dtype)
    for x in (labels, labels.T, labels[:, 1], labels[:0]):
        values_between("op", "labels", x, 0, 5)
    for x, bad in ((labels, "5"), (labels.T, "5"), (labels - 1, "-1")):
        with pytest.raises(ValueError, match=f"labels holds {bad}, expected values in"):
            values_between("op", "labels", x, 0, 4)
    values_between("op", "labels", labels, 0, 4, labels < 5)
    with pytest.raises(ValueError, match="labels holds 0"):
        values_between("op", "labels", labels, 0, 5, open_low=True)


def test_values_between_looks_only_where_it_may():
    x, valid = torch.tensor([0.5, float("nan")]), torch.tensor([True, False])
    values_between("op", "lam", x, 0.0, 1.0, valid)
    with pytest.raises(ValueError, match=r"lam holds nan, .*; the first stands at 1$"):
        values_between("op", "lam", x, 0.0, 1.0)


def test_choice_is_strict_about_types():
    with pytest.raises(ValueError, match="memory is True, expected one of 'auto', 1"):
        Check("op").choice("memory", True, ("auto", 1))
