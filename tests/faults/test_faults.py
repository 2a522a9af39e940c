"""A reduced form of `make faults`: a fault or two of each kind, in stages that differ most."""

import errno
import functools
import json
import random
import signal

import harness
import pytest


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    return harness.Machine(tmp_path_factory.mktemp("faults"))


def lost_nothing(case):
    assert case.good, f"{case.kind}: {case.what}: {case.outcome}"


@pytest.mark.parametrize("stage, share", [("train", 0.6), ("sft", 0.9), ("label", 0.5)])
def test_a_kill_at_a_call_to_the_system_costs_nothing(machine, stage, share):
    lost_nothing(harness.kill_at_call(machine, stage, 1 + int(share * machine.moments[stage])))


def test_a_kill_at_a_random_moment_costs_nothing(machine):
    lost_nothing(harness.kill_at_random(machine, "train", random.Random(1)))


@pytest.mark.parametrize("kind, code", [("disk full", errno.ENOSPC), ("read-only", errno.EROFS)])
def test_a_disk_that_takes_no_more_is_one_sentence(machine, kind, code):
    lost_nothing(harness.error_at_call(machine, kind, code, "map", 3))


def test_files_that_may_not_grow_are_one_sentence(machine):
    lost_nothing(harness.prepared(machine, "files of 4 kB", "train", harness.small_files))


def test_a_terminal_that_is_closed_ends_a_training_in_order(machine):
    lost_nothing(harness.signal_at_call(machine, signal.SIGHUP, "train", 9))


@pytest.mark.parametrize("stage, name, how", [
    ("train-rm", "report.json", "flipped"), ("generate", "manifest.json", "truncated"),
])  # fmt: skip
def test_a_harmed_file_is_named(machine, stage, name, how):
    lost_nothing(harness.harmed_file(machine, stage, name, how))


def test_a_harmed_checkpoint_is_passed_over(machine):
    lost_nothing(harness.harmed_checkpoint(machine, "train", "state.json", "foreign"))


def test_two_processes_in_one_folder(machine):
    lost_nothing(harness.two_processes(machine, "train"))


def test_a_reward_that_is_not_a_number_costs_a_step_and_is_replayed(machine):
    """`tppo replay` on what the run has kept names the first operator that it spoils."""
    folder = machine.copy("train")
    before = sorted(path.name for path in folder.iterdir())
    ended = machine.run(["train", "--out", str(folder)],
                        functools.partial(harness.spoilt_reward, 2))  # fmt: skip
    assert ended.code == 0, ended.said
    kept = folder / "spoilt/train-step-2-1.json"
    assert f"The rollout is skipped (1 in a row); `tppo replay {kept}` repeats it" in ended.said
    rows = [json.loads(line) for line in (folder / "train/metrics.jsonl").read_text().splitlines()]
    assert [row.get("ppo/spoilt", 0) for row in rows] == [0, 1, 0]
    assert json.loads((folder / "train/report.json").read_text())["skipped_steps"] == 1
    after = harness.contents(folder)
    again = machine.run(["replay", str(kept)])
    assert again.code == 0, again.said
    assert "rewards of the batch: nan at token 0 of response 0 (1 values)" in again.said
    assert "found: linear_ppo_loss: " in again.said and "Its input advantages is nan" in again.said
    assert harness.contents(folder) == after
    assert sorted(path.name for path in folder.iterdir()) == sorted([*before, "spoilt", "train"])


def test_the_harness_sees_what_is_lost(machine, monkeypatch):
    """A check of the check: another file after the kill, and a traceback, are not survived."""
    folder = machine.copy("map")
    ended = harness.Ended(1, "Traceback (most recent call last)")
    assert not harness.Case("x", "y", *_judged(machine, folder, ended)).good
    other = machine.copy("map")
    done = machine.run(["map", "--out", str(other)])
    assert done.code == 0
    file = next(path for path in (other / "map").glob("*.jsonl"))
    file.write_text(file.read_text()[:-2] + "\n")
    assert _judged(machine, other, done) == ("other files, and no word", False)


def _judged(machine, folder, ended):
    return machine.judged("x", "y", folder, "map", ended)[2:]


def test_a_fault_that_is_never_met_is_no_success(machine):
    case = harness.kill_at_call(machine, "map", 10_000)
    assert not case.good and "was not killed" in case.outcome


def test_the_table_counts_kills_apart_from_faults():
    cases = [harness.Case("kill at a call", "a", "identical", True),
             harness.Case("disk full", "b", "no sentence: x", False)]  # fmt: skip
    text = harness.table(cases)
    assert "moments killed 1, identical 1, lost 0" in text
    assert "faults injected 1, survived 0" in text and "LOST  disk full: b: no sentence" in text


def test_every_moment_of_a_stage_can_be_chosen(machine):
    chosen = harness.spread(machine, harness.STAGES, 10_000)
    assert len(chosen) == sum(machine.moments.values()) == len(set(chosen))
    few = harness.spread(machine, harness.STAGES, 20)
    assert {stage for stage, _ in few} == set(harness.STAGES)
    assert all(1 <= when <= machine.moments[stage] for stage, when in few)
