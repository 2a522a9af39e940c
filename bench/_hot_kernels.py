"""Instructions of the hot kernels, as `ncu` counts them: a thread's, over the elements it handles.

`python bench/_hot_kernels.py JOURNAL` runs itself without an argument under ncu, which is one
launch of each, and writes down what that counted. Exit status 3: ncu does not answer here.
"""

from __future__ import annotations

import csv
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from _machine import generator, normal, random_mask

import tppo_kernels as tk

METRICS = {"smsp__thread_inst_executed.sum": "instructions", "gpu__time_duration.sum": "ns",
           "dram__bytes.sum": "nbytes"}
ROWS, COLUMNS, WIDTH, BATCH, TOKENS = 1024, 128_256, 1024, 8192, 4096  # one chunk of 1 GiB
TINY = (4, 500, 16, 4, 64)
KERNELS = {  # part of its name: elements; of one operator, those that a plan may choose among
    "_token_logprobs_fwd_kernel": ROWS * COLUMNS,
    "_linear_logprobs_keep_kernel": ROWS * COLUMNS,
    "_linear_logprobs_kept_kernel": ROWS * COLUMNS,
    "_linear_logprobs_gradient_kernel": ROWS * COLUMNS,
    "token_advantages_warps_kernel": BATCH * TOKENS,
    "token_advantages_blocks_kernel": BATCH * TOKENS,
    "token_advantages_whiten_kernel": BATCH * TOKENS,
}


def launch(device: str) -> None:
    """Every one of `KERNELS` once; on a CPU, at tiny sizes, what stands for them there."""
    rows, columns, width, batch, tokens = (
        (ROWS, COLUMNS, WIDTH, BATCH, TOKENS) if device == "cuda" else TINY)
    g = generator(device, 0)
    logits = (3 * normal(g, rows, columns)).bfloat16()
    targets = torch.randint(columns, (rows,), generator=g, device=device)
    tk.token_logprobs(logits, targets)
    del logits
    hidden = normal(g, rows, width).bfloat16().requires_grad_()
    weight = (normal(g, columns, width) / width ** 0.5).bfloat16().requires_grad_()
    for memory in ("store", "recompute"):  # keep and kept, then the gradient from logits
        out = tk.linear_logprobs(hidden, weight, targets, memory=memory)
        torch.autograd.grad(out.logprobs.sum() + 0.5 * out.entropy.sum(), (hidden, weight))
    rewards, values, logprobs, ref = normal(g, 4, batch, tokens)
    tk.token_advantages(rewards, values, random_mask(g, batch, tokens), logprobs=logprobs,
                        ref_logprobs=ref, kl_coef=0.05)


def ncu(tool: str) -> list[str]:
    """The command that counts `KERNELS`; the card's clocks are left alone."""
    names = "|".join(KERNELS)
    return [tool, "--clock-control", "none", "--csv", "--print-units", "base", "--metrics",
            ",".join(METRICS), "--kernel-name", f"regex:{names}", sys.executable, __file__]


def counted(said: str) -> list[dict[str, Any]]:
    """From what ncu printed: time, bytes and instructions an element of each kernel's first launch.
    """
    lines = said.splitlines()
    head = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if head is None:
        return []
    launches: dict[str, dict[str, dict[str, float]]] = {}
    for row in csv.DictReader(lines[head:]):
        column = METRICS.get(row.get("Metric Name") or "")
        kernel = next((k for k in KERNELS if k in (row.get("Kernel Name") or "")), None)
        if column and kernel:
            of_kernel = launches.setdefault(kernel, {}).setdefault(row["ID"], {})
            of_kernel[column] = float(row["Metric Value"].replace(",", ""))
    found = []
    for kernel, of_kernel in launches.items():
        first = next(iter(of_kernel.values()))
        if len(first) == len(METRICS):
            found.append({"name": kernel, "us": round(first["ns"] / 1e3, 1),
                          "gb_s": round(first["nbytes"] / first["ns"], 1),
                          "instructions_per_element":
                              round(first["instructions"] / KERNELS[kernel], 2)})
    return found


def main(journal: Path) -> int:
    """Counts into the journal; the exit status."""
    from _journal import Journal

    device = "cuda" if torch.cuda.is_available() else "cpu"
    tool = shutil.which("ncu")
    if device == "cpu":
        launch(device)
        print("a CPU: the calls ran, nothing was counted")
        return 0
    if tool is None:
        print("ncu is not on the PATH")
        return 3
    done = subprocess.run(ncu(tool), capture_output=True, text=True)
    found = counted(done.stdout)
    for kernel in found:
        Journal(journal).add("kernel", **kernel)
    print(done.stderr[-2000:], "" if found else done.stdout[-2000:],
          f"kernels counted: {len(found)} of {len(KERNELS)}")
    return done.returncode if found else 3


if __name__ == "__main__":
    if len(sys.argv) > 1:
        sys.exit(main(Path(sys.argv[1])))
    launch("cuda" if torch.cuda.is_available() else "cpu")
