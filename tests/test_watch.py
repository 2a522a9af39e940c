"""TPPO_CHECK=1 names the operator, the place and the input behind the first value not finite."""

import importlib
import re
import subprocess
import sys

import pytest
import torch
from test_hops import CPU, GRADIENTS, call_of, tensors

import tppo_kernels as tk
from tppo_kernels._core import op as _op
from tppo_kernels._core.op import OPS

NAN, INF = float("nan"), float("inf")


@pytest.fixture
def watching(monkeypatch):
    monkeypatch.setenv("TPPO_CHECK", "1")


def differentiated(name, options=None):
    """The results of the operator on its sample inputs, and the gradient of the first of them."""
    function, args, given = call_of(name)
    if name in GRADIENTS:
        args[0] = args[0].requires_grad_()
    result = function(*args, **{**given, **(options or {})})
    if name in GRADIENTS:
        sum(x.sum() for x in tensors(result) if x.requires_grad).backward()
    return [*tensors(result), *([args[0].grad] if name in GRADIENTS else [])]


@pytest.mark.parametrize("name, backend", CPU)
def test_a_healthy_call_is_the_same_to_the_bit(name, backend, monkeypatch):
    with tk.use_backend(backend):
        plain = differentiated(name)
        monkeypatch.setenv("TPPO_CHECK", "1")
        watched = differentiated(name)
    assert all(map(torch.equal, plain, watched))


@pytest.mark.parametrize("name", sorted(OPS))
def test_every_raw_op_names_its_outputs(name):
    """One without a name is not watched; the first output of each is what the public call gives."""
    for raw in ("fwd", "bwd", "stats", "frozen", "whiten"):
        op = getattr(torch.ops.tppo_kernels, f"{name}_{raw}", None)
        if op is not None and f"{name}_{raw}" != "entropy_fwd":  # whose first output is nothing
            assert op.default._schema.returns[0].name, (name, raw)


# An input of each operator that reaches its results, as the public function calls it, or the
# record: (operator, position or keyword, index, name in the message).
SPOILT = [
    ("entropy", 0, (1, 2, 5), "logits"), ("gae", 0, (1, 2), "rewards"),
    ("gae", "bootstrap", (1,), "bootstrap"), ("kl", 1, (1, 2), "ref_logprobs"),
    ("linear_logprobs", 0, (1, 2, 3), "hidden"), ("linear_logprobs", 1, (4, 3), "weight"),
    ("linear_ppo_loss", 4, (1, 2), "advantages"), ("ppo_loss", 2, (1, 2), "advantages"),
    ("place_rewards", "terminal", (1,), "terminal"),
    ("prefix_attention", 0, (0, 1, 4, 3), "q"), ("prefix_attention", 2, (0, 1, 4, 3), "v"),
    ("reduce", 0, (1, 2), "x"),
    ("response_states", 0, (1, 4, 2), "full"), ("token_advantages", 1, (1, 2), "values"),
    ("token_head", 0, (1, 2, 3), "hidden"), ("token_logprobs", 0, (1, 2, 5), "logits"),
    ("token_reward_loss", 0, (1, 2, 1), "logits"), ("token_rewards", 0, (1, 2, 1), "class_logits"),
    ("value_loss", 1, (1, 2), "returns"), ("whiten", 0, (1, 2), "x"),
]  # fmt: skip


def test_the_cases_name_every_operator():
    assert {case[0] for case in SPOILT} == set(OPS)


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("name, which, index, said", SPOILT)
def test_an_input_that_is_not_finite_is_named_with_its_place(
        name, which, index, said, value, watching):
    function, args, options = call_of(name)
    if options.get("softcap"):  # which makes a finite logit of an infinite one
        del options["softcap"]
    given = args if isinstance(which, int) else options
    for x in (*args, *options.values()):  # valid everywhere, so that the value is read
        if isinstance(x, torch.Tensor) and x.dtype == torch.bool:
            x.fill_(True)
    given[which] = given[which].clone()
    given[which][index] = value
    if name == "kl" and value == INF:  # its distance is clamped: the result is a number
        assert function(*args, **options).isfinite().all()
        return
    with pytest.raises(FloatingPointError) as caught:
        function(*args, **options)
    place = (f"at row {index[0]}, column {index[1]}" if len(index) == 2 else
             f"at {', '.join(map(str, index))}")
    if name == "prefix_attention":  # which reads them without the first dimension
        place = "at 1, 4, 3"
    assert re.match(rf"{name}: \w+ is (nan|-?inf).* on backend \w+\. Its input {said} is {value} "
                    rf"{place} ", str(caught.value)), caught.value
    assert f"look at what made {said}" in str(caught.value)


@pytest.mark.parametrize("name", ["gae", "ppo_loss", "token_logprobs", "whiten"])
def test_what_stands_in_a_masked_slot_is_no_fault(name, watching):
    function, args, options = call_of(name)
    mask = next(x for x in args if isinstance(x, torch.Tensor) and x.dtype == torch.bool)
    args[0] = args[0].clone()
    args[0][~mask] = NAN
    assert all(x.isfinite().all() for x in tensors(function(*args, **options)))


def test_an_infinite_clip_is_no_fault(watching):
    function, args, options = call_of("value_loss")
    assert function(*args, **{**options, "clip": INF}).loss.isfinite()


def test_a_gradient_that_comes_in_spoilt_is_named(watching):
    function, args, options = call_of("token_logprobs")
    result = function(args[0].requires_grad_(), *args[1:], **options).logprobs
    slope = torch.ones_like(result)
    row, column = args[2].nonzero()[0].tolist()
    slope[row, column] = INF
    with pytest.raises(FloatingPointError, match=(
            r"the backward of token_logprobs: dlogits is -?(inf|nan) at .* Its input grad_logprobs "
            rf"is inf at row {row}, column {column} ")):
        result.backward(slope)


def test_an_overflow_is_told_from_a_fault_of_a_backend(watching, monkeypatch):
    """The first is in the numbers, the second in the code: another remedy for each."""
    function, args, options = call_of("gae")
    big = args[0].clone()
    big[:] = 3e38
    with pytest.raises(FloatingPointError, match=(
            r"gae: advantages is -?inf at row .* Every input is finite at its valid slots; the "
            r"largest number is 3e\+38 in rewards\. The reference gives no finite number there")):
        function(big, *args[1:], **options)
    with tk.use_backend("reference"), pytest.raises(FloatingPointError, match=(
            "on backend reference.* This is what the formula gives in float32: smaller numbers")):
        function(big, *args[1:], **options)

    backend = tk.explain("gae", *args, **options).backend
    if backend == "reference":
        pytest.skip("there is no other backend here")
    module = importlib.import_module(f"tppo_kernels.ops.gae._{backend}")
    real = module.fwd

    def broken(call):
        results = real(call)
        results[1][2, 3] = NAN
        return results

    monkeypatch.setattr(module, "fwd", broken)
    with pytest.raises(FloatingPointError, match=(
            rf"gae: returns is nan at row 2, column 3 \(1 of \d+ values are not finite\), on "
            rf"backend {backend}\. Every input is finite.* The reference gives -?[\d.]+ there: "
            rf"backend {backend} is at fault\. TPPO_BACKEND=reference goes on without it")):
        function(*args, **options)


def test_a_compiled_call_is_watched_as_well(watching):
    """What the dispatcher runs takes the same way; the compiled code is the one made without it."""
    function, args, options = call_of("ppo_loss")
    compiled = torch.compile(lambda a: function(args[0], args[1], a, *args[3:], **options).loss,
                             backend="aot_eager", fullgraph=True)
    assert compiled(args[2]).isfinite()
    with pytest.raises(FloatingPointError, match="ppo_loss: loss is nan.*Its input advantages"):
        compiled(args[2] * NAN)


def test_without_the_variable_nothing_looks_and_nothing_is_loaded():
    code = ("import sys, torch, tppo_kernels as tk; x = torch.full((2, 3), float('nan'))\n"
            "assert tk.gae(x, x).advantages.isnan().all()\n"
            "assert 'tppo_kernels._core.watch' not in sys.modules")
    subprocess.run([sys.executable, "-c", code], check=True, timeout=600)


def test_without_the_variable_a_call_costs_one_look_into_the_environment(monkeypatch):
    """No value is read; in processor time `test_host_cost.py` holds the whole call."""
    monkeypatch.delenv("TPPO_CHECK", raising=False)
    asked = []
    monkeypatch.setattr(_op, "variable", lambda name: asked.append(name))
    function, args, options = call_of("gae")
    function(*args, **options)
    assert asked == ["TPPO_CHECK"]
