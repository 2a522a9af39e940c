"""TRL from the index against `tppo_kernels.integrations.trl`."""

import os
from importlib.metadata import version

import trl


def test_the_environment_holds_the_version_that_it_is_named_for():
    wanted = os.environ["TPPO_PEER"].partition("-")[2] or "1.16"
    assert trl.__version__.startswith(wanted) and version("trl") == trl.__version__
