"""What a cluster needs of a run of `tppo`: prompts, the policy to start from, the reward model.

    python examples/integrations/cluster_data.py runs/default cluster

writes into the second folder

    train.jsonl, test.jsonl   a row a session: `prompt` as a chat of one message, `env_class`, and
                              `suggested_length`, where the length penalty bites, in tokens
    policy/                   the SFT model, whole, with a chat template that gives its prompts back
                              as they stood in training, where its tokenizer has none
    reward-model/             the token reward model, whole
    settings.yaml             how the run pays tokens and samples, under SkyRL's names

Adapters are merged into their base.  The reward model must read the policy's own tokens.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

import torch
from transformers import AutoTokenizer

from tppo.models.adapters import is_adapter
from tppo.models.folder import save_weights
from tppo.models.load import load_from, load_policy, load_reward_model
from tppo.options import Options
from tppo.sessions.prompts import prompt_text
from tppo.sessions.session import read_sessions
from tppo.settings import from_dict
from tppo.store.yaml_file import read_yaml, write_yaml

AS_IT_STANDS = "{{ bos_token }}{% for message in messages %}{{ message['content'] }}{% endfor %}"


def settings(options: Options) -> dict:
    """The run's settings that SkyRL has too: what tokens are paid, PPO's own, sampling."""
    ppo, generate = options.settings.ppo, options.settings.generate
    paid = {"mode": ppo.reward, "values": list(ppo.reward_values)}
    if ppo.length_alpha is not None:
        paid["length_alpha"] = ppo.length_alpha
    return {"reward_model": paid, "trainer": {"algorithm": {
        "gamma": ppo.gamma, "lambd": ppo.lam, "eps_clip_low": ppo.clip, "eps_clip_high": ppo.clip,
        "kl_loss_coef": ppo.kl_coef, "value_clip": ppo.value_clip,
    }}, "generator": {"sampling_params": {"temperature": generate.temperature}}}


def rows(run: Path, split: str, penalty: bool) -> list[dict]:
    """The prompts of a split as a trainer of a cluster reads them; penalty: of the length."""
    median = json.loads((run / "map/lengths.json").read_text())["median_query_tokens"]
    found = []
    for session in read_sessions(run / f"data/{split}.jsonl"):
        n = len(session.targets)
        found.append({
            "prompt": [{"role": "user", "content": prompt_text(session)}], "env_class": "tppo",
            **({"suggested_length": float(median * n + n - 1)} if penalty else {})})
    return found


def write_model(folder: Path, out: Path, *, classifier: bool) -> None:
    """A model of the run as a whole one: copied, or an adapter merged into what it stands on."""
    shutil.rmtree(out, ignore_errors=True)
    if not is_adapter(folder):
        shutil.copytree(folder, out)
        return
    load = load_reward_model if classifier else load_policy
    save_weights(load(folder, torch.device("cpu")), out)
    load_from(AutoTokenizer, folder).save_pretrained(out)


def main(arguments: list[str] | None = None) -> None:
    """Errors: SystemExit naming what the run folder lacks."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, help="run folder of tppo, up to train-rm")
    parser.add_argument("out", type=Path, help="folder to write")
    given = parser.parse_args(arguments)
    for needed in ("run.yaml", "data/train.jsonl", "map/lengths.json", "sft/model",
                   "train-rm/model"):
        if not (given.run / needed).exists():
            sys.exit(f"{given.run} has no {needed}, expected a run folder of tppo whose stages are "
                     "done up to train-rm")
    given.out.mkdir(parents=True, exist_ok=True)
    file = given.run / "run.yaml"
    options = from_dict(Options, read_yaml(file)[0], str(file))
    write_yaml(given.out / "settings.yaml", settings(options))
    ppo = options.settings.ppo
    for split in ("train", "test"):
        lines = [json.dumps(row, ensure_ascii=False)
                 for row in rows(given.run, split, ppo.length_alpha is not None)]
        (given.out / f"{split}.jsonl").write_text("".join(f"{line}\n" for line in lines))
    write_model(given.run / "sft/model", given.out / "policy", classifier=False)
    write_model(given.run / "train-rm/model", given.out / "reward-model", classifier=True)
    tokenizer = AutoTokenizer.from_pretrained(given.out / "policy")
    if not tokenizer.chat_template:
        tokenizer.chat_template = AS_IT_STANDS
        tokenizer.save_pretrained(given.out / "policy")
    print(f"{given.out}: {', '.join(sorted(path.name for path in given.out.iterdir()))}")
    if ppo.format_cost:
        print(f"not taken along: ppo.format_cost, {ppo.format_cost:g} for a fault of the form; "
              "rewards there are the reward model's alone")


if __name__ == "__main__":
    main()
