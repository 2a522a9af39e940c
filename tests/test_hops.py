"""How a call reaches its kernel: few functions deep, under its name, through no other backend."""

import importlib
import sys
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import tppo_kernels as tk
from tppo_kernels._core.op import OPS, missing

LIBRARY = str(Path(tk.__file__).parent)
WRAPPERS = {"keywords.py", "eager.py"}  # of a public function, and `Function.apply` itself
CHECK = "int64_within"  # of the values of labels; no kernel
MOST = 4  # hops from the public function to the kernel
GRADIENTS = [name for name in OPS if hasattr(torch.ops.tppo_kernels, f"{name}_bwd")]
CPU = [(name, backend) for name, op in OPS.items() for backend in op.order["cpu"]
       if not missing(backend)]


def call_of(name, dtype=torch.float32):
    """The public operator on its sample inputs, in a dtype that every backend takes."""
    args, options = importlib.import_module(f"tppo_kernels.ops.{name}").sample_inputs()

    def cast(x):
        return x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x

    args, options = [cast(x) for x in args], {k: cast(v) for k, v in options.items()}
    return getattr(tk, name), args, options


def tensors(result):
    """All tensors of a result, however deep."""
    if isinstance(result, torch.Tensor):
        return [result]
    return [x for part in result for x in tensors(part)] if isinstance(result, tuple) else []


def run(name, gradient):
    """Forward, and backward where a gradient is wanted and the operator has one."""
    function, args, options = call_of(name)
    wanted = gradient and name in GRADIENTS
    args[0] = args[0].requires_grad_(wanted)
    if not wanted:
        with torch.no_grad():
            return function(*args, **options)
    result = function(*args, **options)
    sum(x.sum() for x in tensors(result) if x.requires_grad).backward()
    assert args[0].grad is not None
    return result


class Calls:
    """Sees every call inside, of Python functions of the library and of its compiled part."""

    def __init__(self):
        self.files: list[str] = []
        self.stacks: dict[str, list[str]] = {}  # of a kernel, the functions that lead to it

    def __enter__(self):
        sys.setprofile(self._note)
        return self

    def __exit__(self, *_):
        sys.setprofile(None)

    def _note(self, frame, event, function):
        file = frame.f_code.co_filename
        if event == "call" and file.startswith(LIBRARY):
            self.files.append(file)
            if Path(file).name == "reference.py" and frame.f_code.co_name in ("fwd", "stats"):
                self._keep(f"reference.{frame.f_code.co_name}", frame.f_back)
        if event == "c_call" and function.__module__ == "tppo_kernels._C":
            self._keep(function.__name__, frame)

    def _keep(self, kernel, frame):
        names = []
        while frame is not None:
            path = Path(frame.f_code.co_filename)
            if str(path).startswith(LIBRARY) and path.name not in WRAPPERS:
                name = f"{path.parent.name}/{path.name}:{frame.f_code.co_name}"
                if path.name != "op.py" or not names or "/op.py:" not in names[-1]:
                    names.append(name)  # what `Op` does before the backend is one hop
            frame = frame.f_back
        self.stacks.setdefault(kernel, names[::-1])


@pytest.mark.parametrize("gradient", (False, True))
@pytest.mark.parametrize("name, backend", CPU)
def test_a_kernel_is_at_most_four_hops_from_the_public_function(name, backend, gradient):
    with tk.use_backend(backend), Calls() as calls:
        run(name, gradient)
    reached = {kernel: names for kernel, names in calls.stacks.items() if kernel != CHECK}
    assert reached or backend == "flash"  # whose kernels are torch's own
    for kernel, names in reached.items():
        if names[0].endswith(f":{name}"):  # forward; backward is called by torch
            assert len(names) <= MOST, (kernel, names)


@pytest.mark.parametrize("name", sorted(OPS))
def test_the_forced_reference_runs_nothing_of_the_engines(name):
    """Its files are the formulas: a bug of a backend cannot be in both."""
    with tk.use_backend("reference"), Calls() as calls:
        run(name, gradient=True)
    ran = {Path(file) for file in calls.files}
    assert {path.name for path in ran if path.parent.parent.name == "ops"} == {
        "__init__.py", "reference.py"}
    assert calls.stacks.keys() <= {"reference.fwd", "reference.stats", CHECK}


@pytest.mark.parametrize("gradient", (False, True))
@pytest.mark.parametrize("name", OPS)
def test_every_call_shows_in_the_profiler(name, gradient):
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        run(name, gradient)
    names = {event.key for event in profiler.key_averages()}
    assert f"tppo_kernels::{name}_fwd" in names
    if gradient and name in GRADIENTS:
        assert f"tppo_kernels::{name}_bwd" in names


def test_a_call_behind_a_profile_is_plain_again():
    function, args, options = call_of("gae")
    with profile(activities=[ProfilerActivity.CPU]):
        profiled = function(*args, **options)
    with Calls() as calls:
        plain = function(*args, **options)
    assert all(map(torch.equal, profiled, plain))
    names, = (names for kernel, names in calls.stacks.items() if kernel.endswith("gae_fwd"))
    assert not any("lambda" in name for name in names)  # what the dispatcher would call
