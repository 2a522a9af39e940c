"""LoRA from end to end: the stages, the door and the command, a kill, a folder that is moved."""

import builtins
import json
import runpy
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from reward_server import RewardServer
from safetensors.torch import load_file
from test_door import (  # noqa: F401
    CONFIG,
    PROMPTS,
    door,
    letters,
    model,
    train_through_a_kill,
)
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, AutoTokenizer

import tppo
import tppo_kernels as tk
from tppo.cli import main
from tppo.config import Config, fill_defaults
from tppo.models.adapters import load_adapter, shared_copy
from tppo.models.config import AdapterConfig
from tppo.models.load import load_policy, load_reward_model
from tppo.models.probe import read_probe
from tppo.sessions.prompts import encode_prompt, prompt_text
from tppo.sessions.session import read_sessions
from tppo.store.yaml_file import read_yaml
from tppo_kernels.integrations._reward_model import TokenRewardModel

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
LORA = AdapterConfig(rank=4)
ADAPTED = replace(CONFIG, lr=1e-2, critic_lr=1e-2)
TINY = {
    "sessions": {"train_users": 60, "heldout_users": 8, "test_users": 8, "transfer_users": 4},
    "scratch": {"hidden_size": 32, "intermediate_size": 32, "vocab_size": 400, "heads": 2},
    "sft": {"max_steps": 20, "eval_every": 10},
    "generate": {"samples": 64, "max_new_tokens": 20},
    "lora": {"rank": 4},
    "reward_model": {"epochs": 1, "min_auc": 0.0},
    "ppo": {"steps": 2, "batch_size": 8, "minibatch_size": 8, "eval_every": 2, "min_format": 0.0,
            "max_kl": 100.0, "responses_per_prompt": 2, "without_signal": True,
            "checkpoint_every": 1},
    "eval": {"temperatures": [1.0], "heat_users": 2},
}  # fmt: skip


def stage(name, out, config, *flags):
    main([name, "--out", str(out), "--config", str(config), *flags])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run folder that was moved between PPO and the closing stages, and its settings."""
    root = tmp_path_factory.mktemp("lora")
    config, checkpoints = root / "tiny.json", []
    config.write_text(json.dumps(TINY))
    for name in ("data", "sft", "generate", "label", "map", "train-rm", "merge"):
        stage(name, root / "a", config)
    assert [folder.name for folder in (root / "a/merge").iterdir() if folder.is_dir()] == [
        "reward-model"]  # for a server of it, before there is a policy
    remove = shutil.rmtree

    def keep(path, *args, **kwargs):
        if path.name == "checkpoints":
            checkpoints.append({f.name: f.stat().st_size for f in path.rglob("step-1/*")})
        remove(path, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shutil, "rmtree", keep)
        stage("train", root / "a", config)
    (root / "moved").mkdir()
    shutil.move(root / "a", root / "moved" / "b")
    for name in ("eval", "heat", "merge"):
        stage(name, root / "moved" / "b", config)
    return root / "moved" / "b", config, checkpoints


def test_label_to_the_closing_table_with_adapters(finished):
    out, _, _ = finished
    result = json.loads((out / "result.json").read_text())
    assert {"sft", "sft_continued", "tppo"} <= result.keys() and result["tppo"]["kl"] > 0
    assert '"name": "tppo"' in (out / "heat/tokens.jsonl").read_text()
    for folder in (out / "train/model", out / "train-rm/model"):
        assert not (folder / "model.safetensors").exists()
        settings = json.loads((folder / "adapter_config.json").read_text())
        assert settings["base_model_name_or_path"] == "../../sft/model"
        names = load_file(folder / "adapter_model.safetensors")
        heads = [name for name in names if ".lora_" not in name]
        assert len(names) - len(heads) == 2 * 7 * 2  # layers, linear ones of each, A and B
        assert len(heads) == (2 if "rm" in str(folder) else 0)
    assert "library_name: peft" in (out / "train/model/README.md").read_text()
    critic = load_file(out / "train/critic.safetensors")
    assert sum(".lora_" in name for name in critic) == 28 and len(critic) == 30


def test_a_checkpoint_holds_adapters_and_heads_alone(finished):
    out, _, checkpoints = finished
    whole = (out / "sft/model/model.safetensors").stat().st_size
    sizes = {name: n for found in checkpoints for name, n in found.items()}
    assert {"policy.safetensors", "critic.safetensors", "optimizer.pt"} <= sizes.keys()
    assert max(sizes.values()) < whole
    adapter = (out / "train/model/adapter_model.safetensors").stat().st_size
    assert sizes["policy.safetensors"] < 1.2 * adapter < 0.3 * whole


def test_merged_models_are_plain_and_the_same(finished):
    out, _, _ = finished
    ids = torch.arange(5, 25)[None]
    base = load_policy(out / "sft/model", CPU)
    policy = load_adapter(shared_copy(base), out / "train/model")
    merged = AutoModelForCausalLM.from_pretrained(out / "merge/policy")
    expected = policy(input_ids=ids).logits
    torch.testing.assert_close(merged(input_ids=ids).logits, expected, atol=1e-5, rtol=1e-4)
    assert (expected - base(input_ids=ids).logits).abs().max() > 1e-3
    assert merged.generation_config.eos_token_id == base.generation_config.eos_token_id
    found = AutoModelForTokenClassification.from_pretrained(out / "merge/reward-model")
    wanted = load_reward_model(out / "train-rm/model", CPU)
    torch.testing.assert_close(found(input_ids=ids).logits, wanted(input_ids=ids).logits)
    assert load_policy(out / "train/model", CPU).config.model_type == "llama"
    assert found.config.id2label == {0: "none", 1: "irrelevant", 2: "relevant"}
    one, other = (read_probe(folder) for folder in (out / "merge/reward-model",
                                                    out / "train-rm/model"))  # fmt: skip
    assert one.ids == other.ids
    torch.testing.assert_close(torch.tensor(one.logits), torch.tensor(other.logits), atol=1e-5,
                               rtol=1e-4)  # fmt: skip
    shown = found(input_ids=torch.tensor([one.ids])).logits[0]
    torch.testing.assert_close(shown, torch.tensor(one.logits), atol=1e-5, rtol=1e-4)


def test_a_training_with_adapters_is_paid_by_a_server_of_the_merged_model(finished, tmp_path):
    """The adapter's folder knows its server by what it said of the short text."""
    out, config, _ = finished
    rows = []
    with RewardServer(out / "merge/reward-model") as server:
        for name, flags in (("here", ()), ("served", ("--reward-server.base-url", server.url))):
            shutil.copytree(out, tmp_path / name)
            shutil.rmtree(tmp_path / name / "train")
            stage("train", tmp_path / name, config, *flags)
            lines = (tmp_path / name / "train/metrics.jsonl").read_text().splitlines()
            rows.append([json.loads(line)["objective/scores"] for line in lines])
        assert sum(path == "/pooling" for path, _, _ in server.requests) >= len(rows[1])
    assert rows[1] == pytest.approx(rows[0], abs=2e-5) and len(set(rows[0])) > 1


@pytest.fixture(scope="module")
def cluster_data():
    path = Path(__file__).parents[2] / "examples/integrations/cluster_data.py"
    return runpy.run_path(str(path))["main"]


def test_what_a_cluster_takes_along_is_whole_and_pays_the_same(
        finished, cluster_data, tmp_path, capsys):
    """Prompts, policy, reward model and settings, from a run whose models are adapters."""
    run, _, _ = finished
    out = tmp_path / "cluster"
    cluster_data([str(run), str(out)])
    said = capsys.readouterr().out
    assert "policy, reward-model, settings.yaml, test.jsonl, train.jsonl" in said
    assert "not taken along: ppo.format_cost, 3 for a fault of the form" in said
    tokenizer = AutoTokenizer.from_pretrained(out / "policy")
    own = AutoTokenizer.from_pretrained(run / "sft/model")
    assert own.chat_template is None and own.bos_token_id is not None
    rows, prompts = {}, {}
    for split in ("train", "test"):
        rows[split] = list(map(json.loads, (out / f"{split}.jsonl").read_text().splitlines()))
        sessions = read_sessions(run / f"data/{split}.jsonl")
        prompts[split] = [encode_prompt(own, prompt_text(session)) for session in sessions]
        assert [tokenizer.apply_chat_template(
            row["prompt"], add_generation_prompt=True, return_dict=False)
            for row in rows[split]] == prompts[split]
    ids = torch.tensor([prompts["test"][0]])
    policy = AutoModelForCausalLM.from_pretrained(out / "policy")
    torch.testing.assert_close(policy(input_ids=ids).logits,
                               load_policy(run / "sft/model", CPU)(input_ids=ids).logits)

    settings = read_yaml(out / "settings.yaml")[0]
    paid = settings["reward_model"]
    assert paid == {"mode": "expected", "values": [0.0, -0.5, 0.5], "length_alpha": 2.0}
    assert settings["trainer"]["algorithm"]["kl_loss_coef"] == Config().ppo.kl_coef
    asked, answers = prompts["test"][:2], [[5, 6, 7], list(range(5, 30))]
    lengths = [row["suggested_length"] for row in rows["test"][:2]]
    found = TokenRewardModel(out / "reward-model", mode=paid["mode"], values=paid["values"],
                             alpha=paid["length_alpha"]).rewards(asked, answers, None, lengths)
    classes = load_reward_model(run / "train-rm/model", CPU)
    for rewards, prompt, answer, length in zip(found, asked, answers, lengths, strict=True):
        logits = classes(input_ids=torch.tensor([prompt + answer])).logits[:, len(prompt):]
        expected = tk.token_rewards(
            logits, torch.ones(logits.shape[:2], dtype=torch.bool), mode="expected",
            values=(0.0, -0.5, 0.5), suggested_length=torch.tensor([length]), alpha=2.0).rewards
        assert rewards == pytest.approx(expected[0].tolist(), abs=1e-5)
    assert max(map(abs, found[0])) > 1e-3


def test_a_cluster_takes_along_what_the_runs_flags_say(finished, cluster_data, tmp_path, capsys):
    run, _, _ = finished
    shutil.copytree(run, tmp_path / "run")
    stage("data", tmp_path / "run", finished[1], "--ppo.length-alpha", "None", "--ppo.reward",
          "argmax", "--ppo.format-cost", "0", "--ppo.gamma", "0.9")
    capsys.readouterr()
    cluster_data([str(tmp_path / "run"), str(tmp_path / "cluster")])
    assert "not taken along" not in capsys.readouterr().out
    settings = read_yaml(tmp_path / "cluster/settings.yaml")[0]
    assert settings["reward_model"] == {"mode": "argmax", "values": [0.0, -0.5, 0.5]}
    assert settings["trainer"]["algorithm"]["gamma"] == 0.9
    assert "suggested_length" not in (tmp_path / "cluster/train.jsonl").read_text()
    (tmp_path / "run/map/lengths.json").unlink()
    with pytest.raises(SystemExit, match="has no map/lengths.json, expected a run folder of tppo"):
        cluster_data([str(tmp_path / "run"), str(tmp_path / "cluster")])


def test_adapters_are_settings_of_the_stages_that_train_them(finished, capsys):
    out, config, _ = finished
    shutil.copytree(out / "data", out.parent / "c/data")
    main(["run", "--out", str(out), "--config", str(config)])
    said = capsys.readouterr().err
    assert said.count("finished before, skipped") == 9
    with pytest.raises(SystemExit, match="q_prj.*expected linear layers of LlamaForCausalLM"):
        stage("sft", out.parent / "c", config, "--lora.target-modules", "q_prj")


def test_a_reward_model_of_ones_own_is_written_merged(finished, tmp_path):
    """Its base may be gone when it is read: an adapter would be lost with it."""
    out, config, _ = finished
    shutil.copytree(out, tmp_path / "o")
    own = shutil.copytree(out / "sft/model", tmp_path / "own")
    stage("train-rm", tmp_path / "o", config, "--reward-model.model", str(own))
    shutil.rmtree(own)
    found = load_file(tmp_path / "o/train-rm/model/model.safetensors")
    assert not any(".lora_" in name or "base_layer" in name for name in found)
    before = load_file(out / "sft/model/model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(found[name], before[name])
    assert torch.equal(found["model.norm.weight"], before["model.norm.weight"])


def test_only_adapters_are_merged(finished, tmp_path):
    out, config, _ = finished
    shutil.copytree(out, tmp_path / "o")
    shutil.rmtree(tmp_path / "o/train/model")
    shutil.copytree(out / "merge/policy", tmp_path / "o/train/model")
    with pytest.raises(SystemExit, match="changed|plain model, expected an adapter"):
        stage("merge", tmp_path / "o", config)


@pytest.fixture(scope="module")
def trained(model, tmp_path_factory):  # noqa: F811
    out = tmp_path_factory.mktemp("door")
    trainer = door(model, out, lora=LORA, config=ADAPTED)
    trainer.train()
    return trainer, out


def test_the_door_saves_an_adapter_or_the_merged_model(model, trained, tmp_path):  # noqa: F811
    trainer, out = trained
    trainer.save(tmp_path / "adapter")
    trainer.save(tmp_path / "merged", merge=True)
    settings = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(model) and settings["r"] == 4
    assert settings["lora_alpha"] == 8
    ids = torch.arange(5, 15)[None]
    expected = trainer.model(input_ids=ids).logits
    for folder in (tmp_path / "adapter", tmp_path / "merged", out / "train/model"):
        found = load_policy(folder, CPU)(input_ids=ids).logits
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    again = door(tmp_path / "adapter", tmp_path / "again")  # an adapter in place of a model
    torch.testing.assert_close(again.model(input_ids=ids).logits, expected, atol=1e-5, rtol=1e-4)


def test_a_killed_training_ends_at_the_same_bits(model, trained, tmp_path, monkeypatch):  # noqa: F811
    """`tppo train --reward --lora.rank`, killed in step 4 and run again, ends where the script
    did.
    """
    train_through_a_kill(tmp_path, monkeypatch, "my_lora_reward", model, ADAPTED,
                         "--lora.rank", "4")  # fmt: skip
    one, other = (load_file(folder / "train/model/adapter_model.safetensors")
                  for folder in (tmp_path / "o", trained[1]))  # fmt: skip
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) and tensor.any() for name, tensor in one.items())


def test_adapters_learn(model, tmp_path):  # noqa: F811
    """The share of the letter rises, though every weight of the model is frozen."""
    config = replace(ADAPTED, steps=24, batch_size=4, responses_per_prompt=8, minibatch_size=16,
                     kl_coef=0.0, max_passes=99.0, checkpoint_every=99)  # fmt: skip
    trainer = door(model, tmp_path, lora=LORA, config=config)
    asked = PROMPTS * 16
    counts = []
    for _ in range(2):
        counts.append(sum(letters(trainer.answer(asked), ["e"] * len(asked))) / len(asked))
        if len(counts) == 1:
            trainer.train()
    assert counts[1] > counts[0] + 0.3, counts


def test_without_peft_it_is_said_before_anything_is_loaded(model, tmp_path, monkeypatch):  # noqa: F811
    own = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] == "peft":
            raise ImportError(name)
        return own(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    message = r"LoRA needs the package peft, .* pip install 'tppo-kernels\[lora\]'"
    with pytest.raises(ImportError, match=message):
        door(model, tmp_path, lora=LORA)
    with pytest.raises(SystemExit, match=message):
        main(["run", "--out", str(tmp_path / "o"), "--lora.rank", "4"])
    assert not (tmp_path / "o").exists()


def test_adapters_start_from_larger_learning_rates():
    plain = fill_defaults(Config(), pretrained=True)
    lora = fill_defaults(Config(lora=LORA), pretrained=True)
    for section in ("sft", "reward_model", "ppo"):
        rates = [getattr(config, section).lr for config in (plain, lora)]
        assert rates[1] == pytest.approx(10 * rates[0])
    assert fill_defaults(Config(lora=LORA, ppo=tppo.PPOConfig(lr=1e-6)), True).ppo.lr == 1e-6


@pytest.mark.parametrize(("targets", "message"), [
    ((), "'target_modules': was .*, expected at least 1 values"),
    (("all-linear", "q_proj"), "target_modules was .*, expected names of layers, or 'all-linear'"),
])  # fmt: skip
def test_target_modules_are_names_or_all(targets, message):
    with pytest.raises(ValueError, match=message):
        AdapterConfig(rank=4, target_modules=targets)


def test_an_adapter_answers_in_its_run_and_its_merged_policy_alone(finished, tmp_path):
    out, _, _ = finished
    (found,) = tppo.load(out).answers(["red shoes"], temperature=0.0)[0]
    assert found.reward is not None and {token.category for token in found.tokens} <= {0, 1, 2}
    shutil.copytree(out / "merge/policy", tmp_path / "alone")
    (alone,) = tppo.load(tmp_path / "alone").answers(["red shoes"], temperature=0.0)[0]
    assert alone.text == found.text and alone.reward is None
    assert alone.logprob == pytest.approx(found.logprob, abs=1e-3)
