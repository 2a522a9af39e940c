"""Operators on a GPU: `make gpu-check` runs this folder; nothing is collected without a GPU.

TPPO_GPU_SMOKE=1 collects it on a CPU: what needs no GPU of it then runs on CPU tensors.
"""

from _gpu import DEVICE

collect_ignore_glob = [] if DEVICE else ["test_*.py"]
