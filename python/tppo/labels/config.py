"""Who labels, and how strictly."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Literal

from pydantic import Field

from tppo.labels.endpoint.config import EndpointConfig
from tppo.settings import Count, Natural, Share, Text, section

GUIDANCE = "A word is wanted if it helps this user to find what he is likely to look for next."
PAIR_GUIDANCE = "The better answer has more of what this user is likely to look for next."


@section
class HandConfig:
    """Labels by hand."""

    answers: Count = 50
    """Answers to label; the stage ends there, or where you end it."""
    annotator: Text = "me"
    """Who labels; somebody else gets other answers, but for those that measure agreement."""
    rest: Literal["rule", "endpoint"] | None = None
    """Who labels the answers that nobody judged; where both judged one, the label by hand stands.
    By default they stay without a label."""
    suggestions: bool = True
    """After the first 25 answers take those of which a model of the labels so far is unsure; else
    all are drawn at random."""
    show_targets: bool = False
    """Show what the user searched for next in truth."""
    guidance: Text = GUIDANCE
    """By what is judged: it stands on the page, may be changed there, and is kept with a label."""
    pairs: Count = 50
    """Pairs of answers to compare (tppo prefer); the stage ends there, or where you end it."""
    pair_guidance: Text = PAIR_GUIDANCE
    """By what pairs are compared: it stands on their page, and is kept with them."""
    terminal: bool = False
    """Label in the terminal instead of a browser."""
    browser: bool = True
    """Open the page in a browser."""
    port: Annotated[Natural, Field(lt=65536)] = 0
    """Port of 127.0.0.1 for the page; 0: any that is free."""


# Answers labelled by word that do what more of them do, in a study of generated sessions with and
# without labelling errors (docs/evidence.md): what an endpoint is to be asked for at first.
ENOUGH = 200


@section
class LabelConfig:
    """Who labels words and answers."""

    labeller: Literal["rule", "endpoint", "hand"] = "rule"
    """The rule compares words with the true next queries; an endpoint asks a language model, of
    whose labels 200 are enough to begin with: --generate.samples 200; by hand asks you, on a page
    in the browser."""
    sentence_threshold: Share = 0.6
    """The rule calls an answer relevant when this share of its words is."""
    endpoint: EndpointConfig = field(default_factory=EndpointConfig)
    hand: HandConfig = field(default_factory=HandConfig)

    def __post_init__(self) -> None:
        if self.hand.rest is not None and self.labeller != "hand":
            raise ValueError(
                f"hand.rest, labeller were {self.hand.rest!r}, {self.labeller!r}, expected "
                "labeller 'hand': the rest are answers that nobody has judged by hand"
            )
