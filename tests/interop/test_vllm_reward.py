"""The token reward model that `train-rm` exports, served by vLLM as it stands."""

import json
import shutil
import threading

import pytest
import torch
from _vllm_server import VLLMServer

import tppo
from tppo.cli import main
from tppo.models.batch import Batch
from tppo.models.load import load_reward_model
from tppo.models.own_tokens import load_own_tokenizer
from tppo.models.policy import RewardModel
from tppo.models.probe import write_probe
from tppo.rewards import Answers
from tppo.rewards.server import RewardServerError

TINY = {
    "sessions": {"train_users": 80, "heldout_users": 8, "test_users": 8, "transfer_users": 0},
    "scratch": {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 400, "heads": 2},
    "sft": {"max_steps": 60, "eval_every": 30},
    "generate": {"samples": 200, "max_new_tokens": 24},
    "reward_model": {"epochs": 2, "min_auc": 0.0},
    "ppo": {"steps": 5, "batch_size": 16, "minibatch_size": 8, "eval_every": 5,
            "responses_per_prompt": 2, "min_format": 0.0, "max_kl": 100.0, "without_signal": True},
}
POOLING = ("--runner", "pooling", "--pooler-config", json.dumps({"task": "token_classify"}),
           "--max-model-len", "384", "--max-num-seqs", "32")  # fmt: skip


def made(root, *flags):
    config, out = root / "tiny.json", root / "run"
    config.write_text(json.dumps(TINY))
    for stage in ("data", "sft", "generate", "label", "map", "train-rm"):
        main([stage, "--out", str(out), "--config", str(config), *flags])
    return out


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run up to its reward model."""
    return made(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def server(run, tmp_path_factory):
    log = tmp_path_factory.mktemp("server") / "log"
    with VLLMServer(run / "train-rm/model", log, *POOLING) as found:
        yield found


def generated(run, n=200):
    """The answers of a run, as a batch and as a reward sees them."""
    lines = (run / "generate/answers.jsonl").read_text().splitlines()
    rows = sorted(map(json.loads, lines), key=lambda row: row["session"])[:n]
    prompts = [row["prompt_ids"] for row in rows]
    responses = [row["response_ids"] for row in rows]
    columns = {"suggested_length": [float(5 + i % 9) for i in range(len(rows))]}
    tokenizer = load_own_tokenizer(run / "train-rm/model")
    eos = [tokenizer.eos_token_id]
    return Batch(prompts, responses, tokenizer.pad_token_id), Answers(
        prompts, responses, columns, tokenizer, eos, list(range(len(rows))))


def assert_alike(folder, url, run, **options):
    """The rewards of 200 answers here and there, at every token within 1e-5."""
    batch, given = generated(run)
    assert len(given.response_ids) == 200
    model = RewardModel(load_reward_model(folder, torch.device("cpu")))
    expected = tppo.TokenModelReward(model, **options)(batch, given)
    paid = tppo.ServedReward(url, folder, **options)(batch, given)
    error = (paid.rewards - expected.rewards).abs().max().item()
    spread = expected.rewards[batch.mask].std().item()
    print(f"served against local, {options}: {error:.1e} at most over {int(batch.mask.sum())} "
          f"tokens of 200 answers; rewards spread {spread:.3f}")
    assert error < 1e-5 < 1e-2 < spread
    assert (paid.category == expected.category)[batch.mask].all()


@pytest.mark.parametrize("options", [{}, {"mode": "argmax", "length_alpha": None}])
def test_rewards_of_200_answers_are_the_local_ones(run, server, options):
    assert_alike(run / "train-rm/model", server.url, run, **options)


def test_what_vllm_shows_of_the_export(run, server):
    """Its architecture, its classes and its tokenizer are read as they stand."""
    config = json.loads((run / "train-rm/model/config.json").read_text())
    assert config["architectures"] == ["LlamaForTokenClassification"]
    assert list(config["id2label"].values()) == ["none", "irrelevant", "relevant"]
    text = "search: red shoes\nnext 2:\n"
    own = load_own_tokenizer(run / "train-rm/model").encode(text, add_special_tokens=False)
    assert server.post("/tokenize", {"prompt": text, "add_special_tokens": False})["tokens"] == own


def test_another_reward_model_than_that_of_the_server_is_refused(run, server, tmp_path):
    other = shutil.copytree(run / "train-rm/model", tmp_path / "other")
    model = load_reward_model(other, torch.device("cpu"))
    with torch.no_grad():
        model.score.weight[1:] = model.score.weight[[2, 1]]  # what is wanted, the other way round
    write_probe(model, load_own_tokenizer(other), other)
    with pytest.raises(RewardServerError, match="not the reward model of .* other weights"):
        tppo.ServedReward(server.url, other)


def scores(out):
    rows = [json.loads(line) for line in (out / "train/metrics.jsonl").read_text().splitlines()]
    names = ("objective/scores", "objective/kl", "loss/policy_avg", "loss/value_avg")
    return [[row[name] for name in names] for row in rows]


def test_a_server_killed_in_a_training_and_started_again_costs_nothing(
    run, tmp_path, monkeypatch, capfd
):
    here, there = (shutil.copytree(run, tmp_path / name) for name in ("here", "there"))
    config = run.parent / "tiny.json"
    main(["train", "--out", str(here), "--config", str(config)])
    log, calls, later = tmp_path / "log", [], []
    server = VLLMServer(run / "train-rm/model", log, *POOLING)
    forward = tppo.ServedReward.forward

    def killing(self, batch, answers):
        calls.append(len(calls))
        if len(calls) == 3:  # the server dies while the third step samples, and is started again
            server.kill()

            def again():
                later.append(VLLMServer(run / "train-rm/model", log, *POOLING, port=server.port))

            threading.Thread(target=again).start()
        return forward(self, batch, answers)

    monkeypatch.setattr(tppo.ServedReward, "forward", killing)
    try:
        main(["train", "--out", str(there), "--config", str(config),
              "--reward-server.base-url", server.url])  # fmt: skip
    finally:
        server.kill()
        for one in later:
            one.kill()
    assert later and len(calls) >= TINY["ppo"]["steps"]
    told = capfd.readouterr()
    assert "tried again" in told.out + told.err and "answers again" in told.out + told.err
    expected, found = scores(here), scores(there)
    assert len(found) == len(expected) == TINY["ppo"]["steps"]
    worst = max(abs(a - b) for one, other in zip(found, expected, strict=True)
                for a, b in zip(one, other, strict=True))  # fmt: skip
    print(f"metrics of {len(found)} steps, killed against undisturbed: {worst:.1e} at most apart")
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, rel=2e-3, abs=2e-4)
    assert len({row[0] for row in expected}) == len(expected)


def test_a_reward_model_of_adapters_is_served_merged(tmp_path):
    out = made(tmp_path, "--lora.rank", "4")
    main(["merge", "--out", str(out), "--config", str(tmp_path / "tiny.json"),
          "--lora.rank", "4"])  # fmt: skip
    merged = out / "merge/reward-model"
    with VLLMServer(merged, tmp_path / "log", *POOLING) as server:
        assert_alike(merged, server.url, out)
        tppo.ServedReward(server.url, out / "train-rm/model")  # the adapter's folder knows it too
