"""A run whose advantage needs no critic: none is loaded, kept in a checkpoint, or exported."""

import hashlib

import pytest
import yaml
from safetensors import safe_open

from tppo.cli import main
from tppo.models.policy import Critic
from tppo.stages.loop import Loop

TINY = {
    "sessions": {"train_users": 60, "heldout_users": 6, "test_users": 6, "transfer_users": 4},
    "scratch": {"hidden_size": 16, "intermediate_size": 16, "vocab_size": 300, "heads": 2},
    "sft": {"max_steps": 8, "eval_every": 8},
    "generate": {"samples": 48, "max_new_tokens": 12},
    "reward_model": {"epochs": 1},
    "ppo": {"steps": 3, "batch_size": 6, "minibatch_size": 6, "eval_every": 3, "min_format": 0.0,
            "checkpoint_every": 1, "max_kl": 100.0, "responses_per_prompt": 3,
            "advantage": "grpo", "reward": "expected", "without_signal": True},
    "eval": {"heat_users": 2, "temperatures": [1.0], "continued": False},
}  # fmt: skip


def test_a_run_without_a_critic_has_none_anywhere(tmp_path, monkeypatch, capsys):
    """It fails before its export, resumes from a checkpoint, and its heat map needs no critic."""

    def refused(*_):
        raise AssertionError("a critic was loaded")

    monkeypatch.setattr(Critic, "from_policy", refused)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    out = tmp_path / "out"
    config = ["--out", str(out), "--config", str(tmp_path / "tiny.yaml"), "--threads", "1"]
    for stage in ("data", "sft", "generate", "label", "map", "train-rm"):
        main([stage, *config])
    with monkeypatch.context() as patch:
        patch.setattr(Loop, "export", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            main(["train", *config])
    (weights,) = sorted(out.glob("train.tmp/checkpoints/step-*/*.safetensors"))[:1]
    names = {path.name for path in out.rglob("train.tmp/**/*") if path.is_file()}
    assert not any("critic" in name for name in names)
    with safe_open(weights, "pt") as tensors:
        assert not any("critic" in name for name in tensors.keys())  # noqa: SIM118
    main(["train", *config])
    assert "ppo: resumes after step" in capsys.readouterr().err
    assert not (out / "train/critic.safetensors").exists()
    model = out / "train/model/model.safetensors"
    once = hashlib.sha256(model.read_bytes()).hexdigest()
    sft = hashlib.sha256((out / "sft/model/model.safetensors").read_bytes()).hexdigest()
    assert once != sft
    main(["eval", *config])
    main(["heat", *config])
    assert "Advantage" in (out / "report.html").read_text()
    monkeypatch.undo()
    with pytest.raises(SystemExit) as caught:
        main(["heat", *config, "--ppo.advantage", "gae"])
    assert "because training needed no critic" in str(caught.value) + capsys.readouterr().err
