"""`tppo doctor`: what fits is what is planned, and what is missing is said with the remedy."""

import re
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from tppo.cli import main
from tppo.stages import doctor
from tppo.stages.needs import GB, LEVELS, STAGES, Work, need, plan, turned

CPU = torch.device("cpu")
SMALL = LlamaConfig(vocab_size=32_000, hidden_size=256, intermediate_size=512,
                    num_hidden_layers=2, num_attention_heads=4)  # fmt: skip


def cells(lines, trained):
    (row,) = [line for line in lines if line.startswith("small") and f"  {trained}  " in line]
    return dict(zip(STAGES, row.split()[-len(STAGES) :], strict=True))


def test_a_stage_fits_where_its_plan_is_smaller_than_what_is_free():
    how = doctor.holding(CPU, None)
    taken = {n.stage: n.total + n.host for n in plan(SMALL, how, Work())}
    most = max(taken, key=taken.get)
    exactly = doctor.fit_lines({"small": SMALL}, CPU, taken[most])
    assert set(cells(exactly, "all").values()) == {"yes"}
    less = doctor.fit_lines({"small": SMALL}, CPU, taken[most] - 1)
    changed = cells(less, "all")
    assert changed[most] in ("(1)", "(2)", "(3)") and {*changed.values()} - {changed[most]} == {
        "yes"
    }
    level = int(changed[most][1])
    used, work = turned(LEVELS[level], how, Work())
    found = need(most, SMALL, used, work)
    assert found.total + found.host < taken[most]
    note = next(line for line in less if line.startswith(f"({level}): with "))
    assert "--model.gradient-checkpointing" in note and note.count("--model.grad") == 1
    assert doctor.first_level("generate", SMALL, how, Work(), 1) is None


def test_what_is_not_installed_is_said_with_the_command(monkeypatch):
    found = doctor.find_spec
    monkeypatch.setattr(
        doctor, "find_spec", lambda name: None if name in ("peft", "triton") else found(name)
    )
    lines = doctor.missing_lines(gpu=False)
    assert lines[0] == "missing packages"
    assert "  --lora.rank, adapters in place of all weights: pip install 'tppo-kernels[lora]'" in (
        lines
    )
    assert not any("[triton]" in line for line in lines)
    assert any("[triton]" in line for line in doctor.missing_lines(gpu=True))


def test_every_extra_of_the_package_is_looked_for():
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    section = text.split("[project.optional-dependencies]")[1].split("\n[")[0]
    extras = set(re.findall(r"^([\w-]+) = \[", section, re.MULTILINE))
    # Of developers, and what has to be there for `tppo doctor` to run.
    assert extras - {"dev", "bench", "docs", "train", "eval"} == doctor.EXTRAS.keys()
    for extra, (module, _) in doctor.EXTRAS.items():
        wanted = re.search(rf"^{extra} = \[(.*?)\]", section, re.MULTILINE | re.DOTALL)[1]
        assert module in wanted.replace("-", "_")


def test_the_command_says_what_there_is_and_runs_the_self_test(tmp_path, capsys):
    SMALL.save_pretrained(tmp_path)
    with pytest.raises(SystemExit) as end:
        main(["doctor", "--model", str(tmp_path)])
    shown = capsys.readouterr().out
    assert end.value.code == 0
    free = float(re.search(r"cores, ([\d.]+) GB of memory free", shown)[1])
    assert 0 < free < 10_000 and re.search(r"disk +\d+ GB free in ", shown)
    assert re.search(rf"{re.escape(str(tmp_path))} +all +yes", shown)
    assert "self-test: all passed" in shown and "gae" in shown
    assert re.search(r"(?m)^  skyrl +skyrl is not installed, expected skyrl>=[\d.,<]+: pip ", shown)
    assert GB == 10**9
