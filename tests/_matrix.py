"""`make test` runs a seeded third of each large matrix of cases, `make test-full` all of it."""

import os
import random


def third(cases, seed=0):
    """All cases under TPPO_TEST_FULL=1, else a third of them, chosen by the seed."""
    cases = list(cases)
    if os.environ.get("TPPO_TEST_FULL") == "1":
        return cases
    chosen = set(random.Random(seed).sample(range(len(cases)), max(1, len(cases) // 3)))
    return [case for index, case in enumerate(cases) if index in chosen]
