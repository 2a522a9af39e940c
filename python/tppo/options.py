"""The flags of the commands; this file loads no torch, so that `tppo --help` is there at once."""

from __future__ import annotations

import re
from dataclasses import field
from pathlib import Path
from typing import Annotated

import tyro
from pydantic import AfterValidator

from tppo.config import Config
from tppo.settings import Count, FilePath, Seed, Text, section


def _device(name: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:[0-9]+)?", name):
        raise ValueError(f"was {name!r}, expected auto, cpu, cuda or cuda:N")
    return name


@section
class Options:
    """Flags of every command; a single stage starts from its run folder's settings."""

    data: FilePath | None = None
    """Log file, in any format of --format; by default sessions are generated."""
    out: FilePath = Path("runs/default")
    """The run folder."""
    seed: Seed = 0
    """Decides everything random."""
    model: FilePath | None = None
    """A causal LM: a local folder, a .gguf file, or an id of the Hugging Face hub (owner/name); by
    default a small Llama from scratch. Code that comes with it is never executed."""
    device: Annotated[str, AfterValidator(_device)] = "auto"
    """auto, cpu, cuda, or cuda:1 for the second GPU."""
    threads: Count | None = None
    """CPU threads; by default 1 for the small model (more cost time there), else torch's own."""
    round: Count = 1
    """Of a single stage: later rounds lie in folders of their own (generate-2), and read of every
    other stage the newest round up to theirs."""
    config: FilePath | None = None
    """YAML file of settings, or the run.yaml of an earlier run; flags go before it."""
    settings: Annotated[Config, tyro.conf.arg(name="")] = field(default_factory=Config)


@section
class RunOptions:
    """Flags of `tppo run`."""

    baselines: bool = False
    """Train two baselines too, each as long as PPO takes, for the closing table: on labels of whole
    answers, and with the same rewards paid at the end (`tppo baselines` is the stage)."""
    options: Annotated[Options, tyro.conf.arg(name="")] = field(default_factory=Options)


@section
class LabelOptions:
    """Flags of `tppo label`: with one of the first three, only that is done."""

    agreement: FilePath | None = None
    """Labels to compare the run's with: agreement of words and answers, Cohen's kappa."""
    export_batch: FilePath | None = None
    """OpenAI batch file to write: what the endpoint's model has not answered yet."""
    import_batch: FilePath | None = None
    """Output of such a batch, to be checked and kept for the label stage."""
    options: Annotated[Options, tyro.conf.arg(name="")] = field(default_factory=Options)

    def task(self) -> tuple[str, Path] | None:
        """The one thing to do instead of the stage, and its file."""
        tasks = ("agreement", "export_batch", "import_batch")
        given = [(name, getattr(self, name)) for name in tasks if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{', '.join(name for name, _ in given)} were given, expected one")
        return given[0] if given else None


@section
class TrainOptions:
    """Flags of `tppo train`: with --reward no labels and no reward model are needed."""

    reward: Text | None = None
    """A reward function of your own, module:function, f(prompts, completions, **columns) -> list:
    trains --model on the prompts of --data, a JSONL file with a text or a chat in "prompt"; the
    other columns reach the function by name. `help(tppo.PPOTrainer)` says what it may return."""
    heldout: FilePath | None = None
    """With --reward: prompts by whose answers the weights are chosen; without, the last are."""
    judge: Text | None = None
    """With --heldout: who judges those, module:function, as --reward but a number an answer."""
    options: Annotated[Options, tyro.conf.arg(name="")] = field(default_factory=Options)


@section
class PairOptions:
    """Flags of `tppo ser` and `tppo pit`: with --pairs they need no run of stages."""

    pairs: FilePath | None = None
    """Labelled pairs instead of the run's own answers: a JSONL file of {"prompt", "chosen",
    "rejected"}, texts or chats, or of "chosen" and "rejected" alone in HH-RLHF's layout. Trains
    --model; `help(tppo.ser)` and `help(tppo.pit)` say more."""
    heldout: FilePath | None = None
    """With ser --pairs: more of them, for the figures; by default a share of the pairs."""
    unlabelled: FilePath | None = None
    """With ser --pairs: pairs that nobody has labelled, {"prompt", "answers": [one, another]}."""
    skip_bad: bool = False
    """With --pairs: leave pairs out that are wrong, instead of stopping at the first."""
    options: Annotated[Options, tyro.conf.arg(name="")] = field(default_factory=Options)
