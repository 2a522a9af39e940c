"""Registered stages: what they read is what they declare, a stranger's, and rounds of one."""

import json
import linecache
import os
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from opened import opened, undeclared

import tppo
from tppo.cli import main
from tppo.config import Config, fill_defaults
from tppo.errors import DataError
from tppo.evaluation.config import EvalConfig
from tppo.evaluation.judge import CallableJudge
from tppo.methods.config import PPOConfig, RewardModelConfig, SFTConfig
from tppo.models.config import GenerateConfig, ScratchConfig
from tppo.sessions.config import SessionsConfig
from tppo.stages.artifacts import ANSWERS, LABELS, TRAIN_SESSIONS, Artifact
from tppo.stages.registry import REGISTRY, Stage, register
from tppo.stages.run import Run
from tppo.store.jsonl import plain, read_json, write_json
from tppo.store.yaml_file import write_yaml

CONFIG = fill_defaults(
    Config(
        sessions=SessionsConfig(train_users=40, heldout_users=8, test_users=8, transfer_users=4),
        scratch=ScratchConfig(hidden_size=16, intermediate_size=16, vocab_size=300, heads=2),
        sft=SFTConfig(max_steps=2, eval_every=2),
        generate=GenerateConfig(samples=32, max_new_tokens=8),
        reward_model=RewardModelConfig(epochs=1),
        ppo=PPOConfig(steps=1, batch_size=8, minibatch_size=8, min_format=0.0, max_kl=100.0,
                      without_signal=True, fit_critic=20),
    ),
    pretrained=False,
)  # fmt: skip


@pytest.fixture(autouse=True)
def nothing_stays_registered(monkeypatch):
    """Each test leaves the registry, and what modules are loaded, as it was."""
    kept = dict(REGISTRY)
    torch.set_num_threads(1)
    yield
    REGISTRY.clear()
    REGISTRY.update(kept)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run with every stage, and the files that each of them has read, by stage."""
    torch.set_num_threads(1)
    run = Run(tmp_path_factory.mktemp("run") / "out", CONFIG)
    read = {}
    for name in [name for name in REGISTRY if REGISTRY[name].in_run]:
        with opened(run.out) as files:  # each stage may run in a process of its own
            Run(run.out, CONFIG).perform(name)
        read[name] = files
    return run, read


@pytest.fixture
def run(made):
    run = Run(made[0].out, CONFIG)
    yield run
    for name in ("first", "longest"):
        shutil.rmtree(run.out / name, ignore_errors=True)


def test_every_stage_reads_what_it_declares_and_nothing_else(made):
    run, read = made
    assert list(read) == ["data", "sft", "generate", "label", "map", "train-rm", "train", "eval",
                          "heat"]  # fmt: skip
    for name, files in read.items():
        assert undeclared(name, files) == set(), name
        assert files  # at least its own manifest
        assert run.done(name)
    assert ANSWERS.path in read["train"], "the critic is fitted on answers that exist"
    assert read_json(run.out / "train/report.json")["critic_fit"]["answers"] == 20


FIRST = Artifact("first/label.json", "the first label")


def stage(function, *inputs, **more):
    return register(Stage("first", function, "the first label", inputs, (FIRST,), **more))


def cheat(run):
    """Reads labels by a path of its own, past `Run.path`."""
    with run.stage("first") as out:
        with open(run.out / "label" / "labels.jsonl") as labels:
            write_json(out / FIRST.name, json.loads(next(labels)))


def test_a_stage_that_reads_past_the_run_is_found(run):
    stage(cheat, ANSWERS)
    with opened(run.out) as files:
        run.perform("first")
    assert undeclared("first", files) == {"label/labels.jsonl"}
    del REGISTRY["first"]
    stage(cheat, LABELS)
    with opened(run.out) as files:
        run.perform("first")
    assert undeclared("first", files) == set()


def of_labels(run):
    with run.stage("first") as out:
        with open(run.path(LABELS)) as labels:
            write_json(out / FIRST.name, json.loads(next(labels)))


def test_a_stage_gets_no_path_that_it_does_not_declare(run):
    stage(of_labels, ANSWERS)
    with pytest.raises(ValueError, match=r"stage first reads label/labels.jsonl, which it does not "
                       r"declare; expected .* inputs \(generate/answers.jsonl\)"):  # fmt: skip
        run.perform("first")
    assert not (run.out / "first.tmp").exists() and not run.done("first")
    assert run.path(LABELS).exists()  # outside of stages everybody may ask


@pytest.mark.parametrize("what", ["tokenizer", "eos_ids", "max_new_tokens"])
def test_what_another_stage_has_read_before_has_to_be_declared_too(run, what):
    assert getattr(run, what)

    def function(run):
        with run.stage("first"):
            getattr(run, what)

    stage(function, ANSWERS)
    with pytest.raises(ValueError, match="stage first reads sft/model, which it does not declare"):
        run.perform("first")


def test_an_output_that_is_not_written_is_named(run):
    def nothing(run):
        with run.stage("first"):
            pass

    stage(nothing)
    with pytest.raises(ValueError, match="declares the output first/label.json and did not write"):
        run.perform("first")
    assert not (run.out / "first").exists()


def test_one_stage_does_not_do_the_work_of_another(run):
    def other(run):
        with run.stage("label"):
            pass

    stage(other)
    with pytest.raises(ValueError, match="stage first does the work of stage label"):
        run.perform("first")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (Stage("label", of_labels, ""), "expected one that is not taken"),
        (Stage("run", of_labels, ""), "expected one that is not taken"),
        (Stage("My Stage", of_labels, ""), "stage name was 'My Stage'"),
        (Stage("more-2", of_labels, ""), "-NUMBER ends the names of rounds"),
        (Stage("more", of_labels, "", outputs=(FIRST,)), "output 'first/label.json', expected a"),
        (Stage("more", of_labels, "", (FIRST,)), "no such stage is registered"),
        (Stage("more", of_labels, "", (Artifact("label/x", ""),)), "has label/labels.jsonl"),
    ],
)  # fmt: skip
def test_what_cannot_be_a_stage_is_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        register(wrong)


MODULE = '''
from tppo.stages.registry import ANSWERS, Artifact, Stage, register

LONGEST = Artifact("longest/answer.txt", "the longest answer")

def longest(run):
    with run.stage("longest") as out:
        texts = [answer.text for answer in run.iter_answers()]
        (out / "answer.txt").write_text(max(texts, key=len)[: run.config.generate.max_new_tokens])

STAGE = register(Stage("longest", longest, "the longest answer", (ANSWERS,), (LONGEST,),
                       ("generate.max_new_tokens",)))
'''


def test_a_strangers_stage_from_the_command_line_and_from_python(
    run, tmp_path, monkeypatch, capsys
):
    """Nothing is patched, and nothing is installed."""
    (tmp_path / "longest_stage.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "flags.yaml").write_text("generate: {max_new_tokens: 5}\n")
    command = ["longest_stage:STAGE", "--out", str(run.out), "--config", "flags.yaml"]
    main(command)
    assert "tppo longest: folder" in capsys.readouterr().err
    written = run.out / "longest" / "answer.txt"
    assert written.read_text() == max((a.text for a in run.answers()), key=len)[:5]
    manifest = read_json(run.out / "longest" / "manifest.json")
    assert [entry["path"] for entry in manifest["inputs"]] == [ANSWERS.path]
    assert manifest["config"] == {"generate.max_new_tokens": 5}
    main(command)  # it is registered already
    assert not run.done("longest")  # with another setting
    run.perform("longest")
    assert run.done("longest") and len(written.read_text()) > 5
    with pytest.raises(SystemExit, match="has no 'STAGES'; did you mean 'STAGE'"):
        main(["longest_stage:STAGES"])
    with pytest.raises(SystemExit, match="LONGEST was Artifact.*expected a Stage"):
        main(["longest_stage:LONGEST"])
    with pytest.raises(SystemExit, match="there is no module 'nothing_here'"):
        main(["nothing_here:STAGE"])


def answers_of(run, folder):
    return (run.out / folder / "answers.jsonl").read_text()


def test_a_stage_in_two_rounds(made, tmp_path, monkeypatch, capsys):
    """Each has its folder, manifest and draws; a later stage reads the newest up to its own."""
    out = tmp_path / "out"
    shutil.copytree(made[0].out, out)
    run = Run(out, CONFIG)
    first, labels = answers_of(run, "generate"), (out / "label/labels.jsonl").read_bytes()
    second = run.at(2)
    assert not second.done("generate") and second.path(ANSWERS) == out / "generate/answers.jsonl"
    second.perform("generate")
    assert second.done("generate") and run.done("generate")
    assert answers_of(run, "generate") == first != answers_of(run, "generate-2")
    assert read_json(out / "generate-2" / "manifest.json")["config"]["round"] == 2
    assert second.path(ANSWERS) == run.at(7).path(ANSWERS) == out / "generate-2/answers.jsonl"
    assert run.path(ANSWERS) == out / "generate/answers.jsonl"
    with opened(out) as files:
        second.perform("label")
    assert "generate-2/answers.jsonl" in files and "generate/answers.jsonl" not in files
    assert (out / "label/labels.jsonl").read_bytes() == labels
    inputs = read_json(out / "label-2" / "manifest.json")["inputs"]
    assert [entry["path"] for entry in inputs] == [TRAIN_SESSIONS.path, "generate-2/answers.jsonl"]

    answers = out / "generate-2" / "answers.jsonl"
    content = answers.read_text()
    answers.write_text(content.replace("finish", "Finish", 1))
    assert not second.done("label") and not second.done("generate") and run.done("label")
    with pytest.raises(DataError, match="answers.jsonl: not the file that stage generate-2 wrote"):
        second.perform("label")
    answers.unlink()
    with pytest.raises(DataError, match="run `tppo generate --round 2 --out"):
        second.perform("label")
    answers.write_text(content)
    assert second.done("label")
    manifest = answers.with_name("manifest.json")
    lost = manifest.read_text()
    manifest.unlink()  # the answers of the first round would be others
    with pytest.raises(DataError, match="generate-2/manifest.json: absent or damaged, run stage"):
        second.perform("label")
    manifest.write_text(lost)

    pooled = []

    def pool(run):
        with run.stage("pool"):
            with pytest.raises(ValueError, match="pool runs in round 2 and asks for a path of rou"):
                run.at(1).path(ANSWERS)
            with pytest.raises(ValueError, match="reads generate/answers.jsonl, which it does not"):
                run.path(ANSWERS)
            pooled.extend(run.paths(ANSWERS))

    register(Stage("pool", pool, "all answers", (ANSWERS.of_every_round(),)))
    second.perform("pool")
    both = ["generate/answers.jsonl", "generate-2/answers.jsonl"]
    assert pooled == second.paths(ANSWERS) == [out / path for path in both]
    inputs = read_json(out / "pool-2" / "manifest.json")["inputs"]
    assert [entry["path"] for entry in inputs] == both and run.paths(ANSWERS) == pooled[:1]


def test_rounds_from_the_command_line(made, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(made[0].out, out)
    main(["label", "--out", str(out)])
    kept = (out / "run.yaml").read_bytes()
    main(["label", "--out", str(out), "--round", "2"])
    assert (out / "label-2" / "manifest.json").exists() 
    assert (out / "run.yaml").read_bytes() == kept and "round:" not in kept.decode()
    with pytest.raises(SystemExit, match="--round was 2, expected 1: `tppo run` makes the first"):
        main(["run", "--out", str(out), "--round", "2"])


COUNT = Artifact("count/total.json", "how many rounds there were")


def count(run):
    """Reads its own result of the round before."""
    with run.stage("count") as out:
        earlier = 0 if run.round == 1 else read_json(run.path(COUNT))["rounds"]
        if count.kill:
            (out / "part").write_text("half a result")
            os.kill(os.getpid(), signal.SIGKILL)
        write_json(out / COUNT.name, {"rounds": earlier + 1})


count.kill = False


def test_a_round_reads_its_own_result_of_the_round_before_and_survives_a_kill(tmp_path):
    register(Stage("count", count, "counts its rounds", (COUNT,), (COUNT,)))
    run = Run(tmp_path / "out", CONFIG)
    run.perform("count")
    run.perform("count", round=2)
    assert read_json(run.out / "count-2/total.json") == {"rounds": 2}
    count.kill = True
    try:
        child = os.fork()
        if not child:
            run.perform("count", round=3)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    finally:
        count.kill = False
    third = run.at(3)
    assert (run.out / "count-3.tmp" / "part").exists() and not third.done("count")
    assert run.done("count") and run.at(2).done("count")
    third.perform("count")
    assert read_json(run.out / "count-3/total.json") == {"rounds": 3}
    assert third.done("count") and not (run.out / "count-3" / "part").exists()
    (run.out / "count-2" / "total.json").write_text('{"rounds": 7}')
    assert not third.done("count") and not run.at(2).done("count") and run.done("count")


def test_the_path_of_an_artifact_stands_once():
    """`"sft/model"` stood eleven times in four files."""
    package = Path(tppo.__file__).parent
    sources = {path.relative_to(package).as_posix(): path.read_text()
               for path in package.rglob("*.py")}  # fmt: skip
    outputs = [artifact for stage in REGISTRY.values() for artifact in stage.outputs]
    assert len(outputs) > 12
    for artifact in outputs:
        text = f'"{artifact.path}"'
        where = [file for file, source in sources.items() for _ in range(source.count(text))]
        assert where == ["stages/artifacts.py"], artifact


def letters(completions):
    """A judge's verdict: the share of letters."""
    return [sum(map(str.isalpha, text)) / max(len(text), 1) for text in completions]


def test_another_judge_keeps_the_weights_and_fills_the_table(made, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(made[0].out, out)
    run = Run(out, CONFIG, judged_by=CallableJudge(letters, "letters"))
    stages = [name for name in REGISTRY if REGISTRY[name].in_run]
    assert [name for name in stages if not run.done(name)] == ["train", "eval"]
    run.perform("train")
    assert "ppo: kept step 1, held-out score 0." in (said := capsys.readouterr().err), said
    assert "(by letters)" in said
    row = json.loads((out / "train/metrics.jsonl").read_text())
    assert {"heldout/score", "heldout/kl", "reward/rule"} <= set(row)
    assert "heldout/format" not in row and "heldout/relevance" not in row
    run.perform("eval")
    assert "score: judged by letters (not by the rule, which" in " ".join(
        capsys.readouterr().out.split()
    )
    result = read_json(out / "result.json")
    assert result["test"]["judge"] == "letters" and 0 < result["tppo"]["score"] < 1
    assert "relevance" not in result["tppo"] and "chrf" in result["tppo"]
    strict = replace(CONFIG, ppo=replace(CONFIG.ppo, max_kl=0.0, lr=1.0))
    replace(run, config=strict).perform("train")  # so far from SFT that its estimate is no chance
    said = capsys.readouterr().err
    assert "WARNING: no step had held-out KL <= 0; the last one is kept" in said


OWN_JUDGE = """
def letters(completions, session):
    return [len(text) / len(s.targets) for text, s in zip(completions, session)]
"""


def test_a_judge_from_the_command_line_is_known_by_its_source(
    made, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "out"
    shutil.copytree(made[0].out, out)
    (tmp_path / "own_judge.py").write_text(OWN_JUDGE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    write_yaml(tmp_path / "c.yaml", plain(CONFIG))
    command = ["eval", "--out", "out", "--config", "c.yaml", "--eval.judge"]
    main([*command, "own_judge:letters"])
    said = capsys.readouterr()
    assert "judged by own_judge:letters (" in " ".join(said.out.split())
    assert "eval builds on files of train, which would now be others" in said.err
    known = read_json(out / "eval/manifest.json")["config"]["judge"]
    assert known.startswith("own_judge:letters (")
    own = Run(out, replace(CONFIG, eval=EvalConfig(judge="own_judge:letters")))
    assert own.done("eval") and not own.done("train") and not Run(out, CONFIG).done("eval")
    (tmp_path / "own_judge.py").write_text(OWN_JUDGE.replace("/", "*"))
    monkeypatch.delitem(sys.modules, "own_judge")
    linecache.checkcache()
    assert not own.done("eval")  # the same name, another source

    for given, message in {
        "own_judge:words": "has no 'words'",
        "own_judge:__name__": "--eval.judge own_judge:__name__: was 'own_judge', expected a func",
        "rules": "--eval.judge was 'rules', expected rule, intent, next-query, endpoint, or module",
    }.items():
        with pytest.raises(SystemExit, match=message):
            main([*command, given])


@pytest.mark.parametrize(("name", "figure"), [("intent", "intent"), ("next-query", "mrr")])
def test_built_in_judges_by_name(made, tmp_path, name, figure, capsys):
    out = tmp_path / "out"
    shutil.copytree(made[0].out, out)
    run = Run(out, replace(CONFIG, eval=EvalConfig(judge=name)))
    run.perform("train")
    row = json.loads((out / "train/metrics.jsonl").read_text())
    assert {f"heldout/{figure}", "heldout/format"} <= set(row)
    assert read_json(out / "train/manifest.json")["config"]["judge"] == name
    assert f"by the {'latent intent' if name == 'intent' else 'true next query'}" in (
        capsys.readouterr().err
    )
