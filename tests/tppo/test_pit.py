"""PIT: the gap model and its ordering, both stages of RL, k improvements; files, runs, kills."""

import json
import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from test_door import assert_same, model  # noqa: F401  # a fixture
from test_sentence_model import answer, new_reader
from test_ser import killed, texts
from test_ser_run import TINY, prepared  # noqa: F401  # a fixture
from test_shared_prefix import PAD

import tppo
from tppo.cli import main
from tppo.config import fill_defaults
from tppo.errors import DataError
from tppo.methods.config import PITConfig, PPOConfig, RewardModelConfig, SFTConfig
from tppo.methods.pit import (
    ASK,
    BETTER,
    GapPair,
    GapReader,
    evaluate_gap,
    gap_loss,
    improvement,
)
from tppo.methods.sentence_model import train_sentence_model
from tppo.models.batch import Batch
from tppo.rewards.gap import GapReward
from tppo.rewards.sentence_model import SentenceModel
from tppo.stages.pit_parts import Better, stage_loop
from tppo.stages.run import Run
from tppo.store.jsonl import read_json, read_jsonl

pytestmark = pytest.mark.usefixtures("one_thread")
CHAT = [{"role": "user", "content": "hi"}]
PPO = PPOConfig(
    batch_size=4, minibatch_size=4, epochs=1, lr=3e-3, critic_lr=3e-3, checkpoint_every=1,
    kl_coef=0.01, max_kl=1e3,
)  # fmt: skip
PARTS = {
    "sft": SFTConfig(max_steps=12, eval_every=6, lr=5e-3), "ppo": PPO,
    "gap": RewardModelConfig(epochs=2, batch_size=8, lr=5e-3),
    "config": PITConfig(stage_0=2, stage_1=3),
}  # fmt: skip


def gap_pairs(n, seed):
    """The better answer has the token 7; a reference stands behind the prompt."""
    g = torch.Generator().manual_seed(seed)
    rows = []
    for i in range(n):
        x, w, l = [5, 6, i % 3 + 9], answer(g, 7), answer(g, 8)  # noqa: E741
        rows.append(GapPair([*x, *l, 4], [*x, *w, 4], w, l))
    return rows


def gap_reader(pooling="last"):
    return GapReader(new_reader(pooling).model, PAD)


def test_a_prompt_with_a_reference_asks_for_a_better_answer():
    assert improvement("shoes\n", "red") == f"shoes\nred{BETTER}"
    assert improvement(CHAT, "yes") == [*CHAT, {"role": "assistant", "content": "yes"},
                                        {"role": "user", "content": ASK}]  # fmt: skip
    assert improvement("shoes\n", "") == "shoes\n" and improvement(CHAT, "") is CHAT


def test_the_loss_is_the_ordering_of_the_paper():
    g = torch.randn(3, 4, dtype=torch.float64)  # g_wl, g_ll, g_ww, g_lw of three pairs
    slow, fifth = 0.0, 0.0
    for wl, ll, ww, lw in g.tolist():
        for gap in (wl - ww, wl - ll, ww - lw, ll - lw):
            slow += math.log1p(math.exp(-gap)) / 3
        fifth += math.log1p(math.exp(-(wl - lw))) / 3
    assert gap_loss(g.flatten()).item() == pytest.approx(slow, abs=1e-12)
    assert gap_loss(g.flatten(), fifth=True).item() == pytest.approx(slow + fifth, abs=1e-12)


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_a_gap_model_reads_answers_behind_references_and_learns_the_ordering(pooling):
    reader, pairs = gap_reader(pooling), gap_pairs(48, 0)
    unseen = gap_pairs(24, 1)
    row = pairs[0]
    alone = [reader.gaps([prompt], [ids]).item() for prompt in (row.with_worse, row.with_better)
             for ids in (row.chosen_ids, row.rejected_ids)]  # fmt: skip
    assert reader.scores([row]).tolist() == pytest.approx(alone, abs=1e-5)
    before = evaluate_gap(reader, unseen)
    train_sentence_model(reader, pairs, [], RewardModelConfig(epochs=6, batch_size=8, lr=1e-2),
                         seed=0)  # fmt: skip
    after = evaluate_gap(reader, unseen)
    assert after["loss"] < before["loss"] and after["wl_above_lw"] > 0.9
    assert min(after[name] for name in ("wl_above_ll", "ww_above_lw")) > 0.8


def test_rewards_of_tokens_add_up_to_the_gap():
    reader = gap_reader("mean")
    rows = gap_pairs(4, 2)
    prompts, ids = [r.with_worse for r in rows], [r.chosen_ids for r in rows]
    batch = Batch(prompts, ids, PAD)
    gaps = reader.gaps(prompts, ids)
    paid = GapReward(reader.model, scale=2.0)(batch, None).rewards
    parts = GapReward(reader.model, tokens=True, scale=2.0)(batch, None).rewards
    assert torch.allclose(paid.sum(1), 2 * gaps)
    assert torch.allclose(parts.sum(1), 2 * gaps, atol=1e-5)
    assert (paid != 0).sum(1).tolist() == [1] * 4 and (parts[:, 0] != 0).all()
    assert (parts[~batch.mask] == 0).all() and paid[0, len(ids[0]) - 1] != 0
    with pytest.raises(ValueError, match="pooling was 'last', expected 'mean'"):
        GapReward(gap_reader().model, tokens=True)


@pytest.fixture(scope="module")
def trained(model, tmp_path_factory):  # noqa: F811
    out = tmp_path_factory.mktemp("pit")
    return tppo.pit(model, texts(24, 4), out=out, **PARTS), out


def test_with_empty_references_it_is_ppo_on_the_gap_bit_for_bit(trained, model, tmp_path):  # noqa: F811
    result, out = trained
    training = result.training
    gap = SentenceModel.load(out / "pit/gap", torch.device("cpu"))
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft/model").symlink_to(model)
    (tmp_path / "gap").mkdir()
    (tmp_path / "gap/model").symlink_to(out / "pit/gap")
    (tmp_path / "stage").mkdir()
    prompts = [row["prompt"] for row in texts(6, 4)]
    pairs = [Better(prompt, "", "") for prompt in prompts]
    stage_loop(tmp_path / "stage", tmp_path, training, pairs, tmp_path / "sft/model", "stage-0",
               2).run_all()  # fmt: skip
    plain = tppo.PPOTrainer(
        model, reward=GapReward(gap), prompts=[p for p in prompts for _ in range(2)],
        config=replace(PPO, steps=2), out=tmp_path / "plain",
        generate=tppo.GenerateConfig(max_new_tokens=training.cap),
    )  # fmt: skip
    plain.train()
    mine = load_file(tmp_path / "stage/model/model.safetensors")
    assert_same(mine, load_file(tmp_path / "plain/train/model/model.safetensors"))
    before = load_file(model / "model.safetensors")
    assert any(not torch.equal(mine[name], tensor) for name, tensor in before.items())


def test_the_report_has_every_part_and_k_answers_come_back(trained):
    result, out = trained
    report = result.report
    assert report["pairs"] == 22 and report["heldout"] == 2
    assert {"sft", "gap", "stage_0", "stage_1"} <= report.keys()
    assert report["gap"]["wl_above_lw"] >= 0.5 and report["stage_1"]["steps"] == 3
    assert len((out / "pit/stage-1.jsonl").read_text().splitlines()) == 3
    assert not (out / "pit/checkpoints").exists()
    prompts = ["red 0\n", "cheap 1\n"]
    found = result.improve(prompts, ["socks", "socks"], steps=2)
    assert len(found) == 3 and found[0] == ["socks", "socks"] and len(found[2]) == 2
    assert result.improve(prompts, steps=1) == result.improve(prompts, steps=1)


def test_references_of_stage_1_are_what_the_policy_writes(trained, tmp_path):
    result, out = trained
    training = result.training
    parts = tmp_path
    for name, target in (("sft", result.model), ("gap", out / "pit/gap")):
        (parts / name).mkdir()
        (parts / name / "model").symlink_to(target)
    pairs = [Better(row["prompt"], row["chosen"], row["rejected"]) for row in texts(3, 7)]
    loops = [stage_loop(tmp_path, parts, training, pairs, parts / "sft/model", name, 1)
             for name in ("stage-0", "stage-1")]  # fmt: skip
    rows = [2, 2, 5]
    data, own = (loop.asked(1, rows) for loop in loops)
    assert data.columns["reference"] == [pairs[1].worse] * 2 + [pairs[2].better]
    written = own.columns["reference"]
    assert written[0] == written[1] and written != data.columns["reference"]
    improver = training.improver(loops[1].trainer.models.policy)
    assert own.ids == [training.encode(x, y) for x, y in zip(own.prompts, written, strict=True)]
    assert own.columns == loops[1].asked(1, rows).columns
    assert own.columns != loops[1].asked(2, rows).columns and improver.texts([[5]])


@pytest.mark.parametrize(("check", "step"), [
    ("tppo.methods.sentence_model.check_step", 4),  # in the gap model
    ("tppo.methods.ppo.not_finite", 4),  # in step 2 of stage 1
])  # fmt: skip
def test_a_kill_in_any_part_costs_no_bit(trained, model, tmp_path, capfd, check, step):  # noqa: F811
    result, out = trained
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in texts(24, 4)))
    flags = ["pit", "--pairs", str(path), "--model", str(model), "--out", str(tmp_path / "o"),
             "--pit.stage-0", "2", "--pit.stage-1", "3"]  # fmt: skip
    for section, given, names in (
        ("sft", PARTS["sft"], ("max_steps", "eval_every", "lr")),
        ("reward-model", PARTS["gap"], ("epochs", "batch_size", "lr")),
        ("ppo", PPO, ("batch_size", "minibatch_size", "epochs", "lr", "critic_lr", "max_kl",
                      "checkpoint_every", "kl_coef")),
    ):  # fmt: skip
        for name in names:
            flags += [f"--{section}.{name.replace('_', '-')}", str(getattr(given, name))]
    killed(step, flags, tmp_path, check)
    parts, in_ppo = tmp_path / "o/pit.tmp/checkpoints", "methods.ppo" in check
    assert (parts / "sft").is_dir() and (parts / "stage-0").is_dir() == in_ppo
    main(flags)
    part, steps = ("ppo", 1) if in_ppo else ("pit, gap", 3)
    assert f"{part}: resumes after step {steps} of" in capfd.readouterr().err
    for file in ("model/model.safetensors", "gap/model.safetensors"):
        assert_same(load_file(tmp_path / "o/pit" / file), load_file(out / "pit" / file))


def test_with_lora_and_rewards_of_tokens(model, tmp_path):  # noqa: F811
    parts = PARTS | {"config": PITConfig(stage_0=1, stage_1=1, reward="token", fifth_term=True)}
    result = tppo.pit(model, texts(16, 4), out=tmp_path, lora=tppo.AdapterConfig(rank=4), **parts)
    before = load_file(model / "model.safetensors")
    after = load_file(result.model / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys() and changed and all("proj" in name for name in changed)
    assert read_json(tmp_path / "pit/gap/sentence_model.json") == {"pooling": "mean"}
    assert result.report["stage_1"]["reward"] == "token"


def test_a_stage_may_be_left_out(model, tmp_path):  # noqa: F811
    parts = PARTS | {"config": PITConfig(stage_0=0, stage_1=1)}
    report = tppo.pit(model, texts(16, 4), out=tmp_path, **parts).report
    assert "stage_0" not in report and report["stage_1"]["steps"] == 1


@pytest.mark.parametrize(("pairs", "message"), [
    ([{"prompt": "a", "answers": ["b", "c"]}], "had 'answers', expected 'chosen' and 'rejected'"),
    ([{"prompt": "a", "chosen": "b", "rejected": ""}], r"pairs\[0\]: rejected was ''"),
    ([{"prompt": "a", "chosen": "red " * 80, "rejected": "b"}], r"pairs\[0\]: an answer has"),
    ([{"prompt": "a", "chosen": "b", "rejected": "c"}], "pairs: 1, expected at least 2"),
])  # fmt: skip
def test_pairs_that_are_wrong_are_named(model, tmp_path, pairs, message):  # noqa: F811
    with pytest.raises(DataError, match=message):
        tppo.pit(model, pairs, out=tmp_path, **PARTS)


def test_in_a_run_generated_answers_are_bettered_and_test_users_judge(prepared):  # noqa: F811
    config = replace(TINY, pit=PITConfig(stage_0=1, stage_1=1, improve_steps=2))
    run = Run(out=prepared, config=fill_defaults(config, pretrained=False))
    run.perform("pit")
    report = read_json(prepared / "pit/report.json")
    assert report["pairs"] > 100 and report["gap"]["wl_above_lw"] > 0.5
    run.perform("improve")
    rows = json.loads((prepared / "improve/steps.json").read_text())
    assert [row["step"] for row in rows] == [0, 1, 2] and rows[0]["gap"] is None
    assert all(0 <= row["relevance"] <= 1 and row["users"] == 8 for row in rows)
    texts_of = [line.values["answers"] for line in read_jsonl(prepared / "improve/answers.jsonl")]
    assert len(texts_of) == 8 and all(len(answers) == 3 for answers in texts_of)
    assert run.done("pit") and run.done("improve")
    other = replace(config, pit=replace(config.pit, improve_steps=3))
    other_run = Run(out=prepared, config=fill_defaults(other, pretrained=False))
    assert other_run.done("pit") and not other_run.done("improve")
