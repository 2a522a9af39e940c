"""Every GPU kernel compiled for GPUs that are not here: no spills, shared memory within the limit.

Triton: the host code of each operator runs on CPU tensors under a driver that compiles each launch
for sm_80, sm_90 and sm_100 and runs nothing. CUDA: the kernels in the built extension are read.

To add an operator `x`: `x_launches()` makes every launch that its host code can make (dtypes,
masks, backward, short and long), and `x_varied(i, dtype)` a call whose lengths and Python floats
depend on i. Results are never computed: do not look at them.
"""

import importlib.util
import os
import re
import subprocess
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from _linear_cases import halves

import tppo_kernels as tk
from tppo_kernels._core import op as _op

if importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton is not here, or interprets", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

ROOT = Path(__file__).parent.parent
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
KNOWN_SPILLS = {  # bytes, of Triton 3.6's assembler, in one variant each; none on sm_90
    ("3.6", "_gae_fwd_kernel", 80): 16, ("3.6", "_token_head_bwd_kernel", 80): 8,
    ("3.6", "_token_logprobs_fwd_kernel", 100): 8}
SHARED_LIMIT = {80: 166_912, 90: 232_448, 100: 232_448}  # bytes a block
HALVES = (torch.float32, torch.bfloat16, torch.float16)


def whiten_launches():
    for dtype in HALVES:
        tk.whiten(torch.randn(3, 17).to(dtype))
        x = torch.randn(8, 4096).to(dtype)
        tk.whiten(x, x > 0, unbiased=False, shift_mean=False)


def whiten_varied(i, dtype):
    x = torch.randn(1 + i % 3, 1 + 331 * i).to(dtype)
    tk.whiten(x, x > 0, eps=i / 100, unbiased=i % 2 == 0)


def token_logprobs_call(rows, V, dtype, softcap=None, x=None, **kwargs):
    x = torch.randn(rows, V).to(dtype) if x is None else x
    targets = torch.zeros(x.shape[:-1], dtype=torch.long)
    out = tk.token_logprobs(x.requires_grad_(), targets, targets == 0, softcap=softcap, **kwargs)
    (out.logprobs + out.entropy).sum().backward()


def token_logprobs_launches():
    token_logprobs_call(2, 20_001, torch.bfloat16, temperature=torch.ones(2))  # rows in parts
    token_logprobs_call(2, 20_001, torch.float16, softcap=30.0)
    token_logprobs_call(1024, 64, torch.bfloat16, softcap=30.0)
    for dtype in HALVES:
        token_logprobs_call(1024, 65, dtype)
    odd = torch.randn(2, 520, 65).bfloat16()[:, 3:-1]
    token_logprobs_call(0, 0, torch.bfloat16, x=odd)


def token_logprobs_varied(i, dtype):
    token_logprobs_call(1 + i % 7, 1 + 531 * i, dtype, temperature=0.5 + i / 50,
                        logit_scale=1.0 - i, valid_vocab=1 + 430 * i)


def entropy_launches():
    x = torch.randn(1024, 65).requires_grad_()
    tk.entropy(x).sum().backward()
    x = torch.randn(2, 20_001).bfloat16().requires_grad_()
    tk.entropy(x, x[:, 0] > 0, softcap=30.0).sum().backward()


def entropy_varied(i, dtype):
    x = torch.randn(1 + i % 7, 1 + 531 * i).to(dtype).requires_grad_()
    tk.entropy(x, temperature=0.5 + i / 50).sum().backward()


def gae_launches():
    for dtype, (batch, tokens) in zip(HALVES, ((9, 24), (3, 3000), (9, 24)), strict=True):
        x, lam = torch.randn(batch, tokens).to(dtype), torch.rand(batch)
        cu_seqlens = torch.arange(batch + 1, dtype=torch.int32) * tokens
        tk.gae(x, x)
        tk.gae(x.flatten(), x.flatten(), x.flatten() > 0, lam=lam, value_lam=1.0,
               bootstrap=lam.to(dtype), cu_seqlens=cu_seqlens)


def gae_varied(i, dtype):
    x = torch.randn(1 + i % 3, 1 + 131 * i).to(dtype)
    tk.gae(x, x, x > 0, gamma=1 - i / 100, lam=i / 100)


def loss_arguments(batch, tokens, dtype):
    x = torch.randn(batch, tokens).to(dtype)
    return x.clone().requires_grad_(), x, x, x > 0


def ppo_loss_launches():
    terms = {"entropy_coef": 0.1, "kl_coef": 0.3, "dual_clip": 2.0}
    for dtype, ratio, reduction, kl in ((torch.float32, "token", "token-mean", "k3"),
                                        (torch.bfloat16, "sequence", "seq-mean-token-mean", "k2"),
                                        (torch.float16, "token", "seq-mean-token-sum", "abs")):
        lp, old, advantages, mask = loss_arguments(3, 200, dtype)
        tk.ppo_loss(lp, old, advantages, mask, entropy=lp, ref_logprobs=old, weights=old[:, 0],
                    ratio=ratio, reduction=reduction, kl_estimator=kl, **terms).loss.backward()
        tk.ppo_loss(lp, old, advantages, ratio=ratio, reduction=reduction).loss.backward()
    lp, old, advantages, mask = loss_arguments(9, 24, torch.bfloat16)
    tk.ppo_loss(lp, old, advantages, mask, reduction="seq-mean-token-mean").loss.backward()
    lp, old, advantages, _ = (x.flatten() for x in loss_arguments(3, 200, torch.float32))
    cu = torch.tensor([0, 9, 600], dtype=torch.int32)
    tk.ppo_loss(lp, old, advantages[:2], ratio="sequence", cu_seqlens=cu)
    for objective, ratio, kl, clamp in (("cispo", "sequence", "k3", 10.0), ("sapo", "token", "k2",
                                         None), ("sapo", "sequence", "k3+", 10.0)):
        lp, old, advantages, mask = loss_arguments(3, 200, torch.bfloat16)
        tk.ppo_loss(lp, old, advantages, mask, entropy=lp, ref_logprobs=old, weights=old[:, 0],
                    objective=objective, ratio=ratio, kl_estimator=kl, kl_clamp=clamp,
                    kl_ratio_weighted=True, reduction="seq-mean-token-mean", entropy_coef=0.1,
                    kl_coef=0.3).loss.backward()


def ppo_loss_varied(i, dtype):
    lp, old, advantages, mask = loss_arguments(1 + i % 3, 2 + 31 * i, dtype)
    tk.ppo_loss(lp, old, advantages[:, 0], mask, clip_low=i / 100, max_log_ratio=1 + i,
                num_tokens=1 + i).loss.backward()


def value_loss_launches():
    for dtype, tokens, reduction in ((torch.float32, 200, "token-mean"),
                                     (torch.bfloat16, 300, "seq-mean-token-mean"),
                                     (torch.float16, 24, "seq-mean-token-sum")):
        values, returns, old, mask = loss_arguments(3, tokens, dtype)
        tk.value_loss(values, returns, mask, old_values=old, clip=0.2,
                      reduction=reduction).loss.backward()
        tk.value_loss(values, returns, reduction=reduction).loss.backward()


def value_loss_varied(i, dtype):
    values, returns, old, mask = loss_arguments(1 + i % 3, 2 + 31 * i, dtype)
    tk.value_loss(values, returns, mask, old_values=old, clip=i / 100, num_sequences=1 + i,
                  reduction="seq-mean-token-mean").loss.backward()


def kl_launches():
    for dtype, estimator in zip(HALVES, ("k3", "abs", "k3+"), strict=True):
        lp, ref, _, mask = loss_arguments(3, 200, dtype)
        tk.kl(lp, ref, mask, estimator=estimator, clamp=10.0).sum().backward()


def kl_varied(i, dtype):
    lp, ref, _, mask = loss_arguments(1 + i % 3, 2 + 31 * i, dtype)
    tk.kl(lp, ref, mask, estimator="k3", clamp=0.5 + i).sum().backward()


def reduce_launches():
    for dtype, tokens, reduction in zip(HALVES, (200, 24, 600), (
            "token-mean", "seq-mean-token-mean", "seq-mean-token-sum"), strict=True):
        x, _, _, mask = loss_arguments(9, tokens, dtype)
        tk.reduce(x, mask, reduction=reduction).backward()
        cu = torch.arange(10, dtype=torch.int32) * tokens
        tk.reduce(x.flatten(), reduction=reduction, cu_seqlens=cu).backward()


def reduce_varied(i, dtype):
    x, _, _, mask = loss_arguments(1 + i % 3, 2 + 31 * i, dtype)
    tk.reduce(x, mask, reduction="seq-mean-token-mean", num_sequences=1 + i).backward()


def token_head_call(shape, K, D, dtype, weight_dtype, masked=True, leaf=lambda x: x):
    hidden = leaf(torch.randn(*shape, D).to(dtype)).requires_grad_()
    weight, bias = (torch.randn(s).to(weight_dtype).requires_grad_() for s in ((K, D), (K,)))
    mask = torch.ones(hidden.shape[:-1], dtype=torch.bool) if masked else None
    tk.token_head(hidden, weight, bias, mask).sum().backward()


def token_head_launches():
    for dtype, weight_dtype in ((torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16),
                                (torch.float32, torch.float32)):
        for K in (1, 3, 8):
            token_head_call((9, 7), K, 4096, dtype, weight_dtype)
    token_head_call((9, 7), 4, 1021, torch.float16, torch.float16, leaf=lambda x: x[:, 1:-2])


def token_head_varied(i, dtype):
    token_head_call((1 + i % 3, 1 + i), 1, 512, dtype, torch.float32,
                    leaf=lambda x: x[:, 1:] if i % 2 else x)


def linear_call(op, n, v, dtype, dtype_of_weight=None, **options):
    hidden = torch.randn(n, 8).to(dtype).requires_grad_()
    weight = torch.randn(v, 8).to(dtype_of_weight or dtype).requires_grad_()
    targets = torch.zeros(n, dtype=torch.long)
    with halves():
        if op == "linear_logprobs":
            out = tk.linear_logprobs(hidden, weight, targets, **options)
            (out.logprobs + out.entropy).sum().backward()
        else:
            old = torch.zeros(n)
            tk.linear_ppo_loss(hidden, weight, targets, old, old, cu_seqlens=torch.tensor(
                [0, n], dtype=torch.int32), entropy_coef=0.1, **options).loss.backward()


def every_linear_launch(op, memories=({"memory": "store"}, {"memory": "recompute"})):
    for memory in memories:
        for dtype in HALVES:
            linear_call(op, 3, 9000, dtype, **memory)
            linear_call(op, 3, 9001, dtype, **memory)
        linear_call(op, 3, 9001, torch.bfloat16, softcap=30.0, **memory)
        linear_call(op, 3, 64, torch.bfloat16, torch.float32, **memory)


def linear_logprobs_launches():
    every_linear_launch("linear_logprobs")


def linear_ppo_loss_launches():
    every_linear_launch("linear_ppo_loss", ({}, {"ratio": "sequence"}))


def linear_logprobs_varied(i, dtype):
    linear_call("linear_logprobs", 1 + i, 1 + 201 * i, dtype, temperature=0.5 + i / 50,
                logit_scale=1.0 - i, memory="recompute" if i % 3 else "store")


def linear_ppo_loss_varied(i, dtype):
    linear_call("linear_ppo_loss", 1 + i, 1 + 201 * i, dtype, temperature=0.5 + i / 50,
                ratio="token" if i % 3 else "sequence")


def token_advantages_launches():
    x, cu_seqlens = torch.randn(9, 24), torch.arange(10, dtype=torch.int32) * 24
    tk.token_advantages(x.bfloat16(), x, x > 0, train_mask=x > 1, logprobs=x, ref_logprobs=x,
                        kl_coef=0.1)
    tk.token_advantages(x.flatten(), x.flatten(), cu_seqlens=cu_seqlens)


def token_advantages_varied(i, dtype):
    x = torch.randn(1 + i % 3, 1 + 131 * i).to(dtype)
    tk.token_advantages(x, x, x > 0, gamma=1 - i / 100, lam=i / 100)


def prefix_merge(tokens, heads, d, dtype):
    from tppo_kernels._kernels.triton_prefix import merge

    out, lse = torch.randn(tokens, heads, d).to(dtype), torch.randn(heads, tokens)
    merge(out, lse, out[1:], lse[:, 1:], torch.arange(1, tokens))


def prefix_attention_launches():
    for dtype, d in zip(HALVES, (128, 64, 72), strict=True):
        prefix_merge(300, 4, d, dtype)


def prefix_attention_varied(i, dtype):
    prefix_merge(2 + 131 * i, 1 + i % 7, 128, dtype)


ROW_KERNELS = ("_linear_logprobs_", "_token_logprobs_")  # of which several operators are made
LAUNCHES, VARIED = ({name.removesuffix(end): function for name, function in list(globals().items())
                     if name.endswith(end)} for end in ("_launches", "_varied"))


class Driver:
    """What Triton asks of a driver to compile; each `device` has a cache of its own."""

    def __init__(self, arch: int, device: int):
        self.arch, self.device = arch, device

    def get_current_target(self):
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self):
        return self.device

    def get_current_stream(self, device=None):
        return 0

    def set_current_device(self, device):
        pass

    def get_active_torch_device(self):
        return torch.device("cpu")

    def is_active(self):
        return True

    def map_python_to_cpp_type(self, kind):
        return kind


@pytest.fixture
def compile_for(monkeypatch):
    """`compile_for(arch, device, call)`: the kernels that a call would launch, by name."""
    run = JITFunction.run
    launched: dict[str, dict[int, object]] = defaultdict(dict)

    def compile_only(self, *args, grid, warmup, **options):
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        launched[self.__name__][id(kernel)] = kernel
        return kernel

    monkeypatch.setattr(JITFunction, "run", compile_only)
    monkeypatch.setattr(_op, "interpreting", lambda: True)  # Triton may take CPU tensors

    def compile_for(arch, device, call):
        monkeypatch.setattr(triton.runtime.driver, "_active", Driver(arch, device))
        launched.clear()
        with tk.use_backend("triton"):
            call()
        return {name: list(kernels.values()) for name, kernels in launched.items()}

    return compile_for


def usage(code: Path) -> dict[tuple[str, str], dict[str, int]]:
    """Registers, stack and so on by (architecture, function) of a binary."""
    said = subprocess.run([TOOLS / "cuobjdump", "-res-usage", code], capture_output=True,
                          text=True, check=True).stdout
    found, arch, function = {}, "", ""
    for line in said.splitlines():
        if line.startswith("arch = "):
            arch = line.removeprefix("arch = ")
        elif line.lstrip().startswith("Function "):
            function = line.split()[1].rstrip(":")
        elif "REG:" in line:
            found[arch, function] = {k: int(v) for k, v in re.findall(r"(\w+):(\d+)", line)}
    return found


def spilled(ptx: str, folder: Path) -> int:
    """Bytes of register spills, from the assembler's own report."""
    source = folder / "kernel.ptx"
    source.write_text(ptx)
    arch = re.search(r"\.target\s+(\S+?)[\s,]", ptx)[1]
    for assembler in ("ptxas", "ptxas-blackwell"):  # each refuses some architectures
        report = subprocess.run([TOOLS / assembler, "-v", f"-arch={arch}", source, "-o",
                                 folder / "kernel.cubin"], capture_output=True, text=True).stderr
        bytes_ = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
        if bytes_:
            return int(bytes_[1]) + int(bytes_[2])
    raise AssertionError(f"no assembler took {arch}: {report}")


def test_every_triton_operator_is_compiled_here():
    ops = {name for name, op in _op.OPS.items() if "triton" in op.order["cuda"]}
    ops.add("prefix_attention")  # the merge of what other kernels have computed
    assert set(LAUNCHES) == set(VARIED) == ops


@pytest.mark.parametrize("arch", SHARED_LIMIT)
@pytest.mark.parametrize("op", LAUNCHES)
def test_triton_compiles_without_spills(op, arch, compile_for, tmp_path):
    launched = compile_for(arch, arch, LAUNCHES[op])
    assert launched
    for name, kernels in launched.items():
        own = ROW_KERNELS if op.startswith("linear_") else f"_{op}_"
        own = {"token_advantages": ("_gae_", "_whiten_"),  # their composition
               "entropy": "_token_logprobs_"}.get(op, own)
        assert name.startswith(own) and name.endswith("_kernel"), name
        for kernel in kernels:
            assert kernel.metadata.target.arch == arch
            assert kernel.metadata.shared <= SHARED_LIMIT[arch], name
            cubin = tmp_path / "kernel.cubin"
            cubin.write_bytes(kernel.asm["cubin"])
            (resources,) = usage(cubin).values()
            if resources["STACK"] or resources["LOCAL"]:
                allowed = KNOWN_SPILLS.get((triton.__version__[:3], name, arch), 0)
                found = spilled(kernel.asm["ptx"], tmp_path)
                assert found <= allowed, f"{name} spills {found} bytes: {kernel.src.signature}"


@pytest.fixture
def variants(monkeypatch):
    """The specialisations of each kernel by name; they are counted, not compiled."""
    seen = defaultdict(set)

    def note(*, key, fn, **_):
        seen[fn.name.rpartition(".")[2]].add(str(key))
        return True

    monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", note)
    return seen


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("op", VARIED)
def test_triton_variants_over_fifty_lengths_and_floats(op, dtype, compile_for, variants):
    """Liger#146, fla#533: a recompilation for every length or temperature."""
    compile_for(90, 1000, lambda: [VARIED[op](i, dtype) for i in range(50)])
    assert variants
    assert {name: len(keys) for name, keys in variants.items() if len(keys) > 2} == {}


def test_a_variant_for_each_length_would_be_seen(compile_for, variants):
    compile_for(90, 1000, lambda: [_wide_kernel[(1,)](torch.empty(1), torch.empty(1), N=2 << i)
                                   for i in range(5)])
    assert len(variants["_wide_kernel"]) == 5


def test_a_spill_would_be_seen(compile_for, tmp_path):
    """The gate itself: a block far too large for one warp."""
    (kernel,) = compile_for(90, 90, lambda: _wide_kernel[(1,)](
        torch.empty(1), torch.empty(1), N=16384, num_warps=1))["_wide_kernel"]
    assert spilled(kernel.asm["ptx"], tmp_path) > 0
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    (function,) = usage(cubin).values()
    assert function["STACK"] or function["LOCAL"]


@triton.jit
def _wide_kernel(x_ptr, out_ptr, N: triton.language.constexpr):
    x = triton.language.load(x_ptr + triton.language.arange(0, N))
    top = triton.language.max(x, 0)
    triton.language.store(out_ptr + triton.language.arange(0, N), x - top)


def test_cuda_kernels_keep_everything_in_registers():
    """STACK and LOCAL of 0 in the shipped binary: no spills, and no arrays in local memory."""
    if _op.missing("cuda"):
        pytest.skip(_op.missing("cuda"))
    binary = Path(importlib.util.find_spec("tppo_kernels._C").origin)
    if binary.stat().st_mtime < max(p.stat().st_mtime for p in (ROOT / "csrc").iterdir()):
        pytest.skip("the extension is older than csrc: install it anew")
    kernels = usage(binary)
    assert {arch for arch, _ in kernels} == {"sm_80", "sm_90", "sm_100"}
    assert not {name: k for name, k in kernels.items() if k["STACK"] or k["LOCAL"]}
