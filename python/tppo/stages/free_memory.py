"""Before SFT: what the stages will take of the device's memory, against what is free there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from tppo.models.load import load_from
from tppo.models.meta import Holding
from tppo.progress import say
from tppo.stages.guides import guide_of_run
from tppo.stages.needs import GB, Need, Work, plan
from tppo.stages.run import Run

SMALLEST = 50_000_000  # parameters: of fewer, planning takes longer than it takes to see it fail
TOLERANCE = 1.15  # of the plan: its figures are within 15 % of measured peaks
_PROC, _CGROUP = Path("/proc"), Path("/sys/fs/cgroup")


def check_memory(run: Run, model: PreTrainedModel, prompt_tokens: int, cap: int) -> None:
    """Compare the plan of every stage with what is free, where `model` is already loaded.

    prompt_tokens, cap: of the longest prompt and the longest answer.  A model of few parameters is
    not planned, nor one of a type that has no plan.
    Errors: as `compare`.
    """
    if sum(p.numel() for p in model.parameters()) < SMALLEST:
        return
    config, device = run.config, model.device
    gpu = None
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device).total_memory
    how = Holding(
        model.dtype, config.lora.rank or None, config.model.gradient_checkpointing, gpu
    )  # fmt: skip
    work = Work(
        max(2, prompt_tokens), cap, config.prefix, config.model, config.sft, config.generate,
        config.reward_model, config.ppo, config.algorithm, config.rlgf, config.guide,
        rollout=config.rollout, vllm=config.vllm, reward_server=config.reward_server,
    )  # fmt: skip
    try:
        needs = plan(model.config, how, work, _of_guide(run))
    except ValueError as error:
        say(f"memory is not checked: {error}")
        return
    compare(needs, free_nbytes(device), device, str(run.model))


def _of_guide(run: Run) -> PretrainedConfig | None:
    """The configuration of another model that guides."""
    folder = guide_of_run(run)
    return None if folder is None else load_from(AutoConfig, folder)


def compare(needs: Sequence[Need], free: int, device: torch.device, model: str) -> None:
    """Say which stage takes the most, where that is more than is free.

    On a CPU the best weights wait in the same memory, and swap space may hold what does not fit: it
    is a warning there.
    Errors: ValueError where a GPU has less than the plan, with its error of 15 % taken off.
    """
    cpu = device.type == "cpu"
    taken = [need.total + (need.host if cpu else 0) for need in needs]
    most = max(taken)
    if most <= free:
        return
    need = needs[taken.index(most)]
    found = (
        f"{need.stage} would take {most / GB:.1f} GB of {device} at its highest ({need.moment}), "
        f"and {free / GB:.1f} GB are free; `tppo plan --model {model}` says what takes it, and "
        "which settings take less"
    )
    if most > TOLERANCE * free and not cpu:
        raise ValueError(f"{model}: {found}")
    say(f"WARNING: {found}")


def free_nbytes(device: torch.device) -> int:
    """What the process may still take of the device's memory, with what its tensors have of it."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    status = _fields(_PROC / "self/status")
    own = status.get("RssAnon", status.get("VmRSS", 0))
    available = [_fields(_PROC / "meminfo").get("MemAvailable", 2**62)]
    limit, used = (_number(_CGROUP / f"memory.{name}") for name in ("max", "current"))
    if limit is not None and used is not None:  # of a container
        cached = _fields(_CGROUP / "memory.stat").get("inactive_file", 0)
        available.append(limit - used + cached)
    return own + max(0, min(available))


def _fields(file: Path) -> dict[str, int]:
    """Numbers of a file of the kernel by name, in bytes; none where there is no such file."""
    found = {}
    for line in _text(file).splitlines():
        name, *rest = line.replace(":", " ").split()
        if rest and rest[0].isdecimal():
            found[name] = int(rest[0]) * (1024 if rest[1:] == ["kB"] else 1)
    return found


def _number(file: Path) -> int | None:
    text = _text(file).strip()
    return int(text) if text.isdecimal() else None  # "max" is no limit


def _text(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""
