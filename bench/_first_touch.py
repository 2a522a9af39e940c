"""The first minute on a GPU: what no CPU can show, in small checks that stand alone.

`python bench/_first_touch.py JOURNAL GROUP` runs the checks of one group that the journal does not
have yet, and writes what became of each before the next begins. One that ends the process costs its
own result; the parent starts the group again. Groups: `ops/i/n`, the i-th of n shares of every
operator on every backend against fp64; `products`, matrix products into padded and aliased
results; `launches`, launches inside a captured graph and on streams of their own; `runtime`, the
extension's CUDA runtime beside torch's. On a CPU the same checks go through the CPU's backends.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from _harness import Attempts
from _journal import Journal
from _machine import generator, normal, random_mask
from _peers import said
from torch import Tensor

import tppo_kernels as tk
from tppo_kernels import testing
from tppo_kernels._core.backends import missing
from tppo_kernels._core.op import OPS
from tppo_kernels._kernels import products as _linear

PART = "first-touch"
CHECK_S = 25  # a launch that never ends costs itself alone
EXPECTED = ("triton", "cuda")  # of a GPU; other packages' kernels may be absent
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
COMPILED = "cuda" if DEVICE == "cuda" else "cpp"
Check = Callable[[], "str | None"]


class Skipped(Exception):
    """A check that this installation cannot run, and why."""


# ops/i/n


def of_ops(share: int, shares: int) -> Iterator[tuple[str, Check]]:
    """Every operator's sample on every backend of the device."""
    for name in sorted(OPS)[share::shares]:
        for backend in OPS[name].order[DEVICE]:
            yield f"{name} on {backend}", lambda name=name, backend=backend: one_op(name, backend)


def one_op(name: str, backend: str) -> None:
    """One call with its gradients against the reference in fp64."""
    if why := missing(backend):
        if backend in EXPECTED and DEVICE == "cuda":
            raise AssertionError(why)
        raise Skipped(why)
    wrong = testing.compare(name, backend, DEVICE)
    if wrong and wrong.startswith("BackendError"):
        raise Skipped(wrong)
    if wrong:
        raise AssertionError(wrong)


# products


def near(actual: Tensor, exact: Tensor, what: str) -> None:
    """Fails where a result is further off than sums in fp32 are."""
    error, most = testing.max_error(actual.double(), exact), float(exact.abs().max())
    if not error <= 1e-5 * most:
        raise AssertionError(f"{what} is off by {error:.2e} of {most:.2e}")


def padded(rows: int, columns: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(a matrix whose rows begin at multiples of 16 bytes, what it lies in): all NaN."""
    whole = torch.full((rows, columns + -columns % 8 + 8), float("nan"), dtype=dtype,
                       device=DEVICE)
    return whole[:, :columns], whole


def untouched(whole: Tensor, columns: int) -> None:
    """Fails where something was written beside the result."""
    if not bool(whole[:, columns:].isnan().all()):
        raise AssertionError("columns beside the result were written")


def products_of(weight: Tensor, few: bool) -> _linear.Products:
    """What the linear operators multiply by here."""
    if weight.is_cuda and weight.dtype.itemsize == 2:
        return _linear.HalfProducts(weight, few)
    return _linear.Products(weight, torch.float32)


def one_product(dtype: torch.dtype, columns: int, rows: int, few: bool) -> None:
    """Logits into padded rows, both gradients from padded rows, sums into part of a larger one."""
    g, d = generator(DEVICE, columns), 264
    weight = normal(g, columns, d).to(dtype)
    products = products_of(weight, few)
    h = normal(g, rows, d).to(products.factors)
    logits, whole = padded(rows, columns, torch.float32)
    products.logits(h, logits)
    near(logits, h.double() @ weight.double().T, "the product into padded rows")
    untouched(whole, columns)

    summands = products.summands
    dz, whole = padded(summands * rows, columns, products.factors)
    dz.copy_(normal(g, summands * rows, columns))
    total = dz.double().view(summands, rows, columns).sum(0)
    near(products.d_hidden(dz), total @ weight.double(), "the gradient of the states")
    sums = torch.full((columns + 9, d), float("nan"), device=DEVICE)
    for first in (True, False, False):
        products.add_d_weight(dz, h, first, sums[:columns])
    near(sums[:columns], 3 * (total.T @ h.double()), "three sums into one result")
    untouched(sums.T, columns)
    untouched(whole, columns)


def in_blocks() -> None:
    """A weight cast a block of columns at a time: products into columns that do not lie together,
    and sums whose result is one of their terms."""
    g, block = generator(DEVICE, 7), _linear.BLOCK_BYTES
    weight, h = normal(g, 1003, 136).bfloat16(), normal(g, 65, 136)
    _linear.BLOCK_BYTES = 1 << 16
    try:
        products = _linear.Products(weight, torch.float32)
        logits, whole = padded(65, 1003, torch.float32)
        products.logits(h, logits)
        near(logits, h.double() @ weight.double().T, "the product by blocks")
        near(products.d_hidden(logits), logits.double() @ weight.double(), "its sum of blocks")
        untouched(whole, 1003)
    finally:
        _linear.BLOCK_BYTES = block


def reduced_precision() -> None:
    """torch may add up 16-bit results in 16 bits; results asked for in fp32 must not change."""
    switches = torch.backends.cuda.matmul
    names = ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction")
    before = [getattr(switches, name) for name in names]
    try:
        for allowed in (True, False):
            for name in names:
                setattr(switches, name, allowed)
            for dtype in (torch.bfloat16, torch.float16):
                one_product(dtype, 1024, 300, False)
    finally:
        for name, value in zip(names, before, strict=True):
            setattr(switches, name, value)


def of_products() -> Iterator[tuple[str, Check]]:
    """Sizes that cuBLAS likes and sizes that it does not."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for columns, rows, few in ((4096 if DEVICE == "cuda" else 512, 300, False),
                                   (1003, 65, False), (1003, 1, True), (8, 17, True)):
            name = f"{str(dtype)[6:]} {rows} x 264 x {columns}{', few rows' if few else ''}"
            yield name, lambda a=(dtype, columns, rows, few): one_product(*a)
    yield "by blocks of the weight", in_blocks
    yield "reduced precision allowed and not", reduced_precision


# launches and runtime


def calls(batch: int, tokens: int) -> dict[str, Callable[[int], tuple[Callable, list[Tensor]]]]:
    """By operator: from a seed, (a call with its backward pass, the tensors that it reads)."""
    def inputs(seed: int) -> tuple[list[Tensor], Tensor]:
        g = generator(DEVICE, seed)
        return list(normal(g, 4, batch, tokens)), random_mask(g, batch, tokens)

    def differentiated(function: Callable, x: Tensor, *rest: Tensor) -> list[Tensor]:
        leaf = x.detach().requires_grad_()
        loss = function(leaf, *rest)
        return [loss.detach(), *torch.autograd.grad(loss, leaf)]

    def ppo(x: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> list[Tensor]:
        return differentiated(lambda *a: tk.ppo_loss(*a).loss, x, old, advantages, mask)

    def value(x: Tensor, returns: Tensor, old: Tensor, mask: Tensor) -> list[Tensor]:
        return differentiated(lambda x, r, m: tk.value_loss(x, r, m, old_values=old, clip=0.5).loss,
                              x, returns, mask)

    def gae(rewards: Tensor, values: Tensor, _: Tensor, mask: Tensor) -> list[Tensor]:
        return list(tk.gae(rewards, values, mask, gamma=0.99, lam=0.95))

    def advantages(rewards: Tensor, values: Tensor, x: Tensor, mask: Tensor) -> list[Tensor]:
        return list(tk.token_advantages(rewards, values, mask, logprobs=x, ref_logprobs=values,
                                        kl_coef=0.1)[:3])

    def bound(function: Callable) -> Callable[[int], tuple[Callable, list[Tensor]]]:
        def made(seed: int) -> tuple[Callable, list[Tensor]]:
            (a, b, c, _), mask = inputs(seed)
            return (lambda: function(a, b, c, mask)), [a, b, c, mask]
        return made

    return {"ppo_loss": bound(ppo), "value_loss": bound(value), "gae": bound(gae),
            "token_advantages": bound(advantages)}


def recorded(call: Callable[[], list[Tensor]]) -> Callable[[], list[Tensor]]:
    """The call in a CUDA graph, as a function that replays it; on a CPU the call itself."""
    if DEVICE == "cpu":
        return call
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()

    def replay() -> list[Tensor]:
        graph.replay()
        torch.cuda.synchronize()
        return results

    return replay


def in_a_graph(make: Callable[[int], tuple[Callable, list[Tensor]]]) -> str:
    """Captured on some values, replayed on others: a launch that went by the graph sees none."""
    with tk.use_backend(COMPILED):
        (static, places), (fresh, values) = make(0), make(1)
        expected = [x.clone() for x in fresh()]
        replay = recorded(static)
        for place, value in zip(places, values, strict=True):
            place.copy_(value)
        for _ in range(3):
            testing.assert_same_bits(tuple(replay()), tuple(expected))
    return "a CPU: called, no graph was captured" if DEVICE == "cpu" else ""


def on_a_stream(make: Callable[[int], tuple[Callable, list[Tensor]]]) -> str:
    """Values that arrive late on a stream of their own: a launch on another stream reads others."""
    with tk.use_backend(COMPILED):
        (static, places), (fresh, values) = make(0), make(1)
        expected = [x.clone() for x in fresh()]
        static()
        if DEVICE == "cpu":
            for place, value in zip(places, values, strict=True):
                place.copy_(value)
            testing.assert_same_bits(tuple(static()), tuple(expected))
            return "a CPU: called, there is no stream"
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda._sleep(50_000_000)
            for place, value in zip(places, values, strict=True):
                place.copy_(value)
            results = static()
        torch.cuda.synchronize()
        testing.assert_same_bits(tuple(results), tuple(expected))
    return ""


def of_launches() -> Iterator[tuple[str, Check]]:
    """`ppo_loss` and `value_loss` launch cooperatively, in as many blocks as fit at once."""
    many = (4096, 512) if DEVICE == "cuda" else (64, 512)
    for (batch, tokens), size in (((5, 65), "small"), (many, "every block there is")):
        for name, make in calls(batch, tokens).items():
            yield f"{name} in a graph, {size}", lambda make=make: in_a_graph(make)
            yield f"{name} on a stream, {size}", lambda make=make: on_a_stream(make)


def libraries(name: str) -> set[str]:
    """The files of that name that this process has loaded."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return {line.split()[-1] for line in lines if name in line.rsplit("/", 1)[-1]}


def two_runtimes() -> str:
    """The extension brings a CUDA runtime of its own inside; both work on one context in turn."""
    make = calls(64, 512)["ppo_loss"]
    call, (x, *_) = make(3)
    with tk.use_backend("reference"):
        expected = call()
    with tk.use_backend(COMPILED):
        for _ in range(5):  # torch, the extension, torch: no wait between them
            x.add_(1).sub_(1)
            results = call()
            x.mul_(1)
    for a, e in zip(results, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)
    if DEVICE == "cpu":
        return "a CPU: called, there is no CUDA runtime"
    return f"CUDA runtimes as files: {len(libraries('libcudart'))}"


def from_a_new_thread() -> None:
    """A thread that has not touched the GPU, as those of a backward pass."""
    call, _ = calls(64, 512)["value_loss"](4)
    found: list[Any] = []
    with tk.use_backend(COMPILED):
        expected = call()
        thread = threading.Thread(target=lambda: found.append(call()))
        thread.start()
        thread.join()
    if not found:
        raise AssertionError("the call in the thread raised")
    testing.assert_same_bits(tuple(found[0]), tuple(expected))


def of_runtime() -> Iterator[tuple[str, Check]]:
    """A static CUDA runtime beside torch's."""
    yield "two CUDA runtimes in turn", two_runtimes
    yield "a launch from a new thread", from_a_new_thread


GROUPS: dict[str, Callable[..., Iterator[tuple[str, Check]]]] = {
    "ops": of_ops, "products": of_products, "launches": of_launches, "runtime": of_runtime}


def run(journal: Journal, group: str) -> int:
    """What is left of a group; the exit status is 1 where a check of it failed now."""
    kind, *numbers = group.split("/")
    done = {r["unit"] for r in journal.of("unit", part=PART)} | {
        r["unit"] for r in journal.of("broken")}
    status = 0
    for name, check in GROUPS[kind](*map(int, numbers)):
        unit, start = f"{kind}: {name}", time.monotonic()
        if unit in done:
            continue
        attempts = Attempts(unit, DEVICE, journal, CHECK_S)
        attempts.about("")
        state, text = "ok", ""
        try:
            text = check() or ""
            if DEVICE == "cuda":
                torch.cuda.synchronize()
        except Skipped as why:
            state, text = "skipped", str(why)
        except Exception as error:  # each stands alone
            attempts.leave_if_lost("", error)
            state, text, status = "failed", said(error, 400), 1
        attempts.end()
        journal.add("unit", part=PART, unit=unit, state=state, said=text,
                    seconds=round(time.monotonic() - start, 2))
    return status


if __name__ == "__main__":
    sys.exit(run(Journal(Path(sys.argv[1])), sys.argv[2]))
