"""Log-probability and entropy of each target from hidden states, without a [N, V] of logits."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..._core.check import FP32_MAX, LABELS, Check
from ..._core.derivatives import first_only, refuse_forward_mode, savable
from ..._core.eager import surely
from ..._core.keywords import suggests
from ..._core.op import _LIB, Op
from ..._core.record import build
from ..._kernels.chunks import auto_bytes
from ..._kernels.values import values_between
from ..._math.kept import empty_outputs, kept_dtype
from ..._math.linear import LinearInputs, shard_of, slot_count
from ..._math.rows import valid_rows
from ..._math.sequence import compute_dtype
from ..token_logprobs import check_scaling
from ..whiten import check_group
from . import reference
from .reference import FrozenGradient, LinearLogprobsCall, LinearLogprobsGradient

_op = Op("linear_logprobs", cpu=("cpp", "chunked", "reference"),
         cuda=("triton", "chunked", "reference"), other=("chunked", "reference"))
TENSORS = 9  # of `LinearInputs`, one by one, before the numbers that autograd does not save
LEARNT = (0, 1, 4)  # hidden, weight and bias among them
LEARNERS = "only hidden, weight and bias are differentiable here"


class LinearLogprobs(NamedTuple):
    """The two results of `linear_logprobs`, fp32 (fp64 where an input is fp64)."""

    logprobs: Tensor  # [...]
    entropy: Tensor  # [...]


def sample_inputs() -> tuple[tuple, dict]:
    """Arguments of a small call, in fp64: for the self-test."""
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 17, 8, generator=g, dtype=torch.float64)
    weight, bias = torch.randn(40, 9, generator=g, dtype=torch.float64).split([8, 1], 1)
    targets = torch.randint(37, (3, 17), generator=g)
    mask = torch.rand(3, 17, generator=g) < 0.7
    return (hidden, weight.contiguous(), targets, mask), {
        "bias": bias[:, 0].contiguous(), "temperature": 0.8, "softcap": 5.0, "valid_vocab": 37}


def flops(n: int, v: int, d: int, *, regime: str = "store", backward: bool = True) -> int:
    """Of the products: forward 2NVD; and backward 6 with "store", 8 "recompute", 4 "frozen"."""
    return n * v * d * ({"store": 6, "recompute": 8, "frozen": 4}[regime] if backward else 2)


def check_values(op: str, inputs: LinearInputs) -> None:
    """Checks the values that both linear operators take: `rows` are the True tokens of the mask,
    targets of valid rows lie in the vocabulary, their temperatures and the softcap are > 0."""
    mask, rows, (temperature, softcap, logit_scale) = inputs.mask, inputs.rows, inputs.scaling
    targets, columns = inputs.targets, shard_of(inputs).total
    valid: Any = mask
    if rows is not None:
        values_between(op, "rows", rows, 0, targets.numel() - 1)
        if bool((rows[1:] <= rows[:-1]).any()):
            raise ValueError(f"{op}: rows is not ascending, expected tk.valid_rows(mask)")
        flat = None if mask is None else mask.reshape(-1)
        if flat is not None and (rows.shape[0] != int(flat.sum()) or not bool(flat[rows].all())):
            raise ValueError(f"{op}: rows names {rows.shape[0]} rows, expected the "
                             f"{int(flat.sum())} True tokens of mask: tk.valid_rows(mask)")

        def valid() -> Tensor:
            chosen = torch.zeros(targets.numel(), dtype=torch.bool, device=targets.device)
            return chosen.index_fill_(0, rows, True).view(targets.shape)

    values_between(op, "targets", targets, 0, columns - 1, valid)
    values_between(op, "temperature", temperature, 0.0, FP32_MAX,
                   valid if temperature.dim() else None, open_low=True)
    values_between(op, "softcap", softcap, 0.0, FP32_MAX, open_low=True)
    values_between(op, "logit_scale", logit_scale, -FP32_MAX, FP32_MAX)


def _check_fwd(call: LinearLogprobsCall) -> None:
    check_values("linear_logprobs", call.inputs)


def _fake_fwd(call: LinearLogprobsCall) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inputs, regime = call
    hidden, n = inputs.hidden, inputs.targets.numel()
    dtype = compute_dtype(hidden, inputs.weight, inputs.bias)
    logprobs, entropy = (hidden.new_empty(inputs.targets.shape, dtype=dtype) for _ in range(2))
    slots = slot_count(n, inputs.rows, inputs.capacity)
    return logprobs, entropy, *empty_outputs(inputs, slots, regime)


def _fake_bwd(call: LinearLogprobsGradient) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight, bias = call.inputs.hidden, call.inputs.weight, call.inputs.bias
    return (hidden.new_empty(hidden.shape if call.grad_hidden else 0),
            weight.new_empty(weight.shape if call.grad_weight else 0),
            (weight if bias is None else bias).new_empty(
                weight.shape[:1] if call.grad_bias else 0))


def _fake_frozen(call: FrozenGradient) -> Tensor:
    return call.kept.new_empty((*call.g_logprobs.shape, call.kept.shape[1]), dtype=call.dtype)


_fwd = _op.define("linear_logprobs_fwd -> (Tensor logprobs, Tensor entropy, Tensor, Tensor)",
                  reference.fwd, _fake_fwd, _check_fwd, record=LinearLogprobsCall,
                  registers_autograd=True)
_bwd = _op.define("linear_logprobs_bwd -> (Tensor dhidden, Tensor dweight, Tensor dbias)",
                  reference.bwd, _fake_bwd, record=LinearLogprobsGradient, registers_autograd=True)
_frozen = _op.define("linear_logprobs_frozen -> (Tensor dhidden)", reference.frozen, _fake_frozen,
                     record=FrozenGradient, registers_autograd=True)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    """Keeps what the regime needs, and only that."""
    given, regime = build(LinearLogprobsCall, inputs)
    _, _, stats, kept = output
    ctx.mark_non_differentiable(stats, kept, *([output[1]] if regime == "frozen" else []))
    ctx.set_materialize_grads(False)
    ctx.regime, ctx.dtype, ctx.capacity = regime, given.hidden.dtype, given.capacity
    tensors, ctx.rest = inputs[:TENSORS], inputs[TENSORS:-1]
    if regime == "frozen":
        tensors = (given.mask, given.rows)
    ctx.save_for_backward(*map(savable, tensors), stats, kept)


@first_only(5)  # hidden to bias; of a frozen head none of them is kept
def _backward(ctx: Any, g_logprobs: Any, g_entropy: Any, *_: Any) -> tuple:
    *tensors, stats, kept = ctx.saved_tensors
    if g_logprobs is None and (g_entropy is None or ctx.regime == "frozen"):
        return (None,) * len(ctx.needs_input_grad)
    if ctx.regime == "frozen":
        mask, rows = tensors
        call = FrozenGradient(g_logprobs, kept, mask, rows, ctx.capacity, ctx.dtype)
        return by_input(ctx, (_frozen(call), None, None))
    inputs = build(LinearInputs, (*tensors, *ctx.rest))
    wanted = (ctx.needs_input_grad[i] for i in LEARNT)
    return by_input(ctx, _bwd(LinearLogprobsGradient(g_logprobs, g_entropy, inputs, stats, kept,
                                                     *wanted)))


def by_input(ctx: Any, grads: Sequence[Tensor | None]) -> tuple:
    """Gradients of hidden, weight and bias in their places among the inputs of a raw op."""
    results: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
    for i, grad in zip(LEARNT, grads, strict=True):
        results[i] = grad if ctx.needs_input_grad[i] else None
    return tuple(results)


# Not an `autograd.Function`, as the other operators have: forward returns tensors of a size that it
# finds itself, the number of valid rows, and one that saves such a tensor for backward cannot be
# traced by `torch.compile(fullgraph=True)`.  The dispatcher, which every call goes through for it,
# costs some 20 us, and a call here takes milliseconds.
torch.library.register_autograd("tppo_kernels::linear_logprobs_fwd", _backward,
                                setup_context=_setup_context, lib=_LIB)


def check_head(check: Check, weight: Tensor, bias: Tensor | None, valid_vocab: int | None,
               group: Any) -> tuple[int | None, str | None]:
    """Checks weight [V, D], bias [V] and the number of live columns; gives valid_vocab and the
    name of the group."""
    check.tensor("weight", weight, "V D")
    check.tensor("bias", bias, "V", optional=True)
    size, world = weight.shape[0], 1
    if size == 0:
        raise ValueError(f"{check.op}: weight has shape {list(weight.shape)}, expected at least "
                         "one row")
    check_group(check, group)
    if group is not None:
        world = dist.get_world_size(group)
    if valid_vocab is not None:
        valid_vocab = check.number("valid_vocab", valid_vocab, low=1, high=size * world, kind=int)
    return valid_vocab, None if group is None else group.group_name


def check_choice_of_rows(check: Check, hidden: Tensor, mask: Tensor | None, rows: Tensor | None,
                         capacity: int | None) -> tuple[Tensor | None, int | None]:
    """Checks `rows` and `capacity`, and gives them; in eager mode it finds the rows of a mask.

    That reads their number on the host: free on a CPU, and once a call on a GPU, unless a graph is
    being captured.
    """
    check.tensor("rows", rows, "M", (torch.int64,), optional=True)
    if capacity is not None:
        if rows is not None:
            raise ValueError(f"{check.op}: capacity is {capacity!r} and rows is given, expected "
                             "one of them")
        capacity = check.number("capacity", capacity, low=0, kind=int)
        if not torch.compiler.is_compiling():  # slots that no row can take only cost
            capacity = min(capacity, hidden.shape[:-1].numel())
    elif (rows is None and mask is not None and not torch.compiler.is_compiling()
          and not (hidden.is_cuda and torch.cuda.is_current_stream_capturing())):
        return valid_rows(mask), None
    return rows, capacity


def budget_of(check: Check, memory: str | int, device: torch.device) -> int:
    """Bytes that kept exponentials and the chunk in flight may take together."""
    if isinstance(memory, str) or not isinstance(memory, int | Integral):
        check.choice("memory", memory, ("auto", "store", "recompute"))
        return auto_bytes(device)
    return check.number("memory", memory, low=1, kind=int)


def kept_nbytes(inputs: LinearInputs) -> int:
    """Bytes of the exponentials or logits that "store" keeps; of a shard, at most."""
    size, valid_vocab = inputs.weight.shape[0], inputs.valid_vocab
    columns = size if valid_vocab is None else min(size, valid_vocab)
    slots = slot_count(inputs.targets.numel(), inputs.rows, inputs.capacity)
    dtype = kept_dtype(inputs.hidden, inputs.weight, inputs.bias, inputs.scaling.softcap)
    return slots * columns * dtype.itemsize


@suggests
def linear_logprobs(
        hidden: Tensor,  # [..., D]
        weight: Tensor,  # [V, D], or [V / W, D] of a group
        targets: Tensor,  # [...] int64 or int32
        mask: Tensor | None = None,  # [...] bool or whole numbers
        *,
        bias: Tensor | None = None,  # [V]
        temperature: float | Tensor = 1.0,  # [], or [...]: one a row
        softcap: float | Tensor | None = None,  # []
        logit_scale: float | Tensor = 1.0,  # []
        valid_vocab: int | None = None,
        memory: str | int = "auto",  # "auto", "store", "recompute", or bytes
        entropy_grad: bool = True,
        rows: Tensor | None = None,  # [M] int64
        capacity: int | None = None,
        group: Any = None,  # a torch.distributed.ProcessGroup
) -> LinearLogprobs:
    """`token_logprobs` of the logits hidden @ weight.T + bias, which never exist as a whole.

        x = hidden weight^T + bias, then z, logprob and entropy as `tppo_kernels.token_logprobs`

    hidden: [..., D], weight: [V, D], bias: [V], targets and mask: [...]; temperature: a number,
    0-d, or exactly [...]. Rows are computed in chunks; products of bf16 and fp16 accumulate in
    fp32, and the results read those accumulators. Both results are differentiable in hidden,
    weight and bias, once; dW is added up in fp32. `entropy_grad=False` detaches the entropy.

    Only valid rows are computed. `rows`: `tk.valid_rows(mask)`, found once outside a compiled or
    captured region. `capacity=n`: the first n valid rows, found on the device; a valid row beyond
    gives NaN, and so do its gradient and that of the weight. Neither: eager mode counts the
    valid rows itself; under `torch.compile` a CPU compacts inside, a GPU runs all N rows. Of rows
    that are chosen inside a compiled function the number is not known: "auto" recomputes there.

    memory: "store" keeps exponentials of every row for backward (6NVD flops in all), "recompute"
    nothing of size V (8NVD), "auto" and a number of bytes take "store" where exponentials and a
    chunk fit, and size the chunk. One row is always computed. Exponentials have the inputs' dtype,
    fp16 for bf16; under a softcap logits are kept in their place, in fp32. Without gradients for
    weight and bias, `entropy_grad=False` keeps dlogprob/dhidden [M, D] in fp32, whatever `memory`
    is (4NVD). On top of it come fp32 dW and the results. On a GPU 6 bytes a logit: the budget is
    best where it holds about 2,450 rows. For up to 64 rows 8 bytes: the gradients of their
    logits are not rounded to 16 bits.
    The three words take chunks of 1 GiB on a CPU, and on a GPU of a sixteenth of its memory, 1 to
    8 GiB: of the memory that it has, not of what is free, so that a call repeats bit by bit.

    Gradients are within 1e-5 (fp32) or 3e-3 (bf16, fp16) of the norm of fp64's from the same
    inputs. Where their terms nearly cancel (a nearly uniform row under the entropy alone, rows of
    opposite slopes), within 2^-22 or, from kept exponentials of 16 bits, 2^-11 of the norm that the
    terms would have if all were positive, and 2^-23 more for each unit of the largest |z|.

    A GPU multiplies hidden and weight of one 16-bit dtype as they are; of two dtypes, or in fp32,
    it casts to fp32, several times slower: give the weight in the dtype of the states.

    group: each process holds an equal part of the vocabulary, in the order of ranks; targets and
    `valid_vocab` count over all parts; hidden, targets and mask are the same everywhere. One
    all-gather of (max, sum, target, weighted sum) a row; the gradient of hidden is summed over the
    group, those of weight and bias are the part's own.

    Where neither the compiled part nor Triton is, "chunked" does the same in plain torch, and it is
    the fast backends' loop over chunks. "reference", forced by `use_backend`, is the formula above:
    it makes all logits.

    Under `torch.compile` a Python float is a constant; give 0-d tensors for scalars that change.
    Raises ValueError / TypeError that name the argument.
    """
    check = Check("linear_logprobs")
    check.tensor("hidden", hidden, "... D")
    check.tensor("targets", targets, "...", LABELS)
    mask = check.mask("mask", mask, "...")
    valid_vocab, name = check_head(check, weight, bias, valid_vocab, group)
    scaling = check_scaling(check, "...", temperature, softcap, logit_scale, LEARNERS)
    check.choice("entropy_grad", entropy_grad, (True, False))
    refuse_forward_mode("linear_logprobs", hidden, weight, bias)
    rows, capacity = check_choice_of_rows(check, hidden, mask, rows, capacity)
    budget = budget_of(check, memory, hidden.device)
    inputs = LinearInputs(hidden, weight, targets, mask, bias, rows, scaling, valid_vocab, capacity,
                          budget, name)
    logprobs, entropy, _, _ = _fwd(_in_regime(inputs, memory, entropy_grad))
    return LinearLogprobs(logprobs, entropy if entropy_grad else entropy.detach())


def _in_regime(inputs: LinearInputs, memory: str | int, entropy_grad: bool) -> LinearLogprobsCall:
    """The call with what is to be kept for backward, and with what that leaves of the budget."""
    hidden, *head = inputs.hidden, inputs.weight, inputs.bias
    trains = torch.is_grad_enabled()
    head_trains = trains and any(x is not None and x.requires_grad for x in head)
    if not (head_trains or (trains and hidden.requires_grad)):
        return LinearLogprobsCall(inputs, "none")
    if not head_trains and not entropy_grad:
        return LinearLogprobsCall(inputs, "frozen")
    if isinstance(memory, str) and memory != "auto":
        return LinearLogprobsCall(inputs, memory)
    nbytes = kept_nbytes(inputs)
    if not surely(nbytes <= inputs.budget):
        return LinearLogprobsCall(inputs, "recompute")
    return LinearLogprobsCall(inputs._replace(budget=inputs.budget - nbytes), "store")
