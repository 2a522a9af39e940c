"""Stages that take hours go on where kill -9 met them, to the same bytes; short ones write nothing.

The rule of when a checkpoint is written is set to after every step in the processes that are
killed, and left alone in those that go on.
"""

import functools
import json
import os
import shutil
import signal

import pytest
import torch
import yaml
from safetensors.torch import load_file
from test_stopping import TINY, at, call_before, run, server, signalled  # noqa: F401

from tppo.cli import main
from tppo.methods.ppo import PPO
from tppo.models.keeper import NOTHING_KEPT
from tppo.models.rollout.hf import HFRollout, _draws, _draws_go_on
from tppo.stages.parts import Parts
from tppo.store import checkpoint
from tppo.store.checkpoint import Checkpoints
from tppo.store.disk import DiskFull

SETTINGS = TINY | {
    "sft": {"max_steps": 7, "eval_every": 2, "batch_size": 16},
    "reward_model": {"epochs": 2, "batch_size": 16},
    "generate": {"samples": 40, "max_new_tokens": 8, "batch_size": 8},
    "ppo": TINY["ppo"] | {"checkpoint_every": 1, "advantage": "grpo", "responses_per_prompt": 2},
}
CHAIN = ("data", "sft", "generate", "label", "map", "train-rm", "train", "baselines", "eval")
# Stage, the function whose call is met, which call, and what is said when it goes on.
KILLS = {
    "sft": ("tppo.methods.sft", "sft_step", 6, ["sft: resumes after step 5 of 7"]),
    "generate": (HFRollout, "_sample", 4, ["generate: resumes after batch 3 of 5"]),
    "train-rm": (
        "tppo.methods.reward_model", "_backward", 5, ["train-rm: resumes after step 4 of 6"]),
    "baselines": (PPO, "step", 5, ["ppo: resumes after step 1 of 3"]),  # of the second
    "eval": ("tppo.methods.sft", "sft_step", 3, [
        "eval, sft_t0.2: resumes after batch 1 of 1",
        "eval, SFT continued: resumes after step 2 of"]),
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory, one_thread):
    """A run folder in which nothing disturbed the stages."""
    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(SETTINGS))
    for stage in CHAIN:
        main([stage, "--out", str(folder / "out"), "--config", str(folder / "tiny.yaml")])
    return folder / "out"


def copy_before(finished, folder, stage):
    """The run folder as it was before a stage ran."""
    shutil.copytree(finished, folder)
    shutil.rmtree(folder / stage)
    return folder


def at_every_step(act):
    """Checkpoints after every step from here on, in a child; then prepare it to be met."""
    checkpoint.EVERY_S, checkpoint.WRITING = 0.0, float("inf")
    act()


def killed(server, tmp_path, folder, stage, kill, *flags):  # noqa: F811
    """Run a stage in a process that is killed at a call."""
    owner, name, when = kill
    met = functools.partial(call_before, owner, name, when, signalled(signal.SIGKILL))
    done = run(server, tmp_path, [stage, "--out", str(folder), *flags],
               functools.partial(at_every_step, met))  # fmt: skip
    assert done.code == -signal.SIGKILL, done.said
    assert not (folder / stage).exists()


def test_a_whole_part_that_has_changed_since_is_made_again(tmp_path, capsys):
    """It was taken for whole because its folder was there."""
    parts = Parts("pit", tmp_path, {"a": 1}, 0)
    with parts.part("sft") as work:
        (work / "model.safetensors").write_bytes(b"weights")
    assert parts.done("sft")
    (parts.root / "sft/model.safetensors").write_bytes(b"weightz")
    assert not parts.done("sft")
    assert "model.safetensors is not the file that the stage wrote" in capsys.readouterr().err


def contents(folder):
    """The files of a stage; of what says so, all but how long it took."""
    found = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name, content = path.relative_to(folder).as_posix(), path.read_bytes()
        if path.name in ("manifest.json", "report.json", "result.json"):
            content = without_seconds(json.loads(content))
        found[name] = content
    return found


def without_seconds(found):
    """A JSON value without what differs from run to run; a manifest's hashes of such files too."""
    if not isinstance(found, dict):
        return found
    return {key: without_seconds(value) for key, value in found.items()
            if key != "seconds" and not key.endswith(("report.json", "result.json"))}  # fmt: skip


@pytest.mark.parametrize("stage", KILLS)
def test_a_killed_stage_goes_on_to_the_same_bytes(
    finished, server, tmp_path, capsys, stage  # noqa: F811
):  # fmt: skip
    *kill, goes_on = KILLS[stage]
    folder = copy_before(finished, tmp_path / "out", stage)
    killed(server, tmp_path, folder, stage, kill)
    for kept in {path.parent for path in folder.rglob("step-*")}:
        assert len(list(kept.iterdir())) <= 3  # the newest two, and `latest`
    main([stage, "--out", str(folder)])
    said = capsys.readouterr().err
    assert all(text in said for text in goes_on)
    assert contents(folder / stage) == contents(finished / stage)
    assert not list(folder.rglob("checkpoints"))


def test_adapters_over_a_base_of_16_bits_go_on_to_the_same_bytes(
    finished, server, tmp_path, capsys  # noqa: F811
):  # fmt: skip
    """Of which a checkpoint holds what is trained; killed before the first evaluation."""
    flags = ["--model", str(finished / "sft/model"), "--model.dtype", "bfloat16", "--lora.rank",
             "2", "--sft.max-steps", "4"]  # fmt: skip
    whole, cut = (copy_before(finished, tmp_path / name, "sft") for name in ("whole", "cut"))
    main(["sft", "--out", str(whole), *flags])
    killed(server, tmp_path, cut, "sft", ("tppo.methods.sft", "sft_step", 2), *flags)
    kept = load_file(cut / "sft.tmp/checkpoints/step-1/model.safetensors")
    assert kept and all("lora_" in name for name in kept)
    main(["sft", "--out", str(cut), *flags])
    assert "sft: resumes after step 1 of 4" in capsys.readouterr().err
    assert contents(cut / "sft") == contents(whole / "sft")


def test_a_damaged_one_is_passed_over(finished, server, tmp_path, capsys):  # noqa: F811
    folder = copy_before(finished, tmp_path / "out", "sft")
    killed(server, tmp_path, folder, "sft", KILLS["sft"][:3])
    newest = folder / "sft.tmp/checkpoints/step-5"
    with open(newest / "model.safetensors", "r+b") as file:
        file.truncate(1000)
    main(["sft", "--out", str(folder)])
    said = capsys.readouterr().err
    assert f"{newest}: passed over, model.safetensors is missing or cut" in said
    assert "sft: resumes after step 4 of 7" in said
    assert contents(folder / "sft") == contents(finished / "sft")


def test_other_settings_and_another_model_begin_anew(finished, server, tmp_path, capsys):  # noqa: F811
    folder = copy_before(finished, tmp_path / "out", "generate")
    killed(server, tmp_path, folder, "generate", KILLS["generate"][:3])
    main(["sft", "--out", str(folder), "--sft.max-steps", "1"])
    main(["generate", "--out", str(folder), "--generate.samples", "24"])
    said = capsys.readouterr().err
    assert ("generate: starts anew and deletes its checkpoints, because input sft/model changed; "
            "config.generate.samples was 40, is 24") in said  # fmt: skip
    assert "resumes" not in said


@pytest.mark.parametrize(("stage", "after"), [
    ("sft", "step 6 of 7"), ("generate", "batch 4 of 5"),
])  # fmt: skip
def test_a_signal_saves_what_is_done(
    finished, server, tmp_path, capsys, stage, after  # noqa: F811
):  # fmt: skip
    owner, name, when, _ = KILLS[stage]
    folder = copy_before(finished, tmp_path / "out", stage)
    done = run(server, tmp_path, [stage, "--out", str(folder)],
               at(owner, name, when, signalled(signal.SIGTERM)))  # fmt: skip
    assert done.code == 143, done.said
    assert f"tppo {stage}: stopped by SIGTERM: {stage}: it is saved after {after}" in done.said
    main([stage, "--out", str(folder)])
    assert f"{stage}: resumes after {after}" in capsys.readouterr().err
    assert contents(folder / stage) == contents(finished / stage)


def test_work_of_seconds_writes_no_checkpoint_and_long_work_spends_little_on_them(
    tmp_path, monkeypatch
):
    now, saved = [1000.0], []
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: now[0])

    def slowly(root, step, *rest):
        saved.append(step)
        now[0] += 60.0

    monkeypatch.setattr(checkpoint, "save_checkpoint", slowly)
    keeper = Checkpoints(tmp_path, "sft")
    for step in range(1, 200):
        now[0] += 10.0
        keeper.after(step, 200, lambda: ({}, {}, {}))
    # 300 s to the first; then it knows that writing takes 60 s, so that 1200 s lie between two.
    assert saved == [30, 150]


def test_a_checkpoint_that_the_disk_has_no_room_for_does_not_end_the_work(
    tmp_path, monkeypatch, capsys
):
    def full(*given):
        raise DiskFull("the disk is full")

    monkeypatch.setattr(checkpoint, "save_checkpoint", full)
    monkeypatch.setattr(checkpoint, "EVERY_S", 0.0)
    Checkpoints(tmp_path, "sft").after(3, 9, lambda: ({}, {}, {}))
    said = capsys.readouterr().err
    assert "WARNING: sft goes on without a new checkpoint: the disk is full" in said
    assert NOTHING_KEPT.newest(9) is None and not os.listdir(tmp_path)


def test_draws_of_another_kind_of_device_are_not_gone_on_with(capsys):
    here = torch.device("cpu")
    draws = _draws(here)
    first = torch.rand(3)
    assert _draws_go_on(draws, here, "generate") and torch.equal(torch.rand(3), first)
    assert not _draws_go_on(draws | {"cuda": torch.zeros(16)}, here, "generate")
    assert capsys.readouterr().err == (
        "generate: begins anew all the same: what is kept was drawn on cuda, this process draws on "
        "cpu\n"
    )
