"""Checkpoints: whole or not at all, and damage is seen."""

import pytest
import torch

from tppo.checkpoint import COMPLETE, LATEST, load_latest, save_checkpoint


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


def test_none(tmp_path):
    assert load_latest(tmp_path) is None
