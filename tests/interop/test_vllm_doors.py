"""The other doors to vLLM's answers: PPO by SER's reward models, with a guide and as a server."""

import json
import threading
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
from _vllm import run_by_transformers

import tppo
from tppo.cli import main
from tppo.models.rollout.engine import _OPEN, VLLMEngine
from tppo.stages.answering.serve import Server

TINY = {
    "sessions": {"train_users": 120, "heldout_users": 8, "test_users": 8, "transfer_users": 1},
    "scratch": {"hidden_size": 64, "intermediate_size": 64, "vocab_size": 400, "heads": 2,
                "layers": 1},
    "sft": {"max_steps": 80, "eval_every": 80},
    "generate": {"samples": 240, "max_new_tokens": 16},
    "reward_model": {"epochs": 2, "lr": 0.01},
    "ppo": {"steps": 2, "batch_size": 8, "minibatch_size": 8, "without_signal": True,
            "max_kl": 1e3, "min_format": 0.0, "eval_every": 2},
    "ser": {"rounds": 1, "seed_share": 0.3, "tau_token": 0.6},
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    yield from run_by_transformers(tmp_path_factory.mktemp("run"), TINY)


@pytest.fixture
def asked(monkeypatch):
    """How many answers each request to an engine was for."""
    found, ask = [], VLLMEngine.ask
    monkeypatch.setattr(VLLMEngine, "ask", lambda self, prompts, wanted: found.append(
        len(prompts)) or ask(self, prompts, wanted))  # fmt: skip
    return found


def trained(out, stage, *flags):
    """The metrics of a stage that PPO has written with vLLM's answers."""
    main([stage, "--out", str(out), "--rollout", "vllm", *flags])
    lines = (out / stage / "metrics.jsonl").read_text().splitlines()
    assert json.loads((out / stage / "manifest.json").read_text())["config"]["rollout"] == "vllm"
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("labels", ["pairs", "words"])
def test_ser_train_samples_by_the_engine(finished, asked, labels):
    """With the reward model of whole answers, and with that of tokens."""
    kind = ["--ser.labels", labels]
    main(["ser", "--out", str(finished), *kind])
    assert not asked  # SER labels the answers there are
    rows = trained(finished, "ser-train", *kind)
    assert len(rows) == 2 and asked.count(8) >= 2  # a batch of each step
    assert all(0 < row["rollout/logprob_drift_max"] < 1e-4 for row in rows)
    assert rows[0]["policy/updates"] > 0 and rows[0]["objective/scores"] != 0
    report = json.loads((finished / "ser-train/report.json").read_text())
    assert report["labels"] == labels


def test_a_guide_and_its_learner_take_turns_in_one_engine(finished, asked):
    before = {*_OPEN}
    rows = trained(finished, "train", "--algorithm", "ppo++")
    assert len(rows) == 2 and len({*_OPEN} - before) <= 1
    assert all(0 < row["rollout/logprob_drift_max"] < 1e-4 for row in rows)


def test_a_server_of_answers_gives_the_engine_its_weights_once(finished, monkeypatch):
    """Requests that come at once, to a model that nobody trains, in another thread than main."""
    history, given, hand_over = "red shoes\nclick: trail shoes", [], VLLMEngine.hand_over
    monkeypatch.setattr(VLLMEngine, "hand_over",
                        lambda self, model: given.append(self) or hand_over(self, model))
    (expected,) = tppo.load(finished).answers([history], temperature=0)
    body = json.dumps({"model": "mine", "temperature": 0, "seed": 0,
                       "messages": [{"role": "user", "content": history}]}).encode()

    def post(_):
        url = f"http://127.0.0.1:{server.port}/v1/chat/completions"
        request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=600) as reply:
            return json.loads(reply.read())["choices"][0]["message"]["content"]

    with Server(tppo.load(finished, rollout="vllm"), 0, "mine") as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        with ThreadPoolExecutor(3) as clients:
            said = list(clients.map(post, range(3)))
        server.shutdown()
        thread.join()
    assert said == [expected[0].text] * 3 and expected[0].text
    assert len(given) <= 1  # none where the engine was started for it
