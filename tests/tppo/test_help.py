"""The pages of `--help`: every flag with a sentence, a stage's own alone, and at once."""

import io
import json
import re
import resource
import subprocess
import sys
from contextlib import redirect_stdout

import pytest
import tyro

from tppo.cli import OTHERS, main
from tppo.flags import flags_of, help_text
from tppo.options import LabelOptions, Options, RunOptions, TrainOptions
from tppo.sessions.inspect import Options as InspectOptions
from tppo.settings import section
from tppo.stages.answering.command import AnswerOptions, ServeOptions
from tppo.stages.doctor import DoctorOptions
from tppo.stages.init import InitOptions
from tppo.stages.plan import PlanOptions
from tppo.stages.registry import REGISTRY
from tppo.stages.report.command import ReportOptions
from tppo.stages.study.command import StudyOptions, WriteOptions

KINDS = [
    Options, RunOptions, LabelOptions, TrainOptions, AnswerOptions, ServeOptions, InitOptions,
    DoctorOptions, PlanOptions, ReportOptions, StudyOptions, WriteOptions, InspectOptions,
]  # fmt: skip
COMMANDS = [["run"], *([name] for name in REGISTRY), *([name] for name in OTHERS),
            ["data", "inspect"], ["study", "write"]]  # fmt: skip


def page(*arguments, columns=80):
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as out:
        patch.setenv("COLUMNS", str(columns))
        with pytest.raises(SystemExit) as end:
            main(list(arguments))
    assert not end.value.code
    return out.getvalue()


def flags_on(text):
    return set(re.findall(r"^  (--[\w.-]+)", text, re.MULTILINE))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind.__module__}.{kind.__name__}")
def test_the_flags_are_those_that_are_taken_and_each_has_a_sentence(kind):
    with redirect_stdout(io.StringIO()) as out, pytest.raises(SystemExit):
        tyro.cli(kind, args=["--help"])
    taken = set(re.findall(r"^\W{1,2}(--\w[\w.-]*)", out.getvalue(), re.MULTILINE))
    flags = list(flags_of(kind))
    assert taken and {flag.name for flag in flags if flag.name.startswith("-")} == taken
    for flag in flags:
        assert re.match(r"\S.*[.?)]$", flag.text), f"{flag.name} says {flag.text!r}"


def test_a_stage_shows_its_own_flags_and_all_of_them_if_asked():
    own, every = page("sft", "--help"), page("sft", "--help-all")
    assert len(own.splitlines()) < 90
    assert {"--sft.lr", "--lora.rank", "--model", "--out", "--scratch.layers"} <= flags_on(own)
    assert not [name for name in flags_on(own) if name.startswith(("--ppo.", "--label."))]
    assert "--ppo.normalize" in every and "--ppo.no-normalize" in every
    assert flags_on(every) == {flag.name for flag in flags_of(Options)}
    assert "tppo sft --help-all" in own


@pytest.mark.parametrize(("stage", "flag"), [
    ("data", "--gap-minutes"), ("data", "--sessions.train-users"),
    ("generate", "--generate.samples"), ("label", "--label.endpoint.base-url"),
    ("label", "--agreement"),
    ("train-rm", "--reward-model.lr"), ("train", "--ppo.lr"), ("train", "--reward"),
    ("train", "--reward-model.min-auc"), ("train", "--eval.judge"), ("eval", "--eval.temperatures"),
    ("heat", "--eval.heat-users"),
])  # fmt: skip
def test_what_a_stage_depends_on_is_on_its_page(stage, flag):
    assert flag in flags_on(page(stage, "-h"))


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_page_fits_the_terminal(command):
    for columns in (80, 100):
        lines = page(*command, "--help", columns=columns).splitlines()
        assert lines[0].startswith(f"usage: tppo {' '.join(command)}")
        assert max(map(len, lines)) <= columns


def test_the_values_shown_are_those_that_the_run_folder_has(tmp_path):
    sizes = [f"--sessions.{name}-users=3" for name in ("train", "heldout", "test", "transfer")]
    main(["data", "--out", str(tmp_path), "--sft.max-steps", "77", "--threads", "1", *sizes])
    shown = page("sft", "--out", str(tmp_path), "--help")
    assert re.search(r"--sft.max-steps N .*\n.*\[77\]", shown)


@section
class Odd:
    """A class of a test."""

    given: tyro.conf.Positional[str]
    """What is given."""
    maybe: bool | None = None
    """Yes, no or neither."""
    on: bool = True
    """On."""


def test_kinds_of_flags_are_written_as_they_are_typed():
    text = help_text("x", "What it does.", list(flags_of(Odd)), ["A note."])
    assert "GIVEN                     What is given. [needed]" in text
    assert "--maybe {True,False}      Yes, no or neither. [none]" in text
    assert "--on                      On. [yes; --no-on]" in text


def test_the_list_of_commands_is_there_at_once():
    """In CPU time and in what is loaded: a clock would measure the other work of the machine."""
    code = ("import sys\nfrom tppo.cli import main\ntry:\n    main(['--help'])\n"
            "except SystemExit:\n    pass\nimport json, resource\n"
            "used = resource.getrusage(resource.RUSAGE_SELF)\n"
            "print(json.dumps([used.ru_utime + used.ru_stime, sorted(sys.modules)]))")  # fmt: skip
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    *lines, last = done.stdout.splitlines()
    seconds, modules = json.loads(last)
    packages = {name.split(".")[0] for name in modules}
    assert not {"torch", "transformers", "tyro", "pydantic", "rich", "ruamel", "numpy"} & packages
    assert seconds < 0.3
    assert after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime < 0.6
    for name in ["run", *REGISTRY, *OTHERS]:
        assert any(line.split()[0] == name for line in lines), name


def test_every_stage_begins_with_a_sentence():
    for stage in REGISTRY.values():
        if stage.in_run:
            assert stage.banner and re.fullmatch(r"[A-Z{].*[.?]", stage.banner), stage.name
