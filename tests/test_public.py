"""What every public operator does alike: masks, keywords, ranges, metrics, the forced backend."""

import asyncio
import importlib
import inspect
import json
import threading
import warnings
from math import inf

import numpy
import pytest
import torch

import tppo_kernels as tk
from tppo_kernels import __main__ as doctor
from tppo_kernels._core.backends import forced
from tppo_kernels._core.keywords import near
from tppo_kernels._core.op import OPS, missing

MASKED = sorted(OPS.keys() - {"prefix_attention"})
WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16,
         torch.uint32, torch.uint64)
LAYOUTS = ("padded", "packed")


def sample(op, layout="padded"):
    """The arguments by name of a small call; packed: three sequences of 17 tokens in one row."""
    args, kwargs = importlib.import_module(f"tppo_kernels.ops.{op}").sample_inputs()
    given = dict(zip(inspect.signature(getattr(tk, op)).parameters, args, strict=False)) | kwargs
    if layout == "packed":
        given = {name: x.flatten(0, 1) if isinstance(x, torch.Tensor) and x.shape[:2] == (3, 17)
                 else x for name, x in given.items()}
        if "cu_seqlens" in inspect.signature(getattr(tk, op)).parameters:
            given["cu_seqlens"] = torch.tensor([0, 17, 34, 51], dtype=torch.int32)
    return given


def leaves(result):
    if isinstance(result, torch.Tensor):
        return [result]
    return [x for part in result for x in leaves(part)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", MASKED)
def test_a_mask_of_whole_numbers_is_that_of_bools(op, layout):
    given = sample(op, layout)
    expected = leaves(getattr(tk, op)(**given))
    names = [name for name in ("mask", "train_mask") if name in given]
    if op == "token_advantages":
        given["train_mask"] = given["mask"]
        names.append("train_mask")
    assert names
    for dtype in WHOLE:
        for nonzero in (1, -3 if dtype.is_signed else 200):
            masks = {n: torch.where(given[n], nonzero, 0).to(dtype) for n in names}
            actual = leaves(getattr(tk, op)(**given | masks))
            for a, e in zip(actual, expected, strict=True):
                assert torch.equal(a, e), (dtype, nonzero)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64,
                                   torch.float8_e5m2])
@pytest.mark.parametrize("op", MASKED)
def test_a_mask_of_floats_is_refused_with_both_ways_out(op, dtype):
    """A mask of 0.5 taken as bool doubled a loss, silently."""
    names = ["mask"] + ["train_mask"] * (op == "token_advantages")
    for name in names:
        for layout in LAYOUTS:
            given = sample(op, layout)
            given[name] = (given["mask"] / 2).to(dtype)
            with pytest.raises(TypeError, match=f"{op}: {name} has dtype .*float.*, expected bool "
                               rf"or whole numbers .*: give {name}\.bool\(\).*weights= of ppo"):
                getattr(tk, op)(**given)


def test_valid_rows_takes_the_same_masks():
    mask = torch.tensor([[True, False], [True, True]])
    assert tk.valid_rows(2 * mask.int()).tolist() == tk.valid_rows(mask).tolist() == [0, 2, 3]
    with pytest.raises(TypeError, match=r"valid_rows: mask has dtype float32.*mask\.bool\(\)"):
        tk.valid_rows(mask.float())
    with pytest.raises(TypeError, match="valid_rows: mask is NoneType None, expected a tensor"):
        tk.valid_rows(None)
    with pytest.raises(TypeError, match="gae: mask has dtype complex64, expected bool, int64"):
        tk.gae(mask.float(), mask.float(), mask.to(torch.complex64))


def test_a_response_counts_up_to_and_including_its_first_end():
    tokens = torch.tensor([
        [5, 2, 0, 0],  # an end, then padding
        [5, 6, 7, 8],  # cut at the greatest length: no end
        [5, 3, 2, 3],  # another id ends it too, and a further end counts for nothing
        [2, 5, 5, 5]])  # it says nothing
    T, F = True, False
    expected = [[T, T, F, F], [T] * 4, [T, T, F, F], [T, F, F, F]]
    for ends in ([2, 3], (3, 2), torch.tensor([2, 3]), {2: "", 3: ""}):
        assert tk.response_mask(tokens, ends).tolist() == expected
    assert tk.response_mask(tokens, 2).tolist() == [*expected[:2], [T, T, T, F], expected[3]]
    assert tk.response_mask(tokens.int(), torch.tensor(2)).tolist()[2] == [T, T, T, F]
    assert tk.response_mask(tokens[0], 2).tolist() == expected[0]  # [T]
    assert tk.response_mask(tokens[:, :0], 2).shape == (4, 0)
    padded = torch.tensor([[4, 2, 2, 2], [4, 4, 4, 4]])  # EOS fills the batch, as GPT-2's does
    assert tk.response_mask(padded, 2).sum(1).tolist() == [2, 4]
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: tk.response_mask(x, [2, 3]), fullgraph=True, backend="eager")
    assert compiled(tokens).tolist() == expected


@pytest.mark.parametrize("eos_id, error, message", [
    (None, TypeError, "eos_id is NoneType None, expected a whole number"),
    ("</s>", TypeError, "eos_id is str '</s>', expected a whole number"),
    ([2, -1], ValueError, r"eos_id\[1\] is -1, expected a number >= 0"),
    ([2, 2**63], ValueError, r"eos_id\[1\] is 9223372036854775808, expected .* <= 9.22337e\+18"),
    ([], ValueError, "eos_id is empty, expected one or more token ids"),
    (torch.ones(1, 2).long(), ValueError, r"eos_id has shape \[1, 2\]"),
    (torch.ones(2), TypeError, "eos_id has dtype float32, expected int64, int32")])
def test_what_ends_a_response_is_one_id_or_several(eos_id, error, message):
    with pytest.raises(error, match=f"response_mask: {message}"):
        tk.response_mask(torch.ones(2, 3).long(), eos_id)


def test_masks_of_whole_numbers_compile_whole():
    logprobs, old, advantages = (torch.randn(3, 5) for _ in range(3))
    mask = torch.tensor([[2, 1, 0, 0, 1]]).expand(3, 5)

    def step(logprobs, mask, column):
        loss = tk.ppo_loss(logprobs, old, column, mask, weights=column.abs()).loss
        return loss, tk.gae(old, advantages, mask).returns, tk.whiten(old, mask)

    torch._dynamo.reset()
    given = (logprobs, mask, advantages[:, :1])
    compiled = torch.compile(step, fullgraph=True, backend="eager")(*given)
    for a, e in zip(compiled, step(*given), strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=0)


def calls_of_the_losses():
    """(name, call of (advantages, weights, packed)) of both losses, B = 3 and T = 4 or N = 3."""
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(3, 4, 6, generator=g), torch.randn(9, 6, generator=g)
    old, targets = -torch.rand(3, 4, generator=g), torch.randint(9, (3, 4), generator=g)
    mask = torch.tensor([[True] * 4, [True, False] * 2, [False] * 4])
    cu = {"cu_seqlens": torch.tensor([0, 0, 2, 3], dtype=torch.int32)}

    def ppo(advantages, weights, packed=False):
        x = (old - 0.1, old, mask) if not packed else (old[0, :3] - 0.1, old[0, :3], mask[0, :3])
        return tk.ppo_loss(x[0], x[1], advantages, x[2], weights=weights, **cu if packed else {})

    def linear(advantages, weights, packed=False):
        x = [hidden, targets, old, mask]
        x = [y[0, :3] for y in x] if packed else x
        return tk.linear_ppo_loss(x[0], weight, x[1], x[2], advantages, x[3], weights=weights,
                                  **cu if packed else {})

    return [("ppo_loss", ppo), ("linear_ppo_loss", linear)]


@pytest.mark.parametrize("name, call", calls_of_the_losses(), ids=lambda x: str(x)[:15])
def test_a_column_is_a_value_a_sequence(name, call):
    """Three sequences of 0, 2 and 1 tokens in three rows: [B] would be taken for [N] there."""
    a, w = torch.tensor([0.3, -2.0, 1.5]), torch.tensor([1.0, 0.5, 0.0])
    assert torch.equal(call(a[:, None], w[:, None]).loss, call(a, w).loss)
    every = (a[:, None].expand(3, 4), w[:, None].expand(3, 4))
    assert torch.equal(call(a, w).loss, call(*every).loss)
    by_token = call(a[[1, 1, 2]], w[[1, 1, 2]], True).loss
    assert torch.equal(call(a[:, None], w[:, None], True).loss, by_token)
    assert not torch.equal(call(a, w, True).loss, by_token)
    with pytest.raises(ValueError, match=rf"{name}: advantages has shape \[2, 1\], expected"):
        call(a[:2, None], w)
    with pytest.raises(TypeError, match=f"{name}: advantages is NoneType None"):
        call(None, w)


def broadcast(given):
    """(name, the argument with its first number along one size, expanded: stride 0 there)."""
    for name, x in given.items():
        if torch.is_tensor(x) and x.dim() and name != "cu_seqlens":
            yield from ((name, x.narrow(d, 0, 1).expand(x.shape)) for d in range(x.dim()))


@pytest.mark.parametrize("op, layout, backend", [
    (op, layout, backend) for op in sorted(OPS) for layout in LAYOUTS
    for backend in OPS[op].order["cpu"] if backend in ("cpp", "reference")
    and not missing(backend) and (op, layout) != ("prefix_attention", "packed")])
def test_a_broadcast_argument_is_its_own_copy(op, layout, backend):
    """`x.expand` has stride 0: every result and gradient is that of a dense argument."""
    given = {name: x.float() if torch.is_tensor(x) and x.is_floating_point() else x
             for name, x in sample(op, layout).items()}
    if op == "place_rewards":
        given["terminal"] = None  # it cannot be paid to a sequence without an action token
    seen = 0
    with tk.use_backend(backend):
        for name, x in broadcast(given):
            results = [leaves(getattr(tk, op)(**given | {name: y})) for y in (x, x.contiguous())]
            for a, e in zip(*results, strict=True):
                torch.testing.assert_close(a, e, rtol=1e-6, atol=1e-6, equal_nan=True)
            for trained in TRAINED.get(op, ()):
                if trained in given and trained != name:
                    pair = [gradients(op, given | {name: y}, [trained])[trained]
                            for y in (x, x.contiguous())]
                    torch.testing.assert_close(*pair, rtol=1e-6, atol=1e-6)
            seen += 1
    assert seen


@pytest.mark.parametrize("op", [*sorted(OPS), "valid_rows", "response_mask"])
def test_an_unknown_keyword_is_answered_with_what_was_meant(op):
    function = getattr(tk, op)
    names = list(inspect.signature(function).parameters)
    for name in names:
        if len(name) < 3 or name + "s" in names:
            continue
        with pytest.raises(TypeError, match=rf"^{op}: unknown keyword {name}s, did you mean "
                           rf"([a-z_]+, )*{name}[,?]"):
            function(**{name + "s": 1})
    with pytest.raises(TypeError, match=f"{op}: unknown keyword zzz, expected one of {names[0]}"):
        function(zzz=1)


def test_names_of_other_libraries_find_their_own():
    names = list(inspect.signature(tk.ppo_loss).parameters)
    with pytest.raises(TypeError, match=r"clip, did you mean clip_low, clip_high\?$"):
        tk.ppo_loss(torch.zeros(1, 1), torch.zeros(1, 1), torch.zeros(1, 1), clip=0.2)
    assert near("cliprange", names) == ["clip_low", "clip_high"]
    assert near("response_mask", names) == near("attention_mask", names) == ["mask"]
    assert near("log_probs", names)[0] == "logprobs"
    assert near("temp", ["targets", "temperature"]) == ["temperature"]
    assert near("lambda_", ["gamma", "lam", "value_lam"]) == ["lam"]
    assert near("gae_lambda", ["gamma", "lam", "value_lam"]) == ["lam"]
    assert "softcap" in near("logit_softcapping", ["logits", "softcap", "logit_scale"])
    assert near("clip_ratio", names)[:2] == ["clip_low", "clip_high"]


def test_the_names_of_the_three_masks_find_the_mask():
    """`value_mask` was answered with `values`, `action_mask` with `on_masked`."""
    for op, word in (("value_loss", "value_mask"), ("place_rewards", "action_mask"),
                     ("gae", "action_mask"), ("ppo_loss", "train_mask"),
                     ("ppo_loss", "sequence_mask"), ("whiten", "train_mask"),
                     ("token_advantages", "action_mask"), ("linear_ppo_loss", "train_mask")):
        with pytest.raises(TypeError, match=f"unknown keyword {word}, did you mean mask[,?]"):
            getattr(tk, op)(**{word: None})


FINITE = {"token_logprobs": ("temperature", "softcap", "logit_scale"),
          "linear_logprobs": ("temperature", "softcap", "logit_scale"),
          "linear_ppo_loss": ("temperature", "softcap", "logit_scale", "kl_coef", "entropy_coef"),
          "ppo_loss": ("kl_coef", "entropy_coef"), "gae": ("gamma",), "whiten": ("eps",),
          "token_advantages": ("gamma", "kl_coef"), "prefix_attention": ("scale",)}
OFF = {"ppo_loss": ("clip_low", "clip_high", "dual_clip", "max_log_ratio"),
       "linear_ppo_loss": ("clip_low", "clip_high", "dual_clip", "max_log_ratio"),
       "value_loss": ("clip",), "token_reward_loss": ("balance",)}


@pytest.mark.parametrize("op, name", [(op, name) for op in FINITE for name in FINITE[op]])
def test_infinity_is_refused_where_it_means_nothing(op, name):
    """temperature=inf gave the uniform distribution, softcap=inf NaN."""
    for value in (inf, -inf, float("nan")):
        with pytest.raises(ValueError, match=rf"{op}: {name} is -?(inf|nan), expected a .*finite"):
            getattr(tk, op)(**sample(op) | {name: value})
        if op != "prefix_attention":
            with pytest.raises(ValueError, match=f"{op}: {name} holds -?(inf|nan), expected"):
                getattr(tk, op)(**sample(op) | {name: torch.tensor(value)})
    if name == "temperature":
        given = sample(op)
        every = torch.where(given["mask"], 1.0, inf).double()
        getattr(tk, op)(**given | {name: every})  # a masked token's is not looked at
        with pytest.raises(ValueError, match="temperature holds inf"):
            getattr(tk, op)(**given | {name: torch.full_like(every, inf)})


@pytest.mark.parametrize("op, name", [(op, name) for op in OFF for name in OFF[op]])
def test_an_infinite_bound_is_off(op, name):
    result = getattr(tk, op)(**sample(op) | {name: inf})
    assert result.loss.isfinite()
    beyond = getattr(tk, op)(**sample(op) | {name: 1e6})
    torch.testing.assert_close(result.loss, beyond.loss)


@pytest.mark.parametrize("number", [numpy.float32, numpy.float16, numpy.int64, numpy.uint8])
def test_a_number_of_numpy_is_a_number(number):
    """`mask.sum()` of an array, and what a schedule gives; refused as no number until now."""
    given = sample("ppo_loss")
    for name in ("clip_low", "kl_coef") + ("num_tokens",) * issubclass(number, numpy.integer):
        plain = tk.ppo_loss(**given | {name: number(2).item()})
        assert torch.equal(tk.ppo_loss(**given | {name: number(2)}).loss, plain.loss)
    if issubclass(number, numpy.floating):
        with pytest.raises(TypeError, match="num_tokens is .*, expected a whole number"):
            tk.ppo_loss(**given | {"num_tokens": number(2)})
        return
    given = sample("linear_logprobs") | {"valid_vocab": number(37), "memory": number(200)}
    given["hidden"].requires_grad_()
    expected = tk.linear_logprobs(**given | {"valid_vocab": 37, "memory": 200}).logprobs
    for capacity in (None, number(51)):
        actual = tk.linear_logprobs(**given | {"capacity": capacity}).logprobs
        assert torch.equal(actual, expected)
        actual.sum().backward()
    full = torch.randn(2, 9)
    assert torch.equal(tk.response_states(full, number(3), number(4)), full[:, 2:6])


def test_a_number_that_no_float_holds_is_refused_in_a_line():
    x = torch.zeros(1, 1)
    for name in ("num_tokens", "kl_coef"):
        with pytest.raises(ValueError, match=f"ppo_loss: {name} is 10+, expected") as caught:
            tk.ppo_loss(x, x, x, ref_logprobs=x, **{name: 10**400})
        assert len(str(caught.value)) < 200


def test_means_of_the_policy_metrics_are_a_plain_dict_of_floats():
    logprobs = torch.tensor([[0.0, 0.5, -0.5, 30.0]])
    out = tk.ppo_loss(logprobs, torch.zeros(1, 4), torch.tensor([[1.0, 1.0, -1.0, -1.0]]),
                      torch.tensor([[1, 1, 1, 0]]), entropy=torch.tensor([[1.0, 2.0, 3.0, 9.0]]))
    means = json.loads(json.dumps(out.metrics.means()))
    r = torch.tensor([0.0, 0.5, -0.5]).exp()
    assert means == pytest.approx({
        "tokens": 3, "ratio_max": float(r.max()), "clip_fraction": 2 / 3,
        "clip_fraction_low": 1 / 3, "clip_fraction_high": 1 / 3, "clip_fraction_dual": 0,
        "clamped_fraction": 0, "approx_kl_k1": 0, "approx_kl_k3": float((r - 1).mean()),
        "ratio_mean": float(r.mean()), "entropy": 2, "kl": 0}, abs=1e-6)
    clamped = tk.ppo_loss(logprobs, torch.zeros(1, 4), torch.ones(1, 4)).metrics
    assert clamped.means()["clamped_fraction"] == 0.25
    both = clamped.merged(out.metrics).means()
    assert both["tokens"] == 7 and both["clamped_fraction"] == pytest.approx(1 / 7)
    given = sample("linear_ppo_loss")
    assert tk.linear_ppo_loss(**given).metrics.means().keys() == means.keys()


def test_means_of_the_other_metrics():
    values, returns = torch.tensor([[1.0, 2.0, 0.0]]), torch.tensor([[1.0, 4.0, 9.0]])
    critic = tk.value_loss(values, returns, torch.tensor([[1, 1, 0]])).metrics.means()
    assert critic == pytest.approx({
        "tokens": 2, "clip_fraction": 0, "explained_variance": 1 - 1 / 2.25, "return_mean": 2.5,
        "return_std": 1.5, "error_mean": 1, "error_std": 1})
    reward = tk.token_reward_loss(**sample("token_reward_loss")).metrics
    means = reward.means()
    assert json.dumps(means) and means["tokens"] == int(reward.tokens)
    assert [means[f"class_accuracy_{c}"] for c in range(3)] == reward.class_accuracy.tolist()
    assert len(means) == 9 + 3 * 2 and all(type(x) is float for x in means.values())
    stats = tk.token_advantages(**sample("token_advantages")).stats
    assert stats.means() == {name: float(x) for name, x in stats._asdict().items()}


def test_metrics_of_nothing_are_zero():
    empty = torch.zeros(2, 0)
    assert set(tk.ppo_loss(empty, empty, empty).metrics.means().values()) == {0.0}
    assert set(tk.value_loss(empty, empty).metrics.means().values()) == {0.0}


def test_another_thread_does_not_see_a_forced_backend():
    x, seen = torch.randn(2, 5), []
    with tk.use_backend("triton"):
        other = threading.Thread(target=lambda: seen.append((forced(), tk.whiten(x))))
        other.start()
        other.join()
        with pytest.raises(tk.BackendError):
            tk.whiten(x)
    assert seen[0][0] is None and torch.equal(seen[0][1], tk.whiten(x))


def test_another_task_of_the_thread_does_not_see_it_either():
    seen = []

    async def inside(entered, leave):
        with tk.use_backend("reference"):
            entered.set()
            await leave.wait()
            seen.append(forced())

    async def both():
        entered, leave = asyncio.Event(), asyncio.Event()
        task = asyncio.create_task(inside(entered, leave))
        await entered.wait()
        seen.append(forced())
        leave.set()
        await task
        seen.append(forced())

    asyncio.run(both())
    assert seen == [None, "reference", None]


class Nested(torch.autograd.Function):
    """Its backward runs a backward, to a depth at which torch's engine takes a thread of its own,
    as it does for every backward on a GPU."""

    @staticmethod
    def forward(ctx, x, depth, seen):
        ctx.depth, ctx.seen = depth, seen
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        if ctx.depth == 0:
            ctx.seen.append((threading.get_ident(), forced()))
        else:
            with torch.enable_grad():
                x = torch.ones(1, requires_grad=True)
                Nested.apply(x, ctx.depth - 1, ctx.seen).backward()
        return grad, None, None


def test_autograd_takes_a_forced_backend_to_its_threads():
    x, seen = torch.ones(1, requires_grad=True), []
    with tk.use_backend("reference"):
        with tk.use_backend("cpp"):
            Nested.apply(x, 70, seen).backward()
        Nested.apply(x, 70, seen).backward()
    Nested.apply(x, 70, seen).backward()
    threads, backends = zip(*seen, strict=True)
    assert threading.get_ident() not in threads
    assert backends == ("cpp", "reference", None)


def test_a_compiled_call_runs_on_the_backend_that_is_forced_around_it():
    x = torch.randn(2, 5)
    torch._dynamo.reset()
    compiled = torch.compile(tk.whiten, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), tk.whiten(x))
    with tk.use_backend("triton"), pytest.raises(tk.BackendError):
        compiled(x)


def test_a_backend_forced_within_a_compiled_function_is_refused_in_words():
    """Dynamo's message names ContextVar.set; with graph breaks the block runs as it is written."""
    def step(x):
        with tk.use_backend("reference"):
            return tk.whiten(x), forced()

    x = torch.randn(2, 5)
    torch._dynamo.reset()
    with pytest.raises(Exception, match="use_backend: entered within a compiled function.*around"):
        torch.compile(step, fullgraph=True, backend="eager")(x)
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Dynamo, which names every builtin it goes around
        whitened, seen = torch.compile(step, backend="eager")(x)
    assert seen == "reference" and forced() is None
    torch.testing.assert_close(whitened, tk.whiten(x))


def chosen_inside():
    """Calls on rows that the compiled function chooses itself: their number is not known."""
    weight, targets = torch.randn(11, 8), torch.randint(11, (6,))
    old, advantages = -torch.rand(6), torch.randn(6)
    cu = {"cu_seqlens": torch.tensor([0, 2, 4], dtype=torch.int32)}

    def linear(hidden, i, memory):
        return tk.linear_logprobs(hidden[i], weight, targets[i], memory=memory).logprobs.sum()

    def linear_loss(hidden, i, advantages):
        return tk.linear_ppo_loss(hidden[i], weight, targets[i], old[i], advantages, **cu,
                                  ratio="sequence", memory=1 << 20).loss

    return {
        "linear_logprobs auto": lambda h, i: linear(h, i, "auto"),
        "linear_logprobs store": lambda h, i: linear(h, i, "store"),
        "linear_logprobs 99": lambda h, i: linear(h, i, 99),
        "linear_ppo_loss": lambda h, i: linear_loss(h, i, advantages[i]),
        "ppo_loss B": lambda h, i: tk.ppo_loss(h[i, 0], old[i], advantages[:2], **cu).loss,
        "ppo_loss B 1": lambda h, i: tk.ppo_loss(h[i, 0], old[i], advantages[:2, None], **cu).loss,
        "token_logprobs": lambda h, i: tk.token_logprobs(h[i], targets[i] % 8).logprobs.sum(),
        "value_loss": lambda h, i: tk.value_loss(h[i, 0], old[i], **cu).loss,
        "gae": lambda h, i: tk.gae(h[i, 0], old[i], **cu).returns.sum() + h.sum(),
    }


@pytest.mark.parametrize("call", chosen_inside())
def test_rows_chosen_inside_a_compiled_function(call):
    """A data-dependent guard at the default memory, whether so many rows fit; also [B] or [N]."""
    function = chosen_inside()[call]
    hidden = torch.randn(6, 8, requires_grad=True)
    mask = torch.tensor([1, 1, 0, 1, 0, 1]).bool()

    def step(hidden, mask):
        return function(hidden, mask.nonzero()[:, 0])

    torch.manual_seed(0)
    expected = step(hidden, mask)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
        actual = compiled(hidden, mask)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(*(torch.autograd.grad(x, hidden)[0] for x in (actual, expected)))


TRAINED = {
    "entropy": ("logits",),
    "kl": ("logprobs", "ref_logprobs"), "reduce": ("x",),
    "linear_logprobs": ("hidden", "weight"), "linear_ppo_loss": ("hidden", "weight"),
    "ppo_loss": ("logprobs", "entropy"), "prefix_attention": ("q", "k", "v"),
    "response_states": ("full",), "token_head": ("hidden", "weight", "bias"),
    "token_logprobs": ("logits",), "token_reward_loss": ("logits",), "value_loss": ("values",),
}


def gradients(op, given, trained):
    inputs = {name: given[name].detach().clone().requires_grad_() for name in trained}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        outputs = [x for x in leaves(getattr(tk, op)(**given | inputs)) if x.requires_grad]
    assert outputs
    sum((x * torch.linspace(-1, 1, x.numel()).reshape(x.shape)).sum() for x in outputs).backward()
    return {name: x.grad for name, x in inputs.items()}


@pytest.mark.parametrize("op", TRAINED)
def test_what_inference_mode_made_may_stand_beside_what_is_trained(op):
    """A rollout's tensors, one after another: autograd refuses to save them as they are."""
    given = {name: x.float() if torch.is_tensor(x) and x.is_floating_point() else x
             for name, x in sample(op).items()}
    seen = 0
    for name, value in given.items():
        trained = [x for x in TRAINED[op] if x != name]
        with torch.inference_mode():
            if isinstance(value, torch.Tensor):
                made = value.clone()
            elif isinstance(value, float):
                made = torch.tensor(value)
            elif isinstance(value, tk.PrefixLayout):
                made = tk.PrefixLayout.from_lengths(value.prompt_lengths, value.response_lengths)
            else:
                continue
        if not trained:
            continue
        seen += 1
        expected = gradients(op, given, trained)
        for key, grad in gradients(op, given | {name: made}, trained).items():
            torch.testing.assert_close(grad, expected[key], msg=lambda m, n=name: f"{n}: {m}")
    assert seen > (op != "reduce")  # beside whose x there is the mask alone


def test_states_of_a_layout_that_inference_mode_made_are_trained():
    with torch.inference_mode():
        layout = tk.PrefixLayout.from_lengths([2], [[1, 2]])
    hidden = torch.randn(5, 3, requires_grad=True)
    layout.response_states(hidden).sum().backward()
    assert hidden.grad.abs().sum() > 0


def test_the_report_for_programs_says_what_the_text_says(capsys):
    assert doctor.main(["--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["operators"].keys() == OPS.keys() and found["torch"] == torch.__version__
    assert found["operators"]["gae"] == {device: list(OPS["gae"].order[device])
                                         for device in ("cpu", "cuda")}
    assert {test["operator"] for test in found["self_test"]} == OPS.keys()
    assert {test["state"] for test in found["self_test"]} == {"ok"}
    text = tk.doctor()
    for backend, reason in found["missing"].items():
        assert f"({backend}): {reason}" in text
    assert found["why_no_cuda"] is None or found["why_no_cuda"] in text


def test_a_failure_of_the_self_test_is_the_exit_status_of_both_reports(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "_op", type("", (), {
        "OPS": {"gae": OPS["gae"]}, "missing": staticmethod(doctor._op.missing)}))
    monkeypatch.setattr(doctor.testing, "compare", lambda *_: "AssertionError: off by 1")
    assert doctor.main([]) == 1
    said = capsys.readouterr().out
    assert "FAILED: AssertionError: off by 1" in said
    assert said.rstrip().endswith("gae on reference")
    assert doctor.main(["--json"]) == 1
    assert json.loads(capsys.readouterr().out)["self_test"][-1]["state"] == "failed"
