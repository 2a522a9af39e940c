"""Which answers are labelled next: those of which a reward model is least sure, over many users."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

User = TypeVar("User", bound=Hashable)


def most_doubtful(
    doubts: Sequence[float],
    users: Sequence[User],
    n: int,
    labelled: Mapping[User, int] | None = None,
) -> list[int]:
    """The n answers, by number, to label next: the most doubtful first, a second one of a user
    only when every user has one, and so on.

    doubts: how unsure a reward model is of each answer.  users: whose answer each is.  labelled:
    answers of each user that have a label already, and count as his first ones; a user who is not
    there has none.
    Errors: ValueError where there are fewer than n answers.
    """
    if n > len(doubts):
        raise ValueError(f"n was {n}, expected at most the {len(doubts)} answers to choose from")
    order = sorted(range(len(doubts)), key=lambda i: -doubts[i])
    earlier, turn = Counter[User](labelled or {}), {}
    for i in order:
        turn[i] = earlier[users[i]]
        earlier[users[i]] += 1
    return sorted(order, key=turn.__getitem__)[:n]
