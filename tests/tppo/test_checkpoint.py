"""Checkpoints: whole or not at all, and damage is seen."""

import json
import os
import resource
import subprocess

import pytest
import torch

from tppo.errors import DataError
from tppo.store.checkpoint import COMPLETE, LATEST, load_latest, save_checkpoint
from tppo.store.disk import DiskFull


def save(root, step):
    shared = torch.arange(6.0)
    weights = {"policy": {"a": shared, "b": shared}}  # tied, as an embedding and its head
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([parameter])
    parameter.grad = torch.full((2,), float(step))
    optimizer.step()
    save_checkpoint(root, step, weights, optimizer.state_dict(), {"step": step, "rows": [1.5]})


def test_the_newest_complete_one_is_loaded(tmp_path):
    for step in (9, 10):  # 10 sorts before 9 as text
        save(tmp_path, step)
    (tmp_path / "step-11.tmp").mkdir()
    found = load_latest(tmp_path)
    assert found.step == 10 and found.state == {"step": 10, "rows": [1.5]}
    assert torch.equal(found.weights["policy"]["b"], torch.arange(6.0))
    assert found.optimizer["state"][0]["exp_avg"].tolist() == pytest.approx([1.0, 1.0])
    assert (tmp_path / LATEST).read_text() == "step-10"


def test_two_stay(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step)
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-2", "step-3"]


@pytest.mark.parametrize("damage", ["cut", "changed", "incomplete"])
def test_a_damaged_one_is_passed_over(tmp_path, damage, capsys):
    save(tmp_path, 1)
    save(tmp_path, 2)
    weights = tmp_path / "step-2" / "policy.safetensors"
    content = weights.read_bytes()
    if damage == "cut":
        weights.write_bytes(content[:-1])
    elif damage == "changed":
        weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    else:
        (tmp_path / "step-2" / COMPLETE).unlink()
    assert load_latest(tmp_path).step == 1
    assert "step-2: passed over" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text",
    [
        "[]", "{}", "null", "", "[" * 100_000, '{"files": [1]}', '{"files": {}}', '{"files": null}',
        '{"files": {"policy.safetensors": 1, "state.json": 2, "optimizer.pt": 3}}',
        '{"files": {"policy.safetensors": {"nbytes": 1}}}',
    ],
    ids=lambda text: repr(text[:60]),
)  # fmt: skip
def test_one_whose_list_of_files_is_damaged_is_passed_over(tmp_path, text, capsys):
    save(tmp_path, 1)
    save(tmp_path, 2)
    (tmp_path / "step-2" / COMPLETE).write_text(text)
    assert load_latest(tmp_path).step == 1
    assert "step-2: passed over, " in capsys.readouterr().err
    (tmp_path / "step-1" / COMPLETE).write_text(text)
    assert load_latest(tmp_path) is None
    assert "no checkpoint is whole; the stage begins anew" in capsys.readouterr().err


def test_any_bit_of_the_list_of_files_that_flips_is_noticed(tmp_path, capsys):
    """Also one of the hash of the work, which else would look like that of another work."""
    save(tmp_path, 1)
    save(tmp_path, 2)
    file = tmp_path / "step-2" / COMPLETE
    text = file.read_bytes()
    assert load_latest(tmp_path).step == 2
    for place in range(0, len(text), 7):
        file.write_bytes(text[:place] + bytes([text[place] ^ 1 << place % 8]) + text[place + 1 :])
        assert load_latest(tmp_path).step == 1, text[max(0, place - 20) : place + 20]
    assert f"{COMPLETE} has changed" in capsys.readouterr().err


def test_one_of_an_earlier_format_is_one_sentence(tmp_path):
    save(tmp_path, 1)
    file = tmp_path / "step-1" / COMPLETE
    found = json.loads(file.read_text())
    del found["sum"]
    file.write_text(json.dumps(found))
    with pytest.raises(DataError, match="no checksum of itself. It was written by tppo-kernels"):
        load_latest(tmp_path)


@pytest.mark.parametrize("name", ["policy.safetensors", "optimizer.pt", "state.json"])
def test_one_without_a_file_of_its_own_is_passed_over(tmp_path, name):
    save(tmp_path, 1)
    save(tmp_path, 2)
    (tmp_path / "step-2" / name).unlink()
    assert load_latest(tmp_path).step == 1


@pytest.mark.parametrize("large", ["policy", "optimizer", "state"])
def test_a_full_disk_is_named_and_leaves_the_one_before(tmp_path, large):
    """A limit on the size of a file stops safetensors, torch and Python, each in its own way."""
    save(tmp_path, 1)
    tensors = {"a": torch.zeros(1 << 18)}  # 1 MB
    weights = {"policy": tensors if large == "policy" else {"a": torch.zeros(1)}}
    optimizer = {"state": tensors if large == "optimizer" else {}}
    state = {"rows": ["x" * 100] * 10_000 if large == "state" else []}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 19, hard))
    try:
        with pytest.raises(DiskFull) as caught:
            save_checkpoint(tmp_path, 2, weights, optimizer, state)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    said = str(caught.value)
    assert said.startswith(f"{tmp_path}/step-2.tmp: the checkpoint of step 2 cannot be written: ")
    assert ("1.05 MB are needed" in said) == (large != "state")
    assert "Make room and run the same command again: it goes on after step 1." in said
    assert sorted(path.name for path in tmp_path.iterdir()) == [LATEST, "step-1"]
    assert load_latest(tmp_path).step == 1


def test_a_disk_that_is_truly_full(tmp_path):
    """A small file system in memory, where one may be mounted."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(disk)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no file system may be mounted here; a limit on files is tested above")
    try:
        for large in ("policy", "optimizer"):
            weights = {"policy": {"a": torch.zeros(1 << (17 if large == "policy" else 1))}}
            optimizer = {"a": torch.zeros(1 << (17 if large == "optimizer" else 1))}
            said = r"No space left on device; 524 kB are needed, \d+ kB were free there"
            with pytest.raises(DiskFull, match=said):
                save_checkpoint(disk / "checkpoints", 2, weights, optimizer, {})
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_what_a_killed_process_wrote_goes_with_the_next(tmp_path):
    (tmp_path / "step-1.tmp").mkdir()
    save(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [LATEST, "step-2"]


def test_damaged_ones_of_later_steps_do_not_cost_the_new_ones(tmp_path):
    """They are the newest by number: of three the new one was deleted as the oldest."""
    for step in (50, 60):
        save(tmp_path, step)
        (tmp_path / f"step-{step}/state.json").write_text("{}")
    assert load_latest(tmp_path) is None
    for step in (10, 20, 30):
        save(tmp_path, step)
        assert load_latest(tmp_path).step == step
    assert sorted(path.name for path in tmp_path.iterdir()) == [LATEST, "step-20", "step-30"]


@pytest.mark.parametrize("kind", ["a file", "a link to a folder", "a link to nothing"])
@pytest.mark.parametrize("name", ["step-2", "step-3", "step-3.tmp", "step-4"])
def test_what_is_no_folder_is_passed_over_and_goes_with_the_next(tmp_path, kind, name):
    root, outside = tmp_path / "root", tmp_path / "outside"
    save(root, 1)
    outside.mkdir()
    (outside / "kept").write_text("not of the run")
    if kind == "a file":
        (root / name).write_text("text")
    else:
        (root / name).symlink_to(outside if kind.endswith("folder") else tmp_path / "nothing")
    assert load_latest(root).step == 1
    save(root, 3)
    assert load_latest(root).step == 3
    assert (outside / "kept").read_text() == "not of the run"
    save(root, 5)
    assert sorted(path.name for path in root.iterdir()) == [LATEST, "step-3", "step-5"]


@pytest.mark.parametrize("name", ["step-3", "step-02", "step-\u0663", "Step-3", "step-3.tmp"])
def test_a_renamed_one_is_no_checkpoint(tmp_path, name):
    save(tmp_path, 1)
    save(tmp_path, 2)
    (tmp_path / "step-2").rename(tmp_path / name)
    assert load_latest(tmp_path).step == 1


def test_none(tmp_path):
    assert load_latest(tmp_path) is None
