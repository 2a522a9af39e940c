"""Who labels, and how strictly."""

from __future__ import annotations

from dataclasses import field
from typing import Literal

from tppo.labels.endpoint.config import EndpointConfig
from tppo.settings import Share, section

# Answers labelled by word that do what more of them do, in a study of generated sessions with and
# without labelling errors (docs/evidence.md): what an endpoint is to be asked for at first.
ENOUGH = 200


@section
class LabelConfig:
    """Who labels words and answers."""

    labeller: Literal["rule", "endpoint"] = "rule"
    """The rule compares words with the true next queries; an endpoint asks a language model, of
    whose labels 200 are enough to begin with: --generate.samples 200."""
    sentence_threshold: Share = 0.6
    """The rule calls an answer relevant when this share of its words is."""
    endpoint: EndpointConfig = field(default_factory=EndpointConfig)
