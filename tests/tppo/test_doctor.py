"""`tppo doctor`: what fits is what is planned, and what is missing is said with the remedy."""

import re
from pathlib import Path

import pytest
import torch
from _weights import enlarged
from transformers import LlamaConfig, LlamaForCausalLM

from tppo.cli import main
from tppo.models.tokenizer import train_tokenizer
from tppo.stages import doctor
from tppo.stages.model_check import FIT, check_model, table
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


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["search: red shoes\nblue hat", "search: boots!"] * 4, 280)


def model(tokenizer, **options):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
             "num_attention_heads": 2, "max_position_embeddings": 128}  # fmt: skip
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = LlamaConfig(**{"vocab_size": len(tokenizer)} | sizes | ids | options)
    return enlarged(LlamaForCausalLM(config)).eval()


def verdicts(given, tokenizer):
    return {found.check: found.verdict for found in check_model(given, tokenizer)}


def test_a_sound_model_is_trusted_in_every_way(tokenizer):
    given = model(tokenizer)
    before = {name: x.clone() for name, x in given.state_dict().items()}
    found = check_model(given, tokenizer)
    assert {row.verdict for row in found} == {FIT} and len(found) >= 8
    checks = " ".join(row.check for row in found)
    for word in ("twice", "step-0 ratio", "transformers", "gradients", "backend reference"):
        assert word in checks
    assert "train it as you like" in table(found)[-1]
    assert all(torch.equal(before[name], x) for name, x in given.state_dict().items())
    assert all(p.grad is None for p in given.parameters())


def test_dropout_is_found(tokenizer):
    given = model(tokenizer, attention_dropout=0.5).train()
    found = verdicts(given, tokenizer)
    assert found["the same batch, read twice"].startswith("do not train it: something random")


def test_an_attention_that_sees_padding_is_found(tokenizer, monkeypatch):
    """It ignores the mask of padding: an answer's log-probs depend on its neighbours."""
    given = model(tokenizer)
    for layer in given.model.layers:
        real = layer.self_attn.forward

        def forward(*args, real=real, attention_mask=None, **rest):
            return real(*args, attention_mask=None, **rest)

        monkeypatch.setattr(layer.self_attn, "forward", forward)
    found = verdicts(given, tokenizer)
    assert found["one answer alone, by transformers"].startswith("do not train it: padding")


def test_an_attention_that_shares_wrongly_is_sent_to_dense_prompts(tokenizer, monkeypatch):
    """Answers to one prompt that see each other: dense prompts are right, shared ones are not."""
    import tppo_kernels as tk
    from tppo_kernels.models import shared_prefix as module

    given, real = model(tokenizer), tk.prefix_attention

    def blind(q, k, v, layout, **rest):
        return torch.roll(real(q, k, v, layout, **rest), 1, 2)

    monkeypatch.setattr(module, "prefix_attention", blind)
    found = verdicts(given, tokenizer)
    assert found["shared prompts, log-probs"] == "train with --prefix dense"
    assert found["shared prompts, gradients"] == "train with --prefix dense"
    assert found["step-0 ratio: as the update reads it"] == FIT
    assert table(check_model(given, tokenizer))[-1] == "what to trust: train with --prefix dense"


def test_a_model_that_shares_no_prompts_is_not_said_to_share_them(tokenizer):
    """Batches of shared prompts read it dense: a comparison would be of dense with dense."""
    given = model(tokenizer)
    given.config.sliding_window = given.model.config.sliding_window = 4
    given.model.config.layer_types = ["sliding_attention"] * 2
    found = check_model(given, tokenizer)
    (shared,) = [row for row in found if "shared" in row.check]
    assert re.match("ok: each answer is read with a prompt of its own, because .*sliding_attention",
                    shared.verdict) and shared.good and not shared.error  # fmt: skip
    assert table(found)[-1].endswith("as you like; each answer is read with a prompt of its own")


def test_a_tokenizer_of_another_model_is_found(tokenizer):
    ((_, _, _, verdict),) = check_model(model(tokenizer, vocab_size=100), tokenizer)
    assert re.match(r"do not train it: .*the tokenizer gives token \d+, .*belong together", verdict)


def test_the_table_of_a_model_on_disk_and_the_exit_status(tokenizer, tmp_path, capsys):
    given = model(tokenizer)
    given.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert doctor.check(tmp_path, CPU)
    shown = capsys.readouterr().out
    assert re.search(r"(?m)^head, backend \w+ +[\d.e-]+ +1.0e-04 +ok$", shown)
    (tmp_path / "model.safetensors").unlink()
    assert doctor.check(tmp_path, CPU)
    assert "no weights here" in capsys.readouterr().out


def test_the_servers_that_it_tells_to_start_are_those_of_the_documents():
    lines = doctor.server_lines()
    docs = Path(__file__).parent.parent.parent / "docs"
    labels = (docs / "labelling-endpoints.md").read_text()
    assert doctor.LABEL_SERVER in labels and doctor.LABEL_FLAGS in labels
    assert any(doctor.LABEL_SERVER in line for line in lines)
    command = " ".join((docs / "served-reward-model.md").read_text().replace("\\\n", " ").split())
    (served,) = [line.split(maxsplit=2)[2] for line in lines if "reward model" in line]
    assert served.replace("RUN", "runs/demo") in command
    flag = next(line for line in lines if "--reward-server" in line).split()[-2]
    assert flag in command and "vLLM" in lines[0]
