"""`tppo init`: five questions about a log, and a YAML file that `tppo run --config` takes.

This file loads no torch.  Each question has a flag that answers it; the others are asked at the
terminal, or read from the standard input, a line each.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from tppo.config import Config
from tppo.errors import DataError, short
from tppo.flags import flags_of, parse, sentences
from tppo.labels.config import LabelConfig
from tppo.labels.endpoint.config import EndpointConfig, check_address
from tppo.progress import say, track
from tppo.sessions.config import SessionsConfig
from tppo.sessions.readers import Format, ReadConfig, SessionLog, detect_format
from tppo.settings import FilePath, Text, section
from tppo.store.jsonl import plain, write_text
from tppo.store.yaml_file import commented_yaml

ABOUT = (
    "Asks five questions (which log, its format, what a wrong row does, which model, who labels) "
    "and writes a commented YAML file of the settings that most runs turn. An empty answer takes "
    "what stands in brackets."
)
COUNTED = 20_000  # sessions of a log that are read to describe it
NONE = ("", "none")
# What stands in the file, by the places in `tppo.options.Options`; of a log, or of none.
ALWAYS = ("data", "out", "seed", "model", "device")
OF_LOG = ("sessions.heldout_share", "sessions.test_share", "sessions.read.format",
          "sessions.read.on_bad_row", "sessions.read.duplicates")  # fmt: skip
OF_AOL = ("sessions.read.gap_minutes", "sessions.read.targets")
OF_NONE = ("sessions.train_users", "sessions.queries")
SETTINGS = ("lora.rank", "generate.samples", "generate.temperature", "label.labeller")
OF_ENDPOINT = ("label.endpoint.base_url", "label.endpoint.model", "label.endpoint.api_key_env")
OF_HAND = ("label.hand.answers",)
LAST = ("ppo.steps", "ppo.responses_per_prompt", "ppo.kl_coef", "eval.judge")


@section
class InitOptions:
    """Flags of `tppo init`, each the answer to a question but the first."""

    into: FilePath = Path("run.yaml")
    """The file to write."""
    data: str | None = None
    """Which log? A file of search sessions or chats; none: sessions are generated."""
    format: str | None = None
    """In which format? One of those of `tppo data --format`; auto goes by the file."""
    on_bad_row: Literal["stop", "skip"] | None = None
    """What does a row that is wrong: stop the reading, or get skipped and counted?"""
    model: str | None = None
    """Which model? A folder, a .gguf file or an id of the Hugging Face hub; none: a small Llama
    from scratch."""
    labeller: Text | None = None
    """Who says which words are relevant? The rule, you by hand on a page, or a model at an
    OpenAI-compatible endpoint as NAME@http://HOST/v1."""


class Answered(NamedTuple):
    """What was answered."""

    data: Path | None
    read: ReadConfig
    model: Path | None
    label: LabelConfig
    about: str


def main(arguments: list[str]) -> None:
    """Entry point of `tppo init`."""
    options = parse(InitOptions, "tppo init", ABOUT, arguments)
    if options.into.exists():
        raise DataError(f"{options.into}: is there already, expected a new file (--into)")
    write_text(options.into, "\n".join(file_lines(ask(options))) + "\n")
    into = shlex.quote(str(options.into))
    say(f"{options.into} is written; `tppo run --config {into}` takes it, and every flag goes "
        "before what stands there")  # fmt: skip


def ask(options: InitOptions) -> Answered:
    """The answers of the flags, and to the other questions."""
    data = _answer("data", options.data, "none", _log)
    read, about = ReadConfig(), "Sessions are generated: no log was given."
    if data is not None:
        found = detect(data)
        format = _answer("format", options.format, found, _format)
        read = ReadConfig(format=format)
        about, bad = described(data, read)
        say(about)
        rows: Any = _answer("on_bad_row", options.on_bad_row, "skip" if bad else "stop", _bad_row)
        read = replace(read, on_bad_row=rows)
    model = _answer("model", options.model, "none", _model)
    label = _answer("labeller", options.labeller, "rule", _labeller)
    return Answered(data, read, model, label, about)


def detect(data: Path) -> str:
    """The format that a log seems to have; auto where it is like none."""
    try:
        return detect_format(data)
    except DataError as error:
        say(str(error))
        return "auto"


def described(data: Path, read: ReadConfig) -> tuple[str, int]:
    """A sentence on the beginning of a log, and how many of its rows are wrong.

    Errors: DataError where it holds no session at all.
    """
    log = SessionLog(data, replace(read, on_bad_row="skip"))
    sessions = list(islice(track(log, f"reading {data}"), COUNTED))
    if not sessions:
        first = f": {log.bad.first[0]}" if log.bad.first else ""
        raise DataError(f"{data}: no session in it as {log.format}{first}")
    users = len({session.user for session in sessions})
    more = "at least " if len(sessions) == COUNTED else ""
    wrong = "none of its rows is wrong"
    if log.bad.count:
        wrong = f"{log.bad.count} of its rows are wrong, the first: {log.bad.first[0]}"
    return (
        f"{data}: {more}{len(sessions)} sessions of {users} users, read as {log.format}; {wrong}.",
        log.bad.count,
    )


def _answer(name: str, given: str | None, default: str, read: Callable[[str], Any]) -> Any:
    """What a flag says, or what is answered to its question: on a terminal until it can be."""
    if given is not None:
        return read(given)
    question = sentences(InitOptions)[name]
    terminal = sys.stdin.isatty()
    while True:
        print(f"{question} [{default}] ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            flag = f"--{name.replace('_', '-')}"
            raise DataError(f"{flag}: the input ended before the answer to {question!r}; expected "
                            f"a line, or {flag}")  # fmt: skip
        if not terminal:
            print(line.strip(), file=sys.stderr)
        try:
            return read(line.strip() or default)
        except DataError as error:
            if not terminal:
                raise
            say(str(error))


def _log(text: str) -> Path | None:
    if text.lower() in NONE:
        return None
    path = Path(text).expanduser()
    if not path.is_file():
        raise DataError(f"--data was {short(text)}, expected a file that is there, or none")
    return path


def _format(text: str) -> str:
    if text not in ("auto", *get_args(Format)):
        raise DataError(f"--format was {short(text)}, expected auto, {', '.join(get_args(Format))}")
    return text


def _bad_row(text: str) -> str:
    if text not in ("stop", "skip"):
        raise DataError(f"--on-bad-row was {short(text)}, expected stop or skip")
    return text


def _model(text: str) -> Path | None:
    path = Path(text).expanduser()
    if text.lower() in NONE:
        return None
    if not path.exists() and not re.fullmatch(r"[\w.-]+/[\w.-]+", text):
        raise DataError(f"--model was {short(text)}, expected a folder or a .gguf file that is "
                        "there, an id owner/name, or none")  # fmt: skip
    return path


def _labeller(text: str) -> LabelConfig:
    if text in ("rule", "hand"):
        return LabelConfig(labeller="rule" if text == "rule" else "hand")
    name, at, address = text.partition("@")
    if not name or not at:
        raise DataError(f"--labeller was {short(text)}, expected rule, hand, or "
                        "NAME@http://HOST/v1")  # fmt: skip
    try:
        check_address(address)
    except ValueError as error:
        raise DataError(f"--labeller was {short(text)}: {error}") from None
    endpoint = EndpointConfig(base_url=address, model=name)
    return LabelConfig(labeller="endpoint", endpoint=endpoint)


def file_lines(answers: Answered) -> list[str]:
    """The lines of the YAML file: each value with the sentence of its flag above it."""
    config = Config(sessions=SessionsConfig(read=answers.read), label=answers.label)
    name = "generated" if answers.data is None else answers.data.name.partition(".")[0] or "log"
    values = {"data": answers.data, "out": Path("runs") / name, "seed": 0, "model": answers.model,
              "device": "auto"}  # fmt: skip
    places = [*(OF_NONE if answers.data is None else OF_LOG)]
    places += OF_AOL if answers.read.format == "aol" else ()
    places += SETTINGS
    places += OF_ENDPOINT if answers.label.labeller == "endpoint" else ()
    places += OF_HAND if answers.label.labeller == "hand" else ()
    places += LAST
    tree: dict[str, Any] = plain({place: values[place] for place in ALWAYS})
    for place in places:
        parents, _, last = f"settings.{place}".rpartition(".")
        branch = tree
        for parent in parents.split("."):
            branch = branch.setdefault(parent, {})
        branch[last] = plain(attrgetter(place)(config))
    about = "".join(c if c.isprintable() else "?" for c in answers.about)
    head = [
        "# Settings of a run, written by `tppo init`: tppo run --config THIS-FILE",
        f"# {about}",
        "# What is not here has its default; tppo run --help-all lists every setting.",
        "",
    ]
    comments = _comments()
    return head + commented_yaml(tree, lambda place: comments.get(place, ""))


def _comments() -> dict[str, str]:
    """The sentence of each setting by its place."""
    own = {
        "data": "Log file; null: sessions are generated.",
        "out": "The run folder.",
        "seed": "Decides everything random.",
        "model": "A folder, a .gguf file or an id of the hub; null: a small Llama from scratch.",
        "device": "auto, cpu, cuda, or cuda:1 for the second GPU.",
    }
    settings = {f"settings.{flag.place}": flag.text for flag in flags_of(Config)}
    return settings | own
