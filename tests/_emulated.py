"""The CUDA backends on CPU tensors: csrc/*.cu compiled for the CPU, see cuda/cuda_runtime.h."""

import functools
import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import pytest

from tppo_kernels._core.op import OPS, missing

ROOT = Path(__file__).parent.parent
WALKS = ("gae", "token_advantages")  # compiled together, once


@functools.cache
def extension(*names):
    """An extension module whose CUDA functions of csrc/<name>.cu run on the CPU.

    The others in it are bound to nothing: calling them ends the process. Each has a package name of
    its own, because pybind11 gives a module that it has made once to whoever asks by that name.
    """
    import pybind11

    folder = Path(tempfile.mkdtemp())
    target = folder / "_C.so"
    sources = ["csrc/bindings.cpp", "-x", "c++", *(f"csrc/{name}.cu" for name in names)]
    flags = ["-O1", "-std=c++17", "-fPIC", "-shared", "-w", "-U_FORTIFY_SOURCE", "-Wl,-z,lazy",
             "-DTPPO_CUDA=1", '-DTPPO_WHY_NO_CUDA=""', '-DTPPO_CUDA_ARCHS=""', "-Itests/cuda",
             f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
    subprocess.run([os.environ.get("CXX", "g++"), *flags, *sources, "-o", target], cwd=ROOT,
                   check=True)
    spec = importlib.util.spec_from_file_location(f"{'_'.join(names)}._C", target)
    before = sys.getdlopenflags()
    sys.setdlopenflags(os.RTLD_LAZY)
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.setdlopenflags(before)
        shutil.rmtree(folder)
    return module


def on_the_cpu(monkeypatch, op, *names):
    """Makes "cuda" a backend of `op` for CPU tensors until the test ends; its `_cuda` module.

    names: of the sources in csrc that it needs.
    """
    if missing("cpp") or importlib.util.find_spec("pybind11") is None:
        pytest.skip("needs the compiled part, a C++ compiler and pybind11")
    backend = importlib.import_module(f"tppo_kernels.ops.{op}._cuda")
    monkeypatch.setattr(backend, "_C", extension(*names or WALKS))
    monkeypatch.setitem(OPS[op].order, "cpu", ("cuda", "reference"))
    monkeypatch.setattr("tppo_kernels._core.op.missing", lambda backend: None)
    return backend


def undone(monkeypatch, op, call):
    """What `call()` gives on the operator's own backend for the CPU."""
    with monkeypatch.context() as inner:
        inner.setitem(OPS[op].order, "cpu", ("cpp",))
        return call()
