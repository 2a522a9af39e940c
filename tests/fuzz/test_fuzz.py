"""A reduced form of `make fuzz`, the faults that it has found, and faults that it must find."""

import gzip
import json
import signal

import driver
import fuzz_bombs
import fuzz_gradients as gradients
import guided
import pytest
import torch
from guided import REFUSED, Target, Wrong

import tppo_kernels as tk
from tppo.errors import DataError
from tppo.labels.endpoint.config import EndpointConfig
from tppo.labels.endpoint.replies import outcome, reply_of
from tppo.labels.hand import is_journal
from tppo.labels.label import read_labels
from tppo.labels.words import map_labels, word_spans
from tppo.sessions.readers import ReadConfig, SessionLog
from tppo.sessions.session import read_sessions
from tppo.stages.prompts import read_prompts
from tppo.store import jsonl

QUICK = [t for t in driver.targets() if t.name not in ("gigabytes in bounded memory",
                                                       "gradients of log-probs")]


@pytest.mark.parametrize("target", QUICK, ids=lambda target: target.name)
def test_hostile_input(target):
    slow = target.name in ("settings", "YAML", "run folder", "journal by hand")
    calls = 8 if slow else 60 if target.examples is None else 120
    found = guided.search(target, calls, seed=1)
    assert not found.failures, "\n".join(failure.message for failure in found.failures)
    if target.examples is not None:
        assert 0 <= found.refused < found.calls and found.lines > 40


def test_gigabytes_in_bounded_memory(monkeypatch):
    """With a limit of 256 kB a line in place of 64 MB, and files of 8 MB in place of 2 GB."""
    for place in ("tppo.store.jsonl", "tppo.sessions.readers.array", "tppo.sessions.session",
                  "tppo.sessions.readers.sim4ia", "tppo.stages.answering.histories"):
        monkeypatch.setattr(f"{place}.LONGEST", 1 << 18)
    monkeypatch.setattr(jsonl.bounded_bytes, "__defaults__", (1 << 18,))
    monkeypatch.setattr(fuzz_bombs, "WHOLE", 1 << 23)
    monkeypatch.setattr(fuzz_bombs, "BASE", 1 << 21)
    for case in fuzz_bombs.cases():
        fuzz_bombs.check(case)


def test_a_line_of_two_gigabytes(tmp_path):
    """At the real limit, plain and as a megabyte of gzip data."""
    for case in (fuzz_bombs.Case("labels", "sparse", b'{"id": "', b""),
                 fuzz_bombs.Case("labels", "gzip", b'{"id": "', b"x" * 50)):
        path = tmp_path / "labels.jsonl"
        fuzz_bombs.written(path, case)
        with pytest.raises(DataError, match="labels.jsonl: line 1: has more than 64 MB, expected"):
            read_labels(path)


# --- the faults that were found -----------------------------------------------------------------

SESSION = {"id": "s", "user": "u", "source": "x", "history": [{"type": "a", "text": "b"}],
           "targets": ["c"]}  # fmt: skip


def read(path, kind="auto", **options):
    log = SessionLog(path, ReadConfig(format=kind, **options))
    return list(log), log


@pytest.mark.parametrize("part", ["\ud800", " "])
def test_the_name_of_an_intent_is_a_text_too(tmp_path, part):
    """Half a surrogate pair there could not be written again, a traceback later."""
    (tmp_path / "s.jsonl").write_text(json.dumps({**SESSION, "latent_intent": {part: "shoes"}}))
    with pytest.raises(DataError, match="line 1: field 'latent_intent'"):
        read_sessions(tmp_path / "s.jsonl")


@pytest.mark.parametrize("kind, name, text", [
    ("ikat", "log.json", json.dumps([{"number": "a\tb", "turns": [{"utterance": "c"}, {
        "utterance": "d", "turn_id": "2  3", "resolved_utterance": "e"}]}])),
    ("aol", "log.tsv", "".join(f"a  b\tquery {i}\t2006-03-01 07:17:1{i}\n" for i in range(4))),
    ("sim4ia", "log.csv", "".join(f"1,u,a  b,q {i},2025-01-10,1,q,[]\n" for i in range(2)))])
def test_ids_are_those_of_the_file_that_is_written(tmp_path, kind, name, text):
    """White space in an id was collapsed when the sessions were read again: another id."""
    (tmp_path / name).write_text(text)
    sessions, _ = read(tmp_path / name, kind)
    assert sessions and all(s.id == " ".join(s.id.split()) for s in sessions)
    assert all(s.user == " ".join(s.user.split()) for s in sessions)


def test_a_remedy_is_named_once(tmp_path):
    (tmp_path / "log.csv").write_bytes(b"1,u,s,a,2025-01-10,1,q,[]\n\xff,u,s,b,2025-01-10,1,q,[]\n")
    with pytest.raises(DataError) as caught:
        read(tmp_path / "log.csv", "sim4ia")
    assert str(caught.value).count("--on-bad-row skip") == 1


def test_rows_of_parquet_that_nobody_has_checked(tmp_path):
    """Bytes that are not UTF-8 and a number in place of a list were tracebacks."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [{"session_id": "s", "final_search_term": term, "prefix": "b"} for term in "xyz"]
    table = pyarrow.Table.from_pylist(rows)
    raw = pyarrow.array([b"red", b"\xff", b"blue"], pyarrow.binary()).view(pyarrow.string())
    at = table.column_names.index("final_search_term")
    parquet.write_table(table.set_column(at, "final_search_term", raw), tmp_path / "log.parquet")
    with pytest.raises(DataError, match="row 2: a value that cannot be read, expected UTF-8"):
        read(tmp_path / "log.parquet")
    sessions, log = read(tmp_path / "log.parquet", on_bad_row="skip")
    assert [s.targets[0] for s in sessions] == ["red", "blue"] and log.bad.count == 1
    table = pyarrow.Table.from_pylist([{**row, "prefixes": 0.5} for row in rows])
    parquet.write_table(table, tmp_path / "log.parquet")
    with pytest.raises(DataError, match="column 'prefixes': was 0.5, expected a list"):
        read(tmp_path / "log.parquet")


def test_blank_times_of_parquet_are_none(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    row = {"session_id": "s", "final_search_term": "x", "past_search_terms": [["a", " "]]}
    parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "log.parquet")
    assert read(tmp_path / "log.parquet")[0][0].history[0].time is None


def test_a_response_that_no_file_can_hold_is_no_label(tmp_path):
    (tmp_path / "labels.jsonl").write_text(json.dumps(
        {"id": "1", "response": "a \ud800", "words": [], "sentence": 0, "labeller": "r"}))
    with pytest.raises(DataError, match="line 1: field 'response'"):
        read_labels(tmp_path / "labels.jsonl")


def test_a_prompt_that_no_tokenizer_takes_is_named(tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n{"prompt": "\\ud800"}\n')
    with pytest.raises(DataError, match="line 2: prompt was"):
        read_prompts(tmp_path / "prompts.jsonl")


def test_a_foreign_file_is_no_journal(tmp_path):
    (tmp_path / "deep").write_text("[" * 100_000)
    assert not is_journal(tmp_path / "deep")


def test_an_error_of_lists_in_lists():
    """A server's `detail` with such a place ended the labelling by a TypeError."""
    body = json.dumps({"detail": [{"loc": [["body"], "temperature"], "msg": "no"}]}).encode()
    config = EndpointConfig(base_url="http://127.0.0.1:1/v1", model="m")
    assert "temperature" in outcome(reply_of(422, {}, body), config, "a").reason


def test_every_word_of_a_text_can_be_labelled():
    """A Thai mark upon a foreign letter ended a word for one of two rules only."""
    text = "\u0bf2\u0acf\u0e39\u0aa7"
    words = [(text[a:b], 1) for a, b in word_spans(text)]
    assert set(map_labels(text, words, [(i, i + 1) for i in range(len(text))])) == {2}


def test_items_of_a_list_longer_than_what_is_held(tmp_path):
    """A window goes over the file: places of errors and numbers across its end stay right."""
    rows = [{**SESSION, "id": str(i), "targets": ["x" * 90_000]} for i in range(5)]
    text = json.dumps(rows, indent=1)
    (tmp_path / "log.json").write_bytes(gzip.compress(text.encode()))
    assert [s.id for s in read(tmp_path / "log.json")[0]] == list("01234")
    (tmp_path / "log.json").write_text(text[:-1] + ", " + "7" * 70_000 + "]")
    with pytest.raises(DataError, match="Exceeds the limit|was 7777"):
        read(tmp_path / "log.json")
    wrong = text.replace('"id": "3"', '"id" "3"')
    line, column = wrong[: wrong.index('"id" "3"')].count("\n") + 1, 8
    (tmp_path / "log.json").write_text(wrong)
    with pytest.raises(DataError, match=f"line {line}: not JSON: .* at column {column}"):
        read(tmp_path / "log.json")


# --- the fuzzer itself --------------------------------------------------------------------------

def test_inputs_grow_towards_lines_that_were_not_reached():
    """Six bytes in a row that each open a branch: one of 10^14 inputs, found by what they reach."""
    def deep(data):
        if data[:1] == b"t":
            if data[1:2] == b"p":
                if data[2:3] == b"p":
                    if data[3:4] == b"o":
                        raise RuntimeError("found")

    target = Target("deep", deep, 1, lambda: [b"....."], (__file__,), (b"t", b"p", b"o"))
    assert guided.search(target, 6000).crashes > 0
    blind = target._replace(traced=())
    assert not guided.search(blind, 6000).crashes


def test_faults_of_every_kind_are_found(monkeypatch):
    def spin(data):
        while True:
            pass

    def wrong(data):
        raise Wrong("2 is not 3")

    def leave(data):
        raise SystemExit(0)

    monkeypatch.setattr(guided, "SECONDS", 0.05)
    found = {run: guided.search(Target("t", run, 1), 3) for run in (spin, wrong, leave)}
    assert [f.crashes for f in found.values()] == [3, 0, 3]
    assert [f.wrong for f in found.values()] == [0, 3, 0]
    assert "processor time" in found[spin].failures[0].message
    assert len(found[wrong].failures) == 1  # one of a place
    assert guided.search(Target("t", lambda data: REFUSED, 1), 3).refused == 3
    assert signal.getsignal(signal.SIGVTALRM) == signal.SIG_DFL


def one_in_a_thousand(x):
    """Every number of a result a thousandth larger."""
    if isinstance(x, torch.Tensor):
        return x * 1.001 if x.is_floating_point() else x
    return x._make(map(one_in_a_thousand, x)) if hasattr(x, "_fields") else x


OPERATORS = [t for t in QUICK if hasattr(tk, t.name.split(",")[0])]


@pytest.mark.parametrize("target", OPERATORS, ids=lambda target: target.name)
def test_a_result_that_is_off_by_a_thousandth_is_found(target, monkeypatch):
    name = target.name.split(",")[0]
    right = getattr(tk, name)
    monkeypatch.setattr(tk, name, lambda *args, **options: one_in_a_thousand(
        right(*args, **options)))
    assert guided.search(target, 20, seed=2).wrong >= 2


class Steeper(torch.autograd.Function):
    """The same number, and a gradient that is a thousandth larger."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return 1.001 * gradient


@pytest.mark.parametrize("name", ["kl", "reduce", "ppo_loss", "value_loss", "token_head",
                                  "token_reward_loss", "linear_ppo_loss", "prefix_attention"])
def test_a_gradient_that_is_off_by_a_thousandth_is_found(name, monkeypatch):
    target, right = next(t for t in OPERATORS if t.name == name), getattr(tk, name)

    def off(*args, **options):
        found = right(*args, **options)
        if isinstance(found, torch.Tensor):
            return Steeper.apply(found)
        return found._make(Steeper.apply(x) if isinstance(x, torch.Tensor) else x for x in found)

    monkeypatch.setattr(tk, name, off)
    assert guided.search(target, 20, seed=2).wrong >= 1


def test_a_process_that_dies_is_a_crash_of_its_last_input(tmp_path, monkeypatch):
    """A fault in native code ends the process: the next share goes on in another one."""
    import subprocess
    import sys

    script = ("import json, os, sys, pathlib; sys.path.insert(0, {0!r}); import driver\n"
              "share = json.loads(sys.argv[1])[0]; into = pathlib.Path(share[3])\n"
              "driver.Last(into.with_suffix('.last')).write(b'bad input'); os.abort()")
    here = str(fuzz_bombs.Path(driver.__file__).parent)

    def start(parts):
        given = json.dumps([[*share[:3], str(share.into)] for share in parts])
        return subprocess.Popen([sys.executable, "-c", script.format(here), given])

    monkeypatch.setattr(driver, "start", start)
    parts = driver.shares(QUICK[:1], 10, 0, 1, tmp_path)
    row, = driver.run(parts)
    assert row.found.crashes == 1 and row.found.calls == 1
    assert row.found.failures[0].data == b"bad input" and "-6" in row.found.failures[0].message


def test_the_driver_prints_figures_and_repeats_a_failure(tmp_path, monkeypatch, capsys):
    rows = [driver.Row(guided.search(Target("t", lambda data: 1 / 0, 1), 2), 0.5, 1.0)]
    assert "2" in driver.table(rows).splitlines()[1].split()
    driver.report(rows, tmp_path)
    told = capsys.readouterr().out
    assert "ZeroDivisionError" in told and f"--repeat {tmp_path / 't-1'}" in told
    assert len((tmp_path / "t-1").read_bytes()) == 8
    assert sum(len(of_one) for of_one in driver.shares(QUICK, 1000, 0, 2, tmp_path)) == 2 * len(
        QUICK)


# --- gradients ------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", gradients.BACKENDS)
def test_random_calls(backend):
    with tk.use_backend(backend):
        beyond, cancelled = gradients.run(range(300 if backend == "reference" else 600))
    assert not beyond, "\n".join(map(gradients.describe, beyond))
    assert cancelled <= 3  # the second bound is for few


@pytest.mark.parametrize("backend", gradients.BACKENDS)
@pytest.mark.parametrize("seed", [1600, 2049, 2449])
def test_calls_that_were_beyond(backend, seed):
    """Wrong by 2.5e-2 at softcap 1.5 from kept exponentials, and by 20 times what rounds."""
    with tk.use_backend(backend):
        assert not gradients.run([seed])[0]


def test_a_gradient_that_is_wrong_is_found(monkeypatch):
    right = gradients.actual
    monkeypatch.setattr(gradients, "actual", lambda call: [1.01 * g for g in right(call)])
    beyond, _ = gradients.run(range(30))
    assert len(beyond) >= 25
    monkeypatch.setattr(gradients, "actual", lambda call: [g + float("nan") for g in right(call)])
    assert len(gradients.run(range(30))[0]) == 30


def relative(actual, exact):
    return float((actual.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("backend", gradients.BACKENDS)
@pytest.mark.parametrize("v", [2, 65, 300, 2100])
def test_a_nearly_certain_target(backend, v):
    """1 - p taken as a difference, of a p beside whose 1 an fp32 sum had lost the rest."""
    torch.manual_seed(v)
    logits = torch.randn(16, v)
    targets = torch.randint(v, (16,))
    logits.scatter_(1, targets[:, None], torch.linspace(4, 16, 16)[:, None])
    exact = logits.double().requires_grad_()
    log_p = torch.log_softmax(exact, -1)
    p = log_p.exp()
    wanted = [torch.autograd.grad(x.sum(), exact, retain_graph=True)[0] for x in
              (log_p.gather(1, targets[:, None]), -(p * log_p).sum(1))]
    leaf = logits.clone().requires_grad_()
    with tk.use_backend(backend):
        out = tk.token_logprobs(leaf, targets)
        for result, gradient in zip(out, wanted, strict=True):
            actual, = torch.autograd.grad(result.sum(), leaf, retain_graph=True)
            assert max(map(relative, actual, gradient)) <= 5e-6


@pytest.mark.parametrize("backend", gradients.BACKENDS)
@pytest.mark.parametrize("memory", ["store", "recompute", 4096])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_saturated_logits(backend, memory, dtype):
    """1 - tanh^2 of a tanh near 1, which no rounded exponential holds: wrong by up to 1.1e-1."""
    g = torch.Generator().manual_seed(3)
    hidden = torch.randn(2, 2, 3, 8, generator=g).to(dtype)
    weight, targets = torch.randn(64, 8, generator=g).to(dtype), torch.zeros(2, 2, 3).long()
    leaf, exact = hidden.clone().requires_grad_(), hidden.double().requires_grad_()
    x = exact @ weight.double().T
    targets = x.argmax(-1)
    z = 1.5 * torch.tanh(2 * x / 1.5)
    torch.log_softmax(z, -1).gather(-1, targets[..., None]).sum().backward()
    with tk.use_backend(backend):
        tk.linear_logprobs(leaf, weight, targets, softcap=1.5, logit_scale=2.0, memory=memory
                           ).logprobs.sum().backward()
    assert relative(leaf.grad, exact.grad) <= gradients.LIMIT[dtype]
