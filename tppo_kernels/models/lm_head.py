"""`FusedLMHead`: log-probs of a transformers causal language model without its logits."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.linear_logprobs import LinearLogprobs, linear_logprobs
from ..ops.linear_ppo_loss import LinearPolicyLoss, linear_ppo_loss

# Each is compared with its own logits in tests/test_lm_head.py: `last_hidden_state` has passed the
# final norm, and only a softcap or a scale of the configuration stands between head and logits.
FAMILIES = frozenset({
    "cohere", "cohere2", "gemma", "gemma2", "gemma3_text", "glm", "gpt2", "gpt_neo", "gpt_neox",
    "gptj", "granite", "helium", "llama", "mistral", "mixtral", "olmo", "olmo2", "opt", "phi",
    "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "smollm3", "stablelm", "starcoder2"})
VERIFIED_TO = 1e-4  # of the largest logit


class FusedLMHead:
    """The head of a causal language model as an operator: hidden states in, log-probs out.

        head = FusedLMHead(model)
        hidden = head.hidden(input_ids=ids, attention_mask=attention, use_cache=False)
        logprobs, entropy = head(tk.response_states(hidden, prompt_length, T, align="logprob"),
                                 response_ids, mask, temperature=0.7)

    equals `token_logprobs(model(...).logits, ...)`: the family's softcap (Gemma 2) or logit scale
    (Cohere, Granite), a bias, tied embeddings. Weights are read at every call, and gradients reach
    the model's own parameters. A LoRA of the head is merged for the call: adapters get their
    gradients, at the cost of one [V, D] weight.

    model: a transformers `...ForCausalLM`, also behind `torch.compile`, DistributedDataParallel or
    PEFT. verify=True compares the logits of eight tokens once; it is the way in for a family that
    is not in `FAMILIES`. A head that is no plain matrix at the time of the call raises a ValueError
    with the reason: quantised, sharded, offloaded, hooked, DoRA, LoRA with dropout.

    valid_vocab: tokens from there on, which a padded vocabulary has and no tokenizer gives, have no
    probability, in every call.

    FSDP2 (`fully_shard`): the weight is gathered by the hooks of the module that was given to it,
    the head or the model, once a call whatever the number of rows, and its gradient is reduced by
    them. Take the states from `hidden`, which runs those of the model, and first.
    """

    def __init__(self, model: Any, *, verify: bool = False, valid_vocab: int | None = None):
        self.wrapped, self.valid_vocab = model, valid_vocab
        self.model = _causal_model(model)[-1]
        config = self.model.config
        self.softcap: float | None = getattr(config, "final_logit_softcapping", None)
        divisor = getattr(config, "logits_scaling", None) or 1.0
        self.logit_scale: float = (getattr(config, "logit_scale", None) or 1.0) / divisor
        if not (_sharded(self._holder()) or _sharded(self.model.get_output_embeddings())):
            head_of(self.model)
        if verify:
            self._verify()
        elif config.model_type not in FAMILIES:
            raise ValueError(f"FusedLMHead: model is of the family {config.model_type!r}, expected "
                             f"one of {', '.join(sorted(FAMILIES))}, or verify=True to compare "
                             "its logits once")

    def hidden(self, **inputs: Any) -> Tensor:
        """The states that the head reads, after the final norm, for the inputs of the model."""
        own = []

        def states(**inputs: Any) -> Tensor:
            hidden = self.model.base_model(**inputs).last_hidden_state  # [B, L, D]
            own.append(hidden.dtype)
            return hidden

        holder = self._holder()
        if not _sharded(holder):
            return states(**inputs)
        hidden = _through(holder, states, **inputs)
        return hidden.to(own[0])  # an output_dtype of FSDP2 is meant for logits

    def __call__(
            self,
            hidden: Tensor,  # [..., D]
            targets: Tensor,  # [...] int64 or int32
            mask: Tensor | None = None,  # [...] bool or whole numbers
            **keywords: Any,
    ) -> LinearLogprobs:
        """`tk.linear_logprobs` with this head; it takes the same keywords but those of the head."""
        keywords = self._limited("__call__", keywords)
        return self._use("__call__", keywords, linear_logprobs, hidden, targets, mask)

    def loss(
            self,
            hidden: Tensor,  # [B, T, D] or [N, D]
            targets: Tensor,  # [B, T] or [N] int64 or int32
            old_logprobs: Tensor,  # [B, T] or [N]
            advantages: Tensor,  # [B, T] or [N], [B] or [B, 1]
            mask: Tensor | None = None,  # [B, T] or [N] bool or whole numbers
            **keywords: Any,
    ) -> LinearPolicyLoss:
        """`tk.linear_ppo_loss` with this head; it takes the same keywords but those of the head."""
        keywords = self._limited("loss", keywords)
        return self._use("loss", keywords, linear_ppo_loss, hidden, targets, old_logprobs,
                         advantages, mask)

    def _limited(self, method: str, keywords: dict[str, Any]) -> dict[str, Any]:
        """The keywords with the head's own `valid_vocab`, where it has one."""
        if self.valid_vocab is None:
            return keywords
        if "valid_vocab" in keywords:
            raise TypeError(f"FusedLMHead: {method} got valid_vocab, expected none: the head has "
                            f"its own, {self.valid_vocab}")
        return {**keywords, "valid_vocab": self.valid_vocab}

    def _use(self, method: str, keywords: dict[str, Any], operator: Callable, hidden: Tensor,
             *arguments: Tensor | None) -> Any:
        """The operator with this head, inside the hooks that gather its weight where it is sharded.

        The model gives the keywords that belong to the head; a caller may not.
        """
        own = {"softcap": self.softcap, "logit_scale": self.logit_scale}
        for name in (own.keys() | {"weight", "bias"}) & keywords.keys():
            raise TypeError(f"FusedLMHead: {method} got {name}, expected none: it is the model's")

        def run(hidden: Tensor) -> Any:
            weight, bias = head_of(self.model)
            return operator(hidden, weight, *arguments, bias=bias, **own, **keywords)

        head, holder = self.model.get_output_embeddings(), self._holder()
        if _sharded(head):
            return _through(head, run, hidden)
        apart = type(getattr(head, "weight", None)).__name__ == "DTensor"
        return _through(holder, run, hidden) if apart and _sharded(holder) else run(hidden)

    def _holder(self) -> Any:
        """The outermost module around the model that FSDP2 shards, or the model."""
        chain = _causal_model(self.wrapped)
        return next(filter(_sharded, chain), chain[-1])

    @torch.no_grad()
    def _verify(self) -> None:
        """Raises ValueError where the logits are not this head's of the last hidden states."""
        ids = torch.arange(8, device=self.model.device)[None] % self.model.config.vocab_size
        training = self.model.training
        self.model.eval()
        try:
            logits = self._holder()(input_ids=ids, use_cache=False).logits.float()  # [1, 8, V]
            hidden = self.hidden(input_ids=ids, use_cache=False)
            z = self._use("verify", {}, _logits, hidden)
        finally:
            self.model.train(training)
        limit = VERIFIED_TO if hidden.dtype == torch.float32 else 100 * VERIFIED_TO
        error = float((z - logits).abs().max()) if z.shape == logits.shape else float("inf")
        if not error <= limit * float(logits.abs().max()):
            raise ValueError(f"FusedLMHead: model is of the family {self.model.config.model_type!r}"
                             f", expected logits equal to its head of the last hidden states; they "
                             f"differ by {error:.3g}")


def _logits(hidden: Tensor, weight: Tensor, *, bias: Tensor | None, softcap: float | None,
            logit_scale: float) -> Tensor:
    """What the model's own head gives, in fp32."""
    z = nn.functional.linear(hidden, weight, bias).float() * logit_scale
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def _sharded(module: Any) -> bool:
    """Whether FSDP2 has sharded parameters of the module itself: its hooks gather them."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def _through(module: Any, forward: Callable, *args: Any, **kwargs: Any) -> Any:
    """Calls the module with another forward; its hooks run as they always do."""
    own = vars(module).get("forward")
    module.forward = forward
    try:
        return module(*args, **kwargs)
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


def _causal_model(model: Any) -> list[Any]:
    """The wrappers around a transformers model, outermost first, and the model at the end."""
    chain = [model]
    while True:
        if hasattr(model, "_orig_mod"):  # torch.compile
            model = model._orig_mod
        elif isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif hasattr(model, "get_base_model"):  # PEFT
            model = model.get_base_model()
        else:
            break
        chain.append(model)
    if not (hasattr(model, "get_output_embeddings") and hasattr(model, "config")):
        raise TypeError(f"FusedLMHead: model is {type(model).__name__}, expected a transformers "
                        "model for causal language modelling")
    if model.get_output_embeddings() is None:
        raise ValueError(f"FusedLMHead: model is {type(model).__name__} without an output head, "
                         "expected a ...ForCausalLM")
    return chain


def head_of(model: Any) -> tuple[Tensor, Tensor | None]:
    """(weight [V, D], bias [V] or None) of a model's head, LoRA merged; ValueError with the reason
    where it is no plain matrix."""
    head = model.get_output_embeddings()
    if type(head).__module__.startswith("peft."):
        return _merged(head)
    return _plain(head)


def _refuse(head: Any, why: str) -> ValueError:
    return ValueError(f"FusedLMHead: the head is {type(head).__module__}.{type(head).__name__}, "
                      f"expected a plain torch.nn.Linear: {why}")


def _plain(head: Any) -> tuple[Tensor, Tensor | None]:
    kind = type(head).__bases__[-1] if _sharded(head) else type(head)  # FSDP2 makes a subclass
    if kind is not nn.Linear:
        raise _refuse(head, "what it computes, a quantised product perhaps, is not known here; "
                            "leave the head out of the quantisation (skip_modules)")
    weight = head.weight
    if hasattr(weight, "ds_id") or weight.dim() != 2:
        raise _refuse(head, "its weight is partitioned by DeepSpeed; gather it around the call "
                            "(deepspeed.zero.GatheredParameters)")
    if type(weight.data).__name__ == "DTensor":
        raise _refuse(head, "its weight is a sharded DTensor, which the module that holds it "
                            "gathers: take the states from FusedLMHead.hidden, and first")
    if type(weight.data) is not Tensor or not weight.is_floating_point():
        raise _refuse(head, f"its weight is a {type(weight.data).__name__} of {weight.dtype}, a "
                            "quantised one perhaps")
    if weight.dtype.itemsize < 2 or weight.is_meta:
        raise _refuse(head, f"its weight is {weight.dtype} on {weight.device}")
    hooks = (*head._forward_hooks.values(), *head._forward_pre_hooks.values())
    if not all(type(getattr(h, "__self__", None)).__name__ == "FSDPState" for h in hooks) or (
            "forward" in vars(head) and not _sharded(head)):
        raise _refuse(head, "it has forward hooks, or a forward of its own, which would not run")
    return weight, head.bias


def _merged(head: Any) -> tuple[Tensor, Tensor | None]:
    """The head with its active LoRA adapters added; their gradients are computed."""
    kind = type(head).__name__
    if kind == "ModulesToSaveWrapper":
        copies = [head.modules_to_save[name] for name in head.active_adapters]
        return _plain(copies[0] if copies else head.original_module)
    if kind != "Linear" or not hasattr(head, "lora_A"):
        raise _refuse(head, "only LoRA adapters are merged")
    weight, bias = _plain(head.get_base_layer())
    if head.disable_adapters or head.merged:
        return weight, bias
    for name in head.active_adapters:
        if name not in head.lora_A:
            continue
        if name in getattr(head, "lora_variant", {}):
            raise _refuse(head, "DoRA and other variants of LoRA are no sum of matrices")
        if getattr(head.lora_dropout[name], "p", 0.0) and head.training:
            raise _refuse(head, "LoRA dropout acts on the states; set lora_dropout=0 for the head")
        if head.lora_B[name].bias is not None:
            raise _refuse(head, "its adapter has a bias; merge it (merge_and_unload)")
        weight = weight + head.get_delta_weight(name)
    return weight, bias
