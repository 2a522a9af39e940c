"""A stranger's reward, advantage, judge and stage: defined here, run without patching anything."""

import json
import sys
from dataclasses import replace

import pytest
import torch
from test_door import CONFIG, PROMPTS, SHORT, model  # noqa: F401  # a fixture

import tppo
from tppo.cli import main
from tppo.config import Config
from tppo.sessions.config import SessionsConfig
from tppo.stages.artifacts import TRAIN_SESSIONS
from tppo.stages.registry import REGISTRY
from tppo.stages.run import Run


class EveryToken:
    """A reward: a token whose text has the letter e pays 1, every other one costs .1."""

    def __call__(self, batch: object, answers: tppo.Answers) -> tppo.TokenReward:
        rewards = torch.zeros(batch.mask.shape)  # [B, T]
        for b, (text, spans) in enumerate(zip(answers.texts, answers.offsets, strict=True)):
            for t, (start, end) in enumerate(spans):
                rewards[b, t] = 1.0 if "e" in text[start:end] else -0.1
        return tppo.TokenReward(rewards)


class OverTheMean:
    """An advantage without a critic: rewards still to come, less their mean over all answers."""

    needs_critic = False

    def __init__(self):
        self.seen = []

    def __call__(self, rewards, values, masks, old, ref, groups, bootstrap=None):
        self.seen.append((values, bootstrap, list(groups)))
        to_go = rewards.flip(1).cumsum(1).flip(1)  # [B, T]
        mean = to_go[masks.policy].mean()
        return tppo.TokenAdvantages(torch.where(masks.policy, to_go - mean, 0.0))


class Brevity:
    """A judge that likes short answers."""

    name = "brevity"

    def __call__(self, answers: tppo.Answers) -> dict[str, list[float]]:
        return {"shortness": [-float(len(text)) for text in answers.texts],
                "letters": [float(text.count("e")) for text in answers.texts]}  # fmt: skip


def test_a_reward_an_advantage_and_a_judge_from_outside(model, tmp_path, capfd):  # noqa: F811
    advantage = OverTheMean()
    trainer = tppo.PPOTrainer(
        model, reward=EveryToken(), advantage=advantage, judge=Brevity(), prompts=PROMPTS,
        heldout=PROMPTS, config=CONFIG, generate=SHORT, out=tmp_path,
    )  # fmt: skip
    report = trainer.train()
    first, *_, last = (row["objective/scores"] for row in trainer.metrics)
    assert last > first
    assert advantage.seen == [(None, None, [0, 0, 1, 1, 2, 2, 3, 3])] * 4
    assert not (tmp_path / "train/critic.safetensors").exists()
    looks = {row["step"]: row for row in trainer.metrics if "heldout/shortness" in row}
    assert set(looks) == {2, 4}
    assert report["kept_step"] == max(looks, key=lambda step: looks[step]["heldout/shortness"])
    said = capfd.readouterr().err
    assert "held-out shortness" in said and "(by brevity)" in said
    assert "EveryToken" in report["reward"]


USERS = tppo.Artifact("users/users.json", "the users of the training sessions")
FILE = """
import tppo
from tppo.stages.registry import TRAIN_SESSIONS

def sizes(run):
    with run.stage("sizes") as out:
        (out / "n.txt").write_text(str(len(run.sessions("train"))))

SIZES = tppo.Stage("sizes", sizes, "sessions", inputs=(TRAIN_SESSIONS,),
                   outputs=(tppo.Artifact("sizes/n.txt", "how many sessions there are"),))
"""


@pytest.fixture
def registry():
    """What a test registers is gone after it."""
    kept = dict(REGISTRY)
    yield
    REGISTRY.clear()
    REGISTRY.update(kept)


def list_users(run):
    with run.stage("users") as out:
        users = sorted({session.user for session in run.sessions("train")})
        (out / USERS.name).write_text(json.dumps(users))


def test_a_stage_from_outside(tmp_path, monkeypatch, registry):
    """In a script through `Run`, and by `tppo module:STAGE` from a module of one's own."""
    sessions = SessionsConfig(train_users=5, heldout_users=2, test_users=2, transfer_users=2)
    run = Run(tmp_path / "out", Config(sessions=sessions))
    tppo.register(tppo.Stage("users", list_users, "who is trained on", (TRAIN_SESSIONS,), (USERS,)))
    run.perform("data")
    run.perform("users")
    assert run.done("users") and len(json.loads(run.path(USERS).read_text())) == 5
    run = Run(run.out, Config(sessions=replace(sessions, train_users=6)))
    run.perform("data")
    assert not run.done("users")  # what it reads is another

    (tmp_path / "strangers_stage.py").write_text(FILE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(sys.path))  # the working directory is added to it
    main(["strangers_stage:SIZES", "--out", "out", "--sessions.train-users", "6"])
    assert (tmp_path / "out/sizes/n.txt").read_text() == "6"
