"""The scripts for TRL's users, as they are, for two steps of a small model."""

import runpy
import sys
from pathlib import Path

import pytest
import trl
from _trl_runs import saved_model

from tppo_kernels.integrations.trl import TokenGRPOTrainer, unpatch

EXAMPLES = Path(__file__).resolve().parent.parent.parent / "examples/integrations/trl"


@pytest.mark.parametrize(("script", "says"), [
    ("patch.py", "_ChunkedLogProbFunction, selective_log_softmax"),
    ("token_rewards.py", "TokenGRPOTrainer: dapo loss by ppo_loss"),
])
def test_a_script_trains(script, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [script, saved_model(tmp_path / "model")])
    short = {"max_steps": 2, "use_cpu": True, "bf16": False, "logging_steps": 1,
             "learning_rate": 1e-2}
    config = trl.GRPOConfig
    monkeypatch.setattr(trl, "GRPOConfig", lambda **given: config(**{**given, **short}))
    try:
        found = runpy.run_path(str(EXAMPLES / script), run_name="__main__")
    finally:
        unpatch()
    assert says in capsys.readouterr().err
    history = found["trainer"].state.log_history
    assert len(history) == 3 and history[0]["grad_norm"] > 0
    assert isinstance(found["trainer"], TokenGRPOTrainer) == (script == "token_rewards.py")
