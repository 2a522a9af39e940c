"""Whatever samples in a run takes --rollout vllm: the same answers where nothing is left to chance,
the engine in what a stage stands on, and a stage that was stopped goes on."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from _vllm import adapted, engines, prompts, run_by_transformers, tiny

import tppo
from tppo.cli import main
from tppo.methods.best_of_n import best_of_n
from tppo.models.adapters import shared_copy
from tppo.models.config import Sampler
from tppo.models.rollout import Sampling, build
from tppo.models.rollout.engine import _OPEN, VLLMEngine
from tppo.rewards import Questions, TokenReward
from tppo.store import checkpoint

ROOT = Path(__file__).resolve().parents[2]
COLD = 1e-4  # a temperature that leaves nothing to chance but ties
SETTINGS = {
    "sessions": {"train_users": 40, "heldout_users": 8, "test_users": 8, "transfer_users": 4},
    "scratch": {"hidden_size": 64, "intermediate_size": 64, "vocab_size": 300, "heads": 2},
    "sft": {"max_steps": 80, "eval_every": 40, "lr": 0.01},
    "generate": {"samples": 40, "max_new_tokens": 8, "batch_size": 4},
    "reward_model": {"epochs": 1},
    "ppo": {"steps": 2, "batch_size": 8, "minibatch_size": 8, "checkpoint_every": 100,
            "eval_every": 2, "min_format": 0.0, "max_kl": 100.0, "without_signal": True},
    "eval": {"temperatures": [COLD], "continued": False},
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    yield from run_by_transformers(tmp_path_factory.mktemp("run"), SETTINGS)


def repeated(finished, to, stage, *flags):
    """A stage anew in a copy of the run; the stage's folder."""
    shutil.copytree(finished, to)
    shutil.rmtree(to / stage, ignore_errors=True)
    main([stage, "--out", str(to), *flags])
    return to / stage


def answers(folder):
    return [json.loads(line)["response_ids"]
            for line in (folder / "answers.jsonl").read_text().splitlines()]  # fmt: skip


def settings_of(folder):
    return json.loads((folder / "manifest.json").read_text())["config"]


def test_generate_gives_the_same_greedy_answers_and_says_who_gave_them(finished, tmp_path):
    cold = ["--generate.temperature", str(COLD)]
    one = repeated(finished, tmp_path / "hf", "generate", *cold)
    other = repeated(finished, tmp_path / "vllm", "generate", *cold, "--rollout", "vllm")
    assert answers(one) == answers(other)
    assert len({tuple(ids) for ids in answers(one)}) > 4
    assert settings_of(other)["rollout"] == "vllm" and "rollout" not in settings_of(one)


def test_another_engine_makes_a_stage_stale(finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "out")
    main(["label", "--out", str(tmp_path / "out"), "--rollout", "vllm"])
    said = capsys.readouterr().err
    assert "label builds on files of generate, which would now be others" in said
    assert "rollout" in said


def test_eval_gives_the_same_figures_of_greedy_answers(finished, tmp_path):
    found, name, before = {}, f"sft_t{COLD:g}", {*_OPEN}
    for rollout in ("hf", "vllm"):
        folder = repeated(finished, tmp_path / rollout, "eval", "--rollout", rollout)
        found[rollout] = json.loads((folder / "result.json").read_text())
    ours, theirs = (found[rollout][name] for rollout in ("hf", "vllm"))
    assert ours.pop("kl") == pytest.approx(theirs.pop("kl"), abs=1e-6)
    assert ours == theirs and len(ours["example"]) > 2
    assert found["vllm"]["tppo"]["length"] > 0  # sampled at 1: other draws
    assert len({*_OPEN} - before) <= 1  # SFT and TPPO took turns in one engine


def test_training_evaluates_and_answers_by_it(finished, tmp_path, capsys):
    folder = repeated(finished, tmp_path / "out", "train", "--rollout", "vllm")
    assert settings_of(folder)["rollout"] == "vllm"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert all(row["rollout/logprob_drift_max"] < 1e-3 for row in rows)
    said = {}
    for rollout in ("hf", "vllm"):
        capsys.readouterr()
        main(["answer", "red shoes", "click: trail shoes", "--out", str(tmp_path / "out"),
              "--temperature", "0", "--rollout", rollout])  # fmt: skip
        said[rollout] = capsys.readouterr().out
    assert said["hf"] == said["vllm"] != ""


def test_the_best_of_several_is_the_same_where_all_are_greedy(finished):
    model = tppo.load(finished)
    questions = Questions([[5, 6, 7], [9, 8]], ["a", "b"])

    def paid(batch, given):
        rewards = batch.mask.float() * batch.targets
        return TokenReward(rewards, None)

    found = []
    for rollout in ("hf", "vllm"):
        engine = build(model.model, Sampler(rollout), pad_id=0, eos_id=model.eos_ids)
        found.append(best_of_n(engine, paid, questions, 2, Sampling(6, 0.0), pad_id=0,
                               tokenizer=model.tokenizer, eos_ids=model.eos_ids))  # fmt: skip
    assert found[0].answers.response_ids == found[1].answers.response_ids
    assert found[0].totals == found[1].totals


def test_a_stage_that_was_stopped_goes_on_behind_the_batch_where_it_was(
    finished, tmp_path, monkeypatch, capsys
):
    """16 answers at a time are kept: the third part fails, and is all that is asked for again."""
    whole = repeated(finished, tmp_path / "whole", "generate", "--rollout", "vllm")
    asked, ask = [], VLLMEngine.ask

    def counted(self, prompts, wanted):
        asked.append(len(prompts))
        if sum(asked) > 34 and 40 not in asked:
            asked.append(40)
            raise OSError("no more")
        return ask(self, prompts, wanted)

    monkeypatch.setattr(VLLMEngine, "ask", counted)
    monkeypatch.setattr(checkpoint, "EVERY_S", 0.0)
    monkeypatch.setattr(checkpoint, "WRITING", float("inf"))
    with pytest.raises(SystemExit, match="no more"):
        repeated(finished, tmp_path / "out", "generate", "--rollout", "vllm")
    assert not (tmp_path / "out" / "generate").exists()
    asked.clear()
    asked.append(40)
    main(["generate", "--out", str(tmp_path / "out")])
    assert "generate: resumes after batch 2 of 3" in capsys.readouterr().err
    assert asked == [40, 1, 8]  # one answer to check the weights, and those that were left
    assert answers(tmp_path / "out" / "generate") == answers(whole)


def test_who_does_not_ask_for_it_loads_nothing_of_it(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "generate")
    code = ("import sys, tppo\nfrom tppo.cli import main\n"
            "main(['generate', '--out', sys.argv[1]])\n"
            "main(['answer', 'shoes', '--out', sys.argv[1]])\n"
            "assert not [name for name in sys.modules if name.split('.')[0] == 'vllm']\n")
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "out")], capture_output=True,
                          text=True, env={**os.environ, "VLLM_LOGGING_LEVEL": "ERROR"})  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert torch.get_num_threads() >= 1


def test_models_that_are_alike_take_turns_in_one_engine():
    """Each is answered for by its own weights, whoever was in the engine before."""
    asked, cold = prompts(3), Sampling(6, 0.0)
    first, second = (engines(tiny(seed=seed)) for seed in (21, 22))
    base = tiny(seed=23)
    adapted_ones = [engines(adapted(shared_copy(base), seed=seed)) for seed in (24, 25)]
    other = engines(adapted(tiny(seed=26), seed=24))
    used = []
    for hf, vllm in (first, second, first, *adapted_ones, other, adapted_ones[0]):
        found = vllm.generate(asked, cold).response_ids
        assert found == hf.generate(asked, cold).response_ids
        used.append(vllm.engine)
        assert vllm.drift < 1e-4
    assert used[0] is used[1] is used[2]
    assert used[3] is used[4] is used[6] is not used[0]
    assert used[5] is not used[3]  # another base, which no adapter can stand in for
    before = used[0]
    first[1].generate([[*asked[0], *asked[1], *asked[2]]], cold)
    assert first[1].engine is before  # started with reserve
    for _, vllm in (first, *adapted_ones, other):
        vllm.close()
