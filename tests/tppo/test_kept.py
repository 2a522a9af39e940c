"""Work goes on from a checkpoint of its own to the same bits, or says in one sentence why not.

A checkpoint that is changed here gets the sizes and hashes of what it then holds: it is whole, and
what it holds is of another version of tppo, of other work, or of somebody with bad intentions.
"""

import functools
import io
import json
import pickle
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from _matrix import third
from safetensors.torch import load_file, save_file
from test_door import CONFIG, assert_same, door, model  # noqa: F401  # a fixture
from test_memory import refuse
from test_reward_model import answers
from test_sentence_model import new_reader, paired
from test_shared_prefix import PAD, models
from transformers import LlamaConfig, LlamaForTokenClassification

from tppo.errors import DataError
from tppo.methods.config import RewardModelConfig, SFTConfig
from tppo.methods.reward_model import PolicyTokens, train_reward_model
from tppo.methods.sentence_model import train_sentence_model
from tppo.methods.sft import Examples, continue_sft, train_sft
from tppo.models.rollout import Sampling
from tppo.models.rollout.hf import HFRollout
from tppo.stages.ser import run_rounds
from tppo.store import checkpoint
from tppo.store.checkpoint import COMPLETE, Checkpoints, load_latest, save_checkpoint
from tppo.store.hashes import sha256
from tppo.store.jsonl import SUM, read_json, summed, write_json

pytestmark = pytest.mark.usefixtures("one_thread")
REMEDY = "go on with the version that wrote it, begin anew in another folder, or delete "


def resealed(step, **changes):
    """COMPLETE.json says of what is there that it is whole."""
    files = {f.name: {"nbytes": f.stat().st_size, "sha256": sha256(f)}
             for f in step.iterdir() if f.name != COMPLETE}  # fmt: skip
    found = read_json(step / COMPLETE) | {"files": files} | changes
    (step / COMPLETE).write_text(summed({k: v for k, v in found.items() if k != SUM}))


GONE = object()


def stated(step, **changes):
    """Entries of state.json become others, or are gone."""
    state = read_json(step / "state.json") | changes
    write_json(step / "state.json", {k: v for k, v in state.items() if v is not GONE})


def rows(step, name, change):
    file = step / f"{name}.jsonl"
    found = [change(json.loads(line)) for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps(row) + "\n" for row in found if row is not None))


def weights(step, name, change):
    file = step / f"{name}.safetensors"
    found = load_file(file)
    change(found)
    save_file(found, file)


def optimizer(step, change):
    found = torch.load(step / "optimizer.pt", weights_only=True)
    change(found)
    torch.save(found, step / "optimizer.pt")


class Payload:
    """Pickled, it is a call."""

    def __reduce__(self):
        return print, ("the payload has run",)


def payload(step):
    (step / "optimizer.pt").write_bytes(pickle.dumps(Payload(), 2))


def zipped_payload(step):
    stream = io.BytesIO()
    torch.save({"state": Payload()}, stream)
    (step / "optimizer.pt").write_bytes(stream.getvalue())


def first_of(found):
    return min(found)


def huge(found):
    """A megabyte on the disk that stands for a terabyte in memory."""
    found["state"][0]["exp_avg"] = torch.zeros(1).expand(1 << 20, 1 << 18)


# What is done to a checkpoint of PPO, and a part of the sentence.
REFUSED = {
    "lacks a field": (lambda s: stated(s, processes=GONE), r"the state lacks \['processes'\]"),
    "has a field more": (lambda s: stated(s, later=1),
                         r"the state has, unknown here, \['later'\]"),
    "another type": (lambda s: stated(s, part_sizes=["8"]),
                     r"'part_sizes'\]\[0\] is '8', expected int"),
    "another reward": (lambda s: stated(s, part_sizes=[8, 8, 8]), "part_sizes is 3, expected "),
    "lacks a part of a field": (lambda s: stated(s, schedules={"coef": 1}),
                                r"'schedules'\] lacks \['kl_coef'\] and it has, unknown here, "),
    "no object": (lambda s: (s / "state.json").write_text("[]"), "it holds what tppo never writes"),
    "too deep": (lambda s: (s / "state.json").write_text("[" * 100_000), "never writes"),
    "rows of another version": (
        lambda s: rows(s, "metrics", lambda r: {k: v for k, v in r.items() if k != "num_tokens"}),
        "row 1 of metrics.jsonl lacks one of "),
    "a row less": (lambda s: rows(s, "metrics", lambda r: r if r["step"] > 1 else None),
                   r"rows is \[2\], expected \[1, 2\]"),
    "no rows": (lambda s: (s / "metrics.jsonl").write_text("{"), "metrics.jsonl: "),
    "no policy": (lambda s: (s / "policy.safetensors").unlink(), "it lacks the tensors 'policy'"),
    "a weight less": (lambda s: weights(s, "policy", lambda w: w.pop(first_of(w))),
                      r"the tensors 'policy' lacks \['lm_head"),
    "another shape": (
        lambda s: weights(s, "critic", lambda w: w.update({first_of(w): torch.zeros(3)})),
        r"of 'critic' is \(\(3,\), 'torch.float32'\), expected "),
    "another type of weights": (
        lambda s: weights(s, "policy", lambda w: w.update(
            {k: x.bfloat16() for k, x in w.items()})),
        "'torch.bfloat16'"),
    "no weights": (lambda s: (s / "policy.safetensors").write_text("{}"), "never writes"),
    "best weights that are gone": (lambda s: stated(s, best_step=2, best_score=1.0),
                                   "it lacks the tensors 'best_policy'"),
    "an optimiser of another": (lambda s: optimizer(s, lambda o: o["param_groups"].pop()),
                                "is not that of this model's parameters"),
    "moments of another": (
        lambda s: optimizer(s, lambda o: o["state"][0].update(exp_avg=torch.zeros(2))),
        "state of parameter 0 has other entries"),
    "a terabyte": (lambda s: optimizer(s, lambda o: huge(o)), "parameter 0 has other entries"),
    "a payload": (payload, "it holds what tppo never writes"),
    "a zipped payload": (zipped_payload, "it holds what tppo never writes"),
    "of an earlier version": (lambda s: None, "or by a version that did not say for which"),
}  # fmt: skip


@pytest.fixture(scope="module")
def stopped(model, tmp_path_factory):  # noqa: F811
    """A training that was stopped after step 2, and the same one that was not."""
    folder = tmp_path_factory.mktemp("stopped")
    whole = door(model, folder / "whole")
    whole.train()
    trainer = door(model, folder / "out")
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
    return folder / "out", whole


def stop_after(patch, last):
    from tppo.stages.loop import Loop

    real = Loop.step

    def step(self, number):
        if number > last:
            raise KeyboardInterrupt
        return real(self, number)

    patch.setattr(Loop, "step", step)


@pytest.fixture
def left(stopped, tmp_path):
    shutil.copytree(stopped[0], tmp_path / "out")
    return tmp_path / "out"


def step_of(folder, number=2):
    return folder / f"train.tmp/checkpoints/step-{number}"


def test_ppo_says_why_it_cannot_go_on(model, left, capsys):  # noqa: F811
    """All of it in one folder: a trainer that is refused has changed nothing there."""
    trainer, aside = door(model, left), left / "aside"
    shutil.move(step_of(left), aside)
    for name, (change, why) in third(REFUSED.items(), seed=3):
        shutil.copytree(aside, step_of(left))
        change(step_of(left))
        mark = {"of": None} if name == "of an earlier version" else {}
        resealed(step_of(left), **mark)
        with pytest.raises(DataError, match=why) as caught:
            trainer.train()
        said = str(caught.value)
        assert said.startswith(f"{step_of(left)}: this checkpoint cannot be gone on from: "), name
        assert said.endswith(f"{REMEDY}{step_of(left).parent} and begin anew here"), name
        assert "the payload has run" not in capsys.readouterr().out
        shutil.rmtree(step_of(left))


def test_one_that_is_named_as_of_another_step_is_no_whole_one(model, left, stopped, capsys):  # noqa: F811
    """Weights after step 2 that go on as if after step 3 would be another training."""
    step_of(left).rename(step_of(left, 3))
    trainer = door(model, left)
    trainer.train()
    assert "step-3: passed over, COMPLETE.json says that it is of step 2" in capsys.readouterr().err
    assert_same(trainer.model.state_dict(), stopped[1].model.state_dict())


def test_one_of_another_training_is_refused_and_goes_on_where_it_belongs(
    model, left, stopped, tmp_path, monkeypatch  # noqa: F811
):  # fmt: skip
    other = door(model, tmp_path / "other", config=replace(CONFIG, lr=1e-3))
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        with pytest.raises(KeyboardInterrupt):
            other.train()
    kept = step_of(tmp_path / "other").parent
    kept.mkdir(exist_ok=True)
    shutil.copytree(step_of(left), kept / "step-2")
    with pytest.raises(DataError, match="it is not of this work: it was written for other data"):
        door(model, tmp_path / "other", config=replace(CONFIG, lr=1e-3)).train()
    shutil.move(left, tmp_path / "moved")  # a run folder may lie elsewhere
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "moved").rename(tmp_path / "checkpoints/out")
    trainer = door(model, tmp_path / "checkpoints/out")
    trainer.train()
    assert_same(trainer.model.state_dict(), stopped[1].model.state_dict())


def test_another_version_is_told(left, capsys):
    found = read_json(step_of(left) / COMPLETE)["versions"]
    resealed(step_of(left), versions=found | {"torch": "1.0", "CPU threads": "7"})
    assert Checkpoints(step_of(left).parent, "ppo").newest(4).step == 2
    said = (f"resumes after step 2 of 4, which was written with torch 1.0 (here {found['torch']}), "
            "CPU threads 7 (here 1): what follows may differ")  # fmt: skip
    assert said in capsys.readouterr().err


# --- the other kinds of work ---


def small_sft(keeper):
    data = Examples([[5, 6, 7]] * 8, [[8, 9, 10, 1]] * 8)
    train_sft(small_policy(), data, data, SFTConfig(max_steps=4, eval_every=1, batch_size=4, lr=0.1,
              max_passes=99), pad_id=PAD, seed=0, keeper=keeper)  # fmt: skip


def small_policy():
    torch.manual_seed(3)
    return models()[0].policy


def more_sft(keeper):
    data = Examples([[5, 6, 7]] * 8, [[8, 9, 10, 1]] * 8)
    continue_sft(small_policy(), data, SFTConfig(batch_size=4, lr=0.1), pad_id=PAD, steps=4, seed=0,
                 keeper=keeper)  # fmt: skip


def token_rewards(keeper):
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                         num_attention_heads=2, max_position_embeddings=64, num_labels=3)
    reader = PolicyTokens(LlamaForTokenClassification(config), 0)
    train_reward_model(reader, answers(12, 0), RewardModelConfig(epochs=2, batch_size=4, lr=1e-3),
                       seed=0, keeper=keeper)  # fmt: skip


def sentence_rewards(keeper):
    config = RewardModelConfig(epochs=2, batch_size=4, lr=1e-4)
    train_sentence_model(new_reader(), paired(8, 0), paired(4, 1), config, seed=0, keeper=keeper)


def written_answers(keeper):
    engine = HFRollout(small_policy(), pad_id=PAD, eos_id=1, batch_size=4)
    engine.generate([[5, 6, n] for n in range(7, 19)], Sampling(3, seed=0), keeper=keeper)


WORKS = {work.__name__: work for work in
         (small_sft, more_sft, token_rewards, sentence_rewards, written_answers)}  # fmt: skip


@pytest.mark.parametrize("work", WORKS.values(), ids=WORKS)
def test_all_other_work_says_why_it_cannot_go_on(work, tmp_path, monkeypatch):
    """Whatever is missing, added or of another type: each field and each file by itself."""
    monkeypatch.setattr(checkpoint, "EVERY_S", 0.0)
    monkeypatch.setattr(checkpoint, "WRITING", 1e9)
    kept = Checkpoints(tmp_path / "checkpoints", "work")
    work(kept)
    found = load_latest(kept.root)
    for step, path in checkpoint._complete(kept.root):
        if step != found.step:
            shutil.rmtree(path)
    aside = tmp_path / "aside"
    shutil.copytree(found.path, aside)
    changes = [functools.partial(stated, later=1)]
    changes += [functools.partial(stated, **{key: GONE}) for key in found.state]
    changes += [functools.partial(stated, **{key: [[]]}) for key in found.state]
    changes += [functools.partial(without, name=name) for name in found.weights]
    changes += [functools.partial(weights, name=name, change=lambda w: w.pop(first_of(w)))
                for name in found.weights if name != "draws"]  # fmt: skip
    if found.optimizer:
        changes.append(functools.partial(optimizer, change=dict.clear))
    for change in third(changes, seed=5):
        shutil.rmtree(found.path)
        shutil.copytree(aside, found.path)
        change(found.path)
        resealed(found.path)
        with pytest.raises(DataError, match="this checkpoint cannot be gone on from: "):
            work(kept)
    shutil.rmtree(found.path)
    shutil.copytree(aside, found.path)
    work(kept)


class Killed(Checkpoints):
    """The process ends behind this step's checkpoint."""

    last = 0

    def after(self, step, steps, rest):
        super().after(step, steps, rest)
        if step == self.last:
            raise KeyboardInterrupt


@pytest.mark.parametrize("work", [small_sft, more_sft, token_rewards, sentence_rewards])
def test_a_training_in_parts_is_killed_and_goes_on_to_the_same_bits(
    work, tmp_path, monkeypatch, capsys
):
    """The memory holds all of a batch by then: other sums would be those of whole batches."""
    monkeypatch.setattr(checkpoint, "EVERY_S", 0.0)
    monkeypatch.setattr(checkpoint, "WRITING", 1e9)
    whole, killed = (Killed(tmp_path / name, "work") for name in ("whole", "killed"))
    killed.last = 1
    with monkeypatch.context() as patch:
        refuse(16, patch)
        work(whole)
        with pytest.raises(KeyboardInterrupt):
            work(killed)
    killed.last = 0
    assert "WARNING: out of memory" in capsys.readouterr().err
    work(killed)
    assert "tokens at once, as before" in capsys.readouterr().err
    found, expected = load_latest(killed.root), load_latest(whole.root)
    assert found.step == expected.step > 1
    for name, tensors in expected.weights.items():
        assert_same(found.weights[name], tensors)


def without(step, name):
    (step / f"{name}.safetensors").unlink()


def test_rounds_of_ser_say_why_they_cannot_go_on(tmp_path):
    policy = small_policy()
    weights, state = {"model": policy.state_dict()}, {"rounds": [{}], "labels": {}, "stopped": ""}
    for change, why in (({"rounds": []}, "rounds is 0, expected 1"), ({"labels": []}, "labels"),
                        ({"later": 1}, "unknown here")):  # fmt: skip
        save_checkpoint(tmp_path / "checkpoints", 1, weights, {}, state | change)
        with pytest.raises(DataError, match=why):
            run_rounds(tmp_path, SimpleNamespace(model=policy), None, None, None, None)
