"""`PrefixLayout` and `shared_prefix`: packed groups in models of transformers equal dense runs."""

import contextlib
import copy
from types import SimpleNamespace

import pytest
import torch
from _weights import enlarged
from hypothesis import given, settings
from hypothesis import strategies as st

import tppo_kernels as tk
from tests._matrix import third
from tppo_kernels.models import shared_prefix as _shared_prefix
from tppo_kernels.testing import assert_same_bits

transformers = pytest.importorskip("transformers")
PROMPTS, RESPONSES = [5, 3], [[4, 1, 7], [6]]
ASKED = ("gpt2", "gpt_neox", "llama", "mistral", "qwen2", "qwen3")
SIZES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, vocab_size=64, max_position_embeddings=128, head_dim=8,
             pad_token_id=0, bos_token_id=1, eos_token_id=2, attn_pdrop=0.0, resid_pdrop=0.0,
             embd_pdrop=0.0)


def tiny(family="llama", auto=transformers.AutoModel, **settings):
    """A random model in training mode, with weights large enough for attention to matter.

    `assert_equals_dense` has the control: without the block the packed batch is far off.
    """
    torch.manual_seed(0)
    plain = transformers.AutoConfig.for_model(family)
    known = {k: v for k, v in SIZES.items() if hasattr(plain, k)} | {"pad_token_id": 0}
    known |= {"sliding_window": None} if family == "mistral" else {}
    model = auto.from_config(transformers.AutoConfig.for_model(family, **{**known, **settings}))
    return enlarged(model).train()


def sample(prompts=PROMPTS, responses=RESPONSES, seed=0):
    g = torch.Generator().manual_seed(seed)

    def ids(length):
        return torch.randint(3, 64, (length,), generator=g)

    layout = tk.PrefixLayout.from_lengths(prompts, responses)
    prompt_ids = [ids(p) for p in prompts]
    response_ids = [[ids(r) for r in group] for group in responses]
    pairs = [(p, r) for p, group in zip(prompt_ids, response_ids, strict=True) for r in group]
    return SimpleNamespace(layout=layout, ids=layout.pack(prompt_ids, response_ids), pairs=pairs,
                           projection=torch.randn(*layout.response_mask.shape, 32, generator=g))


def states_of(run, batch):
    """The states before the response tokens, by one packed forward inside a block."""
    with tk.shared_prefix(getattr(run, "model_of", run), batch.layout):
        hidden = run(input_ids=batch.ids, position_ids=batch.layout.position_ids, use_cache=False)
    return batch.layout.response_states(hidden.last_hidden_state[0])


def dense_states(run, batch):
    """The same by one dense forward a response, right-padded with zeros."""
    rows = [run(input_ids=torch.cat([p, r])[None], use_cache=False).last_hidden_state[0, len(p) - 1:
            len(p) + len(r) - 1] for p, r in batch.pairs]
    width = batch.layout.response_mask.shape[1]
    return torch.stack([torch.nn.functional.pad(x, (0, 0, 0, width - len(x))) for x in rows])


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_close(actual, expected, tolerance=1e-5):
    """Relative to the largest value of each tensor."""
    assert actual.keys() == expected.keys()
    for name, exact in expected.items():
        error = (actual[name] - exact).abs().max() / exact.abs().max().clamp(min=1e-9)
        assert error <= tolerance, f"{name} is off by {error:.1e}"


def assert_equals_dense(model, run=None, batch=None):
    """Forward and gradients, for a random projection of the states as loss.

    Control: read without the layout, the same packed batch is wrong. An answer behind another one
    of its prompt sees that one too, or not even the prompt.
    """
    batch, run = batch or sample(), run or model
    expected = dense_states(run, batch)
    expected_gradients = gradients(model, (expected * batch.projection).sum())
    actual = states_of(run, batch)
    actual_gradients = gradients(model, (actual * batch.projection).sum())
    assert_close({"states": actual, **actual_gradients},
                 {"states": expected, **expected_gradients})
    assert any(g.abs().max() > 1e-3 for g in expected_gradients.values())
    with torch.no_grad():
        hidden = run(input_ids=batch.ids, position_ids=batch.layout.position_ids, use_cache=False)
        wrong = batch.layout.response_states(hidden.last_hidden_state[0])
    later = batch.layout.response_mask.clone()
    later[:, 0] = False  # its state is the prompt's
    later[[i == 0 for group in batch.layout.response_lengths for i in range(len(group))]] = False
    apart = ((wrong - expected).abs().amax(-1) / expected.abs().max())[later]
    assert len(apart) and apart.min() > 0.02, apart
    assert_same_bits(dense_states(run, batch).detach(), expected.detach())  # as it was before


REST = sorted(set(_shared_prefix.FAMILIES) - set(ASKED))


@pytest.mark.parametrize("family", [*ASKED, *third(REST, seed=5)])
def test_every_family_equals_dense(family):
    model = tiny(family)
    assert_equals_dense(model)
    dropouts = [m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)]
    assert not any(dropouts)


@pytest.mark.parametrize("implementation", ("sdpa", "eager"))
@pytest.mark.parametrize("kv_heads", (4, 1))
def test_implementations_and_heads(implementation, kv_heads):
    assert_equals_dense(tiny(attn_implementation=implementation, num_key_value_heads=kv_heads))


@pytest.mark.parametrize("family", ("llama", "gpt2"))
@pytest.mark.parametrize("reentrant", (False, True))
def test_checkpointing_with_backward_after_the_block(family, reentrant):
    """The layout is no state: with state, reentrant recomputation outside was wrong by 72 %."""
    model, batch = tiny(family), sample()
    plain = states_of(model, batch)
    expected = gradients(model, (plain * batch.projection).sum())
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    states = states_of(model, batch)
    other = sample([2], [[3, 1]], seed=1)
    with tk.shared_prefix(model, other.layout):  # another layout is in force during backward
        actual = gradients(model, (states * batch.projection).sum())
    assert_same_bits(states.detach(), plain.detach())
    assert_close(actual, expected)


def test_two_layouts_alive_at_once():
    model = tiny()
    one, two = sample(), sample([2, 9], [[3, 2], [1, 8, 5]], seed=1)
    alone = [gradients(model, (states_of(model, b) * b.projection).sum()) for b in (one, two)]
    first, second = states_of(model, one), states_of(model, two)
    both = gradients(model, (second * two.projection).sum() + (first * one.projection).sum())
    assert_close(both, {n: g + alone[1][n] for n, g in alone[0].items()})
    with tk.shared_prefix(model, one.layout):
        inner = states_of(model, two)  # of nested blocks the inner one holds
        outer = model(input_ids=one.ids, use_cache=False).last_hidden_state
    assert_same_bits(inner.detach(), second.detach())
    assert_same_bits(one.layout.response_states(outer[0]).detach(), first.detach())
    before, after = (contextlib.ExitStack() for _ in range(2))
    before.enter_context(tk.shared_prefix(model, one.layout))
    after.enter_context(tk.shared_prefix(model, two.layout))
    before.close()  # not in the order of a stack
    hidden = model(two.ids).last_hidden_state[0]
    assert_same_bits(two.layout.response_states(hidden).detach(), second.detach())
    after.close()
    assert not model._forward_pre_hooks


def test_nothing_remains_behind_the_block():
    model = tiny()
    dense = torch.randint(3, 64, (2, 9))
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0
    before = model(dense, attention_mask=mask).last_hidden_state
    implementation, batch = model.config._attn_implementation, sample()
    with pytest.raises(ZeroDivisionError), tk.shared_prefix(model, batch.layout):
        model(batch.ids)
        1 / 0  # noqa: B018
    assert not model._forward_pre_hooks and model.config._attn_implementation == implementation
    assert_same_bits(model(dense, attention_mask=mask).last_hidden_state, before)
    causal = tiny(auto=transformers.AutoModelForCausalLM).eval()
    options = dict(max_new_tokens=5, do_sample=False, attention_mask=mask)
    generated = causal.generate(dense, **options)
    with tk.shared_prefix(causal, batch.layout):
        causal(batch.ids)
    assert torch.equal(causal.generate(dense, **options), generated)


class LoRA(torch.nn.Module):
    """A linear layer with a trained difference of low rank."""

    def __init__(self, base):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = torch.nn.Parameter(torch.randn(2, base.in_features))
        self.up = torch.nn.Parameter(torch.randn(base.out_features, 2))

    def forward(self, x):
        return self.base(x) + x @ self.down.T @ self.up.T


@pytest.mark.parametrize("reentrant", (None, False, True))
def test_lora_by_hand(reentrant):
    model = tiny().requires_grad_(False)
    for layer in model.layers:
        for name in ("q_proj", "v_proj"):
            setattr(layer.self_attn, name, LoRA(getattr(layer.self_attn, name)))
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
    assert_equals_dense(model)


def test_peft():
    peft = pytest.importorskip("peft")
    causal = tiny(auto=transformers.AutoModelForCausalLM)
    model = peft.get_peft_model(causal, peft.LoraConfig(r=2, init_lora_weights=False,
                                                        target_modules=["q_proj", "v_proj"]))

    def run(**kwargs):
        out = model(output_hidden_states=True, **kwargs)
        return SimpleNamespace(last_hidden_state=out.hidden_states[-1])

    run.model_of = model
    assert_equals_dense(model, run)


def test_heads_and_wrappers():
    """A causal model, a token classifier, a module of the user's that holds a decoder."""
    batch = sample()
    for auto in (transformers.AutoModelForCausalLM, transformers.AutoModelForTokenClassification):
        model = tiny(auto=auto).eval()
        with tk.shared_prefix(model, batch.layout):
            logits = model(batch.ids, position_ids=batch.layout.position_ids).logits
        actual = batch.layout.response_states(logits[0], "reward")
        for i, (p, r) in enumerate(batch.pairs):
            alone = model(torch.cat([p, r])[None]).logits[0, len(p):]
            torch.testing.assert_close(actual[i, :len(r)], alone, rtol=1e-5, atol=1e-5)

    class Critic(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.trunk, self.head = tiny(), torch.nn.Linear(32, 32)

        def forward(self, **kwargs):
            hidden = self.trunk(**kwargs).last_hidden_state
            return SimpleNamespace(last_hidden_state=self.head(hidden))

    assert_equals_dense(Critic())


@pytest.fixture
def process_group():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0,
                                         world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("kind", ("ddp", "fsdp2", "fsdp2 checkpointed"))
def test_distributed_wrappers(process_group, kind):
    from torch.distributed.fsdp import fully_shard

    model, batch = tiny(), sample()
    expected = states_of(model, batch)
    exact = gradients(model, (expected * batch.projection).sum())
    wrapped = torch.nn.parallel.DistributedDataParallel(model) if kind == "ddp" else model
    if kind != "ddp":
        if kind != "fsdp2":
            model.gradient_checkpointing_enable({"use_reentrant": True})
        for layer in model.layers:
            fully_shard(layer)
        fully_shard(model)
    states = states_of(wrapped, batch)
    assert_same_bits(states.detach(), expected.detach())
    actual = gradients(model, (states * batch.projection).sum())
    assert_close({n: getattr(g, "full_tensor", lambda g=g: g)() for n, g in actual.items()}, exact)


def test_compiled_and_embedded_and_bf16():
    model, batch = tiny(), sample()
    expected = states_of(model, batch)
    with tk.shared_prefix(model, batch.layout):
        output = model(inputs_embeds=model.embed_tokens(batch.ids))
    embedded = output.last_hidden_state
    assert output.past_key_values is None  # nothing can be continued from a packed batch
    assert_same_bits(batch.layout.response_states(embedded[0]).detach(), expected.detach())
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")

    def run(**kwargs):
        return compiled(**kwargs)

    run.model_of = model
    torch.testing.assert_close(states_of(run, batch), expected, rtol=1e-5, atol=1e-5)
    low = states_of(model.bfloat16(), batch)
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), expected, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("family", ("llama", "gpt2", "qwen3"))
def test_bf16_is_as_near_to_fp64_as_dense_bf16(family):
    """At most twice as far, by the largest error: of the states, and of the worst gradient."""
    low, batch = tiny(family).bfloat16(), sample([40, 23], [[17, 30, 9, 12], [25, 8, 31]], seed=1)
    exact = copy.deepcopy(low).double()

    def run(model, states_by):
        states = states_by(model, batch)
        return {"states": states.detach().double(),
                **gradients(model, (states * batch.projection.to(states.dtype)).sum())}

    def errors(actual):
        by_name = {n: (actual[n].double() - e).abs().max() / e.abs().max()
                   for n, e in truth.items() if e.abs().max() > 1e-6}
        return by_name.pop("states"), max(by_name.values())

    truth = run(exact, dense_states)
    dense, shared = errors(run(low, dense_states)), errors(run(low, states_of))
    assert all(0 < s <= 2 * d for s, d in zip(shared, dense, strict=True)), (shared, dense)


REFUSED = {
    "sliding window of 7": ("mistral", dict(sliding_window=7)),
    "layers of type sliding_attention": ("qwen2", dict(use_sliding_window=True, sliding_window=4,
                                                       max_window_layers=1)),
    "caps its scores at 30": ("llama", dict(attn_logit_softcapping=30.0)),
    "biases its scores by distance": ("bloom", {}),
    "layers of type linear_attention": ("qwen3_next", {}),
    r"rotary embedding \(dynamic\)": ("llama", dict(rope_parameters=dict(
        rope_type="dynamic", factor=2.0, rope_theta=1e4))),
    "cross_attention|decoder alone": ("gpt2", dict(add_cross_attention=True)),
    "reorder_and_upcast_attn": ("gpt2", dict(reorder_and_upcast_attn=True)),
    "of the type 'opt', expected one that is tested": ("opt", {}),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_models_that_are_not_exact_are_refused_with_the_reason(reason):
    family, settings = REFUSED[reason]
    model = tiny(family, **settings)
    with pytest.raises(ValueError, match=reason), tk.shared_prefix(model, sample().layout):
        pass


def test_gemma2_is_refused():
    for name in ("gemma2", "gemma3_text"):
        model = tiny(name)
        with pytest.raises(ValueError, match="sliding"), tk.shared_prefix(model, sample().layout):
            pass


def test_attention_dropout_is_refused_in_training_alone():
    model, batch = tiny(attention_dropout=0.1), sample()
    with pytest.raises(ValueError, match="attention dropout is 0.1 in training"):
        states_of(model, batch)
    model.eval()
    assert_equals_dense(model)


def test_wrong_batches_are_refused():
    model, batch = tiny(), sample()
    layout, ids = batch.layout, batch.ids
    wrong = {
        r"input_ids is a tensor of shape \[2, 26\].*expected \[1, L\] with L = 26":
            dict(input_ids=ids.expand(2, -1)),
        "expected .*L = 26": dict(input_ids=ids[:, 1:]),
        "attention_mask is": dict(input_ids=ids, attention_mask=torch.ones_like(ids)),
        "past_key_values is": dict(input_ids=ids, past_key_values=transformers.DynamicCache()),
        "use_cache is True": dict(input_ids=ids, use_cache=True),
        "position_ids is": dict(input_ids=ids, position_ids=torch.arange(26)[None]),
        "inputs_embeds is NoneType": {},
    }
    for message, kwargs in wrong.items():
        with tk.shared_prefix(model, layout), pytest.raises(ValueError, match=message):
            model(**kwargs)
    with pytest.raises(TypeError, match="layout is list"), tk.shared_prefix(model, [1]):
        pass
    with pytest.raises(TypeError, match="model is str"), tk.shared_prefix("llama", layout):
        pass
    for module in (torch.nn.Linear(2, 2), torch.nn.ModuleList([tiny(), tiny()])):
        with pytest.raises(ValueError, match="holds [02] transformers decoders"):
            with tk.shared_prefix(module, layout):
                pass


def test_an_attention_that_misses_the_layout_fails_loudly():
    """Not silently: the responses would see each other."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    model, batch = tiny(), sample()
    states_of(model, batch)
    ours = AttentionInterface._global_mapping["sdpa"]
    with tk.shared_prefix(model, batch.layout):
        AttentionInterface.register("sdpa", sdpa_attention_forward)
        try:
            with pytest.raises(RuntimeError):
                model(batch.ids)
        finally:
            AttentionInterface.register("sdpa", ours)
    states_of(model, batch)


def test_layout_by_hand():
    layout = tk.PrefixLayout.from_lengths([2, 1], [[1, 3], [2]])
    assert layout.position_ids.tolist() == [[0, 1, 2, 2, 3, 4, 0, 1, 2]]
    assert layout.response_mask.tolist() == [[True, False, False], [True] * 3, [True, True, False]]
    assert (layout.n_groups, layout.n_responses, layout.n_tokens) == (2, 3, 9)
    packed = layout.pack([[10, 11], [20]], [[[12], [13, 14, 15]], [[21, 22]]])
    assert packed.tolist() == [[10, 11, 12, 13, 14, 15, 20, 21, 22]]
    assert packed.dtype == layout.position_ids.dtype == torch.int64
    states = {a: layout.response_states(packed[0], a).tolist()
              for a in ("logprob", "value", "reward", "bootstrap")}
    assert states["logprob"] == states["value"] == [[11, 0, 0], [11, 13, 14], [20, 21, 0]]
    assert states["reward"] == [[12, 0, 0], [13, 14, 15], [21, 22, 0]]
    assert states["bootstrap"] == [12, 15, 22]
    assert "2 prompts, 3 responses, 9 tokens" in repr(layout)
    assert layout.prompts_first.tolist() == [0, 1, 6, 2, 3, 4, 5, 7, 8]
    assert layout.cu_segments.tolist() == [0, 2, 3, 6, 7, 9]
    assert layout.cu_responses.tolist() == [0, 1, 4, 6]
    assert layout.cu_shared.tolist() == [[0, 4, 6], [0, 2, 3]]
    assert layout.sizes.tolist() == [3, 2, 3, 4]


def test_layout_takes_lists_and_tensors():
    lists = tk.PrefixLayout.from_lengths([2, 1], [[1, 3], [2, 2]])
    for prompts, responses in ((torch.tensor([2, 1]), torch.tensor([[1, 3], [2, 2]])),
                               ((2, 1), (torch.tensor([1, 3], dtype=torch.int32), [2, 2]))):
        other = tk.PrefixLayout.from_lengths(prompts, responses)
        assert torch.equal(other.position_ids, lists.position_ids)
        assert other.response_lengths == ((1, 3), (2, 2)) and other.prompt_lengths == (2, 1)
    ids = [[torch.tensor([5], dtype=torch.int32), [1, 2, 3]], torch.tensor([[7, 8], [8, 9]])]
    assert lists.pack([[1, 2], torch.tensor([3])], ids).tolist() == [
        [1, 2, 5, 1, 2, 3, 3, 7, 8, 8, 9]]


def test_empty_layout():
    layout = tk.PrefixLayout.from_lengths([], [])
    assert layout.pack([], []).shape == (1, 0) and layout.response_mask.shape == (0, 0)
    hidden = torch.zeros(0, 4, requires_grad=True)
    for align, shape in (("logprob", (0, 0, 4)), ("bootstrap", (0, 4))):
        states = layout.response_states(hidden, align)
        assert states.shape == shape
        states.sum().backward()
    assert hidden.grad.shape == (0, 4)


def test_to_another_device():
    layout = tk.PrefixLayout.from_lengths(PROMPTS, RESPONSES)
    assert layout.to("cpu") is layout and layout.to(torch.device("cpu", 0)) is layout
    moved = layout.to("meta")
    assert moved.device.type == moved.response_mask.device.type == "meta"
    assert moved.sizes.tolist() == layout.sizes.tolist()  # for the host, wherever the rest lies
    assert moved is layout.to("meta") and moved.prompt_lengths == layout.prompt_lengths
    hidden = torch.zeros(layout.n_tokens, 2, device="meta")  # the layout follows the tensors
    assert layout.response_states(hidden).device.type == "meta"
    q = torch.zeros(1, 1, layout.n_tokens, 2, device="meta")
    assert tk.prefix_attention(q, q, q, layout).shape == q.shape


BAD_LENGTHS = {
    r"prompt_lengths\[1\] is 0, expected a length >= 1": ([2, 0], [[1], [1]]),
    r"prompt_lengths\[0\] is float 2.5": ([2.5], [[1]]),
    r"prompt_lengths\[0\] is bool True": ([True], [[1]]),
    "prompt_lengths is int 3": (3, [[1]]),
    r"prompt_lengths is a tensor of shape \[1, 1\]": (torch.ones(1, 1).long(), [[1]]),
    "prompt_lengths is a tensor .* dtype torch.float32": (torch.ones(1), [[1]]),
    r"response_lengths\[1\]\[0\] is -1": ([2, 2], [[1], [-1]]),
    r"response_lengths\[0\]\[1\] is 0": ([2], [[1, 0]]),
    r"response_lengths\[1\] is empty, expected one or more": ([2, 2], [[1], []]),
    r"response_lengths\[0\] is int 4": ([2], [4]),
    "response_lengths is int 4": ([2], 4),
    "response_lengths has 1 groups, expected 2 as prompt_lengths": ([2, 2], [[1]]),
}


@pytest.mark.parametrize("message", BAD_LENGTHS)
def test_bad_lengths(message):
    with pytest.raises((ValueError, TypeError), match=message):
        tk.PrefixLayout.from_lengths(*BAD_LENGTHS[message])


BAD_IDS = {
    r"prompts has 2 and responses 1 groups, expected 1": ([[1], [2]], [[[1]]]),
    r"prompts\[0\] has 1 ids, expected 2": ([[1]], [[[1], [2]]]),
    r"responses\[0\]\[1\] has 2 ids, expected 1": ([[1, 2]], [[[1], [2, 3]]]),
    r"responses\[0\] is list .* expected 2 responses": ([[1, 2]], [[[1]]]),
    r"prompts\[0\] is a tensor of shape \[1, 2\]": ([torch.ones(1, 2).long()], [[[1], [2]]]),
    r"prompts\[0\] is a tensor .*float32": ([torch.ones(2)], [[[1], [2]]]),
    r"responses\[0\]\[0\] is int 1": ([[1, 2]], [[1, 2]]),
    r"'str' object cannot be interpreted|is str": ([["a", "b"]], [[[1], [2]]]),
}


@pytest.mark.parametrize("message", BAD_IDS)
def test_bad_ids(message):
    layout = tk.PrefixLayout.from_lengths([2], [[1, 1]])
    with pytest.raises((ValueError, TypeError), match=message):
        layout.pack(*BAD_IDS[message])


def test_bad_states():
    layout = tk.PrefixLayout.from_lengths([2], [[1, 1]])
    for hidden, align, message in ((torch.zeros(1, 4, 3), "logprob", r"pass hidden\[0\]"),
                                   (torch.zeros(5, 3), "logprob", "L = 4"),
                                   (torch.zeros(4, 3), "rewards", "align is 'rewards'"),
                                   ([0.0] * 4, "reward", "hidden is list")):
        with pytest.raises((ValueError, TypeError), match=message):
            layout.response_states(hidden, align)


GROUPS = st.lists(st.tuples(st.integers(1, 6), st.lists(st.integers(1, 6), min_size=1, max_size=4)),
                  min_size=1, max_size=3)


@settings(deadline=None, max_examples=25)
@given(GROUPS, st.sampled_from(("logprob", "value", "reward", "bootstrap")), st.booleans())
def test_states_equal_those_of_the_padded_operator(groups, align, inner):
    """`tk.response_states` of each (prompt, response) apart, forward and gradient."""
    prompts, responses = [p for p, _ in groups], [r for _, r in groups]
    layout = tk.PrefixLayout.from_lengths(prompts, responses)
    hidden = torch.randn(layout.n_tokens, *[3] * inner, dtype=torch.float64, requires_grad=True)
    states = layout.response_states(hidden, align)
    rows, tokens = [], layout.segment_lengths.tolist()
    starts = [sum(tokens[:i]) for i in range(len(tokens))]
    width, prompt = max(map(max, responses)), (0, 0)
    for start, length, is_prompt in zip(starts, tokens, layout.is_prompt.tolist(), strict=True):
        if is_prompt:
            prompt = (start, length)
            continue
        full = torch.cat([hidden[prompt[0]:sum(prompt)], hidden[start:start + length]])
        full = torch.cat([full, full.new_full((width, *full.shape[1:]), float("nan"))])
        rows.append(tk.response_states(full[None], prompt[1], width, align,
                                       mask=(torch.arange(width) < length)[None])[0])
    expected = torch.stack(rows)
    assert_same_bits(states.detach(), expected.detach())
    grad = torch.randn(states.shape, dtype=torch.float64)
    if align != "bootstrap":
        grad[~layout.response_mask] = float("nan")
        assert not states[~layout.response_mask].any()
    (actual,) = torch.autograd.grad(states, hidden, grad, retain_graph=True)
    (exact,) = torch.autograd.grad(expected, hidden, grad)
    torch.testing.assert_close(actual, exact, rtol=1e-14, atol=1e-14)
    assert_same_bits(torch.autograd.grad(states, hidden, grad)[0], actual)


def test_states_compile_and_keep_their_dtype():
    layout = tk.PrefixLayout.from_lengths(PROMPTS, RESPONSES)
    hidden = torch.randn(layout.n_tokens, 3, dtype=torch.bfloat16, requires_grad=True)

    def loss(hidden, layout):
        return layout.response_states(hidden, "logprob").float().square().sum()

    torch._dynamo.reset()
    (expected,) = torch.autograd.grad(loss(hidden, layout), hidden)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    (actual,) = torch.autograd.grad(compiled(hidden, layout), hidden)
    assert actual.dtype == torch.bfloat16
    assert_same_bits(actual, expected)
