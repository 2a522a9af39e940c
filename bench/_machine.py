"""What a machine can do at most, measured in the same process as what is held against it.

The bandwidth of a copy and the rate of a matrix product, both on random data: a GPU's products run
faster on zeros and ones, because fewer bits change. `python bench/_machine.py JOURNAL` writes both
and the machine's description to a journal.
"""

from __future__ import annotations

import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _peers import versions
from torch import Tensor

COPY_BYTES = {"cpu": 1 << 28, "cuda": 1 << 31}
PRODUCT = {"cpu": 512, "cuda": 8192}  # rows and columns of each factor
PRODUCT_S = 0.5  # long enough that a GPU's clocks are those of a long run
_copies: dict[str, float] = {}
_products: dict[tuple[str, torch.dtype], float] = {}


def wait(device: str) -> None:
    """Until the device has done what was asked."""
    if device != "cpu":
        torch.cuda.synchronize()


def wall_us(function: Callable[..., Any], inputs: tuple[Any, ...], device: str) -> float:
    """One call from Python, waited for."""
    wait(device)
    start = time.perf_counter()
    function(*inputs)
    wait(device)
    return (time.perf_counter() - start) * 1e6


def between_events_us(call: Callable[[], Any]) -> float:
    """One call on a GPU, between two events on the current stream."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in "ab")
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3


def generator(device: str, seed: int) -> torch.Generator:
    """A generator that draws on the device: a billion draws take 10 s on a CPU."""
    return torch.Generator(device).manual_seed(seed)


def _once_us(call: Callable[[], Any], device: str) -> float:
    return wall_us(call, (), device) if device == "cpu" else between_events_us(call)


def copy_gb_s(device: str, nbytes: int | None = None) -> float:
    """The bandwidth of a large copy, read and written bytes counted; measured once."""
    if device not in _copies:
        size = nbytes or COPY_BYTES[device]
        g = generator(device, 0)
        source = torch.empty(size // 4, device=device).uniform_(generator=g)
        target = torch.empty_like(source)
        times = [_once_us(lambda: target.copy_(source), device) for _ in range(20)][2:]
        best = min(times) if device == "cpu" else statistics.median(times)
        _copies[device] = 2 * size / best / 1e3
    return _copies[device]


def matmul_tflop_s(device: str, dtype: torch.dtype = torch.bfloat16) -> float:
    """The rate of a square product of random numbers; measured once."""
    if (device, dtype) not in _products:
        n, g = PRODUCT[device], generator(device, 1)
        a, b = (torch.empty(n, n, device=device).normal_(generator=g).to(dtype) for _ in "ab")
        out = torch.empty_like(a)
        times, end = [], time.perf_counter() + PRODUCT_S
        while len(times) < 3 or (time.perf_counter() < end and len(times) < 2000):
            times.append(_once_us(lambda: torch.mm(a, b, out=out), device))
        _products[device, dtype] = 2 * n ** 3 / statistics.median(times[len(times) // 3:]) / 1e6
    return _products[device, dtype]


def product_dtype(device: str) -> torch.dtype:
    """In which the rate is given: products of bf16 may take minutes on a CPU."""
    return torch.float32 if device == "cpu" else torch.bfloat16


def _driver() -> str | None:
    try:
        found = Path("/proc/driver/nvidia/version").read_text().split("Kernel Module")[1]
    except (OSError, IndexError):
        return None
    return found.split()[0]


def machine(device: str) -> dict[str, Any]:
    """The description that every file of results carries."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [x.split(":", 1)[1].strip() for x in info.read_text().splitlines()
                 if x.startswith("model name")]
        cpu = names[0] if names else cpu
    found = {"cpu": cpu, "cores": os.cpu_count(), "threads": torch.get_num_threads(),
             "isa": torch.backends.cpu.get_cpu_capability(), "gpu": None,
             "system": platform.platform(), "python": platform.python_version(),
             "torch": torch.__version__, "load_average": [round(x, 2) for x in os.getloadavg()],
             "copy_gb_s": round(copy_gb_s(device), 2),
             "matmul_tflop_s": round(matmul_tflop_s(device, product_dtype(device)), 3),
             "matmul_dtype": str(product_dtype(device)).removeprefix("torch."),
             "peers": versions(),
             "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    if device != "cpu":
        found |= {"gpu": torch.cuda.get_device_name(), "driver": _driver(),
                  "capability": list(torch.cuda.get_device_capability()),
                  "memory_gb": round(torch.cuda.get_device_properties(0).total_memory / 1e9, 1)}
    return found


def normal(g: torch.Generator, *shape: int) -> Tensor:
    """Normal random numbers in fp32, drawn on the generator's device."""
    return torch.randn(shape, generator=g, device=g.device)


def random_mask(g: torch.Generator, *shape: int, share: float = 0.75) -> Tensor:
    """True for about a share of the slots, drawn on the generator's device."""
    return torch.rand(shape, generator=g, device=g.device) < share


if __name__ == "__main__":
    from _journal import Journal

    Journal(Path(sys.argv[1])).add(
        "machine", **machine("cuda" if torch.cuda.is_available() else "cpu"))
