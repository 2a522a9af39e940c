"""`tppo doctor`: what this machine can train, what is missing, and a self-test."""

from __future__ import annotations

import os
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tppo.flags import parse
from tppo.progress import status
from tppo.settings import FilePath, section
from tppo.stages.needs import GB, LEVELS, STAGES, Work, flags, need, turned

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

    from tppo.models.meta import Holding

ABOUT = (
    "What this machine can do: its memory, which stages of which models fit it, which packages are "
    "missing and how to get them, the backends of every operator, and a self-test of each. With "
    "--model M the model itself is read in every way that a training reads it, and a table says "
    "what to trust. The exit status is 1 where the self-test or a way of reading fails."
)
# Extras of the package: the module that shows it is there, and what it is for.
EXTRAS = {
    "data": ("pyarrow", "logs in parquet files (AmazonQAC)"),
    "label": ("openai", "labels and judges at an endpoint"),
    "gguf": ("gguf", "a --model that is a GGUF file"),
    "lora": ("peft", "--lora.rank, adapters in place of all weights"),
    "study": ("bpe_openai", "what a label costs, in `tppo study`"),
    "tensorboard": ("tensorboard", "--report-to tensorboard"),
    "wandb": ("wandb", "--report-to wandb"),
    "trackio": ("trackio", "--report-to trackio"),
    "vllm": ("vllm", "--rollout vllm"),
    "triton": ("triton", "fused operators on an NVIDIA GPU"),
    "flash-attn": ("flash_attn", "the fastest shared prompts on an NVIDIA GPU"),
}
# What serves a labelling model, so that its verdicts keep to the schema of their requests.
LABEL_SERVER = ("python -m vllm.entrypoints.openai.api_server --model MODEL "
                "--served-model-name judge --enable-prefix-caching")  # fmt: skip
LABEL_FLAGS = ("--label.labeller endpoint --label.endpoint.base-url http://127.0.0.1:8000/v1 "
               "--label.endpoint.model judge --label.endpoint.api-key-env None")  # fmt: skip
OF_A_GPU = ("triton", "flash-attn")


@section
class DoctorOptions:
    """Flags of `tppo doctor`."""

    model: FilePath | None = None
    """A causal LM to plan for, by default four shapes from 0.5B to 14B parameters.  One in a local
    folder is loaded and read: PPO's step-0 ratio, shared prompts against dense ones, every backend
    that is here; of an id of the Hugging Face hub config.json alone is read."""
    plan: Literal["yes", "no"] = "yes"
    """Whether to compute what fits, which takes most of the time."""


def main(arguments: list[str]) -> None:
    """Entry point of `tppo doctor`."""
    options = parse(DoctorOptions, "tppo doctor", ABOUT, arguments)
    with status("loading torch and transformers"):
        import torch

        from tppo.models.load import resolve_device
    device = resolve_device("auto")
    print("\n".join([*machine_lines(device), "", *vllm_lines(), "",
                     *missing_lines(device.type == "cuda"), "", *server_lines()]))  # fmt: skip
    if options.plan == "yes":
        configs = shapes(options.model)  # a folder that cannot be read ends the command here
        try:
            print("\n".join(["", *fit_lines(configs, device, free_memory(device))]))
        except ValueError as error:  # the model may still be read, and trained
            print(f"\nwhat fits: {error}")
    good = options.model is None or check(options.model, device)
    print()
    from tppo_kernels.__main__ import main as kernels

    del torch
    sys.exit(kernels([]) or int(not good))


def check(path: Path, device: torch.device) -> bool:
    """Prints what reading a local model in every way gives; whether all of them agree."""
    from tppo.models.load import load_policy
    from tppo.models.tokenizer import load_tokenizer
    from tppo.stages.model_check import check_model, table

    if not path.is_dir() or not any(path.glob("*.safetensors")):
        print(f"\n{path}: no weights here (model.safetensors), so the model itself is not read")
        return True
    with status(f"reading {path}"):
        findings = check_model(load_policy(path, device), load_tokenizer(path))
    print("\n".join(["", f"{path}, read in every way that a training reads it", *table(findings)]))
    return all(found.good for found in findings)


def machine_lines(device: torch.device) -> list[str]:
    """Cores, memory and disk, what is free of them."""
    import torch

    from tppo.stages.free_memory import free_nbytes

    disk = shutil.disk_usage(".")
    host = free_nbytes(torch.device("cpu"))
    lines = [
        f"CPU           {len(os.sched_getaffinity(0))} cores, {host / GB:.1f} GB of memory free",
        f"disk          {disk.free / GB:.0f} GB free in {Path.cwd()}",
    ]
    if device.type != "cuda":
        return [*lines, "GPU           none that torch can use: every stage runs on the CPU"]
    for i in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(i)
        lines.append(f"GPU {i}         {torch.cuda.get_device_name(i)}, {free / GB:.1f} of "
                     f"{total / GB:.1f} GB free")  # fmt: skip
    return lines


def free_memory(device: torch.device) -> int:
    """Bytes that a training could take of the device."""
    from tppo.stages.free_memory import free_nbytes

    return free_nbytes(device)


def vllm_lines() -> list[str]:
    """What is installed of the engine of --rollout vllm, and what is known."""
    from tppo.models.rollout.installed import REMEDY, VERSIONS, installed, known

    found = installed()
    if found is None:
        return [f"vllm          not installed, known {VERSIONS}, for --rollout vllm: {REMEDY}"]
    said = "" if known(found[1]) else f", which --rollout vllm refuses: {REMEDY}"
    return [f"vllm          {found[0]} {found[1]}, known {VERSIONS}{said}"]


def missing_lines(gpu: bool) -> list[str]:
    """A line for each optional package that is not there; those of a GPU only beside one."""
    found = []
    for extra, (module, what) in EXTRAS.items():
        if find_spec(module) is None and (gpu or extra not in OF_A_GPU):
            found.append(f"  {what}: pip install 'tppo-kernels[{extra}]'")
    return ["missing packages", *found] if found else ["no optional package is missing"]


def server_lines() -> list[str]:
    """How a server of vLLM is started, and asked, for labels and for rewards."""
    from tppo.rewards.server import START

    here = "vLLM is installed here" if find_spec("vllm") else "vLLM, which is not installed here"
    return [
        f"servers to start ({here})",
        f"  labels        {LABEL_SERVER}", f"  asked with    {LABEL_FLAGS}",
        f"  reward model  {START.format(folder='RUN/train-rm/model')}",
        "  asked with    --reward-server.base-url http://127.0.0.1:8000",
    ]  # fmt: skip


def shapes(model: Path | None) -> dict[str, PretrainedConfig]:
    """The configurations to plan for, by name."""
    from tppo.stages.plan import SHAPES, configuration, shape_config

    if model is not None:
        return {str(model): configuration(model)[0]}
    return {name: shape_config(name) for name in SHAPES}


def fit_lines(
    configs: dict[str, PretrainedConfig], device: torch.device, free: int
) -> list[str]:
    """A table: for each model, all weights or adapters trained, which stages fit `free` bytes."""
    work, used = Work(), set[int]()
    rows: list[tuple[str, ...]] = [("model", "trained", *STAGES)]
    too_large = False
    for name, config in configs.items():
        for lora in (None, 16):
            how = holding(device, lora)
            if too_large:  # than one that fits in no way: nor does this
                levels: list[int | None] = [None] * len(STAGES)
            else:
                with status(f"planning {name}"):
                    levels = [first_level(stage, config, how, work, free) for stage in STAGES]
            used |= {level for level in levels if level}
            cells = ["no" if one is None else f"({one})" if one else "yes" for one in levels]
            rows.append((name, "LoRA 16" if lora else "all", *cells))
        too_large = too_large or all(level is None for level in levels)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    table = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip()
             for row in rows]  # fmt: skip
    notes = [f"({level}): with {_flags(level)}" for level in sorted(used)]
    where = "GPU" if device.type == "cuda" else "CPU"
    head = (f"what fits the {free / GB:.1f} GB that are free for the {where}, with prompts of "
            f"{work.prompt_tokens} tokens (`tppo plan` says more)")  # fmt: skip
    return [head, *table, *notes]


def holding(device: torch.device, lora: int | None) -> Holding:
    """How a run would hold a model of 16-bit weights on the device."""
    import torch

    from tppo.models.load import compute_dtype
    from tppo.models.meta import Holding

    nbytes = None
    if device.type == "cuda":
        nbytes = torch.cuda.get_device_properties(device).total_memory
    return Holding(compute_dtype("auto", torch.bfloat16, device), lora, False, nbytes)


def first_level(
    stage: str, config: PretrainedConfig, how: Holding, work: Work, free: int
) -> int | None:
    """The first of LEVELS with which a stage fits; None where none does."""
    for number, level in enumerate(LEVELS):
        used, chosen = turned(level, how, work)
        found = need(stage, config, used, chosen)
        # On a CPU the best weights wait in the same memory.
        if found.total + (0 if how.gpu_nbytes else found.host) <= free:
            return number
    return None


def _flags(level: int) -> str:
    """What to type for every stage to have the settings of a level."""
    each = " ".join(flags(level, stage) for stage in STAGES).split("--")
    return " ".join(dict.fromkeys(f"--{flag.strip()}" for flag in each if flag.strip()))
