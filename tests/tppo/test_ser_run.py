"""SER in a run of stages: on pairs of generated answers, and with labels of words."""

import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from test_door import assert_same

from tppo.config import Config, fill_defaults
from tppo.errors import DataError
from tppo.methods import reward_model
from tppo.methods.config import PPOConfig, RewardModelConfig, SERConfig, SFTConfig
from tppo.methods.reward_model import (
    NOT_LABELLED,
    LabelledAnswer,
    PolicyTokens,
    train_reward_model,
)
from tppo.models.config import (
    AdapterConfig,
    GenerateConfig,
    RewardServerConfig,
    ScratchConfig,
)
from tppo.models.load import load_reward_model
from tppo.sessions.config import SessionsConfig
from tppo.stages.registry import REGISTRY
from tppo.stages.run import Run
from tppo.stages.session_pairs import session_pairs
from tppo.store.jsonl import read_json, read_jsonl, write_jsonl

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = Config(
    sessions=SessionsConfig(120, 8, 8, 1),
    scratch=ScratchConfig(hidden_size=32, intermediate_size=32, vocab_size=400, layers=1),
    sft=SFTConfig(max_steps=80, eval_every=80),
    generate=GenerateConfig(samples=240, max_new_tokens=24),
    reward_model=RewardModelConfig(epochs=2, lr=1e-2),
    ppo=PPOConfig(steps=1, batch_size=8, minibatch_size=8, without_signal=True, max_kl=1e3,
                  min_format=0.0),
)  # fmt: skip


def run_with(out, **ser):
    config = replace(TINY, ser=SERConfig(**ser))
    return Run(out=out, config=fill_defaults(config, pretrained=False))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    run = run_with(tmp_path_factory.mktemp("ser") / "run")
    for name in ("data", "sft", "generate", "label", "map", "train-rm"):
        run.perform(name)
    return run.out


def test_all_labels_of_words_as_the_seed_are_the_stage_train_rm_bit_for_bit(prepared):
    run = run_with(prepared, labels="words", seed_share=1.0)
    run.perform("ser")
    assert_same(load_file(prepared / "ser/model/model.safetensors"),
                load_file(prepared / "train-rm/model/model.safetensors"))  # fmt: skip
    report = read_json(prepared / "ser/report.json")
    assert report["stopped"] == "0 of 0 are left" and report["all_labels"] is None
    assert report["rounds"][0]["auc"] == read_json(prepared / "train-rm/report.json")["auc"]


def test_words_are_labelled_by_their_probability_and_pay_in_ppo(prepared, capsys):
    run = run_with(prepared, labels="words", seed_share=0.3, tau_token=0.6, rounds=1)
    run.perform("ser")
    report = read_json(prepared / "ser/report.json")
    assert [row["status"] for row in report["rounds"]] == ["seed", "tokens"]
    assert report["rounds"][1]["kept"] > 0 and report["rounds"][1]["kept_accuracy"] > 0.5
    assert report["all_labels"]["trained_on"] == report["seed"] + report["pool"]
    assert run.done("ser")
    # Kept from `tppo train`: nobody is there, and it would be another reward model.
    server = RewardServerConfig("http://127.0.0.1:9")
    run = replace(run, config=replace(run.config, reward_server=server))
    run.perform("ser-train")
    assert "the reward model of ser is read here" in capsys.readouterr().err
    assert read_json(prepared / "ser-train/report.json")["labels"] == "words"
    assert (prepared / "ser-train/model/model.safetensors").exists()
    assert (prepared / "ser-train/model/tppo.json").exists()  # `tppo answer` can ask it


def test_with_lora_a_reward_model_of_words_is_adapter_and_head_and_pays_in_ppo(prepared):
    pytest.importorskip("peft")
    config = replace(TINY, lora=AdapterConfig(rank=2),
                     ser=SERConfig(labels="words", seed_share=0.5, tau_token=0.6, rounds=1,
                                   all_labels=False))  # fmt: skip
    run = Run(out=prepared, config=fill_defaults(config, pretrained=False))
    run.perform("ser")
    assert len(read_json(prepared / "ser/report.json")["rounds"]) == 2
    adapter = load_file(prepared / "ser/model/adapter_model.safetensors")
    assert any(tensor.any() for name, tensor in adapter.items() if "lora_B" in name)
    assert not (prepared / "ser/model/model.safetensors").exists()
    run.perform("ser-train")
    assert (prepared / "ser-train/model/adapter_model.safetensors").exists()


def test_pairs_are_two_answers_to_one_history_and_pay_in_ppo(prepared):
    run = run_with(prepared, seed_share=0.4, tau_delta=0.01, rounds=1, min_share=0.01, scale=2.0)
    run.perform("ser")
    report = read_json(prepared / "ser/report.json")
    assert len(report["rounds"]) == 2 and report["seed"] + report["pool"] + report["heldout"] > 10
    assert run.done("ser") and not run_with(prepared, seed_share=0.5).done("ser")
    run.perform("ser-train")
    less_form = read_json(prepared / "ser-train/report.json")["last_reward"]
    free = replace(run.config, ppo=replace(run.config.ppo, format_cost=0.0))
    run = replace(run, config=free)
    assert not run.done("ser-train")
    run.perform("ser-train")
    found = read_json(prepared / "ser-train/report.json")
    assert found["labels"] == "pairs" and -1 < found["last_reward"] < 1
    faults = (found["last_reward"] - less_form) / 3.0 * 8  # of one step's answers, the same ones
    assert faults > 1 and faults == pytest.approx(round(faults), abs=1e-3)
    assert run.done("ser-train")


def test_what_ends_inside_a_round_by_words_costs_that_round_and_no_bit(prepared, monkeypatch):
    """In the second optimiser step of round 1, and in the training on all labels behind it."""
    run = run_with(prepared, labels="words", seed_share=0.3, tau_token=0.55, rounds=1)
    run.perform("ser")
    whole = load_file(prepared / "ser/model/model.safetensors")
    report = read_json(prepared / "ser/report.json")
    rounds = [*read_jsonl(prepared / "ser/rounds.jsonl")]
    assert len(report["rounds"]) == 2
    check, steps, trained = reward_model.check_step, 0, []

    def counted(*arguments):
        nonlocal steps
        steps += 1
        if steps == trained[0]:
            raise KeyboardInterrupt
        return check(*arguments)

    monkeypatch.setattr(reward_model, "check_step", counted)
    of = [TINY.reward_model.epochs * -(-row["trained_on"] // TINY.reward_model.batch_size)
          for row in report["rounds"]]  # fmt: skip
    shutil.rmtree(prepared / "ser")
    for last in (of[0] + 2, of[1] + 2):  # the second time it goes on behind the seed's model
        steps, trained = 0, [last]
        with pytest.raises(KeyboardInterrupt):
            run.perform("ser")
        assert (prepared / "ser.tmp/checkpoints").is_dir() and not (prepared / "ser").exists()
    steps, trained = 0, [0]
    run.perform("ser")
    assert_same(load_file(prepared / "ser/model/model.safetensors"), whole)
    assert read_json(prepared / "ser/report.json") == report
    again = [*read_jsonl(prepared / "ser/rounds.jsonl")]
    assert [line.values for line in again] == [line.values for line in rounds]


def label(id, words, sentence):
    listed = [[f"w{i}", value] for i, value in enumerate(words)]
    return {"id": id, "labeller": "rule", "response": " ".join(word for word, _ in listed),
            "words": listed, "sentence": sentence}  # fmt: skip


def test_the_better_answer_is_relevant_else_has_more_relevant_words(tmp_path):
    answers, labels = [], []
    for folder, rows in (("generate", [("s", [1, 0], 0), ("t", [1, 1], 1), ("u", [0, 1], 0)]),
                         ("generate-2", [("s", [1, 1], 0), ("t", [1, 1, 1, 0], 0),
                                         ("u", [1, 0], 0), ("v", [0], 0)])):  # fmt: skip
        (tmp_path / folder).mkdir()
        answers.append(tmp_path / folder / "answers.jsonl")
        write_jsonl(answers[-1], (
            {"id": f"{s}#0", "session": s, "prompt_ids": [5], "finish": "eos", "text": s,
             "response_ids": [len(words), sum(words), len(folder)]} for s, words, _ in rows))
        (tmp_path / folder.replace("generate", "label")).mkdir()
        labels.append(tmp_path / folder.replace("generate", "label") / "labels.jsonl")
        write_jsonl(labels[-1], (label(f"{s}#0", words, whole)
                                 for s, words, whole in rows))
    found, others = session_pairs(answers, labels)
    assert not others and {key: rows[0].better for key, rows in found.items()} == {"s": 1, "t": 0}
    found, others = session_pairs([*answers, *answers], labels)
    with pytest.raises(DataError, match=r"0 sessions have two answers .*tppo generate --round 2"):
        session_pairs(answers[:1], labels[:1])
    with pytest.raises(DataError, match=r"0 sessions have two answers"):
        session_pairs(answers, labels[:1])


def test_a_share_that_leaves_a_class_empty_is_named(prepared, monkeypatch):
    rows = {f"s{i}": [LabelledAnswer([5], [6, 7], [1, 0], 1)] for i in range(20)}
    monkeypatch.setattr("tppo.stages.ser.policy_rows", lambda run: rows)
    monkeypatch.setattr("tppo.stages.ser.policy_twins", lambda run: {})
    with pytest.raises(DataError, match="none of the words of 9 answers is relevant, expected"):
        run_with(prepared, labels="words", seed_share=0.5).perform("ser")


def test_tokens_that_nobody_has_labelled_are_left_out_of_the_loss(prepared):
    """Whatever stands there: the gradient of an answer is that of its labelled tokens."""
    rows = next(iter(read_jsonl(prepared / "generate/answers.jsonl"))).values
    ids, prompt = rows["response_ids"], rows["prompt_ids"]
    known = [1 + i % 2 if i < 4 else NOT_LABELLED for i in range(len(ids))]
    found = []
    for tail in (ids[4:], [ids[4]] * len(ids[4:])):
        torch.manual_seed(0)
        model = load_reward_model(prepared / "sft/model", torch.device("cpu"), new_head=True)
        reader = PolicyTokens(model, 0)
        row = LabelledAnswer(prompt, [*ids[:4], *tail], known, 2)
        train_reward_model(reader, [row], replace(TINY.reward_model, epochs=1), seed=0)
        found.append(model.score.weight.detach().clone())
    assert torch.equal(*found)


def test_both_stages_are_known_and_no_part_of_a_whole_run():
    assert not REGISTRY["ser"].in_run and not REGISTRY["ser-train"].in_run
