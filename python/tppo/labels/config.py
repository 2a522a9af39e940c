"""Who labels, and how strictly."""

from __future__ import annotations

from dataclasses import field
from typing import Literal

from tppo.labels.endpoint.config import EndpointConfig
from tppo.settings import Share, section


@section
class LabelConfig:
    """Who labels words and answers."""

    labeller: Literal["rule", "endpoint"] = "rule"
    """The rule compares words with the true next queries; an endpoint asks a language model."""
    sentence_threshold: Share = 0.6
    """The rule calls an answer relevant when this share of its words is."""
    endpoint: EndpointConfig = field(default_factory=EndpointConfig)
