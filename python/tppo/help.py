"""What `--help` of a stage prints: the flags that its result depends on; `--help-all`: all of them.

This file loads no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tppo.config import Config
from tppo.flags import HELP_ALL, Flag, flags_of, heading, help_text
from tppo.options import Options
from tppo.stages.registry import REGISTRY, RUN, Given, Stage

SETTINGS = "settings."  # where they stand in the options
OF_ALL = ("--out", "--seed", "--device", "--threads", "--round", "--config")
OF_RUN = (*OF_ALL[:4], "--config", "--data", "--model", "--format", "--lora.rank", "--ppo.steps",
          "--label.labeller", "--eval.judge")  # fmt: skip


def stage_page(command: str, options: Any, arguments: Sequence[str]) -> str:
    """The page for the flags of a command, whose values are those of `options`.

    With --help-all among the arguments every flag is on it.
    """
    flags, usage = list(flags_of(type(options), options)), f"tppo {command} [flags]"
    about = _sentence(RUN if command == "run" else REGISTRY[command].help)
    if HELP_ALL in arguments:
        return help_text(usage, about, flags, heading=_heading)
    if command == "run":
        chosen = [flag for flag in flags if flag.name in (*OF_RUN, "--baselines")]
        notes = [
            "These are the flags that most runs need; tppo STAGE --help lists those of one stage "
            f"({', '.join(name for name in REGISTRY if REGISTRY[name].in_run)}), and "
            f"tppo run {HELP_ALL} every one."
        ]
        return help_text(usage, about, chosen, notes, heading=_heading)
    names = shown_flags(REGISTRY[command])
    chosen = [flag for flag in flags if _is_shown(flag, names)]
    notes = [f"tppo {command} {HELP_ALL} lists the flags of the other stages, which it takes too."]
    return help_text(usage, about, chosen, notes, heading=_heading)


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


def _heading(flag: Flag) -> str:
    """Flags of the whole configuration stand among those of every command."""
    return heading(flag._replace(section=Options) if flag.section is Config else flag)


def shown_flags(stage: Stage) -> set[str]:
    """Flags such as --data, settings, and sections of them that a stage has to do with."""
    given = [Given(config, from_file, from_model)
             for config in (Config(), _with_endpoint())
             for from_file, from_model in ((False, False), (True, True))]  # fmt: skip
    settings = stage.settings
    found = {*OF_ALL, *stage.flags}
    for one in given:
        found.update(settings(one) if callable(settings) else settings)
    found = {name for name in found if name.startswith("--") or not name.startswith("-")}
    found |= {"eval.judge"} if "judge" in found else set()
    found |= {"vllm"} if "rollout" in found else set()
    return found | ({"model"} if "model.dtype" in found else set())


def _with_endpoint() -> Config:
    from tppo.labels.config import LabelConfig

    return Config(label=LabelConfig(labeller="endpoint"))


def _is_shown(flag: Flag, names: set[str]) -> bool:
    place = flag.place.removeprefix("options.")
    if not place.startswith(SETTINGS):  # of every command, or of this one alone
        return flag.name in names or flag.section is not Options
    parents = place.removeprefix(SETTINGS).split(".")
    return any(".".join(parents[: i + 1]) in names for i in range(len(parents)))
