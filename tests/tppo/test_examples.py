"""The scripts in examples/ run, in a reduced form."""

import importlib.util
from pathlib import Path

import yaml

EXAMPLES = Path(__file__).parents[2] / "examples"
TINY = {
    "sessions": {"train_users": 200, "heldout_users": 8, "test_users": 16, "transfer_users": 4},
    "scratch": {"hidden_size": 16, "intermediate_size": 16, "vocab_size": 300, "heads": 2},
    "sft": {"max_steps": 2, "eval_every": 2},
}


def example(name):
    """A script as a module."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_reward_by_spans(tmp_path, capsys):
    script = example("reward_by_spans")
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    flags = ["--out", str(tmp_path / "o"), "--config", str(tmp_path / "tiny.yaml"), "--steps", "2"]
    figures = script.main(flags)
    assert 0 <= figures["trained"] <= 1 and figures["seconds"] > 0
    assert "relevant answers to 16 fresh users" in capsys.readouterr().out
    assert (tmp_path / "o/train/model/model.safetensors").exists()
    assert "by_words" in (tmp_path / "o/train/report.json").read_text()


def test_by_words_pays_what_it_says():
    script = example("reward_by_spans")
    text = "red shoes\nshoes red\n\nblue boots\nred"
    (spans,) = script.by_words([text], [["red boots", "cheap shoes", "x"]])
    paid = [(text[start:end], value) for start, end, value in spans]
    assert paid == [("red", 0.5), ("shoes", 0.5), ("shoes", -0.5), ("red", -0.5), ("blue", -0.5),
                    ("boots", 0.5), ("red", -0.5)]  # fmt: skip
