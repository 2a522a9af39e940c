"""Who judges, and what the closing table and the heat map show."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated

from pydantic import Field

from tppo.labels.endpoint.config import EndpointConfig
from tppo.settings import Count, Positive, Text, section


@section
class EvalConfig:
    """The closing table, and who judges there and where PPO keeps its best weights."""

    judge: Text = "rule"
    """rule; intent (what generated sessions are after); next-query (the answer as a ranked list);
    endpoint (the model of --eval.endpoint, which may be another than the labelling one); or a
    function or judge of your own, module:name (docs/judges.md)."""
    endpoint: EndpointConfig = field(default_factory=EndpointConfig)
    """What --eval.judge endpoint asks; answers are kept in judge-cache.jsonl of the run folder."""
    temperatures: Annotated[tuple[Positive, ...], Field(min_length=1)] = (1.0, 0.5, 0.2)
    """SFT is sampled at each of these; every other row at 1."""
    continued: bool = True
    """A row of SFT trained on for as many steps as PPO, which shows what more steps alone do."""
    heat_users: Count = 12
    """Users in the token heat map, each with an answer of SFT and of TPPO."""
    noise_answers: Count = 1024
    """Answers over which `tppo noise` measures the gradient of the policy."""
