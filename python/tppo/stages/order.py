"""How many steps PPO takes, and which prompts in each of them."""

from __future__ import annotations

import math
import random

from tppo.methods.config import PPOConfig


def schedule(questions: int, config: PPOConfig) -> tuple[int, int]:
    """Steps and prompts a step: a small file gets fewer of both."""
    batch_size = min(config.batch_size, questions)
    if config.max_passes is None:
        return config.steps, batch_size
    most = math.ceil(config.max_passes * questions / batch_size)
    return max(1, min(config.steps, most)), batch_size


class PromptOrder:
    """Indices of the prompts of all steps: one shuffled pass after another.

    A function of the seed, of which one pass is in memory.
    """

    def __init__(self, questions: int, seed: int):
        self.questions, self.seed = questions, seed
        self._begin()

    def _begin(self) -> None:
        self._rng, self._passes, self._pass = random.Random(f"{self.seed}/ppo"), 0, list[int]()

    def rows(self, first: int, n: int) -> list[int]:
        """n of the indices, from the first one on, counted over all steps."""
        found: list[int] = []
        while len(found) < n:
            number, place = divmod(first + len(found), self.questions)
            if number < self._passes - 1:
                self._begin()
            while self._passes <= number:
                self._pass = self._rng.sample(range(self.questions), self.questions)
                self._passes += 1
            found += self._pass[place : place + n - len(found)]
        return found
