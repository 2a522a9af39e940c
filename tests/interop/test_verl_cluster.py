"""verl's algorithm layer from end to end on a CPU, through a local Ray: stock, and with ours."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.slow
def test_ppo_of_verls_trainer_and_workers_is_the_same_with_ours(installed, tmp_path):
    """Six steps by its driver, an FSDP actor of two processes and a critic of one: everything
    that verl logs is equal, and the log-probs of what is paid rise."""
    found = {}
    for how, environ in (("stock", {**os.environ, "VERL_USE_EXTERNAL_PLUGINS": "none",
                                    "PYTHONPATH": str(HERE.parents[1])}), ("ours", installed)):
        (tmp_path / how).mkdir()
        done = subprocess.run(
            [sys.executable, "-W", "ignore", HERE / "_verl_run.py", tmp_path / how,
             tmp_path / f"{how}.json"], env=environ | {"RAY_DEDUP_LOGS": "0"}, text=True,
            capture_output=True)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        found[how] = json.loads((tmp_path / f"{how}.json").read_text())
        said = [x for x in (done.stdout + done.stderr).splitlines() if "GAE, whitening" in x]
        assert (len(said) >= 4) if how == "ours" else not said  # the driver and its three workers
    assert found["stock"]["ours"] == "verl.trainer.ppo.core_algos"
    assert found["ours"]["ours"] == "tppo_kernels.integrations.verl"
    assert (found["stock"]["mode"], found["ours"]["mode"]) == ("vanilla", "tppo")
    for stock, ours in zip(found["stock"]["steps"], found["ours"]["steps"], strict=True):
        assert stock.keys() < ours.keys() and "actor/ratio_max" in ours
        for name, value in stock.items():
            if "/perf/" not in name:
                assert ours[name] == pytest.approx(value, rel=1e-3, abs=1e-5), name
    letters = [step["letter"] for step in found["ours"]["steps"]]
    print("log-prob of the letter that is paid:", letters)
    assert letters[-1] > letters[0] + 0.5
