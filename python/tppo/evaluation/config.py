"""What the closing table and the heat map show."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from tppo.settings import Count, Positive, section


@section
class EvalConfig:
    """The closing table."""

    temperatures: Annotated[tuple[Positive, ...], Field(min_length=1)] = (1.0, 0.5, 0.2)
    """SFT is sampled at each of these; every other row at 1."""
    continued: bool = True
    """A row of SFT trained on for as many steps as PPO, which shows what more steps alone do."""
    heat_users: Count = 12
    """Users in the token heat map, each with an answer of SFT and of TPPO."""
