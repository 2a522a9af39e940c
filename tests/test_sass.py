"""Instructions an element in the hot loops, read from machine code for sm_90.

An H200 runs 2.97e13 instructions of single threads a second (132 multiprocessors of 128 lanes at
1.755 GHz) and copies some 4.2e12 bytes: 7 instructions for each byte that is moved. A loop that
shall wait for memory alone takes fewer by a good margin. The bounds lie a little above what was
reached; before them `kept` took 46.6 and `keep` 26, with two exchanges through shared memory.
"""

import importlib.util
import os

import pytest
import torch

if importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton is not here, or interprets", allow_module_level=True)

from _sass import functions, hot_loop
from test_aot import TOOLS, compile_for, linear_call, token_logprobs_call

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
TRITON = {"_linear_logprobs_keep_kernel": (linear_kernels, 6, 16, 13.6),
          "_linear_logprobs_kept_kernel": (linear_kernels, 4, 16, 12.8),
          "_linear_logprobs_gradient_kernel": (linear_kernels, 6, 16, 14),
          "_token_logprobs_fwd_kernel": (token_kernels, 2, 32, 10.8),
          "_token_logprobs_bwd_kernel": (token_kernels, 4, 32, 14.8)}


@pytest.mark.parametrize("name", TRITON)
def test_row_kernels_wait_for_memory_alone(name, compile_for, tmp_path):
    call, nbytes, columns, most = TRITON[name]
    kernel = compile_for(90, 90, call)[name][-1]
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    (code,) = functions(TOOLS / "cuobjdump", cubin).values()
    loop = hot_loop(code)
    assert loop.turn() / columns <= most < PER_BYTE * nbytes
    of_few_rows = name in ("_linear_logprobs_kept_kernel", "_linear_logprobs_gradient_kernel")
    assert [loop.count(x) for x in SLOW] == [0, 0, int(of_few_rows), 0]  # see `_write`
