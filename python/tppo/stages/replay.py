"""A batch that PPO skipped, kept on the disk, and `tppo replay`, which repeats its step.

`spoilt/train-step-12-1.json` beside the stage's folder, with its tensors in a `.safetensors` of the
same name: no pickle.  A run keeps the newest 20 of them, of 2 GiB at most.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from tppo.errors import DataError
from tppo.flags import parse
from tppo.progress import say, status
from tppo.settings import FilePath, section
from tppo.store.disk import DiskFull, NotWritable, space_for
from tppo.store.jsonl import read_object, write_json

if TYPE_CHECKING:
    from tppo.methods.experience import Experience
    from tppo.methods.ppo import PPO
    from tppo.methods.spoilt import SpoiltBatch
    from tppo.stages.journal import Journal
    from tppo.stages.loop import Loop

ABOUT = (
    "Repeats the step of a batch that PPO skipped because its figures were not finite, with the "
    "weights of the newest checkpoint and TPPO_CHECK=1, and names the first operator whose result "
    "is not finite. Nothing of the run is changed."
)
FOLDER, MOST, MOST_BYTES = "spoilt", 20, 2 << 30  # batches that a run keeps, and what they take
SUFFIX = ".safetensors"
TENSORS = ("rewards", "category", "logprobs", "values", "advantages", "returns")
MASKS = ("action", "policy", "critic", "kl")
KEYS = {"step", "part", "why", "prompts", "responses", "prefix", "pad_id", "stage"}


@section
class ReplayOptions:
    """Flags of `tppo replay`."""

    batch: tyro.conf.Positional[FilePath | None] = None
    """The file that the warning of the skipped batch names: RUN/spoilt/train-step-12-1.json."""
    device: str = "auto"
    """auto, cpu, cuda, or cuda:1 for the second GPU."""


def write_spoilt(stage: Path, batch: SpoiltBatch) -> str:
    """Keep a batch beside the folder of the stage under way, and the newest of those before it; the
    path, or "" where the disk does not take it, which the training goes on without.
    """
    from safetensors.torch import save_file

    folder = stage.parent / FOLDER
    folder.mkdir(exist_ok=True)
    name = f"{stage.name.removesuffix('.tmp')}-step-{batch.step}"
    number = 1
    while (folder / f"{name}-{number}.json").exists():
        number += 1
    path, data = folder / f"{name}-{number}.json", batch.data
    given = {name: getattr(data, name) for name in TENSORS} | data.masks._asdict()
    tensors = {key: x.detach().cpu().contiguous().clone()
               for key, x in given.items() if x is not None}  # fmt: skip
    _make_room(folder, sum(x.nbytes for x in tensors.values()))
    try:
        with space_for(folder, "a batch that is skipped", "It is skipped all the same."):
            save_file(tensors, path.with_suffix(SUFFIX))
            write_json(path, {
                "step": batch.step, "part": batch.part, "why": batch.why, "stage": stage.name,
                "prompts": [[*ids] for ids in data.batch.prompt_ids],
                "responses": [[*ids] for ids in data.batch.response_ids],
                "prefix": data.batch.prefix, "pad_id": data.batch.pad_id,
            })  # fmt: skip
    except (DiskFull, NotWritable) as error:
        path.with_suffix(SUFFIX).unlink(missing_ok=True)
        say(f"WARNING: {error}")
        return ""
    return str(path)


def _make_room(folder: Path, nbytes: int) -> None:
    """Delete the oldest batches until one more of so many bytes is within both limits, and what a
    kill has left of one.
    """
    kept = {file.with_suffix("") for file in folder.glob("*.json")}
    for file in folder.glob(f"*{SUFFIX}"):
        if file.with_suffix("") not in kept:
            file.unlink()
    newest = sorted(folder.glob(f"*{SUFFIX}"), key=lambda file: -file.stat().st_mtime)
    total = nbytes
    for number, file in enumerate(newest, 2):
        total += file.stat().st_size
        if number > MOST or total > MOST_BYTES:
            file.with_suffix(".json").unlink(missing_ok=True)  # first: it names the other
            file.unlink()


def main(arguments: list[str]) -> None:
    """Entry point of `tppo replay`."""
    options = parse(ReplayOptions, "tppo replay", ABOUT, arguments)
    path = options.batch
    if path is None:
        raise DataError("no file was given, expected the .json that the warning of the skipped "
                        "batch names: tppo replay RUN/spoilt/train-step-12-1.json")  # fmt: skip
    kept = read_kept(path)
    with status("loading the run"):
        loop = loop_of_run(path.absolute().parent.parent, options.device)
    print("\n".join(replay(loop.trainer, loop, kept, path)))


def replayed(path: Path, out: Path, loop_in: Callable[[Path, Journal], Loop]) -> str:
    """The same of a training by the Python door in the folder `out`.

    loop_in: its loop in the folder of its stage, which writes into a journal's.
    """
    from tppo.stages.journal import Journal

    kept = read_kept(path)
    with tempfile.TemporaryDirectory() as written:
        loop = loop_in(_stage_folder(out), Journal(Path(written)))
        loop.resume()
        return "\n".join(replay(loop.trainer, loop, kept, path))


def _stage_folder(out: Path) -> Path:
    """Where checkpoints are: of a training under way, else of one that has ended."""
    return next((out / name for name in ("train.tmp", "train") if (out / name).is_dir()), out)


def read_kept(path: Path) -> dict[str, Any]:
    """The JSON of a batch.  Errors: DataError naming the file, and what it should be."""
    kept = read_object(path)
    if kept is None or not kept.keys() >= KEYS:
        raise DataError(f"{path}: no batch that PPO has skipped, expected the .json that the "
                        "warning names (RUN/spoilt/train-step-N-1.json)")  # fmt: skip
    tensors = path.with_suffix(SUFFIX)
    if not tensors.is_file():
        raise DataError(f"{tensors}: no such file, expected the batch's tensors beside {path.name}")
    return kept


def loop_of_run(out: Path, device: str) -> Loop:
    """The PPO loop of a run folder at its newest checkpoint; it writes into a folder of its own.

    Errors: DataError where the folder is not that of a run of stages.
    """
    from tppo.config import Config, fill_defaults
    from tppo.models.parallel import ALONE
    from tppo.settings import from_dict
    from tppo.stages.journal import Journal
    from tppo.stages.ppo import new_loop
    from tppo.stages.run import Run
    from tppo.store.yaml_file import read_yaml

    path = out / "run.yaml"
    if not path.is_file():
        raise DataError(f"{path}: no such file; replay repeats batches of a run of stages; those "
                        "of a reward of one's own are repeated in Python, by "
                        "tppo.PPOTrainer(...).replay(FILE) with the same arguments")  # fmt: skip
    values, line_of = read_yaml(path)
    config = from_dict(Config, values.get("settings", {}), str(path), line_of)
    model = values.get("model")
    run = Run(out, fill_defaults(config, model is not None), values.get("seed", 0),
              values.get("data"), model, device)  # fmt: skip
    loop = new_loop(run, _stage_folder(out), ALONE, Journal(Path(tempfile.mkdtemp())))
    loop.resume()
    return loop


def replay(ppo: PPO, loop: Loop, kept: dict[str, Any], path: Path) -> list[str]:
    """What repeating a step says, in lines."""
    from tppo.methods.spoilt import SpoiltRollout

    data = experience_of(kept, path, ppo)
    lines = [f"step {kept['step']} ({kept['part']}) was skipped: {kept['why']}",
             f"repeated with the weights after step {ppo.step_count}"]  # fmt: skip
    lines += _not_finite(data)
    before = os.environ.get("TPPO_CHECK")
    os.environ["TPPO_CHECK"] = "1"
    try:
        if kept["part"] == "rollout":
            _score_again(ppo, loop, data)
        _gradients(ppo, data)
    except (FloatingPointError, SpoiltRollout) as error:
        return [*lines, f"found: {error}"]
    finally:
        os.environ.pop("TPPO_CHECK") if before is None else os.environ.update(TPPO_CHECK=before)
    return [*lines, "every figure is finite with these weights: those of the skipped step were "
            "others; --ppo.checkpoint-every 1 keeps the ones before each step"]  # fmt: skip


def experience_of(kept: dict[str, Any], path: Path, ppo: PPO) -> Experience:
    """The batch as PPO had it.  Errors: DataError where the tensors are not those of the JSON."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from tppo.methods.advantages import Masks
    from tppo.methods.experience import Experience
    from tppo.models.batch import Batch

    device, file = ppo.models.policy.device, path.with_suffix(SUFFIX)
    batch = Batch(kept["prompts"], kept["responses"], kept["pad_id"], device, kept["prefix"])
    try:
        found = {name: x.to(device) for name, x in load_file(file).items()}
    except SafetensorError as error:
        raise DataError(f"{file}: {error}, expected tensors: is the file cut?") from None
    shapes = {tuple(x.shape) for x in found.values()}
    needed = {*MASKS, "logprobs", "advantages"}
    if shapes != {tuple(batch.mask.shape)} or not needed <= found.keys():
        raise DataError(f"{file}: tensors {sorted(found)} of shapes {sorted(shapes)}, expected "
                        f"those of {path.name}, {[*batch.mask.shape]} each")  # fmt: skip
    masks = Masks(*(found[name].to(torch.bool) for name in MASKS))
    return Experience(batch, masks, **{name: found.get(name) for name in TENSORS})  # type: ignore


def _not_finite(data: Experience) -> list[str]:
    """A line for each tensor of the batch that is not finite, with the first answer and token."""
    lines = []
    for name in TENSORS:
        x = getattr(data, name)
        bad = None if x is None or not x.is_floating_point() else (~x.isfinite()).nonzero()
        if bad is not None and len(bad):
            row, token = bad[0].tolist()
            lines.append(f"{name} of the batch: {x[row, token].item()} at token {token} of "
                         f"response {row} ({len(bad)} values)")  # fmt: skip
    return lines


def _score_again(ppo: PPO, loop: Loop, data: Experience) -> None:
    """Read and rate the answers again.  Errors: SpoiltRollout, FloatingPointError."""
    from tppo.models.rollout import RolloutBatch

    places = {tuple(ids): row for row, ids in enumerate(loop.train.ids)}
    prompts, responses = data.batch.prompt_ids, data.batch.response_ids
    try:
        rows = [places[tuple(ids)] for ids in prompts]
    except KeyError:
        say("a prompt of the batch is no longer among the training sessions: its answers are not "
            "rated again")  # fmt: skip
        return
    ends = ["eos" if ids and ids[-1] in ppo.eos_ids else "length" for ids in responses]
    rollout = RolloutBatch([[*p] for p in prompts], [[*r] for r in responses], None, ends)
    ppo.score(rollout, ppo.answers(loop.train.rows(rows), rollout))


def _gradients(ppo: PPO, data: Experience) -> None:
    """Losses and gradients of the batch, without a step; FloatingPointError for what is not finite
    although no operator's result was that.
    """
    import torch

    from tppo.models.guards import not_finite

    losses = ppo.gradients(data, ppo.part_size.tokens)
    sums = {"policy loss": sum(part.policy for part in losses)}
    if ppo.models.critic is not None:
        sums["value loss"] = sum(part.value for part in losses if part.value is not None)
    norms = {name: torch.nn.utils.get_total_norm([p.grad for p in model.parameters()
                                                  if p.grad is not None])
             for name, model in ppo.models.trained.items()}  # fmt: skip
    _, why = not_finite("found", ppo.models.trained, sums, norms)
    if why:
        raise FloatingPointError(f"{why}, and every operator's results were finite: a layer of "
                                 "the model itself, between two operators")  # fmt: skip
