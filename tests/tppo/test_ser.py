"""SER: rounds in which a reward model labels what it is sure of; on pairs, words and files."""

import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from test_door import assert_same, model  # noqa: F401  # a fixture
from test_sentence_model import answer, new_reader

import tppo
from tppo.cli import main
from tppo.errors import DataError
from tppo.methods.config import RewardModelConfig, SERConfig
from tppo.methods.sentence_model import train_sentence_model
from tppo.methods.ser import Doubtful, Found, Pairs, State, confident, evolve
from tppo.models.load import load_policy
from tppo.models.tokenizer import load_tokenizer
from tppo.rewards.implicit import ImplicitReward, ImplicitScore
from tppo.rewards.sentence_model import SentenceModel, SentenceModelReward
from tppo.stages.preferences import answer_ids, encoded, preference_of, read_preferences

pytestmark = pytest.mark.usefixtures("one_thread")
TRAINING = RewardModelConfig(epochs=3, batch_size=8, lr=5e-3)
SURE = SERConfig(tau_high=0.62, tau_low=0.38, tau_delta=0.2, min_share=0.01, rounds=2)


def doubtful(n, seed):
    """Pairs of which the one with token 7 is the better; which comes first is drawn."""
    g = torch.Generator().manual_seed(seed)
    rows = []
    for i in range(n):
        better = int(torch.randint(2, (1,), generator=g))
        both = [answer(g, 7), answer(g, 8)]
        rows.append(Doubtful([5, 6, i % 3 + 9], both[better], both[1 - better], better))
    return rows


def learner(config=SURE, heldout=20, start=new_reader):
    return Pairs(start, doubtful(heldout, 99), config, TRAINING, seed=3)


def test_the_filter_keeps_easy_pairs_where_they_are_enough_else_hard_ones():
    p1 = torch.tensor([0.56, 0.44, 0.54, 0.90, 0.50])
    p2 = torch.tensor([0.44, 0.56, 0.20, 0.56, 0.45])
    easy, hard = [True, True, False, False, False], [False, False, True, True, False]
    config = SERConfig()
    assert confident(p1, p2, config, 2) == ("easy", pytest.approx(easy))
    assert confident(p1, p2, config, 3) == ("hard", pytest.approx(hard))
    any_of = replace(config, filter="any")
    status, kept = confident(p1, p2, any_of, 3)
    assert status == "any" and kept.tolist() == [True] * 4 + [False]


def test_all_labels_as_the_seed_are_plain_training_bit_for_bit():
    rows = doubtful(24, 0)
    found = learner()
    state = evolve(found, rows, [], SURE, State())
    plain = new_reader()
    train_sentence_model(plain, [row.pair() for row in rows], [], TRAINING, seed=3)
    assert_same(found.model.state_dict(), plain.model.state_dict())
    assert [row["status"] for row in state.rounds] == ["seed"]
    assert state.stopped == "0 of 0 are left"


def test_rounds_label_by_the_higher_score_and_learn_from_all_that_was_kept():
    seed, pool = doubtful(16, 1), doubtful(60, 2)
    # Of a third nobody knows the truth, of another third what is known is wrong.
    given = [row._replace(better=(None, row.better, 1 - row.better)[i % 3])
             for i, row in enumerate(pool)]  # fmt: skip
    found, seen = learner(), []
    state = evolve(found, seed, given, SURE, State(), lambda s: seen.append(dict(s.labels)))
    assert len(state.rounds) == 3 and 0 < len(seen[1]) < len(seen[2])
    for row, before, labels in zip(state.rounds[1:], seen, seen[1:], strict=False):
        new = [i for i in labels if i not in before]
        known = [labels[i] == given[i].better for i in new if given[i].better is not None]
        assert row["kept"] == len(new) and row["trained_on"] == 16 + len(labels)
        assert row["kept_accuracy"] == (sum(known) / len(known) if known else None)
    right = [label == pool[i].better for i, label in state.labels.items()]
    assert sum(right) / len(right) > 0.9 and state.rounds[-1]["accuracy"] > 0.9
    assert 0.3 < state.rounds[-1]["kept_accuracy"] < 0.7
    # The last model is one that was trained on just these pairs, in this order.
    rows = [row.pair() for row in seed]
    rows += [pool[i].pair(label) for i, label in sorted(state.labels.items())]
    plain = new_reader()
    train_sentence_model(plain, rows, [], TRAINING, seed=3)
    assert_same(found.model.state_dict(), plain.model.state_dict())


def test_scores_are_centred_before_their_probability_is_taken():
    """The loss knows differences alone: with all scores moved by 50 no pair would be kept."""
    found = learner()
    pool = doubtful(40, 2)
    found.train(doubtful(16, 1), [None] * 16)
    before = found.sure_of(pool, 1)
    with torch.no_grad():
        found.model.head.bias += 50
    assert found.sure_of(pool, 1).labels == before.labels and before.labels


class Unsure:
    """Is sure of fewer items each round."""

    def __init__(self):
        self.trained = []

    def train(self, items, labels):
        self.trained.append(len(items))

    def sure_of(self, items, enough):
        return Found("easy", {i: 0 for i in range(len(items) // 4)}, 0, 0)

    def figures(self):
        return {}


@pytest.mark.parametrize(("rounds", "min_share", "trained", "stopped"), [
    (2, 0.05, [1, 5, 8], "all 2 rounds are done"),
    (9, 0.15, [1, 5, 8], "the model is sure of 2 of 16, fewer than 3"),
    (0, 0.05, [1], "all 0 rounds are done"),
    (9, 0.01, [1, 5, 8, 10, 11, 12, 13, 14], "the model is sure of 0 of 16, fewer than 1"),
])  # fmt: skip
def test_the_rounds_stop_where_too_few_are_kept(rounds, min_share, trained, stopped):
    unsure = Unsure()
    config = SERConfig(rounds=rounds, min_share=min_share)
    state = evolve(unsure, [0], list(range(16)), config, State())
    assert unsure.trained == trained and state.stopped == stopped
    assert all(row["kept_accuracy"] is None for row in state.rounds)


CHAT = [{"role": "user", "content": "hi"}]


def said(text):
    return [{"role": "assistant", "content": text}]


@pytest.mark.parametrize("row", [
    {"prompt": "hi", "chosen": "yes", "rejected": "no"},
    {"prompt": CHAT, "chosen": said("yes"), "rejected": said("no")},
    {"prompt": CHAT, "chosen": "yes", "rejected": "no"},
    {"chosen": CHAT + said("yes"), "rejected": CHAT + said("no")},
    {"chosen": "\n\nHuman: hi\n\nAssistant:yes", "rejected": "\n\nHuman: hi\n\nAssistant:no"},
    {"prompt": "hi", "answers": ["yes", "no"]},
])  # fmt: skip
def test_every_layout_of_pairs_is_read(row):
    pair = preference_of(row, "pairs[0]")
    assert pair.answers == ("yes", "no") and pair.labelled == ("chosen" in row)
    assert pair.prompt in ("hi", CHAT, "\n\nHuman: hi\n\nAssistant:")


@pytest.mark.parametrize(("row", "message"), [
    ({"prompt": "a", "chosen": "b"}, "the keys were .*expected the keys 'prompt', 'chosen'"),
    ({"prompt": "a", "chosen": "b", "rejected": "b"}, "chosen and rejected were both 'b'"),
    ({"prompt": "a", "chosen": "b", "rejected": " "}, "rejected was ' ', expected a text that is"),
    ({"prompt": "", "chosen": "b", "rejected": "c"}, "prompt was '', expected a text"),
    ({"prompt": CHAT, "chosen": said(""), "rejected": "c"}, "chosen was '', expected"),
    ({"prompt": CHAT, "chosen": CHAT, "rejected": "c"}, "chosen was .*one message by the assist"),
    ({"chosen": "Human: a", "rejected": "Human: b"}, "do not share a text up to their last"),
    ({"chosen": CHAT + said("b"), "rejected": said("c")}, "do not share all messages but"),
    ({"prompt": "a", "answers": ["b"]}, "answers was .*expected two of them"),
    ([1], "was \\[1\\], expected a dict"),
])  # fmt: skip
def test_a_pair_that_is_none_is_named(row, message):
    with pytest.raises(DataError, match=f"^pairs\\[7\\]: .*{message}|^pairs\\[7\\]: {message}"):
        preference_of(row, "pairs[7]")


def test_a_bad_line_of_a_file_stops_or_is_left_out(tmp_path, capfd):
    path = tmp_path / "pairs.jsonl"
    good, bad = {"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "a"}
    half = good | {"chosen": "half of a pair: \ud83d"}
    lines = [json.dumps(row) for row in (good, bad, half, good)]
    path.write_text("\n".join([*lines, '{"prompt": "a", "chos', json.dumps([1])]) + "\n")
    with pytest.raises(DataError, match=r"pairs.jsonl: line 2: the keys were .*--skip-bad"):
        read_preferences(path)
    with pytest.raises(DataError, match=r"pairs\[0\]: chosen was .*expected a text"):
        read_preferences([half])
    assert len(read_preferences(path, skip_bad=True)) == 2
    assert "4 pairs are left out, the first because" in capfd.readouterr().err
    with pytest.raises(DataError, match="no pair, expected at least one"):
        read_preferences([bad], skip_bad=True)


def test_answers_that_are_alike_in_tokens_or_too_long_are_named_or_left_out(model, capfd):  # noqa: F811
    """The words of a tokenizer that does not tell two texts apart prefer nothing."""
    tokenizer = load_tokenizer(model)
    good = {"prompt": "a", "chosen": "red boots", "rejected": "cheap boots"}
    alike = good | {"rejected": "red boots"}
    pairs = read_preferences([good, good, good | {"chosen": "red " * 80}])
    pairs[0] = replace(pairs[0], answers=(alike["chosen"], alike["rejected"]))
    with pytest.raises(DataError, match=r"^pairs\[0\]: both answers have the same .*--skip-bad"):
        encoded(pairs, tokenizer, 64)
    with pytest.raises(DataError, match=r"^pairs\[2\]: an answer has \d+ tokens, expected less"):
        encoded(pairs[1:], tokenizer, 64)
    (kept,) = encoded(pairs, tokenizer, 64, skip_bad=True)
    assert [*kept.first_ids] == answer_ids(tokenizer, "red boots")
    assert "2 pairs are left out, the first because pairs[0]: both" in capfd.readouterr().err
    with pytest.raises(DataError, match="pairs: no pair, expected at least one"):
        encoded(pairs[:1], tokenizer, 64, skip_bad=True)


def texts(n, seed):
    """Pairs in which the answer about boots is the better one."""
    g = torch.Generator().manual_seed(seed)
    words = ["red", "cheap", "running", "and", "shoes"]

    def text(last):
        drawn = [words[i] for i in torch.randint(5, (int(torch.randint(1, 4, (1,), generator=g)),),
                                                 generator=g).tolist()]  # fmt: skip
        return " ".join([*drawn, last])

    return [{"prompt": f"{words[i % 5]} {i // 5}\n", "chosen": text("boots"),
             "rejected": text("socks")} for i in range(n)]  # fmt: skip


OPEN = SERConfig(seed_share=0.2, heldout_share=0.2, tau_delta=0.05, min_share=0.01, rounds=2)
FAST = RewardModelConfig(epochs=2, batch_size=4, lr=3e-3)


def test_the_door_trains_on_pairs_and_its_reward_pays_in_ppo(model, tmp_path, capfd):  # noqa: F811
    hidden = [{"prompt": row["prompt"], "answers": [row["rejected"], row["chosen"]]}
              for row in texts(20, 5)]  # fmt: skip
    pairs, given = texts(60, 4), {"unlabelled": hidden, "config": OPEN, "training": FAST}
    result = tppo.ser(model, pairs, out=tmp_path, **given)
    report = result.report
    assert report["seed"] == 10 and report["pool"] == 38 + 20 and report["heldout"] == 12
    assert [row["round"] for row in report["rounds"]] == [0, 1, 2]
    assert report["rounds"][-1]["accuracy"] > 0.9 and report["all_labels"] is None
    assert [row["status"] for row in report["rounds"]] == ["seed", "hard", "easy"]
    assert 0.5 < report["rounds"][1]["kept_accuracy"] <= 1
    assert json.loads((tmp_path / "ser/report.json").read_text()) == report
    assert not (tmp_path / "ser/checkpoints").exists()
    again = tppo.ser(model, pairs, out=tmp_path, **given)
    assert "finished before" in capfd.readouterr().err and again.report == report
    loaded = SentenceModel.load(result.model, torch.device("cpu"))
    assert_same(loaded.state_dict(), result.reward.model.state_dict())
    other = tppo.ser(model, pairs, config=replace(OPEN, seed_share=1.0, rounds=0), training=FAST,
                     out=tmp_path / "other")  # fmt: skip
    assert repr(other.reward) != repr(result.reward)  # by the mark of its weights
    ppo = tppo.PPOConfig(steps=1, batch_size=4, responses_per_prompt=2, minibatch_size=8, lr=1e-3)
    trainer = tppo.PPOTrainer(model, reward=result.reward, prompts=[row["prompt"] for row in pairs],
                              config=ppo, out=tmp_path / "ppo",
                              generate=tppo.GenerateConfig(max_new_tokens=6))  # fmt: skip
    trainer.train()
    assert "SentenceModelReward" in trainer.report["reward"]
    assert -0.5 <= trainer.metrics[0]["objective/scores"] <= 0.5


def test_with_all_labels_known_the_report_has_a_model_of_all_of_them(model, tmp_path):  # noqa: F811
    result = tppo.ser(model, texts(40, 4), heldout=texts(10, 6), config=OPEN, training=FAST,
                      out=tmp_path)  # fmt: skip
    report = result.report
    assert report["heldout"] == 10 and report["pool"] == 40 - report["seed"]
    assert report["all_labels"]["trained_on"] == 40 and report["all_labels"]["accuracy"] > 0.9


def test_with_lora_adapters_are_trained_and_a_plain_model_is_written(model, tmp_path):  # noqa: F811
    lora = tppo.AdapterConfig(rank=4)
    result = tppo.ser(model, texts(60, 4), config=OPEN, training=replace(FAST, lr=0.03), lora=lora,
                      out=tmp_path)  # fmt: skip
    assert len(result.report["rounds"]) > 1 and result.report["rounds"][-1]["accuracy"] > 0.8
    before, after = load_file(model / "model.safetensors"), load_file(
        result.model / "model.safetensors")  # fmt: skip
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all("proj" in name for name in changed)


def test_dense_rewards_pay_with_adapters_and_are_known_by_their_weights(model, tmp_path):  # noqa: F811
    """RED, ABC and RTO by the Python door; with other weights they are another reward, so that no
    finished training is taken for theirs.
    """
    pytest.importorskip("peft")
    cpu = torch.device("cpu")
    whole = SentenceModel.from_policy(model, cpu, seed=3)
    policy, ref = load_policy(model, cpu), load_policy(model, cpu)
    with torch.no_grad():
        policy.lm_head.weight.mul_(1.5)
    tokens = ImplicitReward(ImplicitScore(policy, ref, beta=0.3))
    config = tppo.PPOConfig(steps=1, batch_size=4, minibatch_size=4, epochs=1, lr=1e-2)
    for name, reward in (("red", tppo.RED(whole)), ("abc", tppo.ABC(whole)),
                         ("rto", tppo.RTO(tokens, SentenceModelReward(whole)))):  # fmt: skip
        trainer = tppo.PPOTrainer(
            model, reward=reward, prompts=[row["prompt"] for row in texts(8, 0)], config=config,
            out=tmp_path / name, lora=tppo.AdapterConfig(rank=2),
            generate=tppo.GenerateConfig(max_new_tokens=6),
        )  # fmt: skip
        report = trainer.train()
        assert type(reward).__name__ in report["reward"] and report["steps"] == 1
        saved = load_file(tmp_path / name / "train/model/adapter_model.safetensors")
        assert any(tensor.any() for key, tensor in saved.items() if "lora_B" in key)
        before = repr(reward)
        with torch.no_grad():
            (policy.lm_head if name == "rto" else whole.head).weight.add_(1e-3)
        assert repr(reward) != before
    one, other = (tppo.TokenModelReward(torch.nn.Linear(2, 3)) for _ in range(2))
    assert repr(one) == repr(one) != repr(other)


KILL = """
import importlib, os, signal, sys
from tppo.cli import main
from tppo.store import checkpoint

checkpoint.EVERY_S, checkpoint.WRITING = 0.0, float("inf")  # after every step
module, _, name = sys.argv.pop(1).rpartition(".")
trained = importlib.import_module(module)

steps, check = 0, getattr(trained, name)

def counted(*arguments):
    global steps
    steps += 1
    if steps == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
    return check(*arguments)

setattr(trained, name, counted)
main(sys.argv[2:])
"""


def killed(step, flags, folder, check="tppo.methods.sentence_model.check_step"):
    """The command in a process that is killed inside of an optimiser step, counted from 1, of the
    trainings that call `check` in each.
    """
    done = subprocess.run([sys.executable, "-c", KILL, check, str(step), *flags], cwd=folder,
                          timeout=900, env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip
    assert done.returncode == -signal.SIGKILL


def test_a_kill_inside_a_round_costs_a_step_of_it_and_no_bit(model, tmp_path, monkeypatch, capfd):  # noqa: F811
    for name, rows in (("pairs", texts(60, 4)), ("more", texts(20, 5))):
        rows = [{"prompt": r["prompt"], "answers": [r["rejected"], r["chosen"]]} if name == "more"
                else r for r in rows]  # fmt: skip
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["ser", "--pairs", "pairs.jsonl", "--unlabelled", "more.jsonl", "--model", str(model)]
    for name in ("seed_share", "heldout_share", "tau_delta", "min_share", "rounds"):
        flags += [f"--ser.{name.replace('_', '-')}", str(getattr(OPEN, name))]
    for name in ("epochs", "batch_size", "lr"):
        flags += [f"--reward-model.{name.replace('_', '-')}", str(getattr(FAST, name))]
    monkeypatch.chdir(tmp_path)
    main([*flags, "--out", "whole"])
    report = json.loads((tmp_path / "whole/ser/report.json").read_text())
    steps = [2 * math.ceil(row["trained_on"] / 4) for row in report["rounds"]]
    killed(sum(steps[:2]) + 2, [*flags, "--out", "cut"], tmp_path)
    assert (tmp_path / "cut/ser.tmp/checkpoints/step-2").is_dir()
    main([*flags, "--out", "cut"])
    said = capfd.readouterr().err
    assert "ser: resumes after round 1" in said
    assert f"ser, round 2: resumes after step 1 of {steps[2]}" in said
    whole, cut = tmp_path / "whole/ser", tmp_path / "cut/ser"
    for file in ("model/model.safetensors", "model/sentence_head.safetensors"):
        assert_same(load_file(whole / file), load_file(cut / file))
    assert json.loads((tmp_path / "cut/ser/report.json").read_text()) == report


@pytest.mark.parametrize(("changes", "message"), [
    ({"pairs": "nowhere.jsonl"}, "nowhere.jsonl"),
    ({"pairs": 3}, "pairs was 3, a int, expected the path"),
    ({"pairs": [{"prompt": "a", "answers": ["b", "c"]}] * 2}, "belong into `unlabelled`"),
    ({"pairs": texts(1, 0)}, "pairs had 1 prompt, expected at least 2"),
    ({"config": replace(OPEN, seed_share=0.01)}, "ser.seed_share was 0.01: of 32 prompts with"),
    ({"config": SERConfig(labels="words")}, "config.labels was 'words', expected 'pairs'"),
    ({"seed": -1}, "seed was -1"),
    ({"pairs": [{"prompt": "a\n", "chosen": "red " * 80, "rejected": "b"}] * 2},
     "an answer has .* tokens, expected less than the 64 positions"),
])  # fmt: skip
def test_what_is_wrong_is_said_before_anything_is_trained(model, tmp_path, changes, message):  # noqa: F811
    given = {"pairs": texts(40, 0), "config": OPEN} | changes
    with pytest.raises((DataError, OSError), match=message):
        tppo.ser(model, given.pop("pairs"), out=tmp_path / "o", **given)
    assert not (tmp_path / "o/ser").exists()


def test_thresholds_that_cross_are_refused():
    with pytest.raises(DataError, match="tau_low, tau_high were 0.6, 0.55, expected"):
        SERConfig(tau_low=0.6)
