"""`tppo answer` and `tppo serve`: what stands on the command line.

This file loads no torch, so that their help is there at once.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from pydantic import Field

from tppo.console import is_unicode
from tppo.environment import load_libraries
from tppo.errors import DataError
from tppo.flags import parse
from tppo.models.config import RolloutName
from tppo.progress import say, status
from tppo.settings import Count, FilePath, Natural, NonNegative, Text, section
from tppo.store.jsonl import bounded_lines, plain

if TYPE_CHECKING:
    from tppo.stages.answering.answerer import Answer, Answerer
    from tppo.stages.answering.histories import Asked

ABOUT = (
    "The next queries after a user's history, by the model that a run has trained. Without events "
    "and --data histories are read from the standard input, or typed at the terminal: an event a "
    "line, a blank line between two histories."
)
ABOUT_SERVE = (
    "The trained model behind an OpenAI-compatible endpoint (/v1/chat/completions and "
    "/v1/completions), with a page to try it, for programs and browsers of this machine alone."
)


@section
class ModelFlags:
    """Which model answers, and where it runs."""

    out: FilePath = Path("runs/default")
    """A run folder, or the folder of an exported model alone, such as a copy of train/model."""
    reward_model: FilePath | None = None
    """Folder of a token reward model, which says what each token is worth; by default the run's."""
    device: Text = "auto"
    """auto, cpu, cuda, or cuda:1 for the second GPU."""
    threads: Count | None = None
    """CPU threads; by default torch's own."""
    rollout: RolloutName = "hf"
    """Who samples: hf, transformers' generate; vllm, an engine in this process (docs/vllm.md)."""


@section
class AnswerOptions:
    """Flags of `tppo answer`."""

    events: tyro.conf.Positional[tuple[str, ...]] = ()
    """The events of one history, the oldest first, each in quotes: "red shoes" "click: trail"."""
    data: FilePath | None = None
    """Histories to answer: a JSONL file with {"history": [...]} a line ({"prompt": ...} for a model
    that was trained by --reward), or a text file with an event a line."""
    several: Count = 1
    """Answers to each history."""
    queries: Annotated[Count | None, Field(lt=1000)] = None
    """Next queries of an answer; by default as many as in training."""
    temperature: NonNegative | None = None
    """Of sampling; 0 takes the likeliest tokens; by default that of training."""
    seed: Natural = 0
    """Decides what is drawn."""
    json: bool = False
    """A JSON object a line for each answer: queries with log-prob and confidence, and the log-prob,
    reward and class of every token."""
    batch_size: Count = 64
    """Answers that are sampled at once: fewer take less memory."""
    model: Annotated[ModelFlags, tyro.conf.arg(name="")] = ModelFlags()


@section
class ServeOptions:
    """Flags of `tppo serve`."""

    port: Annotated[Natural, Field(lt=65536)] = 8017
    """Port of 127.0.0.1; 0: any that is free."""
    name: Text | None = None
    """What clients call the model; by default the name of its folder."""
    model: Annotated[ModelFlags, tyro.conf.arg(name="")] = ModelFlags()


def answer(arguments: list[str]) -> None:
    """Entry point of `tppo answer`."""
    options = parse(AnswerOptions, "tppo answer", ABOUT, arguments)
    if options.events and options.data is not None:
        raise DataError("events and --data were given, expected one of them")
    model = load_model(options.model)
    given = _given(options, model)
    size = max(1, options.batch_size // options.several)
    named = options.several > 1 or not options.events
    while part := list(islice(given, 1 if sys.stdin.isatty() else size)):
        found = model.answers(
            part,
            several=options.several,
            queries=options.queries,
            temperature=options.temperature,
            seed=options.seed,
            batch_size=options.batch_size,
        )
        for of_one in found:
            for number, one in enumerate(of_one, 1):
                text = _json(one, number) if options.json else _text(one, number, named)
                print(text, flush=True)


def serve(arguments: list[str]) -> None:
    """Entry point of `tppo serve`."""
    options = parse(ServeOptions, "tppo serve", ABOUT_SERVE, arguments)
    from tppo.stages.answering.serve import listen

    model = load_model(options.model)
    listen(model, options.port, options.name or options.model.out.absolute().name)


def load_model(flags: ModelFlags) -> Answerer:
    """The model that the flags name."""
    with status("loading torch and transformers"):
        load_libraries(flags.threads)
        from tppo.stages.answering.answerer import load
    model = load(flags.out, reward_model=flags.reward_model, device=flags.device,
                 rollout=flags.rollout)  # fmt: skip
    if model.reward is None:
        say(f"{model.path}: no reward model is beside it, so tokens have log-probs and no rewards "
            "(--reward-model names one)")  # fmt: skip
    return model


def _given(options: AnswerOptions, model: Answerer) -> Iterator[Asked]:
    from tppo.stages.answering.histories import asked, read_file, read_histories

    recipe = model.recipe
    if options.events:
        events = list(options.events)
        given = "\n".join(events) if recipe.prompt == "as given" else events
        return iter([asked(given, recipe, "the history")])
    if options.data is not None:
        return read_file(options.data, recipe)
    if sys.stdin.isatty():
        say("Type a history, an event a line, the oldest first; a blank line asks for the answer, "
            "Ctrl-D ends.")  # fmt: skip
    name = Path("stdin")
    return read_histories(bounded_lines(sys.stdin.buffer, name), name, recipe)


def _json(answer: Answer, number: int) -> str:
    row = plain({"id": answer.id, "answer": number, "logprob": answer.logprob,
                 "reward": answer.reward}) | plain(answer)  # fmt: skip
    return json.dumps(row, ensure_ascii=not is_unicode(sys.stdout))


def _text(answer: Answer, number: int, named: bool) -> str:
    """The queries a line each, below the answer's name and with a blank line behind if it is named.
    """
    lines = [query.text for query in answer.queries] or ["(no query)"]
    return "\n".join([f"{answer.id}, answer {number}:", *lines, ""] if named else lines)
