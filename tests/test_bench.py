"""The benchmarks run, count and write what they say, and give a wrong result no number."""

import dataclasses
import importlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tppo_kernels as tk

pytest.importorskip("pytest_benchmark")

BENCH = Path(__file__).parent.parent / "bench"


@pytest.fixture
def harness(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    monkeypatch.setattr("torch.utils.deterministic.fill_uninitialized_memory", False)
    module = importlib.import_module("_harness")
    machine = importlib.import_module("_machine")
    monkeypatch.setitem(machine._copies, "cpu", 10.0)
    for dtype in (torch.float32, torch.bfloat16):
        monkeypatch.setitem(machine._products, ("cpu", dtype), 0.05)
    return module


@pytest.fixture
def gae_case(harness):
    return importlib.import_module("bench_gae").case(3, 17, smoke=True)


def test_a_wrong_implementation_gets_no_number(harness, gae_case):
    timed = []

    def wrong(rewards, values, mask):
        advantages, returns = gae_case.contenders["op"](rewards, values, mask)
        return advantages + 1e-3 * mask, returns

    def never(once, rounds):
        timed.append(rounds)

    case = dataclasses.replace(gae_case, contenders={**gae_case.contenders, "wrong": wrong})
    with pytest.raises(harness.RedGate, match="no number: wrong of gae 3 x 17: result 0 is off"):
        harness.run(case, round_robin=never)
    assert not timed


def test_the_gradient_is_behind_the_gate_too(harness):
    module = importlib.import_module("bench_token_logprobs")
    case = module.case(4, 50, torch.float32, True, smoke=True)
    harness.gate(case, "cpu")

    def no_entropy_gradient(logits, targets):
        logprobs, entropy = tk.token_logprobs(logits, targets)
        return logprobs, entropy.detach() + 0 * logits.sum()

    case = dataclasses.replace(case, contenders={
        "op": module.with_backward(no_entropy_gradient)})
    with pytest.raises(harness.RedGate, match="result 2 is off"):
        harness.gate(case, "cpu")


def off_by(function, factor):
    """The function with its first result off by a share of itself."""
    def call(*inputs):
        first, *rest = function(*inputs)
        return first * (1 + factor), *rest

    return call


def test_a_peer_that_rounds_more_has_its_error_in_its_note(harness, gae_case):
    peers = {"same": gae_case.contenders["loop"], "rounds": off_by(gae_case.contenders["op"], 1e-3)}
    rows = {r.implementation: r for r in harness.run(
        dataclasses.replace(gae_case, peers=peers), rounds=2)}
    assert rows["same"].note == "" and len(rows["same"].errors) == 2
    assert rows["rounds"].note.startswith("less exact: result 0 is off by ")
    assert rows["rounds"].errors[0] > 100 * rows["op"].errors[0]
    assert rows["rounds"].median_us > 0 and {"same", "rounds"} <= set(rows["op"].speed_up)


def test_what_a_peer_may_do_ours_may_not(harness, gae_case):
    case = dataclasses.replace(gae_case, contenders={
        "op": off_by(gae_case.contenders["op"], 1e-3)})
    with pytest.raises(harness.RedGate, match="no number: op of gae 3 x 17: result 0 is off"):
        harness.gate(case, "cpu")


def test_a_peer_that_raises_or_computes_another_thing_takes_nothing_down(harness, gae_case):
    def raises(*_):
        raise TypeError("unexpected\nkeyword argument 'lam'" + " and so on" * 40)

    other = {"raises": raises, "other": off_by(gae_case.contenders["op"], 0.2),
             "shape": lambda *inputs: tuple(x[:1] for x in gae_case.contenders["op"](*inputs))}
    found = harness.run(dataclasses.replace(gae_case, peers=other), rounds=2)
    rows = {r.implementation: r for r in found}
    assert rows["op"].median_us > 0 and set(rows["op"].speed_up) == {"loop"}
    assert all(rows[name].median_us is None and rows[name].note.startswith("no number: ")
               for name in other)
    assert "TypeError: unexpected keyword argument 'lam'" in rows["raises"].note
    assert all("\n" not in r.note and len(r.note) < 200 for r in found)
    said = harness.table(found)
    assert "no number: AssertionError: result 0 has shape [1, 17]" in said and " -  " in said


def test_a_peer_that_cannot_be_had_says_why(harness, monkeypatch):
    peers = importlib.import_module("_peers")
    monkeypatch.setattr(peers, "REASONS", {})

    def absent(device):
        import no_such_package_x  # noqa: F401

    found = peers.collect("cpu", {"here": lambda device: len, "not here": absent,
                                  "verl triton": peers.verl_triton})
    assert found == {"here": len}
    assert peers.REASONS == {
        "not here": "ModuleNotFoundError: No module named 'no_such_package_x'",
        "verl triton": "RuntimeError: runs on a GPU only"}
    assert set(harness.machine("cpu")["peers"]) == set(peers.PACKAGES)


def test_few_valid_rows_are_listed_for_a_gpu_and_never_none(harness, monkeypatch):
    module = importlib.import_module("bench_linear_logprobs")
    *_, mask, rows = module.make_inputs(16, 8, 100, torch.float32, 1e-9, "cpu", 0)
    assert mask.sum() == 1 and rows is None
    monkeypatch.setattr(module, "random_mask", lambda g, n, share: torch.rand(n) < share)
    monkeypatch.setattr(module, "states", lambda *given: ())
    monkeypatch.setattr(module, "generator", lambda *given: None)
    mask, rows = module.make_inputs(16, 8, 100, torch.float32, 1e-9, "cuda", 0)
    assert torch.equal(rows, mask.nonzero()[:, 0]) and len(rows) == 1
    mask, rows = module.make_inputs(16, 8, 100, torch.float32, 1.0, "cuda", 0)
    assert mask.all() and rows is None


def test_listed_rows_give_what_the_mask_gives(harness):
    module = importlib.import_module("bench_linear_ppo_loss")
    case = module.case_of("", "cpu", True, torch.float32, 0.3, True, module.with_backward,
                          (module.by_logits, module.by_logits),
                          contenders={"op": lambda *given: module.operator(*given,
                                                                           **module.OPTIONS)},
                          peers={})
    *given, mask, _ = case.make(0)
    harness.gate(case, "cpu", (*given, mask, tk.valid_rows(mask)))


def test_a_slow_case_gets_fewer_rounds(harness, gae_case, monkeypatch):
    monkeypatch.setattr(harness, "CASE_S", 1e-9)
    assert {r.rounds for r in harness.run(gae_case, rounds=50)} == {3}
    assert {r.rounds for r in harness.run(gae_case, rounds=2)} == {2}


def test_rounds_are_interleaved_and_rows_follow_from_them(harness, gae_case, monkeypatch):
    order = []
    clock = {"op": 10.0, "loop": 50.0}

    def timed(function, inputs, device, last_us):
        name = next(n for n, f in gae_case.contenders.items() if f is function)
        order.append(name)
        return clock[name], None

    monkeypatch.setattr(harness, "timed", timed)
    op, loop = harness.run(gae_case, rounds=3)
    assert order == ["op", "loop"] * 3
    assert op.median_us == 10.0 and op.rounds == 3 and op.speed_up == {"loop": 5.0}
    assert op.gb_s == pytest.approx(17 * 3 * 17 / 10 / 1e3, abs=1e-3)  # 17 B a token
    assert op.percent_of_copy == pytest.approx(100 * op.gb_s / 10.0, abs=1.0)


def test_peak_memory_is_the_most_held_at_once(harness):
    def holds(n, _):
        big = torch.empty(1_000_000)
        del big
        return (torch.empty(n),)

    timing = importlib.import_module("_timing")
    assert timing.peak_mb(holds, (10, 0), "cpu") == pytest.approx(4.0, abs=0.1)
    assert timing.peak_mb(holds, (2_000_000, 0), "cpu") == pytest.approx(8.0, abs=0.1)


def test_pytest_bench_writes_rows_and_machine(tmp_path):
    target = tmp_path / "results" / "cpu.json"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", str(BENCH), "--bench-smoke", "--bench-rounds", "2",
         "--bench-json", str(target), "-p", "no:cacheprovider"],
        cwd=BENCH.parent, capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    written = json.loads(target.read_text())
    assert {"cpu", "threads", "torch", "copy_gb_s", "matmul_tflop_s", "load_average",
            "peers"} <= set(written["machine"])
    assert {(r["op"], r["implementation"]) for r in written["rows"]} >= {
        ("gae", "op"), ("gae", "loop"), ("token_logprobs", "op"), ("token_logprobs", "eager")}
    assert all(r["median_us"] > 0 and r["gb_s"] >= 0 for r in written["rows"]
               if not r["note"].startswith("no number"))
    assert "token_logprobs" in done.stdout and "speed-up over" in done.stdout
    assert "no row: trl triton: RuntimeError: runs on a GPU only" in done.stdout


@pytest.fixture
def bench_step(harness, monkeypatch):
    pytest.importorskip("transformers")
    module = importlib.import_module("bench_step")
    small = {"vocab_size": 60, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
             "num_attention_heads": 2, "num_key_value_heads": 1}
    for name, settings in module.MODELS.items():
        monkeypatch.setitem(module.MODELS, name, {**settings, **small})
    return module


@pytest.mark.parametrize("name", ("1.5B", "8B"))
def test_a_step_of_a_gpus_models_at_a_small_size(bench_step, name):
    models, _ = bench_step.models_of(name, "cpu")
    trained = {part.split(".")[-2] for part, p in models.policy.named_parameters()
               if p.requires_grad}
    assert trained == {"q_proj", "v_proj"} if name == "8B" else "embed_tokens" in trained
    shared, dense = bench_step.measure_shape(name, "cpu", (9, 3, 2), 2, 1)
    assert (shared.tokens, dense.tokens) == (2 * (9 + 6), 4 * 12) and shared.update_ms > 0


def test_a_step_that_differs_between_the_two_ways_gets_no_number(bench_step, harness):
    used = bench_step.models_of("demo", "cpu")
    ways = {p: bench_step.trainer(used, p, 3, 2, 2) for p in ("shared", "dense")}
    batch = bench_step.rollout(60, 9, 3, 2, 2)
    bench_step.gate(ways, batch, 1e-3)
    advantage = ways["dense"].advantage
    ways["dense"].advantage = dataclasses.replace(advantage, kl_coef=5.0, gamma=0.5)
    with pytest.raises(harness.RedGate, match="red gate, no number"):
        bench_step.gate(ways, batch, 1e-3)


def test_the_grid_of_a_step_is_whole_and_begins_with_what_is_always_measured(bench_step):
    for device, goal in (("cpu", (256, 16, 8)), ("cuda", (2048, 24, 8))):
        shapes = bench_step.shapes(device)
        assert goal in shapes[:2] and len(set(shapes)) == len(shapes) == 49
        assert len({p for p, _, _ in shapes[:bench_step.LISTED]}) == 4


@pytest.fixture
def bench_rollout(bench_step):
    return importlib.import_module("bench_rollout")


def test_an_engine_that_answers_something_else_gets_no_number(bench_rollout, harness, monkeypatch):
    work = bench_rollout.work_of("demo", 6, 4, "cpu", compiled=False)
    honest, reasons = bench_rollout.by_generate, {}

    def another(work):
        first, *rest = honest(work)
        return [[*first[:2], (first[2] + 1) % 60, *first[3:]], *rest]

    def shorter(work):
        return [row[:4] for row in honest(work)]

    def raises(work):
        raise RuntimeError("no engine here")

    monkeypatch.setitem(sys.modules, "vllm", None)  # as where it is not installed
    monkeypatch.setattr(bench_rollout, "PEERS", {
        "another": lambda work: another, "shorter": lambda work: shorter, "raises": raises,
        "vLLM": bench_rollout.vllm_of})
    rows = {r.engine: r for r in bench_rollout.measure(work, 2, harness.Attempts("x", "cpu"))}
    assert rows["HFRollout"].tokens == rows["generate"].tokens > 0
    assert rows["generate"].speed_up == 1.0 and rows["HFRollout"].tokens_s > 0
    reasons = {name: rows[name].note for name in ("another", "shorter", "raises", "vLLM")}
    assert "answer 0 has token" in reasons["another"] and "nats" in reasons["another"]
    assert "answer 0 has 4 tokens, expected 6" in reasons["shorter"]
    assert reasons["raises"] == "no number: RuntimeError: no engine here"
    assert reasons["vLLM"] == "no number: RuntimeError: vllm is not installed"
    assert all(rows[name].tokens_s is None for name in reasons)
    monkeypatch.setattr(bench_rollout, "by_trainer", another)  # ours gets none either, nor has any
    with pytest.raises(harness.RedGate, match="no number: HFRollout: answer 0 has token"):
        bench_rollout.measure(work, 2, harness.Attempts("x", "cpu"))
    monkeypatch.setitem(bench_rollout.TIES, torch.float32, 100.0)
    assert bench_rollout.excused(work, honest(work), another(work)) == 1


@pytest.fixture
def cases_of_a_gpu(harness, monkeypatch):
    """Every case that the benchmarks of the operators with goals build for a GPU, none measured."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    found = []
    linear, loss = (importlib.import_module(f"bench_linear_{n}") for n in ("logprobs", "ppo_loss"))
    for dtype, valid in linear.CASES[:4]:
        linear.test_linear_logprobs(found.append, "cuda", False, dtype, valid)
    for case in (*((*c, False) for c in linear.CASES[:4]), (torch.bfloat16, 1.0, True)):
        loss.test_linear_ppo_loss(found.append, "cuda", False, *case)
    linear.test_forward(found.append, "cuda", False)
    linear.test_frozen_head(found.append, "cuda", False, 1.0)
    linear.test_sum_of_logprobs(found.append, "cuda", False, 1.0)
    for name, more in (("gae", (False,)), ("token_advantages", ()), ("ppo_loss", (False,))):
        module = importlib.import_module(f"bench_{name}")
        found += [module.case(*shape, *more, "cuda") for shape in module.SHAPES["cuda"]]
    module = importlib.import_module("bench_token_head")
    found += [module.case(*shape, dtype, False, "cuda") for shape in module.SHAPES["cuda"]
              for dtype in (torch.float32, torch.bfloat16)]
    module = importlib.import_module("bench_token_logprobs")
    found += [module.case(*shape, torch.bfloat16, backward, False, "cuda")
              for shape in module.SHAPES["cuda"] for backward in (False, True)]
    return {(case.op, case.shape): case for case in found}


def test_every_goal_of_a_gpu_has_its_case_and_its_implementations(cases_of_a_gpu, bench_step):
    goals = importlib.import_module("_goals")
    steps = {bench_step.unit_of("1.5B", shape, bench_step.GROUPS["cuda"])
             for shape in bench_step.shapes("cuda")}
    for goal in goals.GOALS:
        if goal.device == "cuda" and goal.op == "step":
            assert f"step {goal.shape}" in steps
        elif goal.device == "cuda":
            case = cases_of_a_gpu[goal.op, goal.shape]
            ours = {n for n in goals.named([goal]) if not n.startswith(("verl", "Liger", "its "))}
            assert ours <= set(case.contenders), goal.text()
            assert case.nflop > 0 or "product" not in goal.measure, goal.text()
            assert case.nbytes > 0


def test_verdicts_on_goals(harness):
    goals = importlib.import_module("_goals")
    linear = {"op": "linear_logprobs", "shape": f"{goals.LINEAR} 100.0% valid", "device": "cuda",
              "note": ""}
    rows = [{**linear, "implementation": "8 GiB", "median_us": 70e3, "wall_us": 70e3,
             "percent_of_matmul": 93.0},
            {**linear, "implementation": "verl", "median_us": 126e3, "wall_us": 126e3},
            {**linear, "implementation": "verl triton", "median_us": None, "wall_us": None,
             "note": "no number: SIGSEGV"}]
    steps = [{"model": "1.5B", "prompt": 2048, "response": 24, "group": 8, "groups": 8,
              "device": "cuda", "prefix": p, "update_ms": ms, "trl_ms": 900.0}
             for p, ms in (("shared", 100.0), ("dense", 490.0))]
    found = {v["goal"]: v for v in goals.judge({"rows": rows, "steps": steps}, "cuda")}
    name = f"linear_logprobs {goals.LINEAR} 100.0% valid (8 GiB): over"
    assert found[f"{name} its products <= 1.12x"]["verdict"] == "reached"
    assert found[f"{name} verl >= 1.9x"] == {
        "goal": f"{name} verl >= 1.9x", "value": pytest.approx(1.8), "unit": "x", "why": "",
        "verdict": "missed"}
    assert found[f"{name} verl triton >= 1.9x"]["why"] == "no number: SIGSEGV"
    step = "step 1.5B P 2048, R 24, G 8, 8 prompts: over"
    assert found[f"{step} dense >= 5x"]["verdict"] == "missed"
    assert found[f"{step} TRL 1.12 >= 5x"]["verdict"] == "reached"
    assert {v["verdict"] for v in found.values()} == {"reached", "missed", "no figure"}
    stored = json.loads((BENCH / "results/cpu.json").read_text())
    assert not [v for v in goals.judge(stored, "cpu") if v["verdict"] == "missed"]


def test_a_journal_knows_a_peer_before_it_runs_and_leaves_it_out_once_it_broke(
        harness, gae_case, tmp_path, request):
    request.addfinalizer(lambda: signal.alarm(0))
    journal = harness.Journal(tmp_path / "journal.jsonl")
    seen = []

    def peer(*inputs):
        seen.append(journal.records()[-1])
        return gae_case.contenders["op"](*inputs)

    case = dataclasses.replace(gae_case, peers={"peer": peer})
    harness.run(case, rounds=2, journal=journal)
    assert {(r["kind"], r["unit"], r["who"]) for r in seen} == {("trying", "gae 3 x 17", "peer")}
    assert signal.alarm(0) > 0  # the one who called ends it, when the rows are written
    journal.add("broken", unit="gae 3 x 17", who="peer", why="it ended the process by SIGSEGV")
    case, why = harness.without_the_broken(case, journal)
    assert not case.peers and why == {"peer": "no number: it ended the process by SIGSEGV"}


def test_verl_is_taken_apart(harness, tmp_path, monkeypatch):
    """Its package wants ray; the file of a function does not."""
    peers = importlib.import_module("_peers")
    room = tmp_path / "verl/utils/experimental"
    room.mkdir(parents=True)
    for folder in (room.parent.parent, room.parent, room):
        (folder / "__init__.py").write_text("import no_such_ray")
    (room / "torch_functional.py").write_text(
        "class FusedLinearForPPO:\n"
        "    def __call__(self, h, w, t):\n        return h.sum(-1), h.sum(-1)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [n for n in sys.modules if n.split(".")[0] == "verl"]:
        monkeypatch.delitem(sys.modules, name)
    call = peers.verl("cpu")
    assert call(torch.ones(2, 3), None, None, torch.tensor([True, False]), None)[0].tolist() == [
        3, 0]
    for name in [n for n in sys.modules if n.split(".")[0] == "verl"]:
        del sys.modules[name]  # monkeypatch would put it back
