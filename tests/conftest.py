"""Every uninitialised tensor holds NaN, so that an unwritten output is seen; seeds are fixed."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _poisoned_empty():
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
