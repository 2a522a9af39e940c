"""`--report-to`: the real trackers get the rows of metrics.jsonl, each once, without a network."""

import json
import time

import pytest

from tppo.cli import main
from tppo.errors import DataError
from tppo.stages.trackers import STATE, followed, need_trackers, trackers_named

ROWS = [
    {"step": step, "objective/kl": step / 4, "episode": 8 * step, "loss": float("nan"),
     "heldout/relevance_interval": [0.1, 0.2], "note": "text"}
    for step in range(1, 6)
]  # fmt: skip


def of_tensorboard(folder, name):
    """{figure: {step: value}} of a run; a step that stands there twice fails."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard" / name))
    events.Reload()
    found = {}
    for tag in events.Tags()["scalars"]:
        found[tag] = {event.step: event.value for event in events.Scalars(tag)}
        assert len(found[tag]) == len(events.Scalars(tag)), f"{tag} of {name} has a step twice"
    return found


def records_of(data):
    """The records of a .wandb file, which is LevelDB's log behind a header of seven bytes."""
    assert data.startswith(b":W&B")
    at, whole = 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # no header fits the block
            at += 32768 - at % 32768
            continue
        n, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        whole += data[at + 7 : at + 7 + n]
        at += 7 + n
        if kind in (1, 4):  # in one piece, or its last
            yield whole
            whole = b""


def ended(file, kind):
    """The records of a run that has ended; a process of wandb's own writes the last of them."""
    for _ in range(600):
        records = [kind.FromString(data) for data in records_of(file.read_bytes())]
        if records and records[-1].WhichOneof("record_type") == "exit":
            return records
        time.sleep(0.1)
    raise AssertionError(f"{file} has no end")


def of_wandb(folder, name):
    from wandb.proto.wandb_internal_pb2 import Record

    found = {}
    for file in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        if name not in file.name:
            continue
        for record in ended(file, Record):
            row = {item.key or ".".join(item.nested_key): json.loads(item.value_json)
                   for item in record.history.item}  # fmt: skip
            step = record.history.step.num or row.get("_step")
            for key, value in row.items():
                if not key.startswith("_"):
                    assert step not in found.setdefault(key, {})
                    found[key][step] = value
    return found


def of_trackio(folder, name):
    from trackio.sqlite_storage import SQLiteStorage

    (run,) = [run for run in SQLiteStorage.get_runs("tppo") if run.startswith(name)]
    found = {}
    for row in SQLiteStorage.get_logs("tppo", run):
        for key, value in row.items():
            if key not in ("step", "timestamp"):
                assert row["step"] not in found.setdefault(key, {})
                found[key][row["step"]] = value
    return found


READERS = {"tensorboard": of_tensorboard, "wandb": of_wandb, "trackio": of_trackio}


@pytest.fixture(params=READERS)
def kind(request, monkeypatch, tmp_path):
    # wandb and trackio are no dependencies of the tests: with what they need they have 150 MB.
    pytest.importorskip(request.param, reason=f"the package {request.param} is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    if request.param == "trackio":
        import trackio.sqlite_storage
        import trackio.utils

        for module in (trackio.utils, trackio.sqlite_storage):  # read when they were imported
            monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path / "trackio", raising=False)
    return request.param


def test_a_tracker_is_told_every_row_once_over_a_kill(kind, tmp_path, capfd):
    folder, out = tmp_path / "a-run", tmp_path / "a-run" / "train.tmp"
    out.mkdir(parents=True)
    with followed(kind, out, folder, {"lr": 0.1}) as journal:
        for n in (1, 2, 3):
            journal.write(ROWS[:n])
    with followed(kind, out, folder) as journal:  # from a checkpoint at step 2
        journal.resume(ROWS[:2], [])
        for n in (3, 4, 5):
            journal.write(ROWS[:n])
    found = READERS[kind](folder, "a-run-train-1")
    assert found["objective/kl"] == {step: step / 4 for step in range(1, 6)}
    assert found["train/episode"][5] == 40 and "train/loss" not in found  # NaN is no figure
    assert set(found) == {"objective/kl", "train/step", "train/episode"}
    with followed(kind, out, folder) as journal:  # anew: another run, the first one stays
        journal.write(ROWS[:1])
    assert READERS[kind](folder, "a-run-train-2")["objective/kl"] == {1: 0.25}
    assert json.loads((folder / STATE).read_text()) == {"train": {kind: {"run": 2, "rows": 1}}}
    lines = (out / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 1 and capfd.readouterr().out == ""  # stdout is for results


def test_nothing_is_told_by_default(tmp_path):
    with followed("none", tmp_path, tmp_path) as journal:
        journal.write(ROWS[:1], [{"step": 0}])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "samples.jsonl"]


def test_names_that_there_are_not_and_packages_that_are_missing(tmp_path, monkeypatch):
    assert trackers_named("none") == [] and trackers_named("wandb, wandb,trackio") == [
        "wandb", "trackio"]  # fmt: skip
    with pytest.raises(DataError, match="--report-to was 'mlflow', expected none, or some of ten"):
        trackers_named("mlflow")
    monkeypatch.setattr("tppo.stages.trackers.find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"not installed \(pip install 'tppo-kernels\[wandb\]'\)"):
        need_trackers("wandb")
    with pytest.raises(SystemExit, match="tensorboard is not installed"):  # before a folder is made
        main(["run", "--out", str(tmp_path / "out"), "--report-to", "tensorboard"])
    assert not (tmp_path / "out").exists()
