"""`tppo study` and `tppo study write`: what stands on the command line.

This file loads no torch: the processes that train do.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import tyro

from tppo.environment import load_libraries
from tppo.errors import DataError
from tppo.flags import parse
from tppo.progress import say
from tppo.settings import Count, FilePath, Text, from_dict, section
from tppo.stages.study.config import ANY_MODEL, Noise, StudyConfig
from tppo.stages.study.presets import PRESETS

ABOUT = (
    "Arms are trained at equal cost and compared: what labels of words buy, and rewards at tokens. "
    "tppo study write puts the figures into a page, tppo study readme sentences into the README."
)
OF_SYSTEMS = ("ser", "pit")
NAMES = ", ".join((*PRESETS, *OF_SYSTEMS))


@section
class StudyOptions:
    """Flags of `tppo study`."""

    study: tyro.conf.Positional[str] = "small"
    """A preset (labels, credit, small, scarce, tuning, ablations, rlgf, seconds; real and gpu with
    --model; ser and pit, of those two systems), or a YAML file of parts, arms and settings;
    `study.yaml` in the folder of a study is one."""
    out: FilePath = Path("runs/study")
    """The study's folder; a study that was stopped goes on from it."""
    model: FilePath | None = None
    """What the arms begin with, as --model of `tppo run`: a folder, a GGUF file; without it a model
    from scratch. Presets real and gpu need one."""
    workers: Count = 2
    """Processes of one thread that train at once."""
    noise: str | None = None
    """Label noise beside clean labels in place of the study's own (words=.088,sentences=.19)."""


@section
class WriteOptions:
    """Flags of `tppo study write`."""

    study: tyro.conf.Positional[FilePath] = Path("runs/study/study.json")
    """The study.json whose figures are written."""
    into: Annotated[FilePath, tyro.conf.arg(name="into")] = Path("docs/evidence.md")
    """A Markdown file with the lines <!-- study --> and <!-- /study -->: what stands between them
    is replaced."""
    mark: Text = "study"
    """The word of those lines, where a file holds several studies."""


@section
class ReadmeOptions:
    """Flags of `tppo study readme`."""

    runs: tyro.conf.Positional[tuple[FilePath, ...]] = ()
    """Folders of finished runs of the demo, one a seed, whose results demo.json is to hold."""
    studies: FilePath = Path("docs/studies")
    """The folder of labels.json, credit.json and demo.json."""
    into: Annotated[FilePath, tyro.conf.arg(name="into")] = Path("README.md")
    """The file with the marks demo and evidence."""


def main(arguments: list[str]) -> None:
    """Entry point of `tppo study`."""
    if arguments[:1] == ["readme"]:
        about = "Write what studies and the demo found into the README."
        readme = parse(ReadmeOptions, "tppo study readme", about, arguments[1:])
        from tppo.stages.study.readme import write_readme

        write_readme(readme.studies, readme.into, readme.runs)
        return
    if arguments[:1] == ["write"]:
        about = "Write the figures of a study into a page of Markdown."
        given = parse(WriteOptions, "tppo study write", about, arguments[1:])
        from tppo.stages.study.summary import write_into

        write_into(given.study, given.into, given.mark)
        return
    options = parse(StudyOptions, "tppo study", ABOUT, arguments)
    if options.study in OF_SYSTEMS:
        _of_a_system(options)
        return
    study = read_study(options.study)
    if options.noise is not None:
        study = study.with_noise(read_noise(options.noise))
    run(with_model(study, options.model), options.out, options.workers, options.model)


def _of_a_system(options: StudyOptions) -> None:
    """Errors: DataError for a flag that such a study has no use for."""
    if options.model is not None or options.noise is not None:
        raise DataError(f"--model or --noise was given, expected neither with study "
                        f"{options.study}, which trains a small model from scratch")  # fmt: skip
    load_libraries(threads=1)
    from tppo.stages.study.systems import SYSTEMS, run_system
    from tppo.store.folder_lock import FolderLock

    with FolderLock(options.out).held():
        run_system(SYSTEMS[options.study](), options.out)


def with_model(study: StudyConfig, model: Path | None) -> StudyConfig:
    """The study with the name of the model that it is run with.

    Errors: DataError where it needs one that is not given, or was written of another one.
    """
    given = None if model is None else model.name
    if study.model not in (None, ANY_MODEL, given) or study.model == ANY_MODEL and not given:
        named = "a model" if study.model == ANY_MODEL else repr(study.model)
        raise DataError(f"--model was {given!r}, expected the path of {named}, with which the arms "
                        "of this study begin")  # fmt: skip
    return replace(study, model=given)


def read_study(name: str) -> StudyConfig:
    """A preset, or the study of a YAML file.

    Errors: DataError naming file, line and field, or the presets where there is no such file.
    """
    if name in PRESETS:
        return PRESETS[name]()
    path = Path(name)
    if not path.exists():
        raise DataError(f"study was {name!r}, expected one of {NAMES}, or a YAML file")
    from tppo.store.yaml_file import read_yaml

    values, line_of = read_yaml(path)
    return from_dict(StudyConfig, {} if values is None else values, str(path), line_of)


def read_noise(text: str) -> Noise:
    """`words=.088,sentences=.19`; one that is not named is 0.  Errors: DataError."""
    expected = "expected words=P,sentences=P with probabilities from 0 to 1"
    values = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        if name not in ("words", "sentences") or name in values:
            raise DataError(f"--noise was {text!r}, {expected}")
        try:
            values[name] = float(value)
        except ValueError:
            raise DataError(f"--noise was {text!r}, {expected}") from None
    return Noise(**values)


def run(study: StudyConfig, out: Path, workers: int, model: Path | None = None) -> None:
    """Train what is not trained yet; study.json and report.html now and then, and at the end.

    Errors: DataError where the engine of its settings cannot be had here.
    """
    if study.settings.rollout == "vllm":
        from tppo.models.rollout.installed import need_vllm

        need_vllm()
    from tppo.stages.study.summary import Summary
    from tppo.stages.study.work import train_all
    from tppo.store.folder_lock import FolderLock
    from tppo.store.jsonl import plain
    from tppo.store.yaml_file import write_yaml

    with FolderLock(out).held():
        write_yaml(out / "study.yaml", plain(study))
        summary = Summary(study, out)
        summary.write(train_all(study, out, workers, summary, model))
    say(f"study: {out / 'study.json'}, {out / 'report.html'}")
