"""Run folders: a stage is there whole or not at all, and knows what it was made from."""

import dataclasses
import errno
import fcntl
import hashlib
import json
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tppo.progress import INTERVAL_S, say, status, track
from tppo.store import hashes
from tppo.store.disk import DiskFull
from tppo.store.hashes import sha256
from tppo.store.run_folder import KEPT, RunFolder, write_json


@dataclasses.dataclass(frozen=True)
class Inner:
    lr: float = 1e-3
    shape: tuple[int, ...] = (1, 2)


@dataclasses.dataclass(frozen=True)
class Config:
    inner: Inner = Inner()
    path: Path = Path("x/y")
    max_new_tokens: int = 24


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("one\n")
    return path


@pytest.fixture
def folder(tmp_path):
    return RunFolder(tmp_path / "run")


def finish(folder, data, config=Config(), seed=1, text="weights"):  # noqa: B008
    with folder.stage("sft", [data], config, seed) as out:
        (out / "model").mkdir()
        (out / "model" / "a.txt").write_text(text)
    return folder.root / "sft"


def names(root):
    """What a user sees: the lock and the remembered hashes are hidden files."""
    return [name for name in os.listdir(root) if not name.startswith(".")]


def test_a_finished_stage_has_its_files_and_a_manifest(folder, data):
    final = finish(folder, data)
    assert names(folder.root) == ["sft"]
    assert (final / "model" / "a.txt").read_text() == "weights"
    manifest = json.loads((final / "manifest.json").read_text())
    assert manifest["inputs"] == [
        {"path": "../data.jsonl", "sha256": hashlib.sha256(b"one\n").hexdigest()}
    ]
    assert manifest["config"] == {
        "inner": {"lr": 0.001, "shape": [1, 2]},
        "path": "x/y",
        "max_new_tokens": 24,
    }
    assert manifest["seed"] == 1
    assert manifest["seconds"] >= 0
    assert set(manifest["versions"]) == {
        "python", "tppo-kernels", "torch", "transformers", "icu4py"
    }  # fmt: skip
    assert manifest["outputs"] == {
        "model/a.txt": {"nbytes": 7, "sha256": hashlib.sha256(b"weights").hexdigest()}
    }


def test_done_compares_inputs_config_and_seed(folder, data, capsys):
    assert not folder.done("sft", [data], Config(), 1)
    assert capsys.readouterr().err == ""  # nothing to explain: it never ran
    finish(folder, data)
    assert folder.done("sft", [data], Config(), 1)
    assert capsys.readouterr().err == ""

    assert not folder.done("sft", [data], Config(inner=Inner(lr=0.1)), 2)
    err = capsys.readouterr().err
    assert err == "sft: runs again, because config.inner.lr was 0.001, is 0.1; seed was 1, is 2\n"

    data.write_text("two\n")
    assert not folder.done("sft", [data], Config(), 1)
    assert capsys.readouterr().err == "sft: runs again, because input ../data.jsonl changed\n"


def test_a_config_that_gains_or_loses_a_key_is_another(folder, data):
    finish(folder, data, config={"a": 1, "b": None})
    assert folder.changes("sft", [data], {"a": 1, "b": None}, 1) == []
    assert folder.changes("sft", [data], {"a": 1}, 1) == ["config.b was None, is absent"]
    assert folder.changes("sft", [data], {"a": 1, "b": None, "c": 2}, 1) == [
        "config.c was absent, is 2"
    ]
    assert folder.changes("sft", [data, data], {"a": 1, "b": None}, 1) == ["it had 1 inputs, has 2"]


def test_the_same_input_elsewhere_is_the_same_input(folder, data, tmp_path):
    finish(folder, data)
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(data.read_bytes())
    assert folder.done("sft", [copy], Config(), 1)


def test_a_folder_is_an_input_by_names_and_contents(folder, data):
    model = finish(folder, data)
    before = sha256(model)
    (model / "manifest.json").write_text("{}")
    assert sha256(model) == before  # when and where it was made does not matter
    os.rename(model / "model" / "a.txt", model / "model" / "b.txt")
    renamed = sha256(model)
    (model / "model" / "b.txt").write_text("other")
    assert len({before, renamed, sha256(model)}) == 3
    with pytest.raises(ValueError, match="absent: no such file or folder"):
        sha256(model / "absent")


@pytest.mark.parametrize("damage", ["remove", "truncate", "manifest"])
def test_a_damaged_stage_is_not_done(folder, data, damage):
    final = finish(folder, data)
    if damage == "remove":
        (final / "model" / "a.txt").unlink()
    elif damage == "truncate":
        (final / "model" / "a.txt").write_text("weigh")
    else:
        (final / "manifest.json").write_text('{"inputs": ')
    assert not folder.done("sft", [data], Config(), 1)
    finish(folder, data)
    assert folder.done("sft", [data], Config(), 1)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failing_stage_leaves_nothing(folder, data, error):
    with pytest.raises(error):
        with folder.stage("sft", [data], Config(), 1) as out:
            (out / "half.txt").write_text("x")
            raise error
    assert names(folder.root) == []
    assert not folder.done("sft", [data], Config(), 1)


def test_a_failing_stage_leaves_the_earlier_result(folder, data):
    finish(folder, data)
    with pytest.raises(RuntimeError):
        with folder.stage("sft", [data], Config(), 2) as out:
            (out / "half.txt").write_text("x")
            raise RuntimeError
    assert names(folder.root) == ["sft"]
    assert folder.done("sft", [data], Config(), 1)
    assert not folder.done("sft", [data], Config(), 2)


def test_a_second_run_replaces_the_first_whole(folder, data):
    finish(folder, data)
    with folder.stage("sft", [data], Config(), 2) as out:
        (out / "only.txt").write_text("new")
    assert sorted(os.listdir(folder.root / "sft")) == ["manifest.json", "only.txt"]
    assert names(folder.root) == ["sft"]


KILLED = """
import sys, time
from tppo.store.run_folder import RunFolder
with RunFolder(sys.argv[1]).stage("sft", [], {"a": 1}, 1, resume=len(sys.argv) > 2) as out:
    (out / "half.txt").write_text("x")
    (out / "checkpoints").mkdir()
    (out / "checkpoints" / "step-1").write_text("x")
    print("in", flush=True)
    time.sleep(60)
"""


def start(folder, *arguments):
    command = [sys.executable, "-c", KILLED, str(folder.root), *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "in\n"
    return process


def kill(process):
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()


def test_a_killed_stage_does_not_look_finished_and_starts_anew(folder):
    kill(start(folder))
    assert not folder.done("sft", [], {"a": 1}, 1)
    assert not (folder.root / "sft").exists()
    with folder.stage("sft", [], {"a": 1}, 1) as out:
        assert not (out / "half.txt").exists()
    assert folder.done("sft", [], {"a": 1}, 1)
    assert names(folder.root) == ["sft"]


@pytest.mark.parametrize(("config", "kept"), [({"a": 1}, True), ({"a": 2}, False)])
def test_a_resumable_stage_gets_its_checkpoints_back_for_the_same_work(
    folder, config, kept, capsys
):
    kill(start(folder, "resume"))
    assert not folder.done("sft", [], {"a": 1}, 1)
    with folder.stage("sft", [], config, 1, resume=True) as out:
        assert not (out / "half.txt").exists()
        assert (out / KEPT / "step-1").exists() == kept
    assert folder.done("sft", [], config, 1)
    assert os.listdir(folder.root / "sft") == ["manifest.json"]
    said = "starts anew and deletes its checkpoints, because config.a was 1, is 2"
    assert (said in capsys.readouterr().err) == (not kept)


def test_a_resumable_stage_keeps_its_files_when_it_fails(folder):
    with pytest.raises(RuntimeError):
        with folder.stage("ppo", resume=True) as out:
            (out / KEPT).mkdir()
            (out / KEPT / "step-1").write_text("x")
            raise RuntimeError
    assert not folder.done("ppo")
    with folder.stage("ppo", resume=True) as out:
        assert (out / KEPT / "step-1").read_text() == "x"


# Where a power cut or a kill hits the end of a stage; `rename` is the one that gives it its name.
KILLED_AT = """
import os, shutil, signal, sys
from tppo.store import run_folder
from tppo.store.run_folder import RunFolder
def killed_at(module, name, which):
    real = getattr(module, name)
    def call(*arguments, **options):
        if which in str(arguments):
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **options)
    setattr(module, name, call)
where = sys.argv[2]
if where == "manifest":
    killed_at(run_folder, "_sync_tree", "sft.tmp")
elif where == "clear":
    killed_at(run_folder, "write_json", "manifest.json")
elif where == "delete":
    killed_at(shutil, "rmtree", "sft/checkpoints")
else:
    killed_at(os, "rename", "sft.tmp")
with RunFolder(sys.argv[1]).stage("sft", [], {"a": 1}, 1, resume=True) as out:
    (out / "model").write_text("export")
"""


@pytest.mark.parametrize("where", ["clear", "manifest", "rename", "delete"])
def test_a_kill_at_the_end_of_a_stage_does_not_cost_its_checkpoints(folder, where):
    """`train` deleted them in its export: a kill before the rename began from step 0 again."""
    kill(start(folder, "resume"))
    command = [sys.executable, "-c", KILLED_AT, str(folder.root), where]
    assert subprocess.run(command).returncode == -signal.SIGKILL
    if where == "delete":  # the result has its name, and the checkpoints go with the next look
        assert (folder.root / "sft" / KEPT).is_dir()
        assert folder.done("sft", [], {"a": 1}, 1)
    else:
        assert not folder.done("sft", [], {"a": 1}, 1)
        with folder.stage("sft", [], {"a": 1}, 1, resume=True) as out:
            assert os.listdir(out / KEPT) == ["step-1"] and not (out / "model").exists()
            (out / "model").write_text("export")
    assert sorted(os.listdir(folder.root / "sft")) == ["manifest.json", "model"]


@pytest.mark.parametrize(
    "text",
    [
        "[]", "{}", "null", "1", '"text"', "[" * 100_000, '{"a":' * 100_000, "\x00", "",
        '{"outputs": {}}', '{"inputs": [], "config": {}, "seed": 1, "outputs": []}',
        '{"inputs": [1], "config": {}, "seed": 1, "outputs": {}}',
        '{"inputs": [{"path": 1, "sha256": null}], "config": {}, "seed": 1, "outputs": {}}',
        '{"inputs": [], "config": {}, "seed": 1, "outputs": {"model/a.txt": 7}}',
        '{"inputs": [], "config": {}, "seed": 1, "outputs": {"model/a.txt": {"nbytes": "7"}}}',
        '{"inputs": {}, "config": {}, "seed": 1, "outputs": {}}',
    ],
    ids=lambda text: repr(text[:60]),
)  # fmt: skip
def test_a_damaged_manifest_is_named_and_its_stage_runs_again(folder, data, text, capsys):
    manifest = finish(folder, data) / "manifest.json"
    manifest.write_text(text)
    assert not folder.done("sft", [data], Config(), 1)
    assert capsys.readouterr().err == f"sft: runs again, because {manifest} is damaged\n"
    with pytest.raises(ValueError, match=r"sft/manifest\.json: absent or damaged, run stage sft"):
        folder.verify(folder.root / "sft" / "model")
    finish(folder, data)
    assert folder.done("sft", [data], Config(), 1)


def test_checkpoints_whose_manifest_is_damaged_are_not_trusted(folder, capsys):
    kill(start(folder, "resume"))
    (folder.root / "sft.tmp" / "manifest.json").write_text("[]")
    with folder.stage("sft", [], {"a": 1}, 1, resume=True) as out:
        assert not (out / KEPT).exists()
    assert "sft.tmp/manifest.json is damaged" in capsys.readouterr().err


@pytest.mark.parametrize("size", [7, 3 << 20])
def test_a_flipped_bit_in_a_finished_stage_is_seen(folder, data, size, capsys):
    """The size is what the manifest says; the next stage trained on it."""
    final = finish(folder, data, text="x" * size)
    file = final / "model" / "a.txt"
    folder.verify(final / "model")
    times = file.stat()
    with open(file, "r+b") as content:
        content.seek(size // 2)
        content.write(b"y")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))  # a copy may keep the old time
    for path in (file, final / "model", final):
        with pytest.raises(ValueError, match=r"model/a\.txt: not the file that stage sft wrote"):
            RunFolder(folder.root).verify(path)
    assert not RunFolder(folder.root).done("sft", [data], Config(), 1)
    assert "model/a.txt is not the file that the stage wrote" in capsys.readouterr().err


def test_a_file_that_the_stage_did_not_write_is_seen_in_its_model(folder, data):
    final = finish(folder, data)
    (final / "model" / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"adapter_config\.json: not the file that stage"):
        folder.verify(final / "model")


def test_a_large_file_is_hashed_once_and_again_when_it_changes(folder, data, monkeypatch):
    final = finish(folder, data, text="x" * (2 << 20))
    file = final / "model" / "a.txt"
    read = []
    real = hashes._read
    monkeypatch.setattr(hashes, "_read", lambda path: read.append(path.name) or real(path))
    folder.verify(final)
    folder.verify(final)
    assert read == ["a.txt"] * 2  # written just now: a change might keep its time stamp
    monkeypatch.setattr(hashes, "SETTLED_S", -1.0)
    for _ in range(3):
        RunFolder(folder.root).verify(final)  # in another process too: it is remembered on disk
    assert read == ["a.txt"] * 3
    other = file.with_name("b.txt")
    other.write_bytes(b"y" * (2 << 20))
    os.utime(other, ns=(file.stat().st_atime_ns, file.stat().st_mtime_ns))
    os.replace(other, file)
    with pytest.raises(ValueError, match="not the file"):
        folder.verify(final)
    (folder.root / ".hashes.json").write_text("[1")
    finish(folder, data)
    RunFolder(folder.root).verify(final)


def test_a_full_disk_is_one_sentence(folder, data):
    """safetensors, torch and Python each have a type of error of their own for it."""
    tensors = {"a": torch.zeros(1 << 18)}
    writers = [
        lambda out: save_file(tensors, out / "model.safetensors"),
        lambda out: (out / "text").write_bytes(b"x" * (1 << 20)),
        lambda out: write_json(out / "rows.json", ["x" * 100] * 10_000),
    ]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for write in writers:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 19, hard))
        try:
            with pytest.raises(DiskFull, match=r"stage sft cannot be written: File too large; .* "
                                               r"are free there now\. Make room and run the same"):
                with folder.stage("sft", [data]) as out:
                    write(out)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert names(folder.root) == []


def test_two_processes_cannot_work_in_one_folder(folder):
    process = start(folder)
    try:
        said = rf"process {process.pid} \(`-c .*run`, since .* and only one can at a time; wait"
        for name in ("sft", "other"):  # the other may read what this one replaces
            with pytest.raises(RuntimeError, match=said):
                with folder.stage(name, [], {"a": 1}, 1):
                    pass
        assert (folder.root / "sft.tmp" / "half.txt").exists()
        assert not folder.done("sft") and folder.changes("other")  # a reader is let in
    finally:
        kill(process)
    with folder.stage("other"):  # and a process that was killed holds nothing
        pass


def test_a_lock_is_held_as_long_as_the_outermost_block(folder):
    with folder.lock():
        with folder.stage("sft"):
            pass
        with pytest.raises(RuntimeError, match=rf"process {os.getpid()} "):
            with RunFolder(folder.root).lock():
                pass
    with RunFolder(folder.root).lock():
        pass


def test_a_file_system_without_locks_is_said(folder, monkeypatch, capsys):
    def no_locks(descriptor, how):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with folder.stage("sft"):
        pass
    assert "its file system has no locks (No locks available)" in capsys.readouterr().err
    assert folder.done("sft")


def test_everything_is_on_disk_before_the_name_is(folder, data, monkeypatch):
    """A power cut after the rename must not leave a finished stage with empty files."""
    events, fsync, rename = [], os.fsync, os.rename

    def record_fsync(descriptor):
        events.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def record_rename(source, target):
        events.append("rename")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "rename", record_rename)
    finish(folder, data)
    before = events[: events.index("rename")]
    work = folder.root / "sft.tmp"
    for path in (work / "model" / "a.txt", work / "manifest.json", work / "model", work):
        assert str(path) in before
    assert events[-1] == str(folder.root)


def test_an_interrupted_replacement_is_finished_by_the_next_run(folder, data):
    final = finish(folder, data)
    os.rename(final, folder.root / "sft.old")  # where a kill between the two renames leaves it
    assert not folder.done("sft", [data], Config(), 1)
    finish(folder, data)
    assert names(folder.root) == ["sft"]


def test_secrets_are_not_written(folder):
    config = {
        "base_url": "https://me:pass1@host/v1",
        "api_key": "sk-1234",
        "api_key_env": "MY_KEY",
        "headers": [{"Authorization": "Bearer 99"}],
        "hf_token": "hf_77",
        "max_new_tokens": 24,
        "tokenizer": "bpe",
    }
    with folder.stage("label", [], config):
        pass
    text = (folder.root / "label" / "manifest.json").read_text()
    for secret in ("pass1", "sk-1234", "Bearer", "hf_77"):
        assert secret not in text
    written = json.loads(text)["config"]
    assert written["api_key_env"] == "MY_KEY"
    assert written["max_new_tokens"] == 24
    assert written["tokenizer"] == "bpe"
    assert written["base_url"].endswith("@host/v1")
    assert folder.done("label", [], config)


@pytest.mark.parametrize("name", ["", "..", "a/b", "A", ".x", "a.tmp"])
def test_stage_names_are_plain(folder, name):
    with pytest.raises(ValueError, match="stage name was"):
        with folder.stage(name):
            pass


def test_work_that_takes_long_is_never_silent(capsys):
    """A single step that takes three intervals is reported on while it runs."""
    lines = []

    def watch():
        started = time.monotonic()
        while time.monotonic() - started < 60 and len(lines) < 3:
            text = capsys.readouterr().err
            if text:
                lines.append((time.monotonic() - started, text))
            time.sleep(0.05)

    watcher = threading.Thread(target=watch)
    watcher.start()
    bar = track(iter([1]), "thinking", total=1)
    for _ in bar:
        bar.note("loss 1.5")
        watcher.join()
    assert len(lines) == 3
    gaps = [b - a for (a, _), (b, _) in zip([(0.0, ""), *lines], lines, strict=False)]
    assert all(0.8 * INTERVAL_S < gap < 2 * INTERVAL_S for gap in gaps), gaps
    assert re.fullmatch(r"thinking 0/1 \(0 %\) [23] s: loss 1\.5\n", lines[0][1])
    assert capsys.readouterr().err.startswith("thinking 1/1 (100 %)")


def test_quick_work_says_nothing_and_other_ranks_never_speak(capsys, monkeypatch):
    assert list(track([1, 2, 3], "quick")) == [1, 2, 3]
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with status("loading"):
        say("hello")
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_live_bar():
    """The bar, a line beside it, and a clean screen afterwards, on a real pseudo-terminal."""
    import pty

    script = (
        "from tppo.progress import *; import time\n"
        "for i in (bar := track(range(4), 'steps')):\n"
        "    time.sleep(.2); bar.note(f'loss {i}'); say('line %d [x]' % i)\n"
    )
    parent, child = pty.openpty()
    command = [sys.executable, "-c", script]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    process = subprocess.Popen(command, stderr=child, env=environment)
    os.close(child)
    seen = b""
    try:
        while block := os.read(parent, 4096):
            seen += block
    except OSError:  # the other end is closed
        pass
    finally:
        process.wait()
        os.close(parent)
    assert process.returncode == 0
    text = seen.decode()
    assert "steps" in text and "2/4 (50 %)" in text and "line 3 [x]" in text and "loss 2" in text
