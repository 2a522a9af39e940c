"""Ctrl-C and SIGTERM: a training saves, everything else ends in one line; a closed pipe in none."""

import functools
import importlib
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
import typing

import pytest
import torch
import yaml

from tppo.cli import main
from tppo.methods.ppo import PPO
from tppo.progress import Bar
from tppo.stages.loop import Loop
from tppo.store.run_folder import RunFolder

TINY = {
    "sessions": {"train_users": 40, "heldout_users": 8, "test_users": 8, "transfer_users": 4},
    "scratch": {"hidden_size": 16, "intermediate_size": 16, "vocab_size": 300, "heads": 2},
    "sft": {"max_steps": 2, "eval_every": 2},
    "generate": {"samples": 32, "max_new_tokens": 8},
    "reward_model": {"epochs": 1},
    "ppo": {"steps": 3, "batch_size": 8, "minibatch_size": 8, "checkpoint_every": 100,
            "eval_every": 2, "min_format": 0.0, "max_kl": 100.0, "without_signal": True},
}  # fmt: skip


@pytest.fixture(scope="module")
def before_ppo(tmp_path_factory):
    """A run folder with every stage before PPO."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    config = ["--out", str(folder / "out"), "--config", str(folder / "tiny.yaml")]
    for stage in ("data", "sft", "generate", "label", "map", "train-rm"):
        main([stage, *config])
    return folder / "out"


class Ended(typing.NamedTuple):
    """A process that has ended: its exit status, as a shell sees it, and what it said."""

    code: int
    said: str


@pytest.fixture(scope="module")
def server():
    """Forks the processes of these tests from a clean one that has imported all they need.

    A fork of the process of the tests will not do: where autograd has started threads there,
    torch refuses every backward pass in the child.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tppo.cli", "tppo.stages.ppo", "tppo.stages.label", "yaml"])
    return context


def run(server, tmp_path, arguments, prepare):
    """`tppo` in a process of its own, which calls `prepare` first."""
    log = tmp_path / "said"
    child = server.Process(target=call_main, args=(log, arguments, prepare))
    child.start()
    child.join(100)
    if child.is_alive():
        child.kill()
        child.join()
    return Ended(child.exitcode, log.read_text())


def call_main(log, arguments, prepare):
    code = 99
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        torch.set_num_threads(1)
        prepare()
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
        main(arguments)
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
        os.write(descriptor, f"{ended.code}\n".encode() if code != ended.code else b"")
    except BaseException:
        os.write(descriptor, traceback.format_exc().encode())
    finally:
        os._exit(code)


def call_before(owner, name, when, act):
    """Call `act` before the call number `when` of a function of a class or of a named module.

    Nobody undoes it in a child.
    """
    if isinstance(owner, str):
        owner = importlib.import_module(owner)
    real, calls = getattr(owner, name), []

    def call(*arguments, **options):
        calls.append(1)
        if len(calls) == when:
            act()
        return real(*arguments, **options)

    setattr(owner, name, call)


def at(owner, name, when, act):
    """`call_before`, to be called in the child."""
    return functools.partial(call_before, owner, name, when, act)


def signal_me(number):
    os.kill(os.getpid(), number)


def signalled(number):
    return functools.partial(signal_me, number)


def signal_me_twice():
    signal_me(signal.SIGTERM)
    threading.Timer(0.5, signalled(signal.SIGINT)).start()
    time.sleep(90)


def close_the_readers_end(descriptor):
    reader, writer = os.pipe()
    os.dup2(writer, descriptor)
    os.close(reader)
    os.close(writer)


def close_stream(name):
    setattr(sys, name, None)


def write_to_a_full_disk():
    os.dup2(os.open("/dev/full", os.O_WRONLY), 1)


def hang_up_unheard():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    call_before("tppo.stages.label", "label_by_rule", 2, signalled(signal.SIGHUP))


@pytest.mark.parametrize(
    ("number", "code", "called"), [(signal.SIGINT, 130, "Ctrl-C"), (signal.SIGTERM, 143, "SIGTERM")]
)
def test_a_signal_lets_ppo_finish_its_step_and_saves_it(
    server, before_ppo, tmp_path, capsys, number, code, called
):
    """41 lines of traceback, and the steps since the last checkpoint were lost."""
    train = ["train", "--out", str(before_ppo)]
    done = run(server, tmp_path, train, at(PPO, "update", 1, signalled(number)))
    assert done.code == code, done.said
    assert "stopping: the step under way is finished and saved" in done.said
    step = len(list(before_ppo.glob("train.tmp/checkpoints/step-*")))
    assert done.said.splitlines()[-1] == (
        f"tppo train: stopped by {called}: train: it is saved after step {step} of 3, earlier "
        "stages are kept. The same command goes on from there"
    )
    assert "Traceback" not in done.said
    if number == signal.SIGTERM:  # the second: it went on where the first had stopped
        assert step == 2
        main(train)
        assert "ppo: resumes after step 2 of 3" in capsys.readouterr().err
        metrics = (before_ppo / "train" / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in metrics] == [1, 2, 3]


def test_a_signal_in_the_export_lets_the_stage_finish(server, before_ppo, tmp_path):
    train = ["train", "--out", str(before_ppo), "--ppo.steps", "1"]
    done = run(server, tmp_path, train, at(Loop, "export", 1, signalled(signal.SIGTERM)))
    assert done.code == 143 and (before_ppo / "train" / "manifest.json").exists()
    assert "tppo train: stopped by SIGTERM: train: nothing is lost" in done.said


def test_a_second_signal_ends_it_at_once(server, before_ppo, tmp_path):
    start = time.monotonic()
    train = ["train", "--out", str(before_ppo), "--ppo.lr", "1e-3"]
    done = run(server, tmp_path, train, at(PPO, "update", 1, signal_me_twice))
    assert done.code == 130 and time.monotonic() - start < 60, done.said
    assert "Traceback" not in done.said
    with RunFolder(before_ppo).lock():  # it is free
        pass


def test_a_stage_without_checkpoints_ends_at_once_and_says_what_is_lost(
    server, before_ppo, tmp_path
):
    kept = (before_ppo / "label" / "manifest.json").read_bytes()
    stop = signalled(signal.SIGINT)
    done = run(server, tmp_path, ["label", "--out", str(before_ppo)],
               at("tppo.stages.label", "label_by_rule", 1, stop))  # fmt: skip
    assert done.code == 130, done.said
    assert done.said.splitlines()[1:] == [
        "tppo label: stopped by Ctrl-C: label: labels of an endpoint are kept in "
        "label-cache.jsonl, those by hand in hand-labels.jsonl, earlier stages are kept. "
        "The same command goes on from there"
    ]
    assert (before_ppo / "label" / "manifest.json").read_bytes() == kept
    assert not (before_ppo / "label.tmp").exists()


def test_an_ignored_signal_stays_ignored(server, before_ppo, tmp_path):
    """Such as SIGHUP under nohup."""
    label = ["label", "--out", str(before_ppo)]
    assert run(server, tmp_path, label, hang_up_unheard).code == 0


def before_heat(folder):
    """Make what the heat stage reads, where no test before has."""
    for stage in ("train", "eval"):
        if not (folder / stage).exists():
            main([stage, "--out", str(folder)])


@pytest.mark.parametrize("what", ["inspect", "help", "usage", "agreement", "heat"])
def test_a_closed_pipe_is_no_error(server, before_ppo, tmp_path, what):
    """`| head` gave a BrokenPipeError, or Python's own complaint at its exit."""
    if what == "heat":
        before_heat(before_ppo)
    labels = str(before_ppo / "label" / "labels.jsonl")
    arguments = {
        "inspect": ["data", "inspect", str(before_ppo / "data" / "train.jsonl")],
        "help": ["run", "--help"],
        "usage": ["--help"],
        "agreement": ["label", "--agreement", labels, "--out", str(before_ppo)],
        "heat": ["heat", "--out", str(before_ppo)],
    }[what]

    done = run(server, tmp_path, arguments, functools.partial(close_the_readers_end, 1))
    assert done.code in (1, 128 + signal.SIGPIPE), done.said
    assert "Broken" not in done.said and "Traceback" not in done.said and "rror" not in done.said
    assert what != "heat" or (before_ppo / "heat" / "tokens.jsonl").exists()


@pytest.mark.parametrize("what", ["inspect", "help", "heat"])
def test_stdout_on_a_full_disk_is_one_line(server, before_ppo, tmp_path, what):
    if what == "heat":
        before_heat(before_ppo)
    arguments = {
        "inspect": ["data", "inspect", str(before_ppo / "data" / "train.jsonl")],
        "help": ["run", "--help"],
        "heat": ["heat", "--out", str(before_ppo)],
    }[what]
    done = run(server, tmp_path, arguments, write_to_a_full_disk)
    assert done.code == 1 and "Traceback" not in done.said
    assert done.said.splitlines()[-1].endswith("No space left on device")


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_closed_stream_is_no_error(server, before_ppo, tmp_path, stream):
    """`>&-` gave an AttributeError of None, after all was done."""
    arguments = ["data", "inspect", str(before_ppo / "data" / "train.jsonl")]
    done = run(server, tmp_path, arguments, functools.partial(close_stream, stream))
    assert done.code == 0, done.said


def test_a_run_goes_on_where_nobody_reads_its_progress(server, before_ppo, tmp_path):
    nobody_reads = functools.partial(close_the_readers_end, 2)
    assert run(server, tmp_path, ["map", "--out", str(before_ppo)], nobody_reads).code == 0


def test_a_resumed_bar_counts_its_own_steps_alone(monkeypatch):
    """It showed 586 steps a second."""
    bar = Bar("ppo", 40)
    bar.resume(30)
    assert "/s" not in bar.line() and "left" not in bar.line()
    assert bar.line().startswith("ppo 30/40 (75 %)")
    now = bar.start + 10
    monkeypatch.setattr("tppo.progress.time.monotonic", lambda: now)
    bar.advance(5)
    assert bar.line() == "ppo 35/40 (87 %) 0.5/s, 10 s left"
    monkeypatch.undo()
    bar.close()
