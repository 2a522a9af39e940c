"""`make gpu-wheels DIR=...`: what gpu-check wants beyond a usual machine with PyTorch, as wheels.

A GPU machine without network gets that folder, and gpu-check reads it by `--wheels DIR`: each
wheel is unpacked into a folder of the run, before which nothing is installed. Names and versions
stand here alone. None brings torch or a CUDA library along.
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
import zipfile
from pathlib import Path

PYTHON = "3.12"
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_17_x86_64",
             "manylinux2014_x86_64", "any")
PRESENT = ("transformers", "tokenizers", "safetensors", "rich", "sacrebleu")  # of the trainer's
TRAINER = ("tyro==1.0.17", "docstring-parser==0.18.0", "typeguard==4.6.1", "pydantic==2.14.4",
           "pydantic-core==2.50.5", "annotated-types==0.8.0", "typing-extensions==4.16.0",
           "typing-inspection==0.4.5", "ruamel.yaml==0.19.1", "icu4py==1.2.0")
PEERS = ("liger-kernel==0.8.5", "cut-cross-entropy==25.1.1", "trl==1.16.0", "datasets==5.2.0",
         "dill==0.4.1", "multiprocess==0.70.19", "torchrl==0.14.1", "tensordict==0.14.3",
         "pyvers==0.2.3", "hoptorch==0.1.4", "verl==0.9.1")
APART = ("trl==1.12.0",)  # the last with a PPO trainer; another release of the same is in PEERS


def download(folder: Path, python: str = PYTHON) -> None:
    """Fetches all wheels for one version of Python on x86-64 Linux; their needs are in the list."""
    abi = f"cp{python.replace('.', '')}"
    for target, names in ((folder, (*TRAINER, *PEERS)), (folder / "apart", APART)):
        target.mkdir(parents=True, exist_ok=True)
        subprocess.run(
            [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check",
             "--no-deps", "--only-binary=:all:", "--implementation", "cp",
             "--python-version", python, *(x for a in (abi, "abi3", "none") for x in ("--abi", a)),
             *(x for p in PLATFORMS for x in ("--platform", p)), "--dest", str(target), *names],
            check=True)


def unpack(folder: Path, target: Path) -> tuple[Path, Path]:
    """(a folder with all that lies in `folder`, one with what lies apart), for PYTHONPATH.

    A wheel is an archive of what is installed; without scripts nothing else is to be done.
    """
    wheels = sorted(folder.glob("*.whl"))
    if not wheels:
        raise FileNotFoundError(f"--wheels {folder}: no wheel lies there; make gpu-wheels DIR="
                                f"{folder} fetches them on a machine with network")
    places = target / "site", target / "apart"
    for place, found in zip(places, (wheels, sorted(folder.glob("apart/*.whl"))), strict=True):
        place.mkdir(parents=True, exist_ok=True)
        for wheel in found:
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(place)
    return places


def absent() -> list[str]:
    """Modules of the trainer and of the peers that this Python does not find."""
    modules = ("tyro", "liger_kernel", "cut_cross_entropy", "trl", "torchrl", "verl")
    return [m for m in modules if importlib.util.find_spec(m) is None]


def main() -> None:
    """Downloads into the folder that is named."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", default=PYTHON, help=f"of the GPU machine (default {PYTHON})")
    options = parser.parse_args()
    download(options.folder, options.python)
    wheels = sorted(options.folder.rglob("*.whl"))
    size = sum(w.stat().st_size for w in wheels)
    print(f"{len(wheels)} wheels, {size / 1e6:.1f} MB, in {options.folder}: copy it to the GPU "
          f"machine, and there: make gpu-check WHEELS={options.folder}")


if __name__ == "__main__":
    main()
