"""Before SFT one sentence says where a stage would take more memory than is free."""

from dataclasses import replace

import pytest
import torch
from test_preflight import log, tokenizer, write  # noqa: F401  (two fixtures and a function)
from transformers import LlamaConfig, LlamaForCausalLM

from tppo.cli import main
from tppo.config import Config
from tppo.models.config import RewardServerConfig
from tppo.stages import free_memory
from tppo.stages.free_memory import compare, free_nbytes
from tppo.stages.needs import GB, Need
from tppo.stages.run import Run

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def need(stage, nbytes, host=0):
    return Need(stage, "a training step", nbytes, 0, 0, 0, 0, 0, 0, host)


def test_a_gpu_too_small_stops_and_what_the_plan_may_be_wrong_by_does_not(capfd):
    needs = [need("sft", 20 * GB), need("train", 31 * GB, host=9 * GB), need("eval", 30 * GB)]
    with pytest.raises(ValueError, match=r"own/big: train would take 31.0 GB of cuda:0 at its "
                       r"highest \(a training step\), and 24.0 GB are free; `tppo plan --model "
                       r"own/big`") as raised:  # fmt: skip
        compare(needs, 24 * GB, GPU, "own/big")
    assert "\n" not in str(raised.value)
    compare(needs, 27 * GB, GPU, "own/big")  # 31 less 15 % is below it
    assert "WARNING: train would take 31.0 GB" in " ".join(capfd.readouterr().err.split())
    compare(needs, 31 * GB, GPU, "own/big")
    assert capfd.readouterr().err == ""


def test_a_cpu_counts_the_best_weights_and_warns(capfd):
    compare([need("train", 31 * GB, host=9 * GB)], 39 * GB, CPU, "big")
    shown = " ".join(capfd.readouterr().err.split())
    assert "WARNING: train would take 40.0 GB of cpu" in shown and "39.0 GB are free" in shown
    compare([need("train", 31 * GB, host=9 * GB)], 40 * GB, CPU, "big")
    assert capfd.readouterr().err == ""


def test_what_is_free_counts_what_the_process_has_and_the_limit_of_a_container(
    tmp_path, monkeypatch
):
    assert 2**28 < free_nbytes(CPU) < 2**46  # of this machine
    monkeypatch.setattr(free_memory, "_PROC", tmp_path)
    monkeypatch.setattr(free_memory, "_CGROUP", tmp_path)
    (tmp_path / "self").mkdir()
    (tmp_path / "self/status").write_text("Name:\tpython -m x\nVmRSS:\t 70 kB\nRssAnon:\t 50 kB\n")
    (tmp_path / "meminfo").write_text("MemTotal:  9000 kB\nMemAvailable:  800 kB\nHugePages:  0\n")
    assert free_nbytes(CPU) == 850 * 1024
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text(f"{600 * 1024}\n")
    assert free_nbytes(CPU) == 850 * 1024
    (tmp_path / "memory.max").write_text(f"{1000 * 1024}\n")
    assert free_nbytes(CPU) == 450 * 1024
    (tmp_path / "memory.stat").write_text(f"anon 5\ninactive_file {30 * 1024}\n")
    assert free_nbytes(CPU) == 480 * 1024
    (tmp_path / "memory.max").write_text(f"{100 * 1024}\n")  # lower than what is used
    assert free_nbytes(CPU) == 50 * 1024


def test_sft_says_it_before_its_first_step(tokenizer, log, tmp_path, monkeypatch, capfd):  # noqa: F811
    given = write(tmp_path / "given", tokenizer, len(tokenizer), max_position_embeddings=512)
    flags = ["sft", "--out", str(log), "--model", str(given), "--sft.max-steps", "1",
             "--sft.batch-size", "4"]  # fmt: skip
    monkeypatch.setattr(free_memory, "free_nbytes", lambda device: GB)
    main(flags)
    assert "GB of cpu" not in capfd.readouterr().err  # a model too small to be planned
    monkeypatch.setattr(free_memory, "SMALLEST", 0)
    main(flags)
    shown = " ".join(capfd.readouterr().err.split())
    assert "would take 1." in shown and f"`tppo plan --model {given}`" in shown.replace("\n", "")
    assert shown.index("would take") < shown.index("sft: stopped at step 1")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_what_is_free_on_a_gpu_counts_what_torch_has_of_it():
    free = free_nbytes(GPU)
    kept = torch.ones(64 << 20, device=GPU)
    assert abs(free_nbytes(GPU) - free) < 64 << 20
    del kept


def test_a_reward_model_at_a_server_is_not_counted(tmp_path, monkeypatch):
    found = []
    monkeypatch.setattr(free_memory, "plan", lambda config, how, work, guide: found.append(work))
    monkeypatch.setattr(free_memory, "compare", lambda *given: None)
    monkeypatch.setattr(free_memory, "SMALLEST", 0)
    server = RewardServerConfig(base_url="http://127.0.0.1:8000")
    config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                         num_attention_heads=1)  # fmt: skip
    run = Run(tmp_path, replace(Config(), reward_server=server))
    free_memory.check_memory(run, LlamaForCausalLM(config), 10, 5)
    assert [work.reward_server for work in found] == [server]
