"""How a call reaches its kernel: few functions deep, under its name, through no other backend."""

import importlib
import sys
from pathlib import Path

import pytest
import torch
from _linear_cases import Largest
from torch._C import DispatchKey, DispatchKeySet
from torch.profiler import ProfilerActivity, profile

import tppo_kernels as tk
from tppo_kernels._core.op import OPS, BackendError, missing
from tppo_kernels._core.record import flat

LIBRARY = str(Path(tk.__file__).parent)
WRAPPERS = {"keywords.py", "eager.py"}  # of a public function, and `Function.apply` itself
CHECK = "int64_within"  # of the values of labels; no kernel
MOST = 4  # hops from the public function to the kernel
# One hop, the choice of a backend: `Op` gives a call to the dispatcher, which gives it back to it.
# Only the operators that register their gradient with torch go that way in eager mode.
DISPATCHED = ["_core/op.py:kernel", "_core/op.py:call"]
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
                names.append(f"{path.parent.name}/{path.name}:{frame.f_code.co_name}")
                if names[-2:] == DISPATCHED:
                    names.pop()
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


@pytest.mark.parametrize("name", ("linear_logprobs", "linear_ppo_loss"))
def test_the_kernel_of_other_devices_makes_no_logits_of_all_rows(name, monkeypatch):
    """That of MPS, of XPU, of any that is not a CPU or an NVIDIA GPU; here it gets CPU tensors."""
    function, args, options = call_of(name)
    op, given = OPS[name], []
    choose = op.choose

    def noted(device, call, *rest):
        given.append(call)
        return choose(device, call, *rest)

    monkeypatch.setattr(op, "choose", noted)
    expected = function(*args, **options, memory=1)  # bytes: one row at a time
    raw = getattr(torch.ops.tppo_kernels, f"{name}_fwd").default
    other = DispatchKeySet(DispatchKey.XPU)
    with torch.no_grad(), Largest() as made:
        found = raw.redispatch(other, *flat(given[0]))
    torch.testing.assert_close(found[0], expected[0])
    assert 0 < made.numel < given[0].inputs.targets.numel() * args[1].shape[0]
    with tk.use_backend("cpp"), pytest.raises(BackendError, match="backend on other devices, only"):
        raw.redispatch(other, *flat(given[0]))
    with torch.no_grad(), tk.use_backend("reference"), Largest() as made:
        raw.redispatch(other, *flat(given[0]))
    assert made.numel >= given[0].inputs.targets.numel() * args[1].shape[0]
