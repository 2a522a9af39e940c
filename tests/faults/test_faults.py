"""A reduced form of `make faults`: a fault or two of each kind, in works that differ most."""

import errno
import functools
import json
import signal

import cases
import endpoint
import harness
import injected
import proof
import pytest
import soak
import spoilt
from machine import Ended, Machine, contents
from works import LOCKED, READERS, RESUMED, WORKS


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    machine = Machine(tmp_path_factory.mktemp("faults"))
    yield machine
    machine.close()


def lost_nothing(case):
    assert case.good, f"{case.kind}: {case.work}, {case.what}: {case.outcome}"


@pytest.mark.parametrize("work, share", [
    ("train", 0.6), ("label by an endpoint", 0.5), ("label by hand", 0.5),
])  # fmt: skip
def test_a_kill_at_a_call_to_the_system_costs_nothing(machine, work, share):
    lost_nothing(cases.kill_at_call(machine, work, 1 + int(share * machine.done(work).moments)))


def test_a_kill_in_the_middle_of_a_write_costs_nothing(machine):
    lost_nothing(cases.kill_in_write(machine, "sft", harness.sizes(machine, "sft")[-1]))


def test_a_kill_at_a_random_moment_costs_nothing(machine):
    lost_nothing(cases.kill_at_random(machine, "train", 0.5))


def test_a_call_that_finds_no_space_is_one_sentence(machine):
    lost_nothing(cases.disk_full(machine, "map", 3))


def test_a_disk_that_is_full_is_one_sentence_and_its_end_is_the_same(machine):
    if why := injected.why_no_mounts():
        pytest.skip(f"no disk of its own: {why}; a limit on files is tested below")
    lost_nothing(cases.small_disk(machine, "sft", 0.5))


def test_a_folder_that_is_read_only_is_named_with_the_remedy(machine):
    if why := injected.why_no_mounts():
        pytest.skip(f"nothing can be mounted read-only: {why}")
    lost_nothing(cases.read_only_folder(machine, "map"))


def test_files_that_may_not_grow_are_one_sentence(machine):
    lost_nothing(cases.small_files(machine, "train"))


def test_a_terminal_that_is_closed_ends_a_training_in_order(machine):
    lost_nothing(cases.signal_at_call(machine, "train", signal.SIGHUP, 9))


@pytest.mark.parametrize("reader, file, how", [
    ("train", "train-rm/report.json", "flipped"), ("label", "generate/manifest.json", "truncated"),
])  # fmt: skip
def test_a_harmed_file_is_named(machine, reader, file, how):
    lost_nothing(cases.harmed_file(machine, reader, file, how))


def test_a_harmed_checkpoint_is_passed_over(machine):
    lost_nothing(cases.harmed_checkpoint(machine, "train", 0.6, "state.json", "foreign"))


def test_two_processes_in_one_folder(machine):
    lost_nothing(cases.two_processes(machine, "train"))


def test_an_endpoint_that_dies_and_comes_back_is_paid_once(machine):
    lost_nothing(cases.endpoint_restarted(machine, "label by an endpoint", True))


def test_a_disk_that_takes_no_judgement_is_told_and_the_key_is_pressed_again(machine):
    """The answer stays on the screen, and is kept when there is room."""
    name, folder = "label by hand", machine.copy("label by hand")
    full = functools.partial(injected.fail, errno.ENOSPC)
    moments = functools.partial(injected.at_moment, folder, "hand-labels.jsonl", 4, full)
    ended = machine.run(machine.command(name, folder), moments)
    assert "WARNING: not kept: " in ended.said and "Make room, and say it again." in ended.said
    assert cases.judged(machine, name, folder, ended) == "identical"
    person = machine.people[folder.name]
    assert len(person.sent) == len(person.kept) + 1 == 15


def test_a_batch_of_which_the_import_is_killed_is_paid_once(machine):
    found = cases.rest_of_batch(machine, "import a batch", 40)
    lost_nothing(found)
    assert ": 0 of " not in found.what


def test_a_reward_that_is_not_a_number_costs_a_step_and_is_replayed(machine):
    """`tppo replay` on what the run has kept names the first operator that it spoils."""
    folder = machine.copy("train")
    ended = machine.run(machine.command("train", folder),
                        functools.partial(spoilt.spoil, "reward", "nan", {2}))  # fmt: skip
    assert ended.code == 0, ended.said
    kept = folder / "spoilt/train-step-2-1.json"
    assert f"The rollout is skipped (1 in a row); `tppo replay {kept}` repeats it" in ended.said
    assert json.loads((folder / "train/report.json").read_text())["skipped_steps"] == 1
    again = machine.run(["replay", str(kept)])
    assert again.code == 0, again.said
    assert "rewards of the batch: nan at token 0 of response 0 (1 values)" in again.said
    assert "found: linear_ppo_loss: " in again.said and "Its input advantages is nan" in again.said


def test_memory_that_does_not_suffice_gives_the_same_weights(machine):
    lost_nothing(spoilt.out_of_memory(machine, "train", "reading"))


def test_the_harness_sees_what_is_lost(machine):
    """A check of the check: another file after the kill, and a traceback, are not survived."""
    folder = machine.copy("map")
    ended = Ended(1, "Traceback (most recent call last)")
    assert cases.judged(machine, "map", folder, ended).startswith("no sentence")
    done = machine.run(machine.command("map", folder))
    assert done.code == 0 and cases.judged(machine, "map", folder, done) == "identical"
    file = next(path for path in (folder / "map").glob("*.jsonl"))
    file.write_text(file.read_text()[:-2] + "\n")
    outcome = cases.judged(machine, "map", folder, done)
    assert outcome.startswith("other files") and outcome not in cases.GOOD


def test_the_harness_sees_what_is_paid_twice(machine):
    """A cache that is taken away looks as if nothing was paid: the questions tell."""
    name = "label by an endpoint"
    folder = machine.copy(name)
    assert machine.run(machine.command(name, folder)).code == 0
    asked = machine.server_of(folder).asked(folder)
    assert asked and set(endpoint.kept(folder / "label-cache.jsonl")) == set(asked)
    (folder / "label-cache.jsonl").unlink()
    assert "were answered and not kept" in cases.again(machine, name, folder)


def test_a_fault_that_is_never_met_is_no_success(machine):
    assert "was not killed" in cases.kill_at_call(machine, "map", 10_000).outcome
    assert cases.disk_full(machine, "map", 10_000).outcome == "the moment did not come"


def test_the_table_counts_kills_apart_from_faults():
    found = [cases.Case("kill at a call", "map", "call 3", "identical"),
             cases.Case("small disk", "sft", "5 bytes more", "no sentence: x")]  # fmt: skip
    text = harness.table(found)
    assert "moments killed 1, identical 1, lost 0" in text
    assert "faults injected 1, survived 0" in text and "LOST  small disk: sft, 5 bytes" in text


def test_every_moment_of_a_work_can_be_chosen(machine):
    some = ("map", "label", "train")
    chosen = harness.spread(machine, some, 10_000)
    assert len(chosen) == len(set(chosen)) == sum(machine.done(name).moments for name in some)
    few = harness.spread(machine, some, 20)
    assert {name for name, _ in few} == set(some) and len(few) < 30
    assert all(1 <= when <= machine.done(name).moments for name, when in few)


def test_the_readme_says_what_the_whole_runs_have_found(tmp_path):
    """And would say so if it were less."""
    readme = (proof.ROOT / "README.md").read_text()
    assert proof.written(readme) == readme, "README.md: `python tests/faults/proof.py`"
    for name, figure, other in (("faults", "survived", 7), ("soak", "grew", 3)):
        file = tmp_path / f"{name}.json"
        given = json.loads((proof.RESULTS / file.name).read_text())
        file.write_text(json.dumps(given | {figure: other}))
    fuzz = json.loads((proof.RESULTS / "fuzz.json").read_text())
    fuzz["targets"][0]["wrong"] += 2
    (tmp_path / "fuzz.json").write_text(json.dumps(fuzz))
    said = proof.written(readme, tmp_path).replace("\n", " ")
    assert " faults, 7 survived" in said and f" 3 of {len(soak.BOUNDS)} measures grew" in said
    assert f" {sum(target['wrong'] for target in fuzz['targets'])} wrong values" in said


def test_every_command_that_writes_is_among_the_works():
    """A stage that is registered later has its faults too."""
    from tppo.stages.registry import REGISTRY

    stages = {work.command.split()[0] for work in WORKS.values()}
    assert REGISTRY.keys() | {"run", "report", "study"} <= stages
    assert {*RESUMED, *LOCKED} <= WORKS.keys()
    assert {name for pair in READERS for name in pair} <= WORKS.keys()


def test_what_took_another_time_is_the_same(tmp_path):
    for name, seconds in (("one", 1.5), ("two", 2.5)):
        (tmp_path / name / "map").mkdir(parents=True)
        text = json.dumps({"seconds": seconds, "seed": 0, "outputs": {"a": {"nbytes": 3}}})
        (tmp_path / name / "map/manifest.json").write_text(text)
    one, two = (contents(tmp_path / name, ["map"]) for name in ("one", "two"))
    assert one == two and list(one) == ["map/manifest.json"]
    other = tmp_path / "two/map/manifest.json"
    other.write_text(other.read_text().replace("3", "4"))
    assert contents(tmp_path / "two", ["map"]) != one


def test_a_training_that_is_stopped_again_and_again_is_the_same(machine):
    """A reduced form of `make soak`, of whose few steps neither seconds nor memory say anything."""
    found = soak.soak(machine, 24, 8, soak.PPO | {"eval-every": 4, "checkpoint-every": 4}, 6)
    assert found["signals"] == ["SIGTERM", "SIGKILL", "SIGTERM"] and not found["differing"]
    assert len(found["seconds"]) == 24
    settled = {key: {row[key] for row in found["held"] if row["step"] > 8}
               for key in ("tensors", "handles", "threads", "checkpoints")}  # fmt: skip
    assert {key: len(values) for key, values in settled.items()} == dict.fromkeys(settled, 1)
    assert settled["checkpoints"] == {3}  # the newest two, and what says which is the newest


def test_a_training_goes_on_in_other_numbers_of_processes(machine):
    """One, two and again one gloo process, which SIGTERM ends; two of a batch of five prompts."""
    far = soak.worlds(machine, 6, ((1, 2), (2, 2), (1, None)), straight=False)
    assert soak.near(far), soak.worlds_table(far)


def test_the_soak_sees_what_grows():
    held = [soak.Held(i, 10**8, 4 * 10**8, 1000, 9000, 50, 13, 4, 3, 10**6)._asdict()
            for i in range(0, 400, 10)]  # fmt: skip
    flat = {"steps": 400, "signals": ["SIGTERM"], "differing": [], "saved_every": 20,
            "seconds": [0.1] * 400, "fixed": [0.002] * 400, "held": held}  # fmt: skip
    assert soak.good(flat) and "steps soaked 400, grew 0; stopped 1 times" in soak.table(flat)
    for name, step in (("heap", 700), ("resident", 2e4), ("objects", 0.7), ("blocks", 2),
                       ("handles", 0.02), ("checkpoints", 0.01), ("disk", 1000)):  # fmt: skip
        grown = [{**row, name: row[name] + step * row["step"]} for row in held]
        assert not soak.good({**flat, "held": grown}) and "grew 1" in soak.table(
            {**flat, "held": grown}), name  # fmt: skip
    slower = [0.1 + 1e-4 * i for i in range(400)]
    assert "grew 2" in soak.table({**flat, "seconds": slower})
    assert soak.good({**flat, "seconds": slower, "fixed": [x / 50 for x in slower]})  # the machine
    saves = [0.1 if i % 20 else 0.1 + 1e-4 * i for i in range(1, 401)]
    assert "grew 1" in soak.table({**flat, "seconds": saves})
    assert not soak.good({**flat, "differing": ["train/metrics.jsonl"]})
