"""Environment variables: each that is read is refused by its name, or said to be ignored."""

import pytest

from tppo.cli import main
from tppo.environment import processes, whole

TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
WRONG = {
    "rank alone": ({"RANK": "1"}, "RANK was '1' and WORLD_SIZE was not set, .*: unset RANK"),
    "zero alone": ({"RANK": "0"}, "RANK was '0' and WORLD_SIZE was not"),
    "size alone": ({"WORLD_SIZE": "2"}, "WORLD_SIZE was '2' and RANK was not set, .*WORLD_SIZE$"),
    "no number": (TORCHRUN | {"RANK": "abc"}, "RANK was 'abc', expected a whole number fr"),
    "too high": (TORCHRUN | {"RANK": "2"}, "RANK was '2', expected a whole number from 0 to 1"),
    "negative": (TORCHRUN | {"RANK": "-1"}, "RANK was '-1', expected a whole number from 0 to 1"),
    "empty": (TORCHRUN | {"RANK": ""}, "RANK was '', expected a whole number"),
    "superscript": (TORCHRUN | {"RANK": "²"}, "RANK was '²', expected a whole number"),
    "no process": (TORCHRUN | {"WORLD_SIZE": "0"}, "WORLD_SIZE was '0', expected a whole number"),
    "size": (TORCHRUN | {"WORLD_SIZE": "two"}, "WORLD_SIZE was 'two', expected a whole number"),
    "port": (TORCHRUN | {"MASTER_PORT": "http"}, "MASTER_PORT was 'http', expected a whole number"),
    "no meeting": (TORCHRUN | {"MASTER_ADDR": ""}, "MASTER_ADDR was not set, .*: torchrun sets it"),
    "traceback": ({"TPPO_TRACEBACK": "yes"}, "TPPO_TRACEBACK was 'yes', expected 1 or 0"),
    "check": ({"TPPO_CHECK": "true"}, "TPPO_CHECK was 'true', expected 1 or 0"),
    "backend": ({"TPPO_BACKEND": "cuad"}, "TPPO_BACKEND: backend is 'cuad', expected one of ref"),
}


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    for name in (*TORCHRUN, "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(("values", "message"), WRONG.values(), ids=WRONG)
def test_a_variable_that_makes_no_sense_is_refused_by_name(tmp_path, monkeypatch, values, message):
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    out = tmp_path / "out"
    with pytest.raises(SystemExit, match=f"^tppo data: environment variable {message}"):
        main(["data", "--out", str(out)])
    assert not out.exists()


def test_what_torchrun_sets_is_taken(monkeypatch):
    assert processes() == (0, 1)
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    assert processes() == (1, 2)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.delenv("MASTER_ADDR")
    assert processes() == (0, 1)


def test_the_device_of_a_process_is_one_that_is_there(monkeypatch):
    with pytest.raises(ValueError, match="LOCAL_RANK was not set, .* from 0 to 1: torchrun sets"):
        whole("LOCAL_RANK", 0, 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match="LOCAL_RANK was '2', expected a whole number from 0 to 1"):
        whole("LOCAL_RANK", 0, 2)


def test_a_name_that_nothing_reads_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TPPO_BACKND", "reference")
    monkeypatch.setenv("TPPO_MY_KEY", "s3cret")
    sizes = [f"--sessions.{name}-users=3" for name in ("train", "heldout", "test", "transfer")]
    key = ["--label.endpoint.api-key-env", "TPPO_MY_KEY"]
    main(["data", "--out", str(tmp_path / "out"), *sizes, *key])
    said = capsys.readouterr().err
    assert "TPPO_BACKND is ignored: nothing reads it; did you mean TPPO_BACKEND?" in said
    assert "TPPO_MY_KEY" not in said
