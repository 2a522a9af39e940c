"""`tppo plan`: what each stage would take of a GPU's memory, before anything is loaded or paid for.

A model of the same configuration is computed without data, see `tppo.models.meta`.  This file
loads no torch, so that `tppo plan --help` is there at once.
"""

from __future__ import annotations

import re
from dataclasses import field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from pydantic import AfterValidator

from tppo.errors import DataError
from tppo.flags import parse
from tppo.labels.config import ENOUGH
from tppo.models.config import GenerateConfig, GuideConfig
from tppo.sessions.config import ReadConfig
from tppo.settings import Count, FilePath, section
from tppo.stages.needs import (
    GB,
    STAGES,
    Need,
    Work,
    engine_need,
    first_level,
    flags,
    plan,
)

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from tppo.models.meta import Holding

# Qwen2.5's published configurations: hidden size, intermediate size, layers, heads, heads of keys
# and values, vocabulary, whether the embeddings are the head's weight too.
SHAPES = {
    "0.5B": (896, 4864, 24, 14, 2, 151_936, True),
    "1.5B": (1536, 8960, 28, 12, 2, 151_936, True),
    "7B": (3584, 18_944, 28, 28, 4, 152_064, False),
    "14B": (5120, 13_824, 48, 40, 8, 152_064, False),
}
GPUS = (24, 48, 80, 141)  # GB
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(GB|GiB)?")


def _size(text: str) -> str:
    found = _SIZE.fullmatch(text)
    if not found or not float(found[1]):
        raise ValueError(f"was {text!r}, expected a size such as 80GB or 80GiB")
    return text


def nbytes_of(text: str) -> int:
    """Bytes of a size such as 80GB (10^9 bytes each) or 80GiB."""
    found = _SIZE.fullmatch(text)
    assert found
    return int(float(found[1]) * (2**30 if found[2] == "GiB" else GB))


@section
class PlanOptions:
    """Flags of `tppo plan`: a model, a GPU, and the settings of the run that is planned."""

    model: FilePath | None = None
    """A causal LM: a local folder, or an id of the Hugging Face hub; config.json alone is read. By
    default the table of docs/memory.md: four shapes on four GPUs."""
    shape: Literal["0.5B", "1.5B", "7B", "14B"] | None = None
    """One of the four shapes of Qwen2.5 in place of --model."""
    gpu_memory: Annotated[str, AfterValidator(_size)] = "80GB"
    """Of the GPU: 80GB (10^9 bytes each), or 80GiB."""
    lora_rank: Count = 16
    """Rank of the adapters, on every linear layer, where adapters alone are trained."""
    data: FilePath | None = None
    """Log of the run: prompts and answers are measured in it with the tokenizer of --model."""
    read: Annotated[ReadConfig, tyro.conf.arg(name="", prefix_name=False)] = field(
        default_factory=ReadConfig
    )
    work: Annotated[Work, tyro.conf.arg(name="")] = field(default_factory=Work)


def main(arguments: list[str]) -> None:
    """Entry point of `tppo plan`."""
    about = "What each stage would take of a GPU's memory; nothing is loaded or trained."
    own = (PlanOptions, Work, ReadConfig)
    options = parse(PlanOptions, "tppo plan", about, arguments,
                    first=lambda flag: flag.section in own)  # fmt: skip
    print("\n".join(_lines(options)))


def _lines(options: PlanOptions) -> list[str]:
    if options.model is not None and options.shape is not None:
        raise ValueError("--model and --shape were given, expected one of them")
    if options.data is not None and options.model is None:
        raise ValueError("--data was given without --model, whose tokenizer measures it")
    if options.shape is not None:
        return one_model(shape_config(options.shape), options.shape, options)
    if options.model is None:
        return table(options)
    config, folder = configuration(
        options.model, options.work.model.revision, whole=options.data is not None
    )
    if options.data is not None:
        options = replace(options, work=measured(options, config, folder))
    return one_model(config, str(options.model), options)


def configuration(
    path: Path, revision: str | None = None, *, whole: bool = False
) -> tuple[PretrainedConfig, Path]:
    """The configuration of a model, and where it lies; of a hub id it alone is fetched.

    whole: fetch all that the model has, for its tokenizer.
    """
    from huggingface_hub import errors, hf_hub_download
    from transformers import AutoConfig

    from tppo.models.hub import locate
    from tppo.models.load import load_from

    if path.exists() or len(path.parts) != 2:
        path = locate(path, revision)
    elif whole:
        path = locate(path, revision)
    else:
        try:
            path = Path(hf_hub_download(str(path), "config.json", revision=revision)).parent
        except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, OSError) as error:
            raise DataError(
                f"{path}: no local path, and as an id of the hub its config.json cannot be had "
                f"({str(error).splitlines()[0]})"
            ) from error
    return load_from(AutoConfig, path), path


def measured(options: PlanOptions, config: PretrainedConfig, folder: Path) -> Work:
    """The work with the lengths of a log's prompts and answers, as its stages would cut them."""
    from tppo.models.tokenizer import load_tokenizer
    from tppo.sessions.prompts import encode_prompts
    from tppo.sessions.readers import SessionLog
    from tppo.stages.lengths import answer_cap, positions_of

    assert options.data is not None
    tokenizer, sessions = load_tokenizer(folder), list(SessionLog(options.data, options.read))
    if not sessions:
        raise DataError(f"{options.data}: no session in it, expected at least one")
    cap = answer_cap(tokenizer, sessions, options.work.generate)
    prompts = encode_prompts(tokenizer, sessions, positions_of(config) - cap)
    longest = max(2, *map(len, prompts))
    return replace(options.work, prompt_tokens=longest, response_tokens=cap)


def shape_config(name: str) -> PretrainedConfig:
    """The configuration of one of SHAPES."""
    from transformers import Qwen2Config

    hidden, intermediate, layers, heads, kv_heads, vocab, tied = SHAPES[name]
    return Qwen2Config(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocab,
        tie_word_embeddings=tied,
    )


def holding(options: PlanOptions, *, lora: bool, gpu_nbytes: int) -> Holding:
    """How a run would hold a model of 16-bit weights on a GPU."""
    import torch

    from tppo.models.load import compute_dtype
    from tppo.models.meta import Holding

    settings = options.work.model
    return Holding(
        dtype=compute_dtype(settings.dtype, torch.bfloat16, torch.device("cuda")),
        lora=options.lora_rank if lora else None,
        recompute=settings.gradient_checkpointing,
        gpu_nbytes=gpu_nbytes,
    )


def one_model(config: PretrainedConfig, name: str, options: PlanOptions) -> list[str]:
    """Lines: each stage's needs, whether they fit, and what to turn where they do not."""
    work, nbytes, guide = options.work, nbytes_of(options.gpu_memory), guide_config(options)
    lines = [
        f"{name} on {options.gpu_memory}: prompts of {work.prompt_tokens} tokens, answers of "
        f"{work.response_tokens}; GB of 10^9 bytes", *guide_lines(work), *server_lines(work),
        *engine_lines(config, holding(options, lora=False, gpu_nbytes=nbytes), work),
        f"labels of an endpoint: {ENOUGH} answers are enough to begin with (docs/evidence.md), "
        f"--generate.samples {ENOUGH} in place of {GenerateConfig().samples:,}",
    ]  # fmt: skip
    for lora in (False, True):
        how = holding(options, lora=lora, gpu_nbytes=nbytes)
        trained = f"adapters of rank {options.lora_rank} (LoRA)" if lora else "all weights"
        lines += ["", f"{trained} trained, {how.dtype}".replace("torch.", ""), _HEADER]
        for found in plan(config, how, work, guide):
            lines.append(_row(found))
            if found.total > nbytes:
                remedy = _remedy(config, how, work, found, guide)
                lines.append(f"  {found.stage} does not fit; {remedy}")
    return lines


def guide_config(options: PlanOptions) -> PretrainedConfig | None:
    """The configuration of another model that guides; None where none does.

    Errors: DataError for a guide without an algorithm that has one.
    """
    work = options.work
    if work.algorithm == "ppo":
        if work.guide != GuideConfig():
            raise DataError("--guide was given, expected --algorithm ppo++, aggrevated, lols or "
                            "d2lols with it: ppo has no guide")  # fmt: skip
        return None
    if work.guide.model is None:
        return None
    return configuration(Path(work.guide.model), work.guide.revision)[0]


def guide_lines(work: Work) -> list[str]:
    """What the guide takes beside the stages: the requests to an endpoint, and their price."""
    if work.algorithm == "ppo":
        return []
    if work.guide.model is not None:
        return [f"the guide {work.guide.model} is in memory beside the models of train"]
    if not work.guide.base_url:
        return ["the guide is the SFT model, which is in memory as the reference"]
    steps, ppo = work.ppo.steps, work.ppo
    answers = steps * ppo.batch_size * ppo.responses_per_prompt
    asked = round(answers * work.rlgf.asked(work.algorithm, steps))
    shown = 0 if work.algorithm == "ppo++" else work.response_tokens  # what the learner has begun
    read, written = asked * (work.prompt_tokens + shown), asked * work.response_tokens
    line = (f"the guide {work.guide.name} at its endpoint takes no memory: about {asked:,} "
            f"requests for {answers:,} answers in {steps} steps, at most {read / 1e6:.2f} million "
            f"tokens read and {written / 1e6:.2f} written, in the tokens of the model")  # fmt: skip
    if work.guide.price_read is not None and work.guide.price_written is not None:
        cost = (read * work.guide.price_read + written * work.guide.price_written) / 1e6
        line += f", which cost at most {cost:,.2f} at the prices given"
    return [line]


def server_lines(work: Work) -> list[str]:
    """What is not held here, because a server has it."""
    url = work.reward_server.base_url
    return [f"the reward model at {url} takes no memory here in train"] if url else []


def engine_lines(config: PretrainedConfig, how: Holding, work: Work) -> list[str]:
    """What vLLM's share of the GPU holds, and what to give where it is too small."""
    if work.rollout != "vllm":
        return []
    assert how.gpu_nbytes is not None
    found = engine_need(config, how, work, work.generate.batch_size)
    line = (f"vLLM has {found.nbytes / GB:.1f} GB while it samples (--vllm.memory-share "
            f"{work.vllm.memory_share:g}): {found.weights / GB:.1f} GB are its copy of the "
            "weights, ")  # fmt: skip
    if found.answers < 1:
        least = 1.2 * found.weights / how.gpu_nbytes
        return [f"{line}which leaves no room for an answer: at least --vllm.memory-share "
                f"{least:.2f}, or --rollout hf"]  # fmt: skip
    return [f"{line}the rest the keys and values of {found.answers} answers at once; during the "
            "update it takes none"]  # fmt: skip


_WIDTHS = (9, 9, 10, 10, 12, 7, 9, 8, 7, 2)
_NAMES = ("stage", "weights", "optimiser", "gradients", "activations", "logits", "KV cache",
          "reserve", "sum", "highest in")  # fmt: skip
_HEADER = "".join(
    f"{name:<{width}}" if i == 0 else f"  {name}" if i == 9 else f"{name:>{width}}"
    for i, (name, width) in enumerate(zip(_NAMES, _WIDTHS, strict=True))
)


def _row(found: Need) -> str:
    parts = (
        found.weights, found.optimizer, found.gradients, found.activations, found.logits,
        found.cache, found.reserve, found.total,
    )  # fmt: skip
    cells = [f"{part / GB:>{w}.1f}" for part, w in zip(parts, _WIDTHS[1:], strict=False)]
    return f"{found.stage:<{_WIDTHS[0]}}{''.join(cells)}  {found.moment}"


def _remedy(
    config: PretrainedConfig,
    how: Holding,
    work: Work,
    found: Need,
    guide: PretrainedConfig | None,
) -> str:
    level = first_level(config, how, work, [found.stage], guide)
    if level is not None:
        return f"it does with {flags(level, found.stage)}"
    instead = "a smaller model or a larger GPU" if how.lora else "LoRA, if its lines below fit,"
    return f"no batch is small enough: {instead} is the way"


def table(options: PlanOptions) -> list[str]:
    """Lines of Markdown: the four shapes on the four GPUs, all weights trained and LoRA."""
    names = ["model", "trained", *STAGES, *(f"{gpu} GB" for gpu in GPUS)]
    rows = [table_row(name, lora, options) for name in SHAPES for lora in (False, True)]
    return [f"| {' | '.join(names)} |", "|---" * len(names) + "|", *rows]


def table_row(name: str, lora: bool, options: PlanOptions) -> str:
    """One line of `table`: GB of each stage as it is, on 80 GB, and the level for each GPU."""
    config, guide = shape_config(name), guide_config(options)
    held = [holding(options, lora=lora, gpu_nbytes=gpu * GB) for gpu in GPUS]
    needs = [f"{found.total / GB:.1f}" for found in plan(config, held[2], options.work, guide)]
    levels = [first_level(config, how, options.work, STAGES, guide) for how in held]
    cells = ["no" if level is None else str(level) for level in levels]
    trained = f"LoRA {options.lora_rank}" if lora else "all"
    return f"| {' | '.join([name, trained, *needs, *cells])} |"
