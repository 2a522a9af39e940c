"""The command line: which command is meant, and what becomes of signals and errors.

This file loads little, so that `tppo --help` is there at once; each command imports what it needs.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from importlib import import_module
from signal import SIGPIPE
from typing import NoReturn

from tppo import environment
from tppo.console import accept_any_text
from tppo.progress import say
from tppo.stopping import Stopped, listening

# Commands beside the stages: what each does, and the function that takes its flags, which is
# imported when it runs.
OTHERS = {
    "answer": ("the next queries after a history of yours, by the model that a run has trained",
               "tppo.stages.answering.command:answer"),
    "serve": ("the same behind an OpenAI-compatible endpoint, with a page to try it",
              "tppo.stages.answering.command:serve"),
    "init": ("five questions about a log, and a commented YAML file for `tppo run --config`",
             "tppo.stages.init:main"),
    "doctor": ("what this machine can train, what is missing, and a self-test of the operators",
               "tppo.stages.doctor:main"),
    "plan": ("what each stage would take of a GPU's memory, before anything is trained",
             "tppo.stages.plan:main"),
    "replay": ("repeats a batch that PPO skipped because its figures were not finite, and names "
               "the operator", "tppo.stages.replay:main"),
    "report": ("report.html of a run folder, finished or under way: result, curves, answers",
               "tppo.stages.report.command:main"),
    "study": ("arms trained at equal cost and compared: what labels of words and rewards of "
              "tokens buy", "tppo.stages.study.command:main"),
}  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    """Entry point of `tppo`."""
    arguments = sys.argv[1:] if arguments is None else arguments
    accept_any_text()
    try:
        with listening():
            try:
                _main(arguments)
            finally:
                sys.stdout.flush()
    except Stopped as stop:
        say(f"tppo {arguments[0]}: stopped by {stop.cause}: {stop.lost or 'nothing is lost'}. "
            "The same command goes on from there")  # fmt: skip
        sys.exit(stop.code)
    except BrokenPipeError:  # such as `| head`: what it wants to read is all that it gets
        _write_no_more()
        sys.exit(128 + SIGPIPE)
    except OSError as error:  # of stdout itself, such as a full disk: no stage is under way
        _write_no_more()
        sys.exit(f"tppo {arguments[0]}: what is printed cannot be written: {_told(error)}")


def _write_no_more() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _main(arguments: list[str]) -> None:
    command, rest = _command(arguments), arguments[1:]
    try:
        environment.check()
        if command in OTHERS or (command == "data" and rest[:1] == ["inspect"]):
            if environment.processes()[1] > 1:
                from tppo.commands import refuse_several

                refuse_several(command)
            _other(command)(rest if command in OTHERS else rest[1:])
        else:
            from tppo.commands import perform

            perform(command, rest)
    except BrokenPipeError:
        raise
    except (ValueError, OSError, RuntimeError, ImportError, FloatingPointError) as error:
        if os.environ.get("TPPO_TRACEBACK") == "1":
            raise
        sys.exit(f"tppo {command}: {_told(error)}")


def _other(command: str) -> Callable[[list[str]], None]:
    """The function of a command that is no stage."""
    where = OTHERS[command][1] if command in OTHERS else "tppo.sessions.inspect:main"
    module, _, name = where.partition(":")
    return getattr(import_module(module), name)


def _command(arguments: list[str]) -> str:
    """The command; `module:STAGE` names a stage from outside the package, which is registered."""
    name = arguments[0] if arguments else ""
    if name == "run" or name in OTHERS:
        return name
    from tppo.stages.registry import REGISTRY, load_stage

    if ":" in name:
        try:
            return load_stage(name).name
        except (ValueError, ImportError) as error:
            sys.exit(f"tppo {name}: {error}")
    if name not in REGISTRY:
        _usage(name)
    return name


def _told(error: Exception) -> str:
    """What an error says; one of the system's without its number, the file first."""
    if isinstance(error, ModuleNotFoundError) and str(error).startswith("No module named"):
        name = (error.name or "").split(".")[0]
        if name not in ("tppo", "tppo_kernels"):
            return f"{name} is not installed: pip install 'tppo-kernels[train]'"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename2 or error.filename}: {error.strerror}"
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def _usage(name: str) -> NoReturn:
    """Prints what there is to run; where that was not asked for, it is an error."""
    from tppo.stages.registry import REGISTRY, RUN

    texts = {"run": RUN} | {name: stage.help for name, stage in REGISTRY.items()}
    texts |= {name: text for name, (text, _) in OTHERS.items()}
    lines = [f"  {name:<9} {text}" for name, text in texts.items()]
    lines.append("  module:STAGE  a stage of your own, as tppo.stages.registry says")
    text = "\n".join(["usage: tppo COMMAND [flags]; tppo COMMAND --help lists them", *lines])
    if name in ("-h", "--help"):
        print(text)
        sys.exit(0)
    sys.exit(f"{f'unknown command {name!r}' if name else ''}\n{text}".strip())
