"""Fused, exact operators for token-level PPO (Ouyang et al., EMNLP 2025).

Letters: B sequences, T tokens of a sequence, N rows (flattened tokens), D hidden size,
V vocabulary, K outputs of a head, G responses of one prompt.
Layouts: padded [B, T], or packed [N] with `cu_seqlens` [B + 1] (int32, from 0 to N).
Masks: `action_mask` (the token is a step of the MDP), `train_mask` (the policy is trained on it),
`value_mask` (the critic is trained on it). bool, or whole numbers of which 0 is not valid; floats
are refused. `mask=None` means all valid. Whatever stands in a masked slot never reaches a result;
outputs and gradients there are exactly 0.
Index convention: `tk.response_states` slices hidden states so that index t is response token t.
"""

from __future__ import annotations

from ._core.backends import use_backend
from ._core.op import BackendError, Explanation, explain
from ._math.layout import PrefixLayout
from ._math.rows import response_mask, valid_rows
from .models import align
from .models.lm_head import FusedLMHead
from .models.shared_prefix import shared_prefix
from .ops.entropy import entropy
from .ops.gae import gae
from .ops.kl import kl
from .ops.linear_logprobs import linear_logprobs
from .ops.linear_ppo_loss import linear_ppo_loss
from .ops.place_rewards import place_rewards
from .ops.ppo_loss import ppo_loss
from .ops.prefix_attention import prefix_attention
from .ops.reduce import reduce
from .ops.response_states import response_states
from .ops.token_advantages import token_advantages
from .ops.token_head import token_head
from .ops.token_logprobs import token_logprobs
from .ops.token_reward_loss import token_reward_loss
from .ops.token_rewards import token_rewards
from .ops.value_loss import value_loss
from .ops.whiten import whiten

__version__ = "0.1.0"

__all__ = [
    "BackendError", "Explanation", "FusedLMHead", "PrefixLayout", "align", "doctor", "entropy",
    "explain", "gae", "kl", "linear_logprobs", "linear_ppo_loss", "place_rewards", "ppo_loss",
    "prefix_attention", "reduce", "response_mask", "response_states", "shared_prefix",
    "token_advantages", "token_head", "token_logprobs", "token_reward_loss", "token_rewards",
    "use_backend", "valid_rows", "value_loss", "whiten",
]


def doctor() -> str:
    """Versions, what was built, and which backends each operator has, as text."""
    from .__main__ import report

    return report()
