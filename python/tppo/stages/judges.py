"""The judge that `--eval.judge` names, and what manifests call it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tppo.config import Config
from tppo.errors import DataError, short
from tppo.evaluation.config import EvalConfig
from tppo.evaluation.endpoint import ENDPOINT, EndpointJudge
from tppo.evaluation.intent import INTENT, IntentJudge
from tppo.evaluation.judge import RULE, CallableJudge, Judge, RuleJudge
from tppo.evaluation.ranking import NEXT_QUERY, NextQueryJudge
from tppo.rewards.user_function import load_given, named_with_source

BUILT_IN = (RULE, INTENT, NEXT_QUERY, ENDPOINT)


def chosen_judge(config: Config, cache: Path) -> Judge:
    """The judge of a configuration; `cache` keeps what an endpoint has answered.

    Errors: DataError where there is no such judge; those of `EndpointJudge`.
    """
    name = config.eval.judge
    if name == RULE:
        return RuleJudge(config.label.sentence_threshold)
    if name == INTENT:
        return IntentJudge()
    if name == NEXT_QUERY:
        return NextQueryJudge()
    if name == ENDPOINT:
        return EndpointJudge(config.eval.endpoint, cache)
    found = _loaded(name)
    if isinstance(getattr(found, "name", None), str):
        return found
    return CallableJudge(found, named_with_source(found))


def judge_named(config: EvalConfig, given: Judge | None = None) -> str | None:
    """What a manifest calls the judge, so that a stage runs again where another one judges: with
    the source of one's own, with the settings that an endpoint's verdicts depend on; None for the
    rule, whose edition and threshold stages depend on by themselves.  given: a judge in its place.
    """
    if given is not None:
        return given.name
    if config.judge == RULE:
        return None
    if config.judge == ENDPOINT:
        asked = config.endpoint
        return (
            f"{asked.model} at an endpoint: template {asked.template}, temperature "
            f"{asked.temperature}, max_tokens {asked.max_completion_tokens or asked.max_tokens}, "
            f"schema {asked.schema}"
        )
    if config.judge in BUILT_IN:
        return config.judge
    return named_with_source(_loaded(config.judge))


def _loaded(name: str) -> Any:
    expected = f"{', '.join(BUILT_IN)}, or module:name"
    if ":" not in name:
        raise DataError(f"--eval.judge was {name!r}, expected {expected}")
    found = load_given("--eval.judge", name)
    if isinstance(found, type) or not callable(found):
        raise DataError(f"--eval.judge {name}: was {short(found)}, expected a function "
                        "f(prompts, completions, **columns) -> list of numbers, or an object that "
                        "is a tppo.Judge")  # fmt: skip
    return found
