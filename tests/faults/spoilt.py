"""Figures that are not finite, and memory that does not suffice, in a whole process of PPO."""

import functools
import json
import math
import re

from cases import case, judged
from machine import contents

PLACES = ("loss", "gradient", "reward", "value")
CALL = {"loss": 3, "gradient": 3, "reward": 2, "value": 5}  # of the second step
READS = {"reading": "policy_logprobs", "update": "policy_states"}  # what finds no memory


def too_large(place):
    """In a child: the first call that reads with the policy finds no memory."""
    import torch

    from tppo.methods import ppo

    real, calls = getattr(ppo, READS[place]), []

    def read(policy, batch, *others):
        calls.append(1)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("tried to allocate more than there is.")
        return real(policy, batch, *others)

    setattr(ppo, READS[place], read)


def spoil(place, value, calls):
    """In a child: one figure is NaN or infinite, at some calls (all: an empty set)."""
    from tppo.methods import ppo

    value, count = float(value), []

    def spoilt_at(function):
        @functools.wraps(function)
        def found(*arguments):
            result = function(*arguments)
            count.append(1)
            return change(result) if not calls or len(count) in calls else result

        return found

    def change(result):
        if place == "reward":
            result.rewards[0, 0] = value
        elif place == "value":
            result[0][0, 0] = value
        elif place == "loss":
            result = result._replace(policy=result.policy * value)
        else:
            next(p for p in policy[0].parameters() if p.grad is not None).grad[0] = value
        return result

    policy = []
    if place == "reward":
        ppo.check_reward = spoilt_at(ppo.check_reward)
    else:
        start = ppo.PPO.__init__

        def begin(self, models, *given, **others):
            start(self, models, *given, **others)
            policy.append(self.models.policy)
            if place == "value":
                models.critic.forward = spoilt_at(models.critic.forward)
            else:
                self._backward = spoilt_at(self._backward)

        ppo.PPO.__init__ = begin


@case("one figure not finite")
def skipped(machine, name, folder, place, value):
    """A batch is skipped, counted, told, and repeated by `tppo replay`; the training goes on."""
    what = f"{value} in the {place}"
    ended = machine.run(machine.command(name, folder),
                        functools.partial(spoil, place, value, {CALL[place]}))  # fmt: skip
    told = re.search(r"is skipped \(1 in a row\); `tppo replay (\S+)` repeats it", ended.said)
    if ended.code or not told:
        return what, f"not skipped: {ended.said[-400:]}"
    rows = [json.loads(line) for line in (folder / "train/metrics.jsonl").read_text().splitlines()]
    if [row.get("ppo/spoilt", 0) for row in rows] != [0, 1, 0]:
        return what, f"not counted: {rows}"
    before = contents(folder, ["."])
    again = machine.run(["replay", told[1]])
    if again.code or "was skipped: " not in again.said:
        return what, f"not replayed: {again.said[-400:]}"
    if contents(folder, ["."]) != before:
        return what, "the replay changed the run"
    return what, "skipped, told, replayed"


@case("figures not finite")
def stopped(machine, name, folder, place, value):
    """So many in a row stop it in a sentence, and what is spoilt is in no checkpoint."""
    calls = set(range(CALL[place], 1000))
    ended = machine.run([*machine.command(name, folder), "--ppo.max-spoilt", "1"],
                        functools.partial(spoil, place, value, calls))  # fmt: skip
    what = f"{value} in every {place}"
    if ended.code == 0 or "batches in a row had figures that are not finite" not in ended.said:
        return what, f"not stopped: {ended.said[-400:]}"
    return what, judged(machine, name, folder, ended)


@case("out of memory")
def out_of_memory(machine, name, folder, place):
    """What is read at once is halved, told, and gives what a smaller limit gives from the start."""
    what = f"in the {place}"
    ended = machine.run(machine.command(name, folder), functools.partial(too_large, place))
    told = re.findall(r"out of memory with \d+ tokens.*--ppo.max-tokens (\d+) begins", ended.said)
    if ended.code or len(told) != 1:
        return what, f"not halved once: {ended.said[-400:]}"
    other = machine.copy(name)
    limited = machine.run([*machine.command(name, other), "--ppo.max-tokens", told[0]])
    if limited.code or not _alike(folder, other, machine.done(name).folder):
        return what, f"other figures than with a limit of {told[0]} tokens"
    return what, "halved, told, the same figures"


def _alike(*folders):
    """The first step's losses are the same but for roundings, of which Adam makes more later."""
    rows = [json.loads((found / "train/metrics.jsonl").read_text().splitlines()[0])
            for found in folders]  # fmt: skip
    return all(math.isclose(row[key], rows[0][key], rel_tol=1e-4, abs_tol=1e-6)
               for row in rows for key in ("loss/policy_avg", "loss/value_avg"))  # fmt: skip
