"""`tppo run` and the stages one by one: their flags, and what they do.

This file loads no torch, so that `--help` is there at once.
"""

from __future__ import annotations

import shlex
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import tyro

from tppo import environment
from tppo.config import Config, fill_defaults
from tppo.errors import DataError
from tppo.flags import wants_help
from tppo.help import stage_page
from tppo.labels.endpoint.config import (
    api_key,
    check,
    check_address,
    check_key,
    need_libraries,
)
from tppo.labels.label import machine_of
from tppo.options import LabelOptions, Options, PairOptions, RunOptions, TrainOptions
from tppo.progress import say, status
from tppo.settings import from_dict
from tppo.stages.registry import REGISTRY, Given
from tppo.stages.report.command import kept_fresh
from tppo.stages.trackers import need_trackers
from tppo.stopping import Stopped
from tppo.store.jsonl import plain, refuse_pipe
from tppo.store.run_folder import differences

PATHS = ("--data", "--out", "--model", "--config", "--agreement", "--export-batch",
         "--import-batch", "--heldout", "--pairs", "--unlabelled")  # fmt: skip
SETTINGS = "run.yaml"  # in the run folder: the flags of the newest command that changed it
KINDS: dict[str, type] = {"label": LabelOptions, "pit": PairOptions, "run": RunOptions,
                          "ser": PairOptions, "train": TrainOptions}  # fmt: skip


def perform(command: str, rest: list[str]) -> None:
    """Run a stage, or with "run" all of them, with the flags in `rest`.

    Errors: what its work meets, a ValueError, OSError, RuntimeError or ImportError.
    """
    options, extra = _parse(command, rest)
    if isinstance(extra, TrainOptions) and (extra.reward or extra.heldout or extra.judge):
        _train_by_function(extra)
        return
    on_pairs = isinstance(extra, PairOptions) and (
        extra.pairs or extra.heldout or extra.unlabelled)  # fmt: skip
    if on_pairs or command == "run" or not REGISTRY[command].processes:
        refuse_several(command)
    if isinstance(extra, PairOptions) and on_pairs:
        _on_pairs(command, extra)
        return
    names = _names(command, isinstance(extra, RunOptions) and extra.baselines)
    _run(command, names, options, extra.task() if isinstance(extra, LabelOptions) else None)


def refuse_several(command: str) -> None:
    """Errors: ValueError where torchrun has started several processes of what one does."""
    _, size = environment.processes()
    if size > 1:
        able = " and ".join(f"`tppo {name}`" for name in REGISTRY if REGISTRY[name].processes)
        raise ValueError(f"{size} processes, expected 1: several share {able} alone; start `tppo "
                         f"{command}` without torchrun")  # fmt: skip


def _parse(
    command: str, rest: list[str]
) -> tuple[Options, LabelOptions | PairOptions | RunOptions | TrainOptions]:
    for flag in PATHS:
        if _flag(rest, flag) == "":
            sys.exit(f"tppo {command}: {flag} was '', expected a path")
    name, default = f"tppo {command}", _defaults(command, rest)
    kind: Any = KINDS.get(command)
    start = default if kind is None else kind(options=default)
    if wants_help(rest):
        print(stage_page(command, start, rest))
        sys.exit(0)
    try:
        if kind is not None:
            extra = tyro.cli(kind, prog=name, args=rest, default=start)
            return extra.options, extra
        return tyro.cli(Options, prog=name, args=rest, default=default), LabelOptions()
    except DataError as error:  # of a section that tyro makes outside its own reports
        print(f"{name}: {error}", file=sys.stderr)
        sys.exit(2)


def _defaults(command: str, rest: list[str]) -> Options:
    """What the flags start from: --config, else, for a single stage, its run folder's settings."""
    config, out = _flag(rest, "--config"), Path(_flag(rest, "--out") or Options.out)
    if config is not None:
        return _read(Path(config))
    if command == "run" or not (out / SETTINGS).exists():
        return Options()
    return _read(out / SETTINGS, whole=True)


def _flag(rest: list[str], name: str) -> str | None:
    """The value that a flag has at last; flags that are parsed later start from it."""
    found = None
    for i, argument in enumerate(rest):
        if argument == name and i + 1 < len(rest):
            found = rest[i + 1]
        elif argument.startswith(f"{name}="):
            found = argument.removeprefix(f"{name}=")
    return found


def _missing(values: Any, whole: dict[str, Any], name: str = "") -> list[str]:
    """The settings that a document says nothing of, by their names with dots."""
    if not isinstance(values, dict):
        return [name.rstrip(".")]
    found = []
    for key, value in whole.items():
        if key not in values:
            found.append(name + key)
        elif isinstance(value, dict):
            found += _missing(values[key], value, f"{name}{key}.")
    return found


def _read(path: Path, *, whole: bool = False) -> Options:
    """The options of a run.yaml, or of a file that holds the settings alone.

    whole: tell what a file lacks that a run has written, which may have been cut since.
    """
    from tppo.store.yaml_file import read_yaml  # not where only --help is wanted

    try:
        values, line_of = read_yaml(path)
        values = {} if values is None else values
        if isinstance(values, dict) and "settings" in values:
            found = from_dict(Options, values, str(path), line_of)
            expected = plain(found)
            del expected["round"]
            if whole and (lacks := _missing(values, expected)):
                say(f"WARNING: {path} has no {', '.join(lacks[:3])}"
                    f"{f' and {len(lacks) - 3} more' if len(lacks) > 3 else ''}: their defaults "
                    "are taken; was it cut, or written by an earlier version?")  # fmt: skip
            return found
        return Options(settings=from_dict(Config, values, str(path), line_of))
    except DataError as error:
        sys.exit("\n".join(f"tppo: {line}" for line in str(error).splitlines()))


def _run(
    command: str, names: list[str], options: Options, label_task: tuple[str, Path] | None
) -> None:
    if options.data is not None:
        refuse_pipe(options.data)
    endpoints = (options.settings.label.endpoint, options.settings.eval.endpoint)
    for endpoint in endpoints:
        if endpoint.base_url:  # before it is written to the run folder
            check_address(endpoint.base_url)
    for line in environment.ignored(*(endpoint.api_key_env for endpoint in endpoints)):
        say(line)
    with status("loading torch and transformers"):
        environment.load_libraries(options.threads or (1 if options.model is None else None))
        from tppo.models.parallel import from_environment
        from tppo.stages.run import Run
    environment.check_backend()
    run = Run(
        out=options.out,
        config=fill_defaults(options.settings, options.model is not None),
        seed=options.seed,
        data=options.data,
        model=options.model,
        device_name=options.device,
        round=options.round,
    )
    world = from_environment()
    _check_early(command, names, run, label_task)
    say(f"tppo {command}: folder {options.out}, seed {options.seed}, device {run.device}"
        + (f", {world.size} processes" if world.size > 1 else ""))  # fmt: skip
    if label_task is not None and label_task[0] == "agreement":  # it only reads
        _label_task(run, *label_task)
        return
    first = world.rank == 0
    with (
        kept_fresh(options.out) if first else nullcontext(),  # the last page is not of a run
        run.folder.lock() if first else nullcontext(),
    ):
        if world.rank == 0:
            if command != "run":
                run.check_stages_before(command)
            _keep_settings(options)
        if label_task is not None:
            _label_task(run, *label_task)
        else:
            _run_stages(run, command, names)


def _train_by_function(extra: TrainOptions) -> None:
    """The Python door: no run of stages is read or written."""
    options = extra.options
    if options.round != 1:
        raise ValueError(f"--round was {options.round}, expected none with --reward")
    with status("loading torch and transformers"):
        environment.load_libraries(options.threads)
        from tppo.stages.own_reward import train_by_function
    environment.check_backend()
    say(f"tppo train: folder {options.out}, seed {options.seed}, reward {extra.reward}")
    train_by_function(
        extra.reward, extra.judge, options.model, options.data, extra.heldout, options.settings,
        out=options.out, seed=options.seed, device=options.device,
    )  # fmt: skip


def _on_pairs(command: str, extra: PairOptions) -> None:
    """SER or PIT on a file of preferences: no run of stages is read or written."""
    options = extra.options
    if command == "pit" and (extra.heldout or extra.unlabelled):
        raise ValueError("--heldout or --unlabelled was given, expected --pairs alone: PIT learns "
                         "from labelled pairs, and holds a share of them out")  # fmt: skip
    with status("loading torch and transformers"):
        environment.load_libraries(options.threads)
        from tppo.stages.pit_files import pit_on_files
        from tppo.stages.ser_files import ser_on_files
    environment.check_backend()
    say(f"tppo {command}: folder {options.out}, seed {options.seed}, pairs {extra.pairs}")
    common = {"skip_bad": extra.skip_bad, "out": options.out, "seed": options.seed,
              "device": options.device}  # fmt: skip
    if command == "pit":
        pit_on_files(extra.pairs, options.model, options.settings, **common)
    else:
        ser_on_files(extra.pairs, extra.heldout, extra.unlabelled, options.model,
                     options.settings, **common)  # fmt: skip


def _check_early(
    command: str, names: list[str], run: Any, label_task: tuple[str, Path] | None
) -> None:
    """Refuse before hours of other stages, and before the flags are kept, what a stage would."""
    if command == "run" and run.round > 1:
        raise ValueError(f"--round was {run.round}, expected 1: `tppo run` makes the first round, "
                         "single stages the later ones")  # fmt: skip
    if label_task is None:
        for name in names:
            run.check_outside(name)
    elif label_task[0] == "export_batch" and not label_task[1].absolute().parent.is_dir():
        raise ValueError(f"--export-batch was {str(label_task[1])!r}, expected a file in a folder "
                         "that is there")  # fmt: skip
    need_trackers(run.config.report_to)
    if run.config.lora.on:
        from tppo.models.adapters import need_peft

        need_peft()
    if run.config.rollout == "vllm" and any(map(partial(_samples, run.config), names)):
        from tppo.models.rollout.installed import need_vllm

        need_vllm()
    if command in ("run", "train") and run.config.algorithm != "ppo":
        from tppo.stages.guides import check_guide

        check_guide(run.config.guide)
    if command in ("run", "train", "baselines", "noise") and run.config.reward_server.base_url:
        from tppo.rewards.server import as_endpoint

        as_endpoint(run.config.reward_server)
    if command in ("run", "train", "eval"):
        run.judge  # noqa: B018 (one that is not there, or has no key, is refused here)
    label = run.config.label
    if machine_of(label) != "endpoint":
        return
    check_key(label.endpoint)
    if command == "label" or command == "run":
        need_libraries()
        check(label.endpoint)
    if command == "run" and label.endpoint.template != "words":
        raise ValueError(
            f"--label.endpoint.template was {label.endpoint.template!r}, expected 'words': a token "
            "reward model needs labels of words (`tppo label` alone takes both)"
        )
    if command == "run" and not run.label_cache.exists():
        if label.endpoint.base_url:
            api_key(label.endpoint)
        else:
            say("no --label.endpoint.base-url is given: `tppo label --export-batch` and "
                "--import-batch have to bring the labels")  # fmt: skip


def _samples(config: Config, name: str) -> bool:
    """Whether answers are sampled in a stage."""
    return "rollout" in REGISTRY[name].dependencies(Given(config, True, True))


def _keep_settings(options: Options) -> None:
    """The flags of this command are those from which a single stage starts next."""
    from tppo.store.yaml_file import read_yaml, write_yaml

    path, new = options.out / SETTINGS, plain(options)
    del new["round"]  # the next command is of the first again, unless it says so
    try:
        old = read_yaml(path)[0]
    except DataError:  # absent, or damaged: `tppo run` does not read it
        old = None
    if isinstance(old, dict):
        changes = differences("", old, new | {"out": old.get("out")})  # a folder may be moved
        if changes:
            say(f"{path} changes: {'; '.join(change.removeprefix('.') for change in changes)}")
    if old != new:
        write_yaml(path, new)


def _names(command: str, baselines: bool) -> list[str]:
    """The stages that a command runs."""
    if command != "run":
        return [command]
    return [n for n, stage in REGISTRY.items() if stage.in_run or baselines and n == "baselines"]


def _run_stages(run: Any, command: str, names: list[str]) -> None:
    for place, name in enumerate(names, 1):
        try:
            if command == "run":
                _run_unless_done(run, name, f"{place} of {len(names)}")
            else:
                run.perform(name)
        except Stopped as stop:
            lost = stop.lost or REGISTRY[name].lost
            raise Stopped(stop.signum, f"{name}: {lost}, earlier stages are kept") from None
    if command == "run":
        say("\n".join(_next_commands(run)))


def _next_commands(run: Any) -> list[str]:
    """What one can do with a finished run, for those who do not know it yet."""
    out = shlex.quote(str(run.out))
    return [
        "The run is finished. With its model:",
        f'  tppo answer --out {out} "red shoes" "click: trail shoes"   next queries for a history',
        f"  tppo serve --out {out}   the same in a browser, and as an OpenAI-compatible endpoint",
        f"  {run.out / 'report.html'}   what came of the run, on one page",
    ]


def _run_unless_done(run: Any, name: str, place: str) -> None:
    if not run.done(name):
        say(f"{name} ({place}): {_banner(run, name)}")
        run.perform(name)
    elif not run.go_on(name):
        say(f"{name}: finished before, skipped")


def _banner(run: Any, name: str) -> str:
    """The sentence with which a stage of `tppo run` begins."""
    text = REGISTRY[name].banner or f"{REGISTRY[name].help}."
    data = "a generator" if run.data is None else str(run.data)
    model = "A small Llama from scratch" if run.model is None else str(run.model)
    return text.replace("{data}", data).replace("{model}", model)


def _label_task(run: Any, name: str, path: Path) -> None:
    from tppo.stages.label import compare_labels, export_labels, import_labels

    tasks = {
        "agreement": compare_labels,
        "export_batch": export_labels,
        "import_batch": import_labels,
    }
    tasks[name](run, path)
