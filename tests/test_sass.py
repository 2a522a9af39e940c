"""Instructions an element in the hot loops, read from machine code for sm_90.

An H200 runs 2.97e13 instructions of single threads a second (132 multiprocessors of 128 lanes at
1.755 GHz) and copies some 4.2e12 bytes: 7 instructions for each byte that is moved. A loop that
shall wait for memory alone takes fewer by a good margin. The bounds lie a little above what was
reached; before them `kept` took 46.6 and `keep` 26, with two exchanges through shared memory. Of
`keep` 5.2, and of the forward of `token_logprobs` 1.5 keep the largest column out of fp32 sums.
"""

import functools
import importlib.util
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch

if importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton is not here, or interprets", allow_module_level=True)

import triton
from _sass import functions, hot_loop
from test_aot import (
    ROOT,
    TOOLS,
    compile_for,
    linear_call,
    prefix_merge,
    token_logprobs_call,
    usage,
)

__all__ = ["compile_for"]

PER_BYTE = 7
SLOW = ("STS", "LDS", "BAR", r"F2F\.B?F16")  # exchanges, and conversions of one number, not two


def linear_kernels():
    for memory in ("store", "recompute"):
        linear_call("linear_logprobs", 3, 9000, torch.bfloat16, memory=memory)


def token_kernels():
    token_logprobs_call(1024, 65, torch.bfloat16)


# kernel: the call that launches it, bytes a column, columns of a thread in a turn of the loop, the
# most instructions a column
TRITON = {"_linear_logprobs_keep_kernel": (linear_kernels, 6, 16, 18.8),
          "_linear_logprobs_kept_kernel": (linear_kernels, 4, 16, 12.8),
          "_linear_logprobs_gradient_kernel": (linear_kernels, 6, 16, 14),
          "_token_logprobs_fwd_kernel": (token_kernels, 2, 32, 12.2),
          "_token_logprobs_bwd_kernel": (token_kernels, 4, 32, 14.8)}
OLDER = {  # of Triton 3.6: instructions a column, and SLOW ones; it exchanges the sums of keep
    ("3.6", "_linear_logprobs_keep_kernel"): (30.2, [45, 45, 14, 0]),
    ("3.6", "_linear_logprobs_kept_kernel"): (13.2, [0, 0, 1, 0])}


@pytest.mark.parametrize("name", TRITON)
def test_row_kernels_wait_for_memory_alone(name, compile_for, tmp_path):
    call, nbytes, columns, most = TRITON[name]
    of_few_rows = name in ("_linear_logprobs_kept_kernel", "_linear_logprobs_gradient_kernel")
    slow = [0, 0, int(of_few_rows), 0]  # see `_write`
    most, slow = OLDER.get((triton.__version__[:3], name), (most, slow))
    kernel = compile_for(90, 90, call)[name][-1]
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    (code,) = functions(TOOLS / "cuobjdump", cubin).values()
    loop = hot_loop(code)
    assert loop.turn() / columns <= most < PER_BYTE * nbytes
    assert [loop.count(x) for x in SLOW] == slow


def test_the_merge_of_two_parts_of_attention(compile_for, tmp_path):
    """No loop: all that a thread does for its 16 numbers, of which each is 6 bytes moved."""
    (kernel,) = compile_for(90, 90, lambda: prefix_merge(300, 4, 128, torch.bfloat16))[
        "_prefix_attention_merge_kernel"]
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    (code,) = functions(TOOLS / "cuobjdump", cubin).values()
    texts = [text for _, text in code if not text.startswith("NOP")]
    wide = [sum(f"{name}.E" in x and ".128" in x for x in texts) for name in ("LDG", "STG")]
    assert wide == [4, 2]
    assert len(texts) / 16 <= 22 < PER_BYTE * 6


# Parts of the names of CUDA kernels (their template arguments: the results are written, all inputs
# are fp32): bytes a token, tokens of a thread in a turn of the loop, the most instructions a token;
# of token_head in a column's place
CUDA = {("gae", "gae_blocks_kernelILb1ELb1E"): (17, 8, 99),
        ("gae", "gae_warps_kernelILb1E"): (17, 4, 122),
        ("token_advantages", "token_advantages_blocks_kernelILb1ELb1E"): (29, 8, 202),
        ("token_advantages", "token_advantages_warps_kernelILb1E"): (29, 4, 232),
        ("token_head", "token_head_fwd_kernelILi2ELi0ELi1E"): (2, 32, 6.2),  # fp16, one output
        ("token_head", "token_head_bwd_kernelILi2ELi1E"): (4, 32, 18.6)}


@functools.cache
def compiled(source, arch="sm_90"):
    """(code, resources) of every kernel of csrc/<source>.cu by name."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not here")
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernels.cubin")
        subprocess.run([nvcc, "-cubin", f"-arch={arch}", "-O3", "-std=c++17", "-o", cubin,
                        ROOT / f"csrc/{source}.cu"], check=True)
        resources = {name: found for (_, name), found in usage(cubin).items()}
        return functions(TOOLS / "cuobjdump", cubin), resources


@pytest.mark.parametrize("source, name", CUDA)
def test_cuda_kernels_take_few_instructions_a_token(source, name):
    """All that stands in the loop is counted, what only the ends of a sequence take too."""
    nbytes, tokens, most = CUDA[source, name]
    code, resources = compiled(source)
    (kernel,) = (k for k in code if name in k)
    loop = hot_loop(code[kernel])
    assert len(loop.code) / tokens <= most
    assert loop.turn() / tokens < PER_BYTE * nbytes  # without a KL
    assert not any(k["STACK"] or k["LOCAL"] for k in resources.values())


@pytest.mark.parametrize("arch", ("sm_80", "sm_100"))
def test_the_kernel_with_the_most_registers_spills_none(arch):
    """`test_aot` reads them all from the built extension, where it has CUDA."""
    resources = compiled("token_advantages", arch)[1]
    assert not any(k["STACK"] or k["LOCAL"] for k in resources.values())
