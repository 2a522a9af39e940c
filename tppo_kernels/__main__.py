"""`python -m tppo_kernels`: versions, what was built, the op x backend table, and a self-test."""

from __future__ import annotations

import importlib
import importlib.util
import platform
import sys
from importlib.metadata import PackageNotFoundError, version

import torch

from . import testing
from ._core import op as _op


def report() -> str:
    """Versions, what was built and what was not and why, and the backends of every operator."""
    lines = [f"tppo_kernels {_version('tppo-kernels')}, torch {torch.__version__}, "
             f"Python {platform.python_version()}, {platform.machine()}",
             f"triton        {_version('triton')}",
             f"GPU           {_gpu()}",
             f"compiled part {_built()}", "", *_table()]
    return "\n".join(lines)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _gpu() -> str:
    if not torch.cuda.is_available():
        return "none that torch can use"
    return ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))


def _built() -> str:
    reason = _op.missing("cpp")
    if reason:
        return f"none: {reason}"
    reason = _op.missing("cuda")
    compiled = importlib.import_module("tppo_kernels._C")
    archs = ", ".join(f"sm_{arch}" for arch in compiled.cuda_archs.split())
    return f"C++, {f'CUDA for {archs}' if not reason else f'no CUDA: {compiled.why_no_cuda}'}"


def _table() -> list[str]:
    """One line an operator: the order of backends on each device, missing ones in brackets."""
    rows: list[tuple[str, ...]] = [("operator", "CPU", "CUDA")]
    for name, op in sorted(_op.OPS.items()):
        rows.append((name, *(" > ".join(f"({b})" if _op.missing(b) else b for b in op.order[device])
                             for device in ("cpu", "cuda"))))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    table = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
             for row in rows]
    hidden = dict.fromkeys(b for op in _op.OPS.values() for order in op.order.values()
                           for b in order if _op.missing(b))
    return table + [f"  ({backend}): {_op.missing(backend)}" for backend in hidden]


def self_test() -> list[str]:
    """Runs every operator's sample on every backend that takes it, against the fp64 reference."""
    failures = []
    devices = ["cpu"] + ["cuda"] * torch.cuda.is_available()
    for name, op in sorted(_op.OPS.items()):
        for device in devices:
            for backend in op.order[device]:
                if _op.missing(backend):
                    continue
                error = testing.compare(name, backend, device)
                refused = (error or "").startswith("BackendError")  # it takes no fp32
                state = "ok" if not error else f"{'not run' if refused else 'FAILED'}: {error}"
                print(f"  {name:18s} {device:4s} {backend:10s} {state}")
                failures += [f"{name} on {backend}"] * (bool(error) and not refused)
    return failures


def main() -> int:
    """Prints the report and runs the self-test; the exit status is 1 where it fails."""
    print(report())
    print("\nself-test against the fp64 references")
    failures = self_test()
    print(f"self-test: {'FAILED: ' + ', '.join(failures) if failures else 'all passed'}")
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
