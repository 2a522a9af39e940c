"""`prefix_attention` and a decoder that shares its prompts, against each (prompt, response) apart.

On a GPU in bf16, with every backend that takes it.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import pytest
import torch
from _harness import Case, Function
from _machine import generator, normal
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import tppo_kernels as tk
from tppo_kernels._core.backends import missing
from tppo_kernels._core.op import OPS
from tppo_kernels.ops.prefix_attention import nbytes, reference

SHAPES = {"cpu": [(512, 16, 8), (64, 16, 8)], "cuda": [(2048, 24, 8), (512, 16, 8)]}  # P, R, G
DTYPE = {"cpu": torch.float32, "cuda": torch.bfloat16}
HEADS = {"cpu": (8, 4, 64), "cuda": (12, 2, 128)}  # of queries, of keys, values each


def masked(q: Tensor, k: Tensor, v: Tensor, layout: tk.PrefixLayout) -> Tensor:
    """PyTorch's attention with the explicit mask."""
    seen = reference.visible(layout.segment_lengths, layout.is_prompt, layout.n_tokens)
    return scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)


def dense(q: Tensor, k: Tensor, v: Tensor, layout: tk.PrefixLayout) -> Tensor:
    """The prompt repeated for each of its responses, and causal attention over both."""
    prompt, responses = layout.prompt_lengths[0], layout.n_responses
    shared, own = (torch.arange(0, prompt, device=q.device),
                   torch.arange(prompt, layout.n_tokens, device=q.device).view(responses, -1))
    rows = torch.cat([shared.expand(responses, -1), own], 1)  # [G, P + R]
    out = scaled_dot_product_attention(*(x[0][:, rows].transpose(0, 1) for x in (q, k, v)),
                                       is_causal=True, enable_gqa=True)
    return torch.cat([out[0, :, :prompt], out[:, :, prompt:].transpose(0, 1).flatten(1, 2)],
                     1)[None]


def with_backward(function: Callable) -> Function:
    """(result, gradients of q, k and v)."""
    def both(q: Tensor, k: Tensor, v: Tensor, layout: tk.PrefixLayout,
             grad: Tensor) -> tuple[Tensor, ...]:
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out = function(*leaves, layout)
        return out.detach(), *torch.autograd.grad(out, leaves, grad)
    return both


def forced(backend: str) -> Callable:
    """The operator on one backend."""
    def call(q: Tensor, k: Tensor, v: Tensor, layout: tk.PrefixLayout) -> Tensor:
        with tk.use_backend(backend):
            return tk.prefix_attention(q, k, v, layout)
    return call


def attention_case(prompt: int, response: int, group: int, device: str) -> Case:
    """One group, with the heads of a small decoder, on a GPU of one of 1.5B."""
    heads, kv_heads, dim = HEADS[device]
    layout = tk.PrefixLayout.from_lengths([prompt], [[response] * group]).to(device)

    def make(seed: int) -> tuple:
        g = generator(device, seed)
        q, k, v, grad = (normal(g, layout.n_tokens, h, dim).to(DTYPE[device])
                         .transpose(0, 1)[None] for h in (heads, kv_heads, kv_heads, heads))
        return q, k, v, layout, grad

    functions = {"op": tk.prefix_attention, "dense": dense, "masked": masked}
    functions |= {b: forced(b) for b in OPS["prefix_attention"].order[device]
                  if not missing(b) and device == "cuda" and b != "reference"}
    shape = f"P {prompt}, R {response}, G {group} {str(DTYPE[device])[6:]} forward+backward"
    return Case("prefix_attention", shape, nbytes(*make(0)[:3], backward=True), make,
                with_backward(tk.prefix_attention), with_backward(dense),
                {n: with_backward(f) for n, f in functions.items()}, grad=True, beats="dense")


def decoder(device: str) -> torch.nn.Module:
    """A Llama of 4 layers and hidden size 256."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    return transformers.LlamaModel(transformers.LlamaConfig(
        hidden_size=256, intermediate_size=704, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=4, vocab_size=4096, max_position_embeddings=4096)
        ).to(device, DTYPE[device])


def gradients(model: torch.nn.Module, states: Tensor, projection: Tensor) -> tuple[Tensor, ...]:
    """(states, gradients of a weight of the first and of the last layer)."""
    (states * projection).sum().backward()
    first, last = model.layers[0].self_attn.k_proj.weight, model.layers[-1].mlp.down_proj.weight
    result = states.detach(), first.grad.clone(), last.grad.clone()
    model.zero_grad()
    return result


def decoder_case(prompt: int, response: int, group: int, device: str) -> Case:
    """The states before the response tokens, and the backward pass of a projection of them."""
    layout = tk.PrefixLayout.from_lengths([prompt], [[response] * group]).to(device)
    model = decoder(device)
    double = copy.deepcopy(model).double()

    def make(seed: int) -> tuple[Tensor, Tensor, Tensor]:
        g = generator(device, seed)
        return (torch.randint(4096, (prompt,), generator=g, device=device),
                torch.randint(4096, (group, response), generator=g, device=device),
                normal(g, group, response, 256).to(DTYPE[device]))

    def apart(model: torch.nn.Module, prompts: Tensor, responses: Tensor,
              projection: Tensor) -> tuple[Tensor, ...]:
        ids = torch.cat([prompts.expand(group, -1), responses], 1)
        hidden = model(input_ids=ids, use_cache=False).last_hidden_state
        return gradients(model, tk.response_states(hidden, prompt, response), projection)

    def shared(prompts: Tensor, responses: Tensor, projection: Tensor) -> tuple[Tensor, ...]:
        ids = layout.pack([prompts], [responses])
        with tk.shared_prefix(model, layout):
            hidden = model(input_ids=ids, position_ids=layout.position_ids,
                           use_cache=False).last_hidden_state
        return gradients(model, layout.response_states(hidden[0]), projection)

    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    eager = functools.partial(apart, model)
    return Case("shared_prefix", f"P {prompt}, R {response}, G {group} Llama 4 x 256 "
                "forward+backward", 4 * weights, make, functools.partial(apart, double), eager,
                {"op": shared, "dense": eager}, grad=True, beats="dense",
                notes={"op": "bytes: the weights and their gradients, read and written once"})


@pytest.mark.parametrize("kind", (attention_case, decoder_case), ids=("attention", "decoder"))
@pytest.mark.parametrize("which", (0, 1))
def test_prefix_attention(measure, device, smoke, kind, which):
    if smoke and which:
        pytest.skip("one tiny shape")
    measure(kind(*((9, 3, 4) if smoke else SHAPES[device][which]), device))
