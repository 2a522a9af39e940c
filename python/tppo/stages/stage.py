"""What a stage is: its name, what it reads and writes, what it depends on; and the registered ones.

The stages themselves stand in `tppo.stages.registry`.  This file loads no torch; the functions are
imported when their stages run.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import import_module
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tppo.errors import DataError, short
from tppo.stages.artifacts import Artifact

if TYPE_CHECKING:
    from tppo.config import Config
    from tppo.stages.run import Run

RUN = "all stages that follow, in one run folder; those that are finished are skipped"


@dataclass(frozen=True)
class Given:
    """What decides which settings a stage depends on."""

    config: Config
    from_file: bool
    """Whether sessions are read from a log of the user."""
    from_model: bool
    """Whether SFT starts from a model of the user."""
    judge: Callable[[], str | None] = lambda: None
    """What names a judge in place of the rule, asked only where a stage depends on it."""


@dataclass(frozen=True)
class Stage:
    """One stage; a stage that is not registered does not exist.

    settings: names of those that change its result: `ppo.lr` is one, `ppo` a section, `-ppo.lr` the
    section without it, "rule" the edition of the rule's verdicts, "judge" the name of a judge in
    place of the rule, if there is one, "lora" the adapters, if some are trained, "guided" the
    algorithm with its guide, if it is not plain PPO, "rollout" the engine that samples, if it is
    not transformers' own.  A setting that decides how fast, how often or
    whether at all something happens, but not what comes of it, is not among them: changing it
    repeats no stage.
    An own output among the inputs is of rounds before; the first round has none.
    """

    name: str
    function: Callable[[Run], None] | str
    """Does the work inside `with run.stage(name)`; as `module:name` it is imported late."""
    help: str
    """What `tppo --help` says of it."""
    inputs: tuple[Artifact, ...] = ()
    outputs: tuple[Artifact, ...] = ()
    """What others may read of it: where one is not written, the stage fails."""
    settings: tuple[str, ...] | Callable[[Given], tuple[str, ...]] = ()
    lost: str = "its work so far is lost"
    """What a signal costs a stage that is under way."""
    outside: Callable[[Run], Path | None] | None = None
    """What the stage reads that the user names, None where he names nothing."""
    in_run: bool = False
    """Whether `tppo run` runs it, in the order of registration."""
    processes: bool = False
    """Whether several processes of torchrun may share it."""
    left_over: Callable[[Run], bool] | str | None = None
    """What `tppo run` calls where the stage is finished; True where there was something to do."""
    banner: str | None = None
    """The sentence with which `tppo run` begins the stage; {data}, {model}: what the user gave."""
    flags: tuple[str, ...] = ()
    """What its `--help` shows besides `settings`: --data, or as there."""

    def __call__(self, run: Run) -> None:
        """Do the work of the stage."""
        _resolved(self.function)(run)

    def go_on(self, run: Run) -> bool:
        """Do what a finished stage has left over; whether there was something."""
        return self.left_over is not None and _resolved(self.left_over)(run)

    def dependencies(self, given: Given) -> dict[str, Any]:
        """The settings that the result depends on, by name."""
        names = self.settings(given) if callable(self.settings) else self.settings
        return _chosen(given, names)


REGISTRY: dict[str, Stage] = {}


def register(stage: Stage) -> Stage:
    """Make a stage known, after those whose files it reads; gives it back.

    Errors: ValueError where its name is taken or not usable, an input is of no registered stage or
    is no output of it, or an output lies outside the stage's folder.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_-]*", stage.name) or re.search(r"-\d+$", stage.name):
        raise ValueError(f"stage name was {stage.name!r}, expected a lower-case letter, then "
                         "letters, digits, - and _; -NUMBER ends the names of rounds")  # fmt: skip
    if stage.name in REGISTRY or stage.name == "run":
        raise ValueError(f"stage name was {stage.name!r}, expected one that is not taken: there "
                         f"are run, {', '.join(REGISTRY)}")  # fmt: skip
    for output in stage.outputs:
        if output.stage != stage.name or not output.name:
            raise ValueError(f"stage {stage.name}: output {output.path!r}, expected a path "
                             f"{stage.name}/...")  # fmt: skip
    for artifact in stage.inputs:
        maker = stage if artifact.stage == stage.name else REGISTRY.get(artifact.stage)
        if maker is None or artifact.path not in [output.path for output in maker.outputs]:
            known = "no such stage is registered" if maker is None else "its stage has " + (
                ", ".join(output.path for output in maker.outputs) or "no outputs")  # fmt: skip
            raise ValueError(f"stage {stage.name}: input {artifact.path!r}, expected an output of "
                             f"a registered stage ({known})")  # fmt: skip
    REGISTRY[stage.name] = stage
    return stage


def load_stage(name: str) -> Stage:
    """The registered stage that `module:name` names; the module may lie in the working directory.

    Errors: DataError naming what is not there, or is no Stage.
    """
    from tppo.rewards.user_function import load_object  # not where only --help is wanted

    found = load_object(name)
    if not isinstance(found, Stage):
        raise DataError(f"{name} was {short(found)}, expected a Stage of tppo.stages.registry")
    return found if REGISTRY.get(found.name) is found else register(found)


def before(name: str) -> list[str]:
    """The stages whose files a stage reads, and theirs, in order."""
    found: set[str] = set()
    left = [name]
    while left:
        direct = {artifact.stage for artifact in REGISTRY[left.pop()].inputs}
        left += direct - found
        found |= direct
    return [other for other in REGISTRY if other in found - {name}]


def _resolved(function: Any) -> Any:
    if not isinstance(function, str):
        return function
    module, _, name = function.partition(":")
    return attrgetter(name)(import_module(module))


def _chosen(given: Given, names: Iterable[str]) -> dict[str, Any]:
    from tppo.config import guided_settings  # not where only --help is wanted
    from tppo.labels.rule import RULE
    from tppo.store.jsonl import plain

    found: dict[str, Any] = {}
    for name in names:
        if name.startswith("-"):
            section, _, key = name.removeprefix("-").rpartition(".")
            del found[section][key]
        elif name == "judge":
            judge = given.judge()
            found |= {} if judge is None else {name: judge}
        elif name == "guided":
            found |= guided_settings(given.config)
        elif name == "lora":
            found |= {name: plain(given.config.lora)} if given.config.lora.on else {}
        elif name == "rollout":
            found |= given.config.sampler.identity
        else:
            found[name] = RULE if name == "rule" else plain(attrgetter(name)(given.config))
    return found
