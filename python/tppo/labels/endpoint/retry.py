"""How often a request is tried, and how long is waited in between: for all who ask an endpoint."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from typing import TypeVar

from tppo.labels.endpoint.config import EndpointConfig
from tppo.labels.endpoint.forms import Action
from tppo.labels.endpoint.replies import Trouble, too_long_a_wait

FIRST_WAIT_S, MOST_WAIT_S = 0.5, 8.0  # between tries where the server asks for no wait
T = TypeVar("T")


async def persistently(
    attempt: Callable[[], Awaitable[tuple[T | Trouble, Action]]],
    config: EndpointConfig,
    pause: Callable[[float, Trouble], Awaitable[None]],
) -> tuple[T | Trouble, Action]:
    """What comes of a request, tried again where the table of forms.py demands it.

    attempt: sends it once; gives what came of it and the table's action.
    pause: waits so many seconds before the next try, after a trouble; the server may have asked for
        them (`wait_s`).
    A server that asks for a longer wait than `config.max_wait_s`, and the last of
    `config.max_retries` further tries, end it.
    """
    tries = config.max_retries + 1
    for number in range(1, tries + 1):
        result, action = await attempt()
        if not isinstance(result, Trouble) or action != "retry":
            return result, action
        if result.wait_s is not None and result.wait_s > config.max_wait_s:
            return too_long_a_wait(result, config), "stop"
        if number < tries:
            await pause(_wait_s(number) if result.wait_s is None else result.wait_s, result)
    assert isinstance(result, Trouble)
    often = f"{tries} times" if tries > 1 else "once"
    return Trouble(result.form, f"{result.reason}, {often}"), result.form.spent


def _wait_s(number: int) -> float:
    """Seconds after the try of this number: ever longer, and never the same for all who wait."""
    return min(FIRST_WAIT_S * 2.0 ** (number - 1), MOST_WAIT_S) * (1 - 0.25 * random.random())
