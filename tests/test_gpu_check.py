"""`make gpu-check` where there is no GPU: every part ended in every way, and what is left then."""

import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PARTS = ("machine", "build", "first-touch", "goals", "tests", "kernels", "benchmarks", "learning",
         "rollouts", "sanitizer")
MACHINE = {"gpu": None, "cpu": "a CPU", "torch": "2", "python": "3", "copy_gb_s": 10.0,
           "matmul_tflop_s": 1.0, "matmul_dtype": "float32", "time": "now"}
ROW = {"op": "gae", "shape": "1 x 1", "implementation": "op", "device": "cpu", "median_us": 1.0,
       "wall_us": 1.0, "device_us": None, "gb_s": 1.0, "percent_of_copy": 1.0, "peak_mb": 0.0,
       "speed_up": {}, "rounds": 1, "note": "", "errors": []}
ANSWERS = {"model": "1.5B", "device": "cuda", "prompts": 64, "response": 400, "engine": "generate",
           "tokens": 9000, "seconds": 2.0, "tokens_s": 4500.0, "speed_up": 1.0, "excused": 0,
           "note": ""}
NO_ENGINE = {"engine": "vLLM", "tokens": None, "seconds": None, "tokens_s": None, "speed_up": None,
             "note": "no number: RuntimeError: vllm is not installed"}


@pytest.fixture
def gpu_check(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    return importlib.import_module("gpu_check")


@pytest.fixture
def rehearsal(gpu_check, tmp_path, monkeypatch):
    """gpu-check with its own parts, whose commands are stand-ins: each writes what the real one
    would, a row or a check, and ends as it is told to."""
    monkeypatch.setattr(gpu_check._parts, "lacks", lambda *_: None)
    monkeypatch.setattr(gpu_check._parts.shutil, "which", lambda name: f"/usr/bin/{name}")

    class Rehearsal(gpu_check.Check):
        how: dict[str, str] = {}
        seen: dict[str, list[dict]] = {}

        def command(self, part, *argv, **options):
            self.seen.setdefault(part.name, []).append(self.on_disk())
            how = self.how.get(part.name, "well")
            if how == "exception":
                raise IndexError("list index out of range")
            self.begin(part, argv)
            script = {"well": "true", "exit": "echo no; exit 7", "time-out": "sleep 60",
                      "kill": "kill -9 $$"}[how]
            if how == "time-out":
                part.end = min(part.end, time.monotonic() + 0.3)
            return super().command(part, "bash", "-c", f"echo begun; {script}",
                                   **{k: v for k, v in options.items() if k == "share"})

        def begin(self, part, argv):
            name = f"{part.name} {len(self.seen[part.name])}"
            if part.name == "machine":
                self.journal.add("machine", **MACHINE)
            elif part.name == "first-touch":
                self.journal.add("unit", part=part.name, unit=str(argv[-1]), state="ok", said="",
                                 seconds=0.0)
            elif part.name == "learning":
                folder = Path(argv[argv.index("--out") + 1], "train")
                folder.mkdir(parents=True, exist_ok=True)
                (folder / "metrics.jsonl").write_text('{"objective/scores": 0.5}\n' * 4)
            else:
                self.journal.add("row", **{**ROW, "shape": name})
            if part.name == "rollouts":
                self.journal.add("rollout", **ANSWERS)
                self.journal.add("rollout", **{**ANSWERS, **NO_ENGINE})

        def on_disk(self):
            path = self.out / "results.json"
            return json.loads(path.read_text()) if path.exists() else {}

    def make(out=tmp_path / "out", **how):
        check = Rehearsal(out, smoke=False, seconds=40)
        check.how, check.seen = {k.replace("_", "-"): v for k, v in how.items()}, {}
        monkeypatch.setattr(check, "has_device", lambda: True)
        return check

    return make


@pytest.mark.parametrize("how, state", [("exception", "failed"), ("exit", "failed"),
                                        ("time-out", "timed out"), ("kill", "failed")])
def test_whatever_ends_a_part_all_earlier_results_are_on_disk_and_the_next_ones_run(
        gpu_check, rehearsal, tmp_path, how, state):
    for number, name in enumerate(PARTS[1:], 1):
        check = rehearsal(tmp_path / f"{how}-{name}", **{name.replace("-", "_"): how})
        parts = check.run(list(gpu_check.PARTS))
        states = {p.name: p.state for p in parts}
        assert states == {**dict.fromkeys(PARTS, "ok"), name: state}, [p.said for p in parts]
        assert gpu_check.exit_status(parts) == {"failed": 1, "timed out": 3}[state]
        before = check.seen[name][0]  # what lay there as the part began
        assert [c["name"] for c in before["checks"]] == list(PARTS[:number])
        after = check.on_disk()
        assert [(c["name"], c["state"]) for c in after["checks"]] == list(states.items())
        lost = {name} if how == "exception" else set()  # raised before anything was measured
        writes = set(PARTS) - {"machine", "first-touch", "learning"}
        assert {r["shape"].split()[0] for r in after["rows"]} == writes - lost
        report = (check.out / "report.md").read_text()
        assert f"| {name} | {state} |" in report and (check.out / "log.txt").exists()


def test_a_part_says_how_it_ended(rehearsal, gpu_check, tmp_path):
    said = {}
    for how in ("exception", "exit", "time-out", "kill"):
        parts = rehearsal(tmp_path / how, tests=how).run(list(gpu_check.PARTS))
        said[how] = "; ".join(next(p.said for p in parts if p.name == "tests"))
    assert said["exception"] == "IndexError: list index out of range"
    assert said["exit"] == "exit status 7: begun | no"
    assert said["time-out"].startswith("no failure before; stopped after 0 s")
    assert said["kill"] == "exit status -9: begun"
    (engines,) = (p.said for p in parts if p.name == "rollouts")
    assert engines == ["generate, 400: 4,500 tokens/s",
                       "vLLM, 400: no number: RuntimeError: vllm is not installed"]


def test_the_machine_comes_first_and_without_it_nothing_runs(rehearsal, gpu_check, monkeypatch):
    check = rehearsal(machine="exit")
    monkeypatch.setattr(check, "has_device", lambda: False)
    assert [p.name for p in check.run(list(gpu_check.PARTS))] == ["machine"]


@pytest.mark.parametrize("smoke", (False, True))
def test_budgets_add_up_to_less_than_the_whole_and_what_is_left_over_passes_on(
        gpu_check, tmp_path, smoke):
    check = gpu_check.Check(tmp_path / "a", smoke=smoke)
    total = gpu_check.TOTAL_S[smoke]
    assert sum(map(check.budget, gpu_check.PARTS)) <= total <= {False: 570, True: 180}[smoke]
    assert tuple(s.name for s in gpu_check.PARTS) == PARTS
    assert {s.name for s in gpu_check.PARTS if not s.required} == {"kernels", "rollouts",
                                                                        "sanitizer"}
    half = gpu_check.Check(tmp_path / "b", smoke=smoke, seconds=total / 2)
    assert half.budget(gpu_check.PARTS[3]) == check.budget(gpu_check.PARTS[3]) / 2
    ends = []

    def at(part_check, part):
        ends.append(part.end - part_check.end)

    specs = [gpu_check.Spec(at, 100, 10), gpu_check.Spec(at, 60, 6)]
    check.run(specs)
    assert ends == [-check.budget(specs[1]), 0]


def test_a_required_part_that_is_skipped_is_not_well(gpu_check):
    required, free = gpu_check.Part("goals"), gpu_check.Part("kernels", required=False)
    free.skip("ncu does not answer")
    assert gpu_check.exit_status([required, free]) == 0
    required.skip("not installed: pytest")
    assert gpu_check.exit_status([required, free]) == 3
    required.time_out("in gae")
    required.skip("again")
    assert required.state == "timed out"
    required.fail("no")
    assert (required.state, gpu_check.exit_status([required])) == ("failed", 1)


def test_the_folder_of_its_work_goes_with_a_check(gpu_check, tmp_path):
    check = gpu_check.Check(tmp_path, smoke=True)
    work = check.work
    assert work.is_dir()
    del check
    gc.collect()
    assert not work.exists()


def alive(command):
    """The processes that have this in their command line."""
    return subprocess.run(["pgrep", "-f", command], capture_output=True, text=True).stdout.split()


def test_a_command_is_ended_with_its_children_when_its_time_is_up(gpu_check, tmp_path):
    check = gpu_check.Check(tmp_path, smoke=True)
    part = gpu_check.Part("tests", end=time.monotonic() + 1.0)
    start = time.monotonic()
    ended = check.command(part, "bash", "-c", "trap '' INT; echo begun; sleep 61.7 & sleep 61.7")
    assert ended.status is None and "begun" in ended.said and "stopped after 1 s" in ended.said
    assert time.monotonic() - start < 1.9  # the grace is part of it
    deadline = time.monotonic() + 30  # what was killed is in the list until somebody reaps it
    while alive("sleep 61.7"):
        assert time.monotonic() < deadline, "a child outlived the command"
        time.sleep(0.05)
    assert check.command(part, "true").said == "no time was left"
    assert "begun" in (tmp_path / "log.txt").read_text()


DIES = """
import os, signal, sys, time
sys.path.insert(0, {bench!r})
from pathlib import Path
from _journal import CONTEXT_LOST, Journal
journal = Journal(Path({journal!r}))
done = {{r["unit"] for r in journal.of("unit")}}
broken = {{(r["unit"], r["who"]) for r in journal.of("broken")}}
for unit, who, how in (("first", "", None), ("second", "a peer", signal.SIGSEGV),
                       ("third", "", signal.SIGALRM), ("fourth", "another", CONTEXT_LOST),
                       ("fifth", "", None)):
    if unit in done:
        continue
    if (unit, who) not in broken and how:
        journal.add("trying", unit=unit, who=who)
        if how == CONTEXT_LOST:
            journal.add("broken", unit=unit, who=who, why="an illegal address")
            os._exit(how)
        os.kill(os.getpid(), how)
        time.sleep(10)
    journal.add("unit", part="goals", unit=unit, state="ok", said="")
"""


def test_a_worker_that_dies_is_started_again_behind_what_it_died_of(gpu_check, tmp_path):
    check = gpu_check.Check(tmp_path, smoke=True)
    part = gpu_check.Part("goals", end=time.monotonic() + 30)
    ended = check.worker(part, sys.executable, "-c", DIES.format(
        bench=str(ROOT / "bench"), journal=str(check.journal.path)))
    assert ended.status == 0
    assert {r["unit"]: r["state"] for r in check.journal.of("unit")} == {
        "first": "ok", "second": "ok", "third": "failed", "fourth": "ok", "fifth": "ok"}
    assert part.state == "failed" and part.said == [
        "second, without a peer: it ended the process by SIGSEGV", "third: no answer came",
        "fourth, without another: an illegal address"]


def test_a_line_that_was_cut_off_costs_itself_alone(gpu_check, tmp_path):
    journal = gpu_check.Journal(tmp_path / "j")
    journal.add("row", **ROW)
    with journal.path.open("a") as file:
        file.write('{"kind": "row", "op": "ga')
    journal.add("row", **{**ROW, "shape": "2 x 2"})
    assert [r["shape"] for r in gpu_check.results_of(journal.records())["rows"]] == ["1 x 1",
                                                                                     "2 x 2"]


KILLED = """
import sys
sys.path[:0] = [{bench!r}]
import gpu_check
def first(check, part):
    check.journal.add("machine", **{machine!r})
    check.journal.add("row", **{row!r})
def second(check, part):
    check.journal.add("row", **{{**{row!r}, "shape": "of a part that never ended"}})
    check.command(part, "bash", "-c", "{sleep} & {sleep}")
gpu_check.Check.has_device = lambda self: True
check = gpu_check.Check(gpu_check.Path({out!r}), smoke=True)
import signal
signal.signal(signal.SIGTERM, check.interrupt)
check.run([gpu_check.Spec(first, 1, 1), gpu_check.Spec(second, 1, 60)])
"""


@pytest.mark.parametrize("number", (signal.SIGKILL, signal.SIGTERM))
def test_gpu_check_itself_killed(gpu_check, tmp_path, number):
    out, sleep = tmp_path / "out", f"sleep 63.{int(number)}"
    process = subprocess.Popen([sys.executable, "-c", KILLED.format(
        bench=str(ROOT / "bench"), machine=MACHINE, row=ROW, out=str(out), sleep=sleep)],
        stdout=subprocess.PIPE, text=True)
    while "second" not in (line := process.stdout.readline()):
        assert line
    journal = gpu_check.Journal(out / "journal.jsonl")
    while len(journal.of("row")) < 2:
        time.sleep(0.02)
    found = json.loads((out / "results.json").read_text())
    assert [c["name"] for c in found["checks"]] == ["first"] and len(found["rows"]) == 1
    while len(alive(sleep)) < 4:  # gpu-check, a shell, and both that it started
        time.sleep(0.02)
    process.send_signal(number)
    process.wait(45)
    assert [r["shape"] for r in gpu_check.results_of(journal.records())["rows"]] == [
        "1 x 1", "of a part that never ended"]
    if number == signal.SIGTERM:
        found = json.loads((out / "results.json").read_text())
        assert found["checks"][1]["state"] == "timed out" and len(found["rows"]) == 2
    end = time.monotonic() + 45  # less than they would sleep
    while alive(sleep):
        assert time.monotonic() < end, "what gpu-check had started goes on without it"
        time.sleep(0.02)


def test_resume_goes_on_where_the_first_stopped(gpu_check, rehearsal, tmp_path, capsys):
    first = rehearsal(goals="time-out", tests="exit")
    first.run(list(gpu_check.PARTS)[:5])
    failed = {**ROW, "shape": "2 x 2", "median_us": None, "note": "no number: red gate"}
    first.journal.add("row", **failed)
    first.journal.add("row", **{**failed, "implementation": "a peer"})
    first.journal.add("broken", unit="gae 1 x 1", who="a peer", why="SIGSEGV")
    first.journal.add("broken", unit="gae 3 x 3", who="", why="SIGSEGV")
    done = gpu_check.take_up(first.journal)
    assert done == {"machine", "build", "first-touch"}
    names = [s.name for s in gpu_check.chosen(None, done)]
    assert names == ["machine", *PARTS[3:]]
    assert [s.name for s in gpu_check.chosen(["tests"], done)] == ["machine", "tests"]
    rows = gpu_check.results_of(first.journal.records())["rows"]
    assert ("2 x 2", "op") not in {(r["shape"], r["implementation"]) for r in rows}
    assert ("2 x 2", "a peer") in {(r["shape"], r["implementation"]) for r in rows}
    assert [r["who"] for r in first.journal.of("broken")] == ["a peer"]
    second = rehearsal()
    parts = second.run(gpu_check.chosen(None, done))
    assert {p.state for p in parts} == {"ok"}
    assert [c["state"] for c in second.on_disk()["checks"]] == ["ok"] * len(PARTS)
    gpu_check.begin_anew(second.journal)
    assert not second.journal.path.exists() and len(list(second.out.glob("earlier-*"))) == 1
    assert "--resume would have gone on with it" in capsys.readouterr().out


def test_resume_of_another_machine_is_refused(gpu_check, tmp_path):
    check = gpu_check.Check(tmp_path, smoke=True)
    check.journal.add("machine", **{**MACHINE, "gpu": "NVIDIA H200"})
    assert gpu_check.Check(tmp_path).has_device()
    check.journal.add("machine", **MACHINE)
    with pytest.raises(gpu_check.Refused, match="are of NVIDIA H200, this is a CPU"):
        check.has_device()
    assert [m["gpu"] for m in check.journal.of("machine")] == ["NVIDIA H200"]


def test_a_report_that_cannot_be_made_costs_no_result(gpu_check, rehearsal, monkeypatch):
    def broken(*_):
        raise KeyError("copy_gb_s")

    check = rehearsal()
    monkeypatch.setattr(gpu_check.report, "write", broken)
    parts = check.run(list(gpu_check.PARTS)[:2])
    assert [p.state for p in parts] == ["failed", "failed"]
    assert [c["name"] for c in check.on_disk()["checks"]] == ["machine", "build"]


def test_curves_agree_within_noise_or_not(gpu_check):
    disagreement = gpu_check._parts.disagreement
    a = [0.0, 0.2, 0.4, 0.6, 0.5, 0.7, 0.6, 0.65]
    assert disagreement(a, [x + 0.03 for x in a]) is None
    assert "scores differ by -0.900" in disagreement(a, [x + 0.9 for x in a])
    assert "not finite" in disagreement(a, [*a[1:], float("nan")])
    assert "8 and 7 steps" in disagreement(a, a[1:])


def test_a_package_may_lie_among_the_wheels(gpu_check, tmp_path):
    check = gpu_check.Check(tmp_path / "out", smoke=True)
    assert gpu_check._parts.lacks(check, "json", "no_such_x") == "not installed: no_such_x"
    (tmp_path / "no_such_x").mkdir()
    check.places = (tmp_path, tmp_path / "apart")
    assert gpu_check._parts.lacks(check, "json", "no_such_x") is None
    paths = [check.environment(apart)["PYTHONPATH"].split(os.pathsep) for apart in (False, True)]
    assert str(tmp_path) in paths[0] and str(tmp_path / "apart") not in paths[0]
    assert paths[1].index(str(tmp_path / "apart")) < paths[1].index(str(tmp_path))


def test_wheels_are_unpacked_and_their_absence_is_said(gpu_check, tmp_path):
    import zipfile

    wheels = gpu_check.gpu_wheels
    with pytest.raises(FileNotFoundError, match="make gpu-wheels DIR="):
        wheels.unpack(tmp_path, tmp_path / "to")
    (tmp_path / "apart").mkdir()
    for path, version in ((tmp_path / "trl-1.16-py3-none-any.whl", "1.16"),
                          (tmp_path / "apart/trl-1.12-py3-none-any.whl", "1.12")):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("trl/__init__.py", f"VERSION = {version!r}")
    places = wheels.unpack(tmp_path, tmp_path / "to")
    assert [(p / "trl/__init__.py").read_text() for p in places] == ["VERSION = '1.16'",
                                                                     "VERSION = '1.12'"]
    names = [n.split("==")[0] for n in (*wheels.TRAINER, *wheels.PEERS)]
    assert len(names) == len(set(names)) and all("==" in n for n in (*wheels.PEERS, *wheels.APART))


def test_the_trainers_needs_are_present_or_among_the_wheels(gpu_check):
    import re

    wheels = gpu_check.gpu_wheels
    extra = re.search(r"^train = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(),
                      re.MULTILINE | re.DOTALL)[1]
    needs = set(re.findall(r'"([\w.-]+?)[><=]', extra))
    fetched = {name.split("==")[0] for name in wheels.TRAINER}
    assert needs <= fetched | set(wheels.PRESENT), "a GPU machine cannot train"
    source = (ROOT / "bench/_parts.py").read_text().split("def learning(")[1]
    assert all(f'"{n.split(".")[0]}"' in source for n in needs)


def test_every_benchmark_is_in_a_part(gpu_check):
    present = {p.stem.removeprefix("bench_") for p in (ROOT / "bench").glob("bench_*.py")}
    parts = gpu_check._parts
    assert present == {*parts.GOAL_BENCHES, *parts.OTHER_BENCHES, parts.STEP, parts.ROLLOUT}


def test_the_report_of_the_stored_results(gpu_check, tmp_path):
    source = tmp_path / "cpu.json"
    source.write_text((ROOT / "bench/results/cpu.json").read_text())
    text = gpu_check.report.write(source).read_text()
    rows = json.loads(source.read_text())["rows"]
    assert text.count("\n| ") >= len(rows) and "cpu.svg" in text
    drawn = (tmp_path / "cpu.svg").read_text()
    assert drawn.count("<circle") == sum(r["implementation"] == "op" and r["gb_s"] > 0
                                         for r in rows)


def test_the_report_says_in_what_it_counts_and_what_it_did_not_measure(gpu_check):
    rows = [{**ROW, "op": "gae", "shape": "8192 x 4096", "percent_of_copy": 81.25,
             "device": "cuda"},
            {**ROW, "op": "token_advantages", "shape": "512 x 2048", "device_us": 14.5,
             "device": "cuda"}]
    found = {"machine": MACHINE, "rows": rows,
             "goals": gpu_check._goals.judge({"rows": rows}, "cuda")}
    text = gpu_check.report.markdown(found, None)
    assert "| gae 8192 x 4096: of the copy bandwidth >= 75 % | 81.25 % | reached |" in text
    assert "512 x 2048: time on the device <= 15 us | 14.50 us | reached |" in text
    assert "| token_advantages 512 x 2048: over composed >= 1000x | - | no figure" in text
    assert "errors: of each result and gradient, the largest absolute difference from fp64" in text
    assert text.startswith("# Measured on a CPU") and "dry run" not in text
    text = gpu_check.report.markdown({**found, "options": {"smoke": True}}, None)
    assert text.startswith("# A dry run, not a measurement, on a CPU")
    assert "Its times say nothing about the operators" in text


def test_the_first_touch_claims_no_graph_and_no_stream_on_a_cpu(gpu_check):
    touch = importlib.import_module("_first_touch")
    said = {name: check() for name, check in (*touch.of_launches(), *touch.of_runtime())}
    assert {text for name, text in said.items() if "in a graph" in name} == {
        "a CPU: called, no graph was captured"}
    assert {text for name, text in said.items() if "on a stream" in name} == {
        "a CPU: called, there is no stream"}
    assert said["two CUDA runtimes in turn"] == "a CPU: called, there is no CUDA runtime"


def test_a_row_without_numbers_has_its_reason_in_the_report(gpu_check):
    stored = json.loads((ROOT / "bench/results/cpu.json").read_text())
    refused = {**ROW, "shape": "8 x 2048", "implementation": "Liger (Triton)",
               **dict.fromkeys(("median_us", "wall_us", "gb_s", "percent_of_copy", "peak_mb")),
               "note": "no number: TypeError: x | y"}
    stored["machine"]["peers"] = {"trl": "1.16.0", "verl": "not installed"}
    text = gpu_check.report.markdown({**stored, "rows": [*stored["rows"], refused]}, None)
    assert "| Liger (Triton) | - | - | - | - | - | - | - | - | - |  | no number: TypeError: x / y" \
        in text
    assert "Peers: trl 1.16.0, verl not installed." in text
    assert "Liger publishes 788 TFLOP/s forward" in text


def test_counts_of_ncu(gpu_check):
    kernels = importlib.import_module("_hot_kernels")
    name, elements = "_linear_logprobs_kept_kernel", kernels.ROWS * kernels.COLUMNS
    head = '"ID","Process ID","Kernel Name","Metric Name","Metric Unit","Metric Value"'
    lines = [f'"{i}","1","{kernel}(x)","{metric}","","{value:,}"'
             for i, kernel, scale in ((0, name, 1), (1, name, 3), (2, "other", 1))
             for metric, value in (("smsp__thread_inst_executed.sum", 20 * elements * scale),
                                   ("gpu__time_duration.sum", 250_000 * scale),
                                   ("dram__bytes.sum", 1_000_000_000))]
    found = kernels.counted("\n".join(["==PROF== Connected", head, *lines]))
    assert found == [{"name": name, "us": 250.0, "gb_s": 4000.0, "instructions_per_element": 20.0}]
    assert kernels.counted("==ERROR== no permission") == []
    sources = "".join(p.read_text() for p in [*ROOT.glob("tppo_kernels/**/*.py"),
                                              *ROOT.glob("csrc/*.cu")])
    assert all(f"{kernel}(" in sources or f"{kernel}<" in sources for kernel in kernels.KERNELS)


@pytest.mark.skipif(os.environ.get("TPPO_TEST_FULL") != "1", reason="minutes: make test-full")
def test_the_dry_run(gpu_check, tmp_path):
    done = subprocess.run([sys.executable, ROOT / "bench/gpu_check.py", "--smoke", "--out",
                           tmp_path, "--seconds", "900"], capture_output=True, text=True,
                          timeout=1000)
    assert done.returncode == 0, done.stdout + done.stderr
    written = json.loads((tmp_path / "results.json").read_text())
    states = {part["name"]: part["state"] for part in written["checks"]}
    assert states == {**dict.fromkeys(PARTS, "ok"), "sanitizer": "skipped"}
    assert written["rows"] and written["steps"] and written["first_touch"]
    assert {p.name for p in tmp_path.iterdir()} == {"results.json", "report.md", "report.svg",
                                                    "log.txt", "journal.jsonl"}


def test_without_a_gpu_it_says_so(tmp_path):
    done = subprocess.run([sys.executable, ROOT / "bench/gpu_check.py", "--out", tmp_path],
                          capture_output=True, text=True, timeout=600,
                          env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 1 and "torch sees no GPU here" in done.stdout
