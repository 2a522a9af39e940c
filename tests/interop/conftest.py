"""What tests of several peers share."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def installed(tmp_path):
    """The environment of a process in which tppo-kernels is installed, with its entry points."""
    import tomllib  # of Python 3.11

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    folder = tmp_path / "tppo_kernels_for_verl-0.1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: tppo-kernels-for-verl\n"
                                     "Version: 0.1.0\n")
    (folder / "entry_points.txt").write_text("[verl.plugins]\n" + "".join(
        f"{name} = {value}\n" for name, value in project["entry-points"]["verl.plugins"].items()))
    return {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
