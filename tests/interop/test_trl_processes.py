"""TokenGRPOTrainer in two processes: what one logs and learns from the same answers."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from _trl_process import RUNS, trained
from _trl_runs import saved_model

HERE = Path(__file__).parent
CLOSE = 2e-5  # of the larger of 1 and the number: sums in another order, over four steps


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The logs and weights of one process, and of the first of two over gloo."""
    folder = tmp_path_factory.mktemp("processes")
    model, out = saved_model(folder / "model"), folder / "two.json"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = [subprocess.Popen(
        [sys.executable, HERE / "_trl_process.py", model, out], stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, text=True, env={
            **os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}) for rank in range(2)]
    one = trained(model, folder / "one")
    told = [process.communicate(timeout=900)[1] for process in world]
    assert [process.returncode for process in world] == [0, 0], told
    return one, json.loads(out.read_text())


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_log_and_learn_what_one_does(both, name):
    """Rewards of a group that lies on both are gathered, and metrics are of all answers."""
    one, two = (found[name] for found in both)
    assert len(one["log"]) == len(two["log"]) == 5
    assert max(abs(line["loss"]) for line in one["log"][:4]) > 1e-3
    apart = 0.0
    for expected, actual in zip(one["log"], two["log"], strict=True):
        assert expected.keys() == actual.keys()
        for key in expected.keys() - {"step_time"}:
            if "runtime" not in key and "per_second" not in key:
                share = abs(actual[key] - expected[key]) / max(1.0, abs(expected[key]))
                assert share < CLOSE, (key, expected[key], actual[key])
                apart = max(apart, share)
    moved = [abs(a / b - 1) for a, b in zip(two["moved"], one["moved"], strict=True)]
    assert max(moved) < 1e-3  # fp32 keeps four digits of a hundredth of a weight
    print(f"{name}: logs {apart:.1e} apart, what weights moved {max(moved):.1e}")
