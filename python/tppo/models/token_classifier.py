"""Token classifiers of every causal family, also of those for which transformers has no class.

    states = trunk(input_ids)            # [B, L, D], the causal LM's own trunk
    logits = states W^T + b              # [B, L, C]

`Gemma3ForTokenClassification` and its like are made here where transformers has none, with the
names that it would give: the folder that `save_pretrained` writes names that architecture in its
`config.json`, and its `model.safetensors` holds the trunk under the causal LM's own names beside
`score.weight` [C, D] and `score.bias` [C].  So any program that knows the trunk can read it.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import Tensor, nn
from transformers import AutoModel, AutoModelForTokenClassification, PreTrainedModel
from transformers.modeling_outputs import TokenClassifierOutput
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
)


def token_classifier(config: Any) -> Any:
    """What has `from_pretrained` for the token classifier of a configuration.

    transformers' own class where it has one for the family, else one that is made here.  Where a
    family has neither that nor a causal LM, transformers' refusal stands.
    """
    kind = type(config)
    if kind in MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING or kind not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return AutoModelForTokenClassification
    return _made(MODEL_FOR_CAUSAL_LM_MAPPING[kind])


def state_size(config: Any) -> int:
    """D, the size of the last hidden states of a trunk, which heads read.

    It is the hidden size, but for OPT, which may project its states (OPT-350m: 1024 to 512).
    """
    own = config.get_text_config()
    return getattr(own, "word_embed_proj_dim", None) or own.hidden_size


def head_name(model: nn.Module) -> str:
    """The name of a token classifier's head, which differs from family to family."""
    return "score" if getattr(model, "score", None) is not None else "classifier"


class _TokenClassifier(PreTrainedModel):
    """The trunk of a causal LM with a linear head that reads the state of every token."""

    def __init__(self, config: Any):
        super().__init__(config)
        self.num_labels = config.num_labels
        setattr(self, self.base_model_prefix, AutoModel.from_config(config))
        self.score = nn.Linear(state_size(config), config.num_labels)
        self.post_init()

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **inputs: Any
    ) -> TokenClassifierOutput:
        """Class logits [B, L, C]; further inputs are the trunk's."""
        states = self.base_model(
            input_ids=input_ids, attention_mask=attention_mask, **inputs
        ).last_hidden_state  # [B, L, D]
        return TokenClassifierOutput(logits=self.score(states))


@cache
def _made(causal: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The token classifier of a causal LM's family, with what its base class knows of weights."""
    family = causal.__name__.removesuffix("ForCausalLM").removesuffix("LMHeadModel")
    base = next(kind for kind in causal.__mro__[1:] if kind.__name__.endswith("PreTrainedModel"))
    own = {
        "__doc__": f"{_TokenClassifier.__doc__} The trunk is that of {causal.__name__}.",
        "__module__": __name__,
        "base_model_prefix": causal.base_model_prefix,
        "config_class": causal.config_class,
    }
    return type(f"{family}ForTokenClassification", (_TokenClassifier, base), own)
