"""verl's own ways in: its plugin, its configuration, its dataset, a process of Ray."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from verl.utils.config import omega_conf_to_dataclass
from verl.utils.dataset.rl_dataset import RLHFDataset

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "examples/integrations/verl"


ASKS = """
import sys, verl
print("told", len(sys.modules["tppo_kernels.integrations.verl"]._algorithms._replaced)
      if "tppo_kernels.integrations.verl" in sys.modules else "nothing")
import verl.trainer.ppo.core_algos as algos
print(algos.compute_value_loss.__module__, "tppo" in algos.POLICY_LOSS_REGISTRY)
"""


def test_verl_loads_the_plugin_and_pays_when_it_needs_it(installed):
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", ASKS], env=installed,
                          capture_output=True, text=True)
    assert done.stdout.splitlines()[-2:] == ["told 0", "tppo_kernels.integrations.verl True"]
    lines = [x for x in done.stderr.splitlines() if x.startswith("tppo_kernels in verl 0.9.1: ")]
    assert any("loss_mode=tppo" in x for x in lines)


def test_verls_switch_keeps_the_plugin_out(installed):
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", ASKS], capture_output=True,
                          text=True, env=installed | {"VERL_USE_EXTERNAL_PLUGINS": "none"})
    assert done.stdout.splitlines()[-2:] == ["told nothing", "verl.trainer.ppo.core_algos False"]
    assert "tppo_kernels" not in done.stderr


@pytest.mark.slow
def test_a_process_of_ray_has_ours(installed):
    code = ("import ray\nray.init(num_cpus=1, include_dashboard=False)\n"
            "@ray.remote\ndef asks():\n"
            "    import torch, verl\n    from verl.trainer.ppo import core_algos, ray_trainer\n"
            "    mask = torch.ones(2, 5, dtype=torch.int64)\n    x = torch.randn(2, 2, 5)\n"
            "    data = verl.DataProto.from_dict(tensors=dict(token_level_rewards=x[0],\n"
            "        values=x[1], response_mask=mask))\n"
            "    out = ray_trainer.compute_advantage(data, 'gae', config={})\n"
            "    return (core_algos.compute_gae_advantage_return.__module__,\n"
            "            out.batch['advantages'].std().item())\n"
            "print(*ray.get(asks.remote()))")
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], env=installed,
                          capture_output=True, text=True)
    module, std = done.stdout.splitlines()[-1].split()
    assert module == "tppo_kernels.integrations.verl", done.stderr[-2000:]
    assert float(std) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(("name", "gpus", "prompts"), [("one_gpu", 1, 64), ("eight_gpus", 8, 512)])
def test_the_settings_are_verls(name, gpus, prompts):
    """Read by verl's own hydra configuration, which refuses a key that it does not have."""
    with initialize_config_dir(str(RECIPE), version_base=None):
        config = compose(name)
    assert config.trainer.n_gpus_per_node == gpus and config.data.train_batch_size == prompts
    assert config.algorithm.adv_estimator == "gae" and config.algorithm.use_kl_in_reward
    actor = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
    assert actor.policy_loss.loss_mode == "tppo" and actor.clip_ratio_c > 1e5
    assert actor.optim.lr == 1e-6
    actor.validate(gpus, prompts)


def test_the_script_reads_the_settings():
    done = subprocess.run(
        [sys.executable, "-W", "ignore", RECIPE / "train.py", f"--config-path={RECIPE}",
         "--config-name=one_gpu", "trainer.nnodes=3", "--cfg=job"], capture_output=True, text=True,
        env={**os.environ, "VERL_USE_EXTERNAL_PLUGINS": "none"})
    assert "loss_mode: tppo" in done.stdout and "nnodes: 3" in done.stdout, done.stderr[-2000:]
    assert "tppo_kernels in verl 0.9.1: " in done.stderr


def prepare(*arguments):
    return subprocess.run([sys.executable, RECIPE / "data.py", *arguments], capture_output=True,
                          text=True)


def test_the_prepared_prompts_are_read_by_verls_dataset(tmp_path):
    rows = [{"prompt": [{"role": "user", "content": "red shoes"}], "suggested_length": 4},
            {"prompt": "blue hat"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    done = prepare(tmp_path / "a.jsonl", tmp_path / "a.parquet")
    assert done.stdout == f"2 rows in {tmp_path / 'a.parquet'}\n", done.stderr
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "red": 1, "shoes": 2, "blue": 3, "hat": 4},
                                       "[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[UNK]", eos_token="[UNK]",
        chat_template="{% for m in messages %}{{ m['content'] }} {% endfor %}")
    with initialize_config_dir(str(RECIPE), version_base=None):
        config = compose("one_gpu").data
    dataset = RLHFDataset(str(tmp_path / "a.parquet"), tokenizer, config)
    assert len(dataset) == 2
    first, second = dataset[0], dataset[1]
    assert first["raw_prompt"] == rows[0]["prompt"]
    assert second["raw_prompt"] == [{"role": "user", "content": "blue hat"}]
    assert first["extra_info"]["suggested_length"] == 4 and first["data_source"] == "tppo"


@pytest.mark.parametrize(("text", "words"), [
    ("", "has no line"), ("{}\n", "line 1 is no JSON object with a `prompt`"),
    ('{"prompt": "a"}\n[1]\n', "line 2 is no JSON object"),
    ('{"prompt": [{"role": "user"}]}\n', "line 1: `prompt` is neither a text nor"),
])
def test_bad_prompts_are_one_sentence_and_no_file(tmp_path, text, words):
    (tmp_path / "a.jsonl").write_text(text)
    done = prepare(tmp_path / "a.jsonl", tmp_path / "a.parquet")
    assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["a.jsonl"]
