"""The whole chain at a tiny size: every stage, skipping, resuming after a kill, bad input."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from tppo.cli import main
from tppo.commands import _parse
from tppo.config import fill_defaults
from tppo.labels.queries import parse_answer, repeats
from tppo.models.parallel import ALONE
from tppo.models.tokenizer import token_offsets, train_tokenizer
from tppo.sessions.prompts import prompt_text
from tppo.sessions.session import read_sessions
from tppo.stages.ppo import new_loop
from tppo.stages.registry import REGISTRY
from tppo.stages.reward_rows import policy_twins
from tppo.stages.run import Run
from tppo.store.hashes import sha256
from tppo.store.jsonl import write_json
from tppo.store.run_folder import RunFolder

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = {
    "sessions": {"train_users": 200, "heldout_users": 24, "test_users": 24, "transfer_users": 8},
    "scratch": {"hidden_size": 32, "intermediate_size": 48, "vocab_size": 400},
    "sft": {"max_steps": 30, "eval_every": 10, "decay_steps": 30},
    "generate": {"samples": 96},
    "reward_model": {"epochs": 1},
    "ppo": {"steps": 4, "batch_size": 16, "minibatch_size": 8, "checkpoint_every": 1,
            "eval_every": 2, "min_format": 0.0, "max_kl": 100.0},
    "eval": {"temperatures": [1.0, 0.5], "heat_users": 2},
}  # fmt: skip
STAGES = [name for name, stage in REGISTRY.items() if stage.in_run]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(json.dumps(TINY))
    return str(path)


class Read:
    """Settings that note under which stage each of them is read, and files that it opens."""

    stage: str | None = None
    settings: dict[str, set[str]] = {}
    files: dict[str, set[str]] = {}

    def __init__(self, values, name=""):
        self._values, self._name = values, name

    def __getattr__(self, key):
        made = getattr(type(self._values), key, None)
        if isinstance(made, property):  # of settings, each of which is noted
            return made.fget(self)
        value, name = getattr(self._values, key), f"{self._name}{key}"
        if dataclasses.is_dataclass(value):
            return Read(value, f"{name}.")
        if Read.stage is not None:
            Read.settings.setdefault(Read.stage, set()).add(name)
        return value


class NotedRun(Run):
    """A run that notes what its stages read."""

    def __init__(self, **values):
        super().__init__(**{**values, "config": Read(values["config"])})
        object.__setattr__(self, "plain", Run(**values))

    def _settings(self, stage):
        return self.plain._settings(stage)

    @contextmanager
    def stage(self, stage, *, resume=False):
        Read.out = str(self.out)
        # Each stage may run in a process of its own.
        for kept in ("_tokenizer", "_eos_ids", "_max_new_tokens"):
            self.__dict__.pop(kept, None)
        with super().stage(stage, resume=resume) as work:
            Read.stage = stage
            try:
                yield work
            finally:
                Read.stage = None


def _note_files(event, arguments):
    # Not the report, which a thread of its own keeps while a stage runs.
    ours = threading.current_thread() is threading.main_thread()
    if ours and Read.stage is not None and event == "open" and isinstance(arguments[0], str):
        path = Path(arguments[0])
        if path.is_relative_to(Read.out):
            Read.files.setdefault(Read.stage, set()).add(path.relative_to(Read.out).as_posix())


@pytest.fixture(scope="module")
def finished(tmp_path_factory, config):
    out = tmp_path_factory.mktemp("run folder") / "out"
    sys.addaudithook(_note_files)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tppo.stages.run.Run", NotedRun)
        main(["run", "--out", str(out), "--config", config])
    return out


# Read, and without a word in the result: how often, how fast, whether at all.
RECOMPUTED = {"model.gradient_checkpointing", "report_to"}
# Read to decide whether the settings of adapters, another judge and another engine count.
CHOICES = {"lora.rank", "eval.judge", "algorithm", "rollout"}
WITHOUT_RESULT = {
    "sft": RECOMPUTED,
    # The content of the model is compared, wherever it lies.
    "train-rm": RECOMPUTED | {"reward_model.model", "model.allow_pickle"},
    "train": RECOMPUTED | {"ppo.checkpoint_every", "ppo.verify_prefix", "reward_model.min_auc",
                           "reward_model.min_auc_sessions", "ppo.without_signal",
                           "ppo.max_spoilt", "reward_server.base_url"},
    "eval": RECOMPUTED,
    # It builds PPO to score answers, and trains nothing.
    "heat": RECOMPUTED | {"ppo.lr", "ppo.critic_lr", "ppo.clip", "ppo.steps", "ppo.adaptive_kl",
                          "ppo.max_spoilt", "ppo.lr_schedule", "ppo.lr_warmup_steps",
                          "ppo.critic_lr_warmup_steps", "ppo.critic_warmup_steps",
                          "reward_server.base_url"},
}  # fmt: skip


@pytest.mark.parametrize("stage", STAGES)
def test_what_a_stage_reads_is_what_it_depends_on(finished, stage):
    """`generate.batch_size` ran SFT again, `min_auc` the reward model; a file was not declared."""
    manifest = json.loads((finished / stage / "manifest.json").read_text())
    declared = {f"{name}.{key}" if isinstance(value, dict) else name
                for name, value in manifest["config"].items()
                for key in (value if isinstance(value, dict) else [""])}  # fmt: skip
    judged = {"rule"} if stage in ("label", "train", "eval") else set()  # no setting, its edition
    read = Read.settings.get(stage, set()) - WITHOUT_RESULT.get(stage, set()) - CHOICES
    assert read | judged == declared
    files = {entry["path"] for entry in manifest["inputs"]}
    opened = {f for f in Read.files[stage] if not f.startswith(f"{stage}.tmp")}
    covered = {f: [d for d in files if f"{f}/".startswith(f"{d}/")] for f in opened}
    assert all(covered.values()), covered
    read = {d for found in covered.values() for d in found}
    rust = {f for f in files if f.endswith(".safetensors")}  # not opened by Python
    if stage == "train":  # read where `ppo.fit_critic` asks for it
        files -= {"generate/answers.jsonl"}
    assert files - read - rust == set()


def test_labels_of_an_endpoint_depend_on_what_is_asked_alone(config, tmp_path):
    def settings(*flags):
        endpoint = ["--label.labeller", "endpoint", "--label.endpoint.model", "judge"]
        options, _ = _parse("run", ["--config", config, "--out", str(tmp_path), *endpoint, *flags])
        return Run(options.out, options.settings)._settings("label")

    same = ["--label.endpoint.base-url", "http://127.0.0.1:1/v1", "--label.endpoint.timeout-s", "9",
            "--label.endpoint.concurrency", "2", "--label.endpoint.max-retries", "1",
            "--label.sentence-threshold", ".5", "--label.endpoint.max-dropped", ".5",
            "--label.endpoint.max-wait-s", "7", "--label.endpoint.api-key-env", "None"]  # fmt: skip
    assert settings(*same) == settings()
    for other in (["model", "other"], ["temperature", ".5"], ["template", "sentence"]):
        assert settings(f"--label.endpoint.{other[0]}", other[1]) != settings(), other


@pytest.mark.parametrize(
    ("flags", "again"),
    [
        (["--generate.batch-size", "7"], {"generate", "train", "eval", "heat"}),
        (["--generate.samples", "90"], {"generate"}),
        (["--reward-model.min-auc", "0.1"], set()),
        (["--reward-model.min-auc-sessions", "7"], set()),
        (["--reward-model.lr", "0.1"], {"train-rm"}),
        (["--ppo.checkpoint-every", "3", "--ppo.verify-prefix"], set()),
        (["--ppo.lr", "0.1"], {"train"}),
        (["--ppo.lam", "0.9"], {"train", "heat"}),
        (["--eval.heat-users", "1"], {"heat"}),
        (["--eval.temperatures", "1"], {"eval"}),
        (["--sft.patience", "9"], {"sft"}),
        (["--sft.grad-norm", "9"], {"sft", "eval"}),
        (["--scratch.layers", "1"], {"sft"}),
        (["--sessions.test-share", "0.5", "--duplicates", "near"], set()),
        (["--label.endpoint.timeout-s", "5", "--label.endpoint.model", "judge"], set()),
        (["--label.sentence-threshold", "0.5"], {"label", "train-rm", "train", "eval"}),
        (["--label.labeller", "endpoint", "--label.endpoint.model", "judge"], {"label"}),
        (["--label.labeller", "hand", "--label.hand.rest", "rule"], {"label"}),
        (["--reward-model.hand-weight", "2"], {"train-rm"}),
        (["--prefix", "dense"], {"sft", "generate", "train-rm", "train", "eval", "heat"}),
    ],
)
def test_a_setting_repeats_the_stages_whose_result_it_changes(finished, config, flags, again):
    options, _ = _parse("run", ["--config", config, "--out", str(finished), *flags])
    run = Run(options.out, fill_defaults(options.settings, pretrained=False))
    assert {stage for stage in STAGES if not run.done(stage)} == again


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def seconds(folder: Path) -> dict[str, float]:
    return {
        name: json.loads((folder / name / "manifest.json").read_text())["seconds"]
        for name in STAGES
    }


def test_every_stage_leaves_its_files_and_the_table_is_complete(finished):
    assert all((finished / name / "manifest.json").is_file() for name in STAGES)
    result = json.loads((finished / "result.json").read_text())
    for name in ("repeat_last", "sft", "sft_t0.5", "sft_continued", "tppo", "tppo_transfer"):
        for figure in (
            "relevance", "relevance_se", "exact_match", "chrf", "distinct_2",
            "queries_per_answer", "format",
        ):  # fmt: skip
            assert isinstance(result[name][figure], float), (name, figure)
    assert result["sft"]["kl"] == pytest.approx(0, abs=1e-4) and result["tppo"]["kl"] != 0
    assert result["tppo"]["length"] > 1 and result["test"]["users"] == 24
    # 4 steps of 2 epochs over 16 responses, 8 a minibatch
    assert result["sft_continued"]["optimizer_steps"] == result["tppo"]["optimizer_steps"] == 16
    assert result["test"]["judge"] == result["test"]["labeller"] == "rule"
    assert isinstance(result["findings"], list) and result["training"]["steps"] == 4
    answers = rows(finished / "eval" / "answers.jsonl")
    assert len(answers) == 24 and answers[0]["prompt"].endswith("next 3:\n")
    for name in ("sft", "sft_t0.5", "sft_continued", "tppo"):
        assert answers[0][name] == result[name]["example"]
    assert len(rows(finished / "heat" / "tokens.jsonl")) == 4


def test_the_metrics_have_a_row_a_step_with_trls_names(finished):
    metrics = rows(finished / "train" / "metrics.jsonl")
    assert [row["step"] for row in metrics] == [1, 2, 3, 4]
    for row in metrics:
        assert {"objective/kl", "objective/rlhf_reward", "val/ratio", "reward/rule"} <= set(row)
        assert 0 <= row["response/format"] <= 1 and row["response/length"] >= 1
    assert "heldout/relevance" in metrics[1] and "heldout/relevance" not in metrics[0]
    low, high = metrics[1]["heldout/relevance_interval"]
    assert low <= metrics[1]["heldout/relevance"] <= high
    tokens = [row["num_tokens"] for row in metrics]
    assert tokens == sorted(tokens) and tokens[0] > 16 * 2
    sft = rows(finished / "sft" / "metrics.jsonl")
    assert 0 < sft[0]["num_tokens"] < sft[-1]["num_tokens"]
    assert rows(finished / "train-rm" / "metrics.jsonl")[0]["num_tokens"] > 0


def test_answers_are_kept_at_every_evaluation(finished):
    samples = rows(finished / "train" / "samples.jsonl")
    assert [row["step"] for row in samples] == [0] * 8 + [2] * 8 + [4] * 8
    heldout = read_sessions(finished / "data" / "heldout.jsonl")[:8]
    for step in range(3):
        for row, session in zip(samples[8 * step :], heldout, strict=False):
            assert row["id"] == session.id and row["prompt"] == prompt_text(session)
            assert row["targets"] == [*session.targets] and row["finish"] in ("eos", "length")
            assert set(row["figures"]) > {"relevance", "words", "format"}


def test_categories_line_up_with_the_sampled_tokens(finished):
    answers = {row["id"]: row for row in rows(finished / "generate" / "answers.jsonl")}
    tokenizer = AutoTokenizer.from_pretrained(finished / "sft" / "model")
    labels = {row["id"]: row for row in rows(finished / "label" / "labels.jsonl")}
    mapped = rows(finished / "map" / "categories.jsonl")
    assert len(mapped) == len(answers) == 96
    for row in mapped:
        ids, words = answers[row["id"]]["response_ids"], labels[row["id"]]["words"]
        assert len(row["categories"]) == len(ids)
        assert (ids[-1] != tokenizer.eos_token_id) or row["categories"][-1] == 0
        marked = {1 + relevant for _, relevant in words}
        assert set(row["categories"]) - {0} == marked


@pytest.mark.parametrize("share", ["0.5", "0"])
def test_the_reward_model_reads_answers_with_a_repeated_query(finished, config, share):
    """Without them PPO said one relevant query three times, which the reward model paid thrice."""
    flags = ["--config", config, "--out", str(finished), "--reward-model.repeated-share", share]
    options, _ = _parse("run", flags)
    run = Run(options.out, fill_defaults(options.settings, pretrained=False))
    twins = [row for found in policy_twins(run).values() for row in found]
    able = sum(len(parse_answer(answer.text)) > 1 for answer in run.iter_answers())
    assert (0.2 * able < len(twins) < 0.8 * able) if share == "0.5" else not twins
    for row in twins:
        text, offsets = token_offsets(run.tokenizer, row.response_ids)
        lines, start = text.split("\n"), 0
        if row.response_ids[-1] == run.tokenizer.eos_token_id:
            assert sum(repeats(lines)) == 1  # a cut one may have lost its repetition
        for line, again in zip(lines, repeats(lines), strict=True):
            tokens = {c for c, (a, b) in zip(row.categories, offsets, strict=True)
                      if a < start + len(line) and b > start}  # fmt: skip
            assert not again or tokens <= {0, 1}
            start += len(line) + 1
    report = json.loads((finished / "train-rm" / "report.json").read_text())
    assert report["auc_repeated"] is None or 0 <= report["auc_repeated"] <= 1


def test_exports_are_plain_models(finished):
    for folder in ("sft/model", "train/model"):
        model = AutoModelForCausalLM.from_pretrained(finished / folder)
        tokenizer = AutoTokenizer.from_pretrained(finished / folder)
        assert len(tokenizer) == model.config.vocab_size
        card = (finished / folder / "README.md").read_text()
        assert "library_name: transformers" in card and f"# {folder.split('/')[0]}\n" in card
        assert ("| relevance |" in card) == (folder == "train/model")
        ids = [getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")]
        config = model.generation_config
        assert [config.bos_token_id, config.eos_token_id, config.pad_token_id] == ids
        prompt = rows(finished / "generate" / "answers.jsonl")[0]["prompt_ids"]
        answers = model.generate(torch.tensor([prompt] * 32), max_new_tokens=60, do_sample=True)
        ended = [row for row in answers[:, len(prompt) :].tolist() if ids[1] in row]
        assert len(ended) > 8
        for row in ended:  # behind its end there is nothing but filler
            assert set(row[row.index(ids[1]) + 1 :]) <= {ids[2]}
    assert not list((finished / "train").glob("**/*.pt"))


def test_a_second_run_skips_what_is_finished(finished, config, capsys):
    before = seconds(finished)
    main(["run", "--out", str(finished), "--config", config])
    assert seconds(finished) == before
    assert capsys.readouterr().err.count("finished before, skipped") == len(STAGES)


def test_a_changed_setting_reruns_its_stage_and_says_why(finished, config, tmp_path, capsys):
    folder = shutil.copytree(finished, tmp_path / "out")
    main(["run", "--out", str(folder), "--config", config, "--eval.heat-users", "1"])
    said = capsys.readouterr().err
    assert said.count("finished before, skipped") == len(STAGES) - 1  # all but heat
    assert "heat: runs again, because config.eval.heat_users was 2, is 1" in said
    assert "run.yaml changes: settings.eval.heat_users was 2, is 1" in said


def test_a_stage_alone_uses_the_settings_of_its_folder(finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "out")
    shutil.rmtree(folder / "generate")
    main(["generate", "--out", str(folder)])
    same = (folder / "generate" / "answers.jsonl").read_bytes()
    assert same == (finished / "generate" / "answers.jsonl").read_bytes()


def test_the_same_seed_gives_the_same_run(finished, config, tmp_path):
    """In another process, with another hash seed."""
    command = [sys.executable, "-m", "tppo", "run", "--out", str(tmp_path), "--config", config]
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in ("data/train.jsonl", "generate/answers.jsonl", "train/model/model.safetensors"):
        assert (tmp_path / name).read_bytes() == (finished / name).read_bytes(), name
    results = [json.loads((path / "result.json").read_text()) for path in (finished, tmp_path)]
    assert without_seconds(results[0]) == without_seconds(results[1])
    assert without_seconds(results[0])["sft_continued"]["optimizer_steps"] == 16


def without_seconds(value):
    """A value of JSON without the fields named seconds: only they may differ between two runs."""
    if not isinstance(value, dict):
        return value
    return {key: without_seconds(item) for key, item in value.items() if key != "seconds"}


def test_labels_of_one_class_stop_before_ppo_unless_told_otherwise(
    finished, tmp_path, monkeypatch, capsys
):
    pytest.importorskip("openai", reason="openai is not installed: pip install tppo-kernels[label]")
    from test_label_openai import answer, serving, slots

    def nothing_is_relevant(request, number):
        words = " ".join(slots(request)["returned_queries"]).split()
        return answer([(word, 0) for word in words], 0)

    folder = shutil.copytree(finished, tmp_path / "out")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serving(nothing_is_relevant) as server:
        flags = ["--label.labeller", "endpoint", "--label.endpoint.api-key-env", "None"]
        flags += ["--label.endpoint.base-url", server.url, "--label.endpoint.model", "judge-1"]
        main(["label", "--out", str(folder), *flags])
    main(["map", "--out", str(folder)])
    main(["train-rm", "--out", str(folder)])
    shutil.rmtree(folder / "train")
    message = r"nothing to learn from: none of the labelled tokens of \d+ answers are relevant.*"
    with pytest.raises(SystemExit, match=f"{message}--ppo.without-signal"):
        main(["train", "--out", str(folder)])
    assert not (folder / "train").exists()
    flags = ["--ppo.without-signal", "--ppo.steps", "1"]
    main(["train", "--out", str(folder), *flags])
    assert "WARNING: there is nothing to learn from: none of the" in capsys.readouterr().err
    main(["eval", "--out", str(folder), "--eval.temperatures", "1.0"])
    shown, result = capsys.readouterr().out, json.loads((folder / "result.json").read_text())
    assert "(not by judge-1, which labelled" in " ".join(shown.split())
    assert result["findings"] and " ".join(shown.split()).startswith(result["findings"][0])


def test_a_policy_that_does_not_move_stops_at_its_first_step(finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "out")
    shutil.rmtree(folder / "train")
    flags = ["--ppo.lr", "1e-30", "--ppo.steps", "2"]
    with pytest.raises(SystemExit, match="first step left the policy as it was.*without-signal"):
        main(["train", "--out", str(folder), *flags])
    assert not (folder / "train").exists()


def test_the_format_that_keeps_weights_is_relative_to_that_of_sft(finished, tmp_path):
    """Where SFT itself seldom had the format, no step qualified and the last one was kept."""
    run = Run(finished, fill_defaults(_parse("train", ["--out", str(finished)])[0].settings, False))
    run = dataclasses.replace(run, config=dataclasses.replace(
        run.config, ppo=dataclasses.replace(run.config.ppo, min_format=1.0)))  # fmt: skip
    loop = new_loop(run, tmp_path, ALONE)
    figures = loop.evaluate_heldout(1, loop.held)  # of a policy that is still SFT
    assert figures["heldout/format"] == loop.min_format < 1
    assert loop.best and loop.best_step == 1
    loop.best, loop.best_score, loop.min_format = {}, None, figures["heldout/format"] + 1e-3
    loop.evaluate_heldout(2, loop.held)
    assert not loop.best


def test_two_processes_train_together_and_resume_bit_identically(finished, tmp_path):
    """Under torchrun; the first of them writes, a kill costs the steps since the checkpoint.

    All bits are compared by make test-full: a start of two processes takes half a minute.
    """
    names = ["killed", *(["whole"] if os.environ.get("TPPO_TEST_FULL") == "1" else [])]
    folders = [shutil.copytree(finished, tmp_path / name) for name in names]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               "--nproc-per-node", "2", "-m", "tppo"]  # fmt: skip
    with open(tmp_path / "log", "w") as log:
        for folder in folders:
            for stage in ("train", "eval", "heat"):
                shutil.rmtree(folder / stage)
        train = [*command, "train", "--out", str(folders[0])]
        process = subprocess.Popen(train, stdout=log, stderr=log)
        deadline = time.monotonic() + 600
        while not (folders[0] / "train.tmp" / "checkpoints" / "step-2").is_dir():
            assert process.poll() is None and time.monotonic() < deadline, log.name
            time.sleep(0.005)
        for worker in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
            os.kill(int(worker), signal.SIGKILL)
        assert process.wait(timeout=600) != 0
    for folder in folders:
        train = [*command, "train", "--out", str(folder)]
        done = subprocess.run(train, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("2 processes") == 1
        assert ("resumes after step" in done.stderr) == (folder is folders[0])
    resumed, *whole = (load_file(path / "train/model/model.safetensors") for path in folders)
    for weights in whole:
        assert weights.keys() == resumed.keys()
        assert all(torch.equal(weights[name], resumed[name]) for name in weights)
    metrics = [rows(folder / "train" / "metrics.jsonl") for folder in folders]
    assert metrics[0] == metrics[-1] and [row["step"] for row in metrics[0]] == [1, 2, 3, 4]
    for row, alone in zip(metrics[0], rows(finished / "train" / "metrics.jsonl"), strict=True):
        numbers = {name: x for name, x in alone.items() if not isinstance(x, list)}
        found = {name: row[name] for name in numbers}
        assert found == pytest.approx(numbers, rel=1e-3, abs=1e-4), "one process has other figures"
    exported = [path / "train/model/generation_config.json" for path in (finished, *folders)]
    assert len({path.read_text() for path in exported}) == 1


def test_other_stages_refuse_to_run_several_times_at_once(finished, monkeypatch):
    torchrun = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": "1"}
    for name, value in torchrun.items():
        monkeypatch.setenv(name, value)
    expected = "2 processes, expected 1: several share `tppo train` and `tppo ser-train` alone; sta"
    for command in (["eval"], ["run"], ["sft"], ["ser", "--pairs", "none.jsonl"], ["report"]):
        with pytest.raises(SystemExit, match=f"{expected}rt `tppo {command[0]}` without torchrun"):
            main([*command, "--out", str(finished)])


# transformers reads a temperature without do_sample with a warning, and refuses to save it.
AUTHORS = {"temperature": 0.6, "top_k": 20, "repetition_penalty": 9.0, "suppress_tokens": [40, 41]}


@pytest.fixture(scope="module")
def local_model(tmp_path_factory, finished):
    """A causal LM as a user has it: random weights, a chat template, no pad token, and a
    generation config with two ends of an answer, one of them a token like any other.
    """
    path = tmp_path_factory.mktemp("model")
    texts = [prompt_text(session) for session in read_sessions(finished / "data/train.jsonl")]
    tokenizer = train_tokenizer(texts, 350)
    tokenizer.pad_token = None
    tokenizer.chat_template = (
        "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}assistant\n{% endif %}"
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=160,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        )
    )  # fmt: skip
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("Z")]
    (path / "generation_config.json").write_text(json.dumps(AUTHORS | {"eos_token_id": ends}))
    return path


def test_a_local_model_with_a_chat_template(local_model, config, tmp_path, capsys):
    flags = ["--sessions.train-users", "64", "--generate.samples", "48", "--sft.lr", "3e-3",
             "--ppo.without-signal"]  # 30 steps of SFT find no relevant word
    main(["run", "--out", str(tmp_path), "--config", config, "--model", str(local_model), *flags])
    assert "no pad token" in capsys.readouterr().err
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "train" / "model")
    answers = rows(tmp_path / "generate" / "answers.jsonl")
    prompt = tokenizer.decode(answers[0]["prompt_ids"])
    assert prompt.startswith("<s>user\nprofile:") and prompt.endswith("assistant\n")
    assert json.loads((tmp_path / "result.json").read_text())["tppo"]["users"] == 24
    for folder in (local_model, tmp_path / "sft/model", tmp_path / "train/model"):
        config = json.loads((folder / "generation_config.json").read_text())
        config.pop("transformers_version", None)
        assert config == AUTHORS | {"eos_token_id": config["eos_token_id"]}
        assert config["eos_token_id"] == [tokenizer.eos_token_id, tokenizer.encode("Z")[0]]
        kept = AutoTokenizer.from_pretrained(folder).chat_template
        assert kept and kept == AutoTokenizer.from_pretrained(local_model).chat_template
    last = Counter(row["response_ids"][-1] for row in answers if row["finish"] == "eos")
    assert set(last) == set(config["eos_token_id"]), last
    categories = {row["id"]: row["categories"] for row in rows(tmp_path / "map/categories.jsonl")}
    for row in answers:
        ids, ended = row["response_ids"], row["finish"] == "eos"
        assert not set(ids[:-1]) & set(last) and (ids[-1] in last) == ended
        shown = ids[:-1] if ended else ids
        assert row["text"] == tokenizer.decode(shown, skip_special_tokens=True)
        assert not ended or categories[row["id"]][-1] == 0
    for row in rows(tmp_path / "train/metrics.jsonl"):
        assert row["response/eos"] == row["val/num_eos_tokens"] / 16


def test_a_prompt_longer_than_the_model(local_model, config, tmp_path, capsys):
    long = {
        "source": "made",
        "history": [{"type": "search", "text": "zebra " * 200}],
        "targets": ["zebra"],
    }
    lines = [json.dumps({"id": f"s{i}", "user": f"u{i}", **long}) for i in range(9)]
    (tmp_path / "long.jsonl").write_text("\n".join(lines))
    flags = ["--data", str(tmp_path / "long.jsonl"), "--model", str(local_model)]
    with pytest.raises(SystemExit, match=r"session 's\d'.* tokens .*the model has room for"):
        main(["run", "--out", str(tmp_path / "out"), "--config", config, *flags])
    assert not (tmp_path / "out" / "sft").exists()


def test_labels_of_an_endpoint(finished, tmp_path, monkeypatch):
    pytest.importorskip("openai", reason="openai is not installed: pip install tppo-kernels[label]")
    from test_label_openai import judge, serving

    folder = shutil.copytree(finished, tmp_path / "out")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serving(lambda request, number: judge(request)) as server:
        flags = ["--label.labeller", "endpoint", "--label.endpoint.api-key-env", "None"]
        flags += ["--label.endpoint.base-url", server.url, "--label.endpoint.model", "judge"]
        main(["label", "--out", str(folder), *flags])
        asked = len(server.requests)
        main(["label", "--out", str(folder), *flags])
        assert len(server.requests) == asked  # nothing that was paid for is asked again
    main(["map", "--out", str(folder)])
    by_rule, by_endpoint = (
        {row["id"]: row["categories"] for row in rows(path / "map" / "categories.jsonl")}
        for path in (finished, folder)
    )
    assert len(by_endpoint) > 48
    assert all(len(row) == len(by_rule[id]) for id, row in by_endpoint.items())


@pytest.mark.parametrize("name", ["sim4ia_sessions", "ikat_turns"])
def test_real_sessions(name, config, tmp_path):
    folder = os.environ.get("TPPO_SESSIONS")
    if not folder:
        pytest.skip("TPPO_SESSIONS names no folder of real sessions")
    data = str(Path(folder) / f"{name}.jsonl")
    flags = ["--generate.samples", "32", "--ppo.steps", "1", "--sft.max-steps", "3"]
    flags += ["--ppo.without-signal"]  # 3 steps of SFT find no relevant word
    flags += ["--generate.max-new-tokens", "24", "--scratch.max-length", "280"]
    main(["run", "--data", data, "--out", str(tmp_path), "--config", config, *flags])
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["tppo"]["users"] >= 4 and "tppo_transfer" not in result
    splits = [read_sessions(tmp_path / "data" / f"{s}.jsonl") for s in ("train", "heldout", "test")]
    users = [{session.user for session in split} for split in splits]
    assert not (users[0] & users[1] or users[0] & users[2] or users[1] & users[2])
    assert sum(map(len, splits)) == len(read_sessions(data))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "empty"),
        ("not json\n", "line 1"),
        ('{"id": "a", "user": "u", "source": "x", "history": [], "targets": []}\n', "targets"),
    ],
)
def test_bad_session_files_leave_nothing(content, message, tmp_path):
    (tmp_path / "bad.jsonl").write_text(content)
    out = tmp_path / "out"
    with pytest.raises(SystemExit, match=message):
        main(["run", "--data", str(tmp_path / "bad.jsonl"), "--out", str(out)])
    assert not (out / "data").exists()


def test_a_missing_file_and_a_missing_stage_are_named(tmp_path):
    with pytest.raises(SystemExit, match="gone.jsonl: no such file; is the path right"):
        main(["run", "--data", str(tmp_path / "gone.jsonl"), "--out", str(tmp_path / "a")])
    with pytest.raises(SystemExit, match="run `tppo data --out .*` first"):
        main(["sft", "--out", str(tmp_path / "b")])


@pytest.mark.parametrize(("flags", "message"), [
    (["--model", "GONE"], "gone: no such file .* expected a local folder .* owner/name"),
    (["--model", "FILE"], "file: a file, expected a local folder"),
    (["--data", "GONE"], "gone: no such file; is the path right?"),
    (["--reward-model.model", "GONE"], "gone: no such file .* expected a local folder"),
    (["--reward-model.model", "FILE"], "file: a file, expected a local folder"),
    (["--label.labeller", "endpoint"], "model was '', expected its name at the endpoint"),
    (["--label.labeller", "hand", "--label.hand.rest", "endpoint"], "model was '', expected its"),
    (["--label.labeller", "endpoint", "--label.endpoint.model", "hand:m"], "labels by hand"),
    (["--label.labeller", "endpoint", "--label.endpoint.model", "m", "--label.endpoint.price-read",
      "1"], "price_read, price_written were 1.0, None"),
    (["--label.labeller", "endpoint", "--label.endpoint.model", "m", "--label.endpoint.template",
      "sentence"], "template was 'sentence', expected 'words'"),
    (["--label.labeller", "endpoint", "--label.endpoint.model", "m", "--label.endpoint.base-url",
      "http://127.0.0.1:9/v1"], "environment variable OPENAI_API_KEY was empty"),
])  # fmt: skip
def test_what_a_later_stage_would_refuse_is_refused_first(flags, message, tmp_path, monkeypatch):
    """A folder of a reward model that is not there was named after labels had been paid for."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    (tmp_path / "file").write_text("x")
    named = {"GONE": str(tmp_path / "gone"), "FILE": str(tmp_path / "file")}
    with pytest.raises(SystemExit, match=message):
        main(["run", "--out", str(tmp_path / "out"), *(named.get(flag, flag) for flag in flags)])
    assert not (tmp_path / "out").exists()


def test_labels_that_changed_are_not_compared(finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "out")
    labels = folder / "label" / "labels.jsonl"
    labels.write_text(labels.read_text().replace('"sentence": 0', '"sentence": 1', 1))
    with pytest.raises(SystemExit, match="labels.jsonl: not the file that stage label wrote"):
        main(["label", "--agreement", str(finished / "label/labels.jsonl"), "--out", str(folder)])


def test_settings_that_were_cut_are_told(tmp_path, capsys):
    """A file that ends behind some line is YAML too, and the rest of it was the defaults unsaid."""
    place = tmp_path / "out"
    main(["data", "--out", str(place), "--sessions.train-users", "12"])
    lines = (place / "run.yaml").read_text().splitlines(keepends=True)
    main(["data", "--out", str(place)])
    assert "WARNING" not in capsys.readouterr().err
    cut = next(n for n, line in enumerate(lines) if line.startswith("  eval:")) + 2
    (place / "run.yaml").write_text("".join(lines[:cut]))
    main(["data", "--out", str(place)])
    said = capsys.readouterr().err
    assert "run.yaml has no " in said and "their defaults are taken; was it cut" in said


def test_a_run_folder_that_cannot_be_one_is_named(tmp_path):
    (tmp_path / "file").write_text("x")
    for place in ("file", "file/below"):
        with pytest.raises(SystemExit, match=f"{place}: .*, expected a run folder, or a place for"):
            main(["data", "--out", str(tmp_path / place)])


def test_too_few_users_are_named(tmp_path):
    row = {"user": "u", "source": "x", "history": [], "targets": ["a"]}
    lines = "\n".join(json.dumps({"id": str(i), **row}) for i in range(5))
    (tmp_path / "one.jsonl").write_text(lines)
    with pytest.raises(SystemExit, match="1 users, expected at least 3"):
        main(["data", "--data", str(tmp_path / "one.jsonl"), "--out", str(tmp_path / "out")])


def test_a_stage_does_not_read_what_another_did_not_write(finished, tmp_path, capsys):
    """A bit that flipped in `sft/model` went into the answers, and nobody heard of it."""
    folder = shutil.copytree(finished, tmp_path / "out")
    weights = folder / "sft" / "model" / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(SystemExit, match="model.safetensors: not the file that stage sft wrote"):
        main(["generate", "--out", str(folder)])
    assert (folder / "generate" / "answers.jsonl").exists()
    weights.write_bytes(content)
    (folder / "map" / "manifest.json").write_text("[]")
    with pytest.raises(SystemExit, match=r"map/manifest.json: absent or damaged, run stage map"):
        main(["train-rm", "--out", str(folder)])


def test_a_stage_refuses_another_seed_and_says_other_settings(finished, tmp_path, capsys):
    folder = shutil.copytree(finished, tmp_path / "out")
    before = (folder / "run.yaml").read_bytes()
    with pytest.raises(SystemExit, match=r"stage data in .* had seed 0, this command has 2: leave"):
        main(["heat", "--out", str(folder), "--seed", "2"])
    assert (folder / "run.yaml").read_bytes() == before
    main(["heat", "--out", str(folder)])
    assert "changes" not in capsys.readouterr().err
    main(["heat", "--out", str(folder), "--sft.lr", "1e-3", "--eval.heat-users", "1"])
    said = capsys.readouterr().err
    assert "settings.eval.heat_users was 2, is 1; settings.sft.lr was None, is 0.001" in said
    assert "WARNING: heat builds on files of sft, which would now be others" in said
    assert "config.sft.lr was 0.005, is 0.001" in said and said.count("WARNING") == 2  # eval too


def test_one_command_works_in_a_folder_and_readers_may(finished, tmp_path, capsys):
    folder = shutil.copytree(finished, tmp_path / "out")
    before = (folder / "run.yaml").read_bytes()
    with RunFolder(folder).lock():
        with pytest.raises(SystemExit, match=rf"process {os.getpid()} \(`.*works in this run f"):
            main(["sft", "--out", str(folder), "--seed", "2"])
        main(["label", "--agreement", str(finished / "label" / "labels.jsonl"), "--out",
              str(folder), "--seed", "3"])  # fmt: skip
    assert "96" in capsys.readouterr().out
    assert (folder / "run.yaml").read_bytes() == before


def test_labels_that_name_other_words_are_named(finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "out")
    path = folder / "label" / "labels.jsonl"
    first, *rest = path.read_text().splitlines()
    row = json.loads(first)
    row["words"] = [["elsewhere", 1]]
    path.write_text("\n".join([json.dumps(row), *rest]))
    manifest = json.loads((path.parent / "manifest.json").read_text())
    manifest["outputs"]["labels.jsonl"] = {"nbytes": path.stat().st_size, "sha256": sha256(path)}
    write_json(path.parent / "manifest.json", manifest)
    with pytest.raises(SystemExit, match=r"labels.jsonl: line 1: .*'elsewhere'"):
        main(["map", "--out", str(folder)])


def test_unknown_settings_and_commands_are_named(tmp_path, capsys):
    (tmp_path / "bad.yaml").write_text("ppo: {stepz: 3}")
    with pytest.raises(SystemExit, match=r"ppo: unknown key 'stepz'"):
        main(["run", "--config", str(tmp_path / "bad.yaml"), "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="unknown command 'fly'"):
        main(["fly"])
    with pytest.raises(SystemExit, match="device"):
        main(["data", "--device", "cuda:99", "--out", str(tmp_path)])
