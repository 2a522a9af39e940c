"""`python -m tppo_kernels [--json] [--probe]`: versions, what was built, the backends of each
operator, the trainers that are installed, and a self-test."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import platform
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from . import testing
from ._core import op as _op
from .integrations import _peer


def facts(*, probe: bool = False) -> dict[str, Any]:
    """What `report` says, as plain data: `missing` has the reason for each backend without one,
    `trainers` what `integrations` found, with probe=True by importing them."""
    orders = {name: {device: list(op.order[device]) for device in ("cpu", "cuda")}
              for name, op in sorted(_op.OPS.items())}
    backends = dict.fromkeys(b for order in orders.values() for bs in order.values() for b in bs)
    reasons = {backend: _op.missing(backend) for backend in ("cpp", "cuda", *backends)}
    built = None if reasons["cpp"] else importlib.import_module("tppo_kernels._C")
    return {
        "tppo_kernels": _version("tppo-kernels"),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())
                 ] if torch.cuda.is_available() else [],
        "cuda_archs": [] if built is None else built.cuda_archs.split(),
        "why_no_cuda": reasons["cpp"] if built is None else built.why_no_cuda or None,
        "operators": orders,
        "missing": {backend: reason for backend, reason in reasons.items() if reason},
        "trainers": _peer.states(probe=probe),
    }


def report(found: dict[str, Any] | None = None) -> str:
    """Versions, what was built and what was not and why, the backends of every operator, and the
    trainers that are installed. found: of `facts`."""
    found = found or facts()
    none = "not installed"
    lines = [f"tppo_kernels {found['tppo_kernels'] or none}, torch {found['torch']}, "
             f"Python {found['python']}, {found['machine']}",
             f"triton        {found['triton'] or none}",
             f"GPU           {', '.join(found['gpus']) or 'none that torch can use'}",
             f"compiled part {_built(found)}", "", *_table(found), "", *_trainers(found)]
    return "\n".join(lines)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _built(found: dict[str, Any]) -> str:
    if "cpp" in found["missing"]:
        return f"none: {found['missing']['cpp']}"
    archs = ", ".join(f"sm_{arch}" for arch in found["cuda_archs"])
    return f"C++, {f'CUDA for {archs}' if archs else 'no CUDA: ' + found['why_no_cuda']}"


def _table(found: dict[str, Any]) -> list[str]:
    """One line an operator: the order of backends on each device, missing ones in brackets."""
    missing = found["missing"]
    rows: list[tuple[str, ...]] = [("operator", "CPU", "CUDA")]
    for name, order in found["operators"].items():
        rows.append((name, *(" > ".join(f"({b})" if b in missing else b for b in order[device])
                             for device in ("cpu", "cuda"))))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    table = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
             for row in rows]
    return table + [f"  ({backend}): {reason}" for backend, reason in missing.items()]


def _trainers(found: dict[str, Any]) -> list[str]:
    """One line a trainer that integrations know: what is installed of it, and the remedy."""
    lines = ["trainers that tppo_kernels.integrations knows"]
    for each in found["trainers"]:
        said = each["why"] or f"{each['installed']} is installed, within {each['supported']}" + (
            ", and its interface is the one we know" if each["state"] == "works" else "")
        lines.append(f"  {each['trainer']:9s} {said}")
    if any(each["state"] == "known version" for each in found["trainers"]):
        lines.append("  `python -m tppo_kernels --probe` imports them and looks at what we need")
    return lines


def self_test() -> Iterator[dict[str, str | None]]:
    """Runs every operator's sample on every backend that is there, against the fp64 reference.

    Gives operator, device, backend, state ("ok", "not run" where the backend does not take fp32,
    "failed") and why.
    """
    devices = ["cpu"] + ["cuda"] * torch.cuda.is_available()
    for name, op in sorted(_op.OPS.items()):
        for device in devices:
            for backend in op.order[device]:
                if _op.missing(backend):
                    continue
                error = testing.compare(name, backend, device)
                refused = (error or "").startswith("BackendError")
                yield {"operator": name, "device": device, "backend": backend, "why": error,
                       "state": "ok" if not error else "not run" if refused else "failed"}


def main(arguments: list[str] | None = None) -> int:
    """Prints the report and runs the self-test; the exit status is 1 where it fails."""
    parser = argparse.ArgumentParser(prog="python -m tppo_kernels", description=(
        "Versions, what was built, which backends each operator has, which trainers are "
        "installed, and a self-test of every operator on every backend; the exit status is 1 "
        "where one fails."))
    parser.add_argument("--json", action="store_true", help="print one JSON object, for programs")
    parser.add_argument("--probe", action="store_true", help=(
        "import each trainer that is installed in a version we know and look at its interface: "
        "one that has moved is a failure"))
    given = parser.parse_args(arguments)
    found = facts(probe=given.probe)
    moved = [each["trainer"] for each in found["trainers"] if each["state"] == "fails"]
    if given.json:
        tests = list(self_test())
        print(json.dumps({**found, "self_test": tests}, indent=2))
        return int(bool(moved) or any(test["state"] == "failed" for test in tests))
    print(report(found))
    print("\nself-test against the fp64 references")
    failures = [f"the integration of {trainer}" for trainer in moved]
    for test in self_test():
        state = test["state"] if test["state"] != "failed" else "FAILED"
        said = f"{state}: {test['why']}" if test["why"] else state
        print(f"  {test['operator']:18s} {test['device']:4s} {test['backend']:10s} {said}")
        failures += [f"{test['operator']} on {test['backend']}"] * (state == "FAILED")
    print(f"self-test: {'FAILED: ' + ', '.join(failures) if failures else 'all passed'}")
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
