"""The chooser: order, forcing, reasons, the one line that a fallback logs."""

import logging
import subprocess
import sys
import textwrap
from typing import NamedTuple

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import tppo_kernels as tk
from tppo_kernels._core import backends as _backends
from tppo_kernels._core import eager as _eager
from tppo_kernels._core import op as _op
from tppo_kernels._core import record as _record


@pytest.fixture
def inputs():
    return torch.randn(2, 5), torch.randn(2, 5)


@pytest.fixture
def no_extension(monkeypatch):
    monkeypatch.setitem(sys.modules, "tppo_kernels._C", None)
    _op.missing.cache_clear()
    yield
    _op.missing.cache_clear()


def run(code: str, **env: str) -> subprocess.CompletedProcess:
    import os

    return subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True,
                          text=True, env={**os.environ, **env}, timeout=600)


def test_explain_names_the_backend_and_runs_nothing(inputs, monkeypatch):
    kernel = "tppo_kernels.ops.gae._cpp" if not _op.missing("cpp") else "tppo_kernels.ops.gae"
    monkeypatch.delattr(f"{kernel}.fwd", raising=False)
    said = tk.explain("gae", *inputs)
    assert said == tk.explain(tk.gae, *inputs)
    assert said.backend == ("reference" if _op.missing("cpp") else "cpp")


def test_explain_gives_the_reason_for_every_refusal(inputs):
    said = tk.explain("gae", *(x.double() for x in inputs))
    assert said.backend == "reference"
    assert "cpp" in said.refused and "not cpp: " in str(said)


def test_explain_of_bad_arguments_raises_as_the_call_would(inputs):
    with pytest.raises(ValueError, match="values has shape"):
        tk.explain("gae", inputs[0], inputs[1][:1])
    with pytest.raises(ValueError, match="op is 'gea', expected one of .*gae"):
        tk.explain("gea")


def test_forcing_a_backend_that_cannot_run_raises_with_the_reason(inputs):
    with tk.use_backend("triton"), pytest.raises(tk.BackendError, match="gae.*triton: it has no"):
        tk.gae(*inputs)
    if not _op.missing("cpp"):
        with tk.use_backend("cpp"), pytest.raises(tk.BackendError, match="fp64"):
            tk.gae(*(x.double() for x in inputs))
    with pytest.raises(ValueError, match="backend is 'opencl', expected one of reference"):
        with tk.use_backend("opencl"):
            pass


def test_triton_on_a_cpu_wants_its_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with tk.use_backend("triton"), pytest.raises(tk.BackendError, match="TRITON_INTERPRET=1"):
        tk.whiten(torch.randn(3))


def test_forcing_ends_with_the_block_and_nests(inputs):
    with tk.use_backend("triton"):
        with tk.use_backend("reference"):
            tk.gae(*inputs)
        with pytest.raises(tk.BackendError):
            tk.gae(*inputs)
    tk.gae(*inputs)


@pytest.mark.parametrize("old", (False, True))
def test_what_autograds_threads_are_told_lives_and_ends_with_the_block(monkeypatch, old):
    """torch 2.11 keeps it without a reference, and cannot take it back."""
    if old:
        monkeypatch.delattr(torch._C, "_remove_obj_from_tls", raising=False)
    for i in range(300):
        with tk.use_backend("reference"):
            with tk.use_backend("cpp"):
                assert torch._C._get_obj_in_tls(_backends._TO_AUTOGRAD)[1] == "cpp"
            [(j, str(j + i)) for j in range(50)]  # where memory that was freed would be used again
            assert torch._C._get_obj_in_tls(_backends._TO_AUTOGRAD)[1] == "reference"
        assert _backends.forced() is None
    monkeypatch.undo()
    with tk.use_backend("cpp"):
        pass  # takes back what an old torch would have left


def test_the_environment_forces_a_backend(inputs, monkeypatch):
    monkeypatch.setenv("TPPO_BACKEND", "reference")
    assert tk.explain("gae", *inputs).backend == "reference"
    monkeypatch.setenv("TPPO_BACKEND", "quantum")
    with pytest.raises(tk.BackendError, match="TPPO_BACKEND is 'quantum', expected one of"):
        tk.gae(*inputs)


def test_a_fallback_is_logged_once(inputs, caplog, no_extension):
    _op._logged.clear()
    with caplog.at_level(logging.WARNING, "tppo_kernels"):
        tk.gae(*inputs)
        tk.gae(*inputs)
    assert len(caplog.records) == 1
    assert "gae: cpp passed over: no compiled part" in caplog.text
    assert "install a C++ compiler" in caplog.text


def test_everything_works_without_the_compiled_part(inputs, no_extension):
    assert tk.explain("gae", *inputs).backend == "reference"
    assert "no compiled part" in tk.explain("gae", *inputs).refused["cpp"]
    assert "none: no compiled part" in tk.doctor()
    assert tk.doctor().isascii()  # `make demo` prints it, whatever PYTHONIOENCODING says


def test_import_loads_neither_the_extension_nor_triton_nor_transformers():
    """PufferLib#312, DeepSeek-R1#493: import fails without CUDA or Triton."""
    done = run("""
        import sys, torch
        before = set(sys.modules)
        import tppo_kernels
        new = {m.split(".")[0] for m in set(sys.modules) - before}
        assert "tppo_kernels._C" not in sys.modules
        assert not new & {"triton", "transformers", "tppo"}, new
    """)
    assert done.returncode == 0, done.stderr


def test_import_works_where_triton_and_the_extension_are_broken():
    done = run("""
        import sys
        sys.modules["triton"] = sys.modules["tppo_kernels._C"] = None
        import torch, tppo_kernels as tk
        print(tk.gae(torch.ones(1, 2), torch.zeros(1, 2), lam=1.0).advantages.tolist())
    """)
    assert done.stdout.strip() == "[[2.0, 1.0]]", done.stderr


def test_denormals_survive_the_import():
    done = run("""
        import torch, tppo_kernels as tk
        tk.gae(torch.ones(1, 2), torch.zeros(1, 2))
        assert (torch.tensor([1e-40]) * 1).item() > 0 and 1e-320 * 1 > 0
    """)
    assert done.returncode == 0, done.stderr


def test_raw_ops_exist_and_are_functional():
    for name in _op.OPS:
        for raw in (f"{name}_fwd", f"{name}_bwd"):
            if hasattr(torch.ops.tppo_kernels, raw):
                schema = getattr(torch.ops.tppo_kernels, raw).default._schema
                assert not schema.is_mutable
                assert all(r.alias_info is None for r in schema.returns)


class Watch(TorchDispatchMode):
    """Notes what the dispatcher is asked for."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_mode_sees_the_raw_op_that_a_plain_call_goes_past(inputs):
    plain = tk.gae(*inputs)
    with Watch() as watch:
        watched = tk.gae(*inputs)
    assert "tppo_kernels.gae_fwd.default" in watch.seen
    assert torch.equal(plain.advantages, watched.advantages)


def test_fake_tensors_stay_fake_and_leave_no_constant_behind(inputs):
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert isinstance(tk.gae(*inputs, gamma=0.123).advantages, FakeTensor)
    assert 0.123 not in _eager._CONSTANTS
    assert type(tk.gae(*inputs, gamma=0.123).advantages) is torch.Tensor


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_subclass_and_a_trace_go_through_the_dispatcher(inputs):
    class Mine(torch.Tensor):
        pass

    args = (*inputs, None)
    assert _eager.plain_device(args) == "cpu"
    assert _eager.plain_device((inputs[0].as_subclass(Mine), inputs[1])) is None
    assert _eager.plain_device((torch.nn.Parameter(inputs[0]), None, 1, "x")) == "cpu"
    traced = torch.jit.trace(lambda r, v: tuple(tk.gae(r, v)), inputs)
    assert "tppo_kernels::gae_fwd" in str(traced.graph)


def test_a_constant_first_met_in_inference_mode_can_be_saved_later():
    logits, targets = torch.randn(2, 5, requires_grad=True), torch.tensor([0, 1])
    with torch.inference_mode():
        tk.token_logprobs(logits.detach().clone(), targets, temperature=0.4567)
    tk.token_logprobs(logits, targets, temperature=0.4567).logprobs.sum().backward()
    assert logits.grad.abs().sum() > 0


def test_a_plain_call_records_nothing_for_inputs_that_want_gradients(inputs):
    rewards, values = (x.requires_grad_() for x in inputs)
    with tk.use_backend("reference"):
        assert not tk.gae(rewards, values).advantages.requires_grad
    assert torch.is_grad_enabled()
    with pytest.raises(ValueError, match="gamma holds|lam holds"):
        tk.gae(rewards, values, lam=torch.tensor(2.0))
    assert torch.is_grad_enabled()


class Inner(NamedTuple):
    """Arguments that two ops could share."""

    scale: torch.Tensor
    name: str


class Outer(NamedTuple):
    """A record with another one in its middle."""

    x: torch.Tensor
    inner: Inner
    mask: torch.Tensor | None


@pytest.fixture
def scaled():
    """A raw op whose record holds another; its name is free again afterwards."""
    def reference(call):
        assert isinstance(call, Outer) and isinstance(call.inner, Inner)
        assert call.inner.name == "a name"
        return call.x * call.inner.scale

    op = _op.Op("test_scaled")
    yield op.define("test_scaled_fwd -> Tensor", reference,
                    lambda call: torch.empty_like(call.x), record=Outer)
    del _op.OPS["test_scaled"]


def test_a_record_within_a_record_is_flattened_and_built_again(scaled):
    call = Outer(torch.ones(3), Inner(torch.tensor(2.0), "a name"), None)
    assert _record.schema(Outer) == "Tensor x, Tensor scale, str name, Tensor? mask"
    assert _record.flat(call) == (call.x, call.inner.scale, "a name", None)
    assert _record.build(Outer, iter(_record.flat(call))) == call
    assert scaled(call).tolist() == [2.0] * 3  # past the dispatcher
    with Watch() as watch:
        assert scaled(call).tolist() == [2.0] * 3
    assert "tppo_kernels.test_scaled_fwd.default" in watch.seen
    compiled = torch.compile(lambda x: scaled(call._replace(x=x)), fullgraph=True)
    assert compiled(torch.ones(5)).tolist() == [2.0] * 5
    torch.library.opcheck(torch.ops.tppo_kernels.test_scaled_fwd.default, _record.flat(call))


def test_a_record_that_a_schema_cannot_hold_is_refused():
    class Twice(NamedTuple):
        scale: torch.Tensor
        inner: Inner

    with pytest.raises(TypeError, match="Twice has scale in two places, expected one"):
        _record.schema(Twice)
    with pytest.raises(TypeError, match="Odd: x is .*dict.*, expected a record, or one of Tensor"):
        _record.schema(NamedTuple("Odd", [("x", dict)]))


def attention(q):
    layout = tk.PrefixLayout.from_lengths([2], [[1, 2]])
    return tk.prefix_attention(q, q.detach(), q.detach(), layout)


SECOND = {
    "token_logprobs": ((2, 3, 5), lambda x: tk.token_logprobs(x, torch.ones(2, 3).long()).entropy),
    "token_head": ((2, 3, 5), lambda x: tk.token_head(x, torch.ones(1, 5, requires_grad=True))),
    "token_reward_loss": ((2, 3, 3), lambda x: tk.token_reward_loss(
        x, torch.ones(2, 3).long(), sentence_labels=torch.ones(2), seed=0).loss),
    "prefix_attention": ((2, 5, 8), attention),
}


@pytest.mark.parametrize("op", SECOND)
def test_a_derivative_that_is_not_computed_is_refused(op):
    """A second one, or forward mode: 0 would be taken for the truth. The losses: in their files."""
    shape, call = SECOND[op]
    leaf = torch.randn(shape, requires_grad=True)
    gradient, = torch.autograd.grad(call(leaf).sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(gradient.square().sum() + leaf.sum(), leaf)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="jvp"):
        call(forward_ad.make_dual(leaf.detach(), torch.ones(shape)))
