"""`tppo baselines`: sentence labels and rewards at the end by the same loop, in the same table."""

import json
import shutil
from contextlib import contextmanager

import pytest

from tppo.cli import main
from tppo.commands import _names
from tppo.evaluation.table import reached_line
from tppo.rewards.sentence_model import SentenceModelReward
from tppo.stages import baselines
from tppo.stages.artifacts import BASELINES, TEST_SESSIONS
from tppo.stages.registry import before
from tppo.stages.study.presets import OF_FEW

TINY = {
    "sessions": {"train_users": 64, "heldout_users": 8, "test_users": 12, "transfer_users": 0},
    "scratch": {"hidden_size": 32, "intermediate_size": 32, "vocab_size": 400, "heads": 2},
    "sft": {"max_steps": 4, "eval_every": 2},
    "generate": {"samples": 48, "max_new_tokens": 16},
    "reward_model": {"epochs": 1},
    "ppo": {"steps": 2, "batch_size": 8, "minibatch_size": 8, "eval_every": 1, "min_format": 0.0,
            "max_kl": 100.0, "without_signal": True},
    "eval": {"temperatures": [1.0], "continued": False},
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    (folder / "tiny.yaml").write_text(json.dumps(TINY))
    flags = ["--out", str(folder / "out"), "--config", str(folder / "tiny.yaml")]
    for stage in [*before("eval"), "eval"]:
        if stage != "baselines":
            with nobody_there(folder / "out", stage):
                main([stage, *flags])
    return folder / "out"


@contextmanager
def nobody_there(out, stage):
    """Without the users that judge, whom no stage between data and eval may read."""
    test, apart = out / TEST_SESSIONS.path, out.parent / "test-users"
    if stage in ("data", "eval"):
        yield
        return
    test.rename(apart)
    try:
        yield
    finally:
        assert not test.exists()
        apart.rename(test)


@pytest.fixture(scope="module")
def compared(finished, tmp_path_factory):
    out = shutil.copytree(finished, tmp_path_factory.mktemp("baselines") / "out")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(baselines, "SentenceModelReward", paid)
        with nobody_there(out, "baselines"):
            main(["baselines", "--out", str(out)])
    main(["eval", "--out", str(out)])
    return out


PAID = []


def paid(model, **options):
    """The reward of whole answers, of which the test wants to know how it pays."""
    PAID.append((model.pooling, options["mode"], options["scale"]))
    return SentenceModelReward(model, **options)


def test_labels_of_wholes_are_paid_as_the_study_was_tuned(compared):
    arm = OF_FEW  # 48 answers are few
    assert PAID == [(arm.pooling, arm.mode, arm.scale)] and arm.mode == "score"


def test_baselines_take_as_many_steps_and_stand_in_the_table(compared, finished):
    result = json.loads((compared / "result.json").read_text())
    before = json.loads((finished / "result.json").read_text())
    for name in BASELINES:
        assert name not in before
        row = result[name]
        assert row["users"] == result["tppo"]["users"] and "relevance_interval" in row
        assert row["training"]["steps"] == result["training"]["steps"]
        assert row["training"]["critic_fit"]["answers"] == result["training"]["sessions"]
        assert not list((compared / "baselines" / name).glob("checkpoints*"))
    assert result["tppo"] == before["tppo"]


def test_baselines_of_other_settings_are_left_out(compared, capsys, tmp_path):
    out = shutil.copytree(compared, tmp_path / "out")
    main(["eval", "--out", str(out), "--ppo.kl-coef", "0.3"])
    assert not set(BASELINES) & json.loads((out / "result.json").read_text()).keys()
    assert "paid_at_end was trained with other files or settings" in capsys.readouterr().err


def test_they_are_paid_once_at_the_end_and_otherwise_differ(compared):
    first = {
        name: json.loads((compared / folder / "metrics.jsonl").read_text().splitlines()[0])
        for name, folder in {"train": "train", **{n: f"baselines/{n}" for n in BASELINES}}.items()
    }
    scores = {name: row["objective/scores"] for name, row in first.items()}
    # The first answers are those of SFT: what they are paid in total is the same, wherever.
    assert scores["paid_at_end"] == pytest.approx(scores["train"], abs=1e-5)
    assert scores["sentence_labels"] != pytest.approx(scores["train"], abs=1e-3)
    known = "val/explained_variance"
    assert first["paid_at_end"][known] != first["train"][known]


def test_a_run_trains_them_where_it_is_told_to():
    assert "baselines" not in _names("run", False) and _names("eval", True) == ["eval"]
    with_them = _names("run", True)
    assert with_them.index("train") < with_them.index("baselines") < with_them.index("eval")


def test_the_steps_to_a_level_are_told_of_every_training():
    row = {"relevance": 0.9, "relevance_interval": [0.8, 1.0]}
    result = {
        "sft": row, "tppo": row, "training": {"reached": {"0.8": 25, "0.9": None}},
        "paid_at_end": row | {"training": {"reached": {"0.8": None, "0.9": 40}}},
    }  # fmt: skip
    assert reached_line(result, "relevance") == [
        "steps until held-out relevance reached 0.8, 0.9: tppo 25, never; paid_at_end never, 40"
    ]
    result["training"], result["paid_at_end"] = {}, row
    assert reached_line(result, "relevance") == []
