"""How a model is loaded and held, its sizes from scratch, how answers are sampled.

This file loads no torch, so that `tppo --help` can list the settings at once.
"""

from __future__ import annotations

from typing import Annotated, Literal, NamedTuple

from pydantic import Field

from tppo.settings import Count, Natural, NonNegative, Positive, Text, section

Prefix = Literal["shared", "dense"]
RolloutName = Literal["hf", "vllm"]
DType = Literal["auto", "float32", "bfloat16"]
ALL_LINEAR = "all-linear"


@section
class ScratchConfig:
    """The small Llama that is trained from scratch when no --model is given."""

    hidden_size: Count = 64
    """Width of its states; a multiple of twice the heads."""
    intermediate_size: Count = 160
    """Width inside each layer's feed-forward part."""
    layers: Count = 2
    """Number of layers."""
    heads: Count = 4
    """Number of attention heads in each layer."""
    vocab_size: Annotated[Count, Field(ge=259)] = 1024
    """At most this many tokens in the byte-level BPE trained on the data: 256 bytes, 3 special."""
    max_length: Count = 384
    """Positions of the model: prompt and response together, in tokens."""

    def __post_init__(self) -> None:
        if self.hidden_size % (2 * self.heads):
            raise ValueError(
                f"hidden_size, heads were {self.hidden_size}, {self.heads}, expected a hidden_size "
                "that is a multiple of 2 * heads: each head turns pairs of its numbers"
            )


@section
class ModelConfig:
    """How models are loaded and held in memory, those of every stage."""

    revision: Text | None = None
    """Branch, tag or commit of --model where it is an id of a hub; by default its main branch."""
    dtype: DType = "auto"
    """Of the weights in memory. auto: float32 on a CPU; on a GPU bfloat16 for a model of 16 bits,
    its updates kept in float32, else float32. An export has the type of --model always."""
    allow_pickle: bool = False
    """Read pytorch_model.bin where a model has no safetensors; only tensors are taken from it."""
    gradient_checkpointing: bool = False
    """Keep only the input of each layer for backward and compute the rest again there: less memory
    for a quarter more time, and the same bits."""


@section
class AdapterConfig:
    """LoRA: policy, critic and reward model are adapters over one frozen base."""

    rank: Natural = 0
    """Of each adapter; 0 trains all weights instead. 16 is usual; needs the package peft."""
    alpha: Positive | None = None
    """An adapter's output is scaled by alpha / rank; by default twice the rank."""
    target_modules: Annotated[tuple[Text, ...], Field(min_length=1)] = (ALL_LINEAR,)
    """Names of the linear layers that get one, such as q_proj v_proj; all-linear: all but the head
    and the experts of a mixture."""

    def __post_init__(self) -> None:
        names = self.target_modules
        if ALL_LINEAR in names and len(names) > 1:
            raise ValueError(f"target_modules was {list(names)}, expected names of layers, or "
                             f"{ALL_LINEAR!r} alone")  # fmt: skip

    @property
    def on(self) -> bool:
        """Whether adapters are trained."""
        return self.rank > 0

    @property
    def scale(self) -> float:
        """What an adapter's output is multiplied with."""
        return 2.0 if self.alpha is None or not self.rank else self.alpha / self.rank


@section
class GenerateConfig:
    """Sampling, at the one temperature of rollouts and of all log-probs."""

    samples: Count = 4_000
    """Answers of the SFT model to be labelled: 4,000 by the rule, which costs nothing; of labels
    that cost something 200 are enough to begin with (docs/evidence.md)."""
    samples_per_session: Count = 4
    """At most this many of one session: a small file gets fewer answers."""
    max_new_tokens: Natural = 0
    """Cap of an answer in tokens; 0: 1.25 times the 99th percentile of the true answers."""
    temperature: Positive = 1.0
    """Of sampling; a lower one keeps closer to the likeliest tokens."""
    batch_size: Count = 256
    """Answers that are sampled at once, of all processes together: fewer take less memory."""


@section
class VLLMConfig:
    """The engine of --rollout vllm (docs/vllm.md)."""

    memory_share: Annotated[float, Field(gt=0, lt=1)] = 0.4
    """Of the GPU's memory: the engine's weights and the keys and values of the answers under way;
    what it takes is free during the update. On a CPU the keys and values take what they need."""


class Sampler(NamedTuple):
    """What `tppo.models.rollout.build` has to know of how answers are sampled."""

    rollout: RolloutName = "hf"
    vllm: VLLMConfig = VLLMConfig()
    batch_size: int = 256
    prefix: Prefix = "shared"

    @property
    def identity(self) -> dict[str, str]:
        """The setting that changes what is sampled, if it is not the default."""
        return {} if self.rollout == "hf" else {"rollout": self.rollout}


@section
class GuideConfig:
    """The guide of --algorithm ppo++, aggrevated, lols and d2lols: by default the model that PPO
    starts from, with a sampling of its own; else another model, or one at an endpoint."""

    model: Text | None = None
    """Local folder or id on the hub of a causal LM with its tokenizer, whichever that is."""
    revision: Text | None = None
    """Branch, tag or commit of that model where it is an id of a hub."""
    temperature: NonNegative = 1.0
    """Of the guide's sampling; 0 takes its likeliest token."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.92
    """The guide samples from the likeliest tokens with so much of the probability (the paper)."""
    base_url: str = ""
    """An OpenAI-compatible endpoint that is asked for the guide's text, such as
    http://127.0.0.1:8000/v1; it must not spend its tokens on thoughts."""
    name: str = ""
    """The guide's name at the endpoint."""
    system: Text | None = None
    """System message to the endpoint; in a run of stages by default one that asks for queries."""
    api_key_env: Text | None = "OPENAI_API_KEY"
    """Environment variable that holds the key; None for a server that asks for none."""
    concurrency: Count = 8
    """Requests in flight."""
    max_retries: Natural = 5
    """Further tries of a request after 429, 5xx or a time-out, ever longer apart."""
    timeout_s: Positive = 120.0
    """Limit of one try, in seconds."""
    price_read: NonNegative | None = None
    """Price of a million prompt tokens of the endpoint; with both prices `tppo plan` says the
    cost."""
    price_written: NonNegative | None = None
    """Price of a million tokens that it writes."""

    def __post_init__(self) -> None:
        if (self.price_read is None) != (self.price_written is None):
            raise ValueError(f"price_read, price_written were {self.price_read}, "
                             f"{self.price_written}, expected both, or none")  # fmt: skip
        if self.model is not None and self.base_url:
            raise ValueError(f"model and base_url were {self.model!r} and {self.base_url!r}, "
                             "expected one of them")  # fmt: skip
        if bool(self.base_url) != bool(self.name.strip()):
            raise ValueError(f"base_url and name were {self.base_url!r} and {self.name!r}, "
                             "expected both: the endpoint, and the model's name there")  # fmt: skip
        if self.revision is not None and self.model is None:
            raise ValueError(f"revision was {self.revision!r} and model None, expected the id on "
                             "the hub that it is a revision of")  # fmt: skip


@section
class RewardServerConfig:
    """A server that reads answers with the token reward model in place of this process: vLLM, see
    docs/served-reward-model.md. The model need not fit beside the policy, and several trainings
    may ask one server."""

    base_url: str = ""
    """Such as http://127.0.0.1:8000; empty: the reward model is loaded here."""
    name: str = ""
    """The model's name at the server; by default the only one that it has."""
    api_key_env: Text | None = None
    """Environment variable that holds the key; None for a server that asks for none."""
    concurrency: Count = 4
    """Requests in flight."""
    max_tokens: Count = 16_384
    """Tokens of prompts and answers in a request; an answer is never parted."""
    max_retries: Natural = 90
    """Further tries of a request after 429, 5xx, a time-out or a connection that fails, at most 8 s
    apart: with 90 the training waits about eleven minutes for a server that is started again."""
    timeout_s: Positive = 120.0
    """Limit of one try, in seconds."""

    def __post_init__(self) -> None:
        if self.name and not self.base_url:
            raise ValueError(f"name was {self.name!r} and base_url empty, expected the server's "
                             "address too, such as http://127.0.0.1:8000")  # fmt: skip
