"""A CPU as a platform of verl, through the place that verl has for others' devices.

verl has no such platform: without one it takes "cuda", and its workers ask that for their device.
Loaded by `VERL_USE_EXTERNAL_MODULES=_verl_cpu` and chosen by `VERL_PLATFORM=cpu`; its FSDP engines,
which are listed for cuda alone, are reached by `VERL_ENGINE_DEVICE=cuda`.
"""

from types import SimpleNamespace

import torch
from verl.plugin.platform.platform_base import PlatformBase
from verl.plugin.platform.platform_manager import PlatformRegistry


def nothing(*_, **__):
    """What a CPU has nothing to do for, and no memory of its own to count."""
    return 0


@PlatformRegistry.register(platform="cpu")
class PlatformCPU(PlatformBase):
    """Everything that PlatformBase asks for."""

    device_name = vendor_name = "cpu"
    device_module = SimpleNamespace(
        **{name: nothing for name in ("max_memory_allocated", "max_memory_reserved",
                                      "memory_allocated", "memory_reserved", "empty_cache",
                                      "synchronize", "set_device", "reset_peak_memory_stats")},
        get_device_name=lambda *_: "CPU", is_available=lambda: True,
        current_device=lambda: torch.device("cpu"), mem_get_info=lambda *_: (0, 0))
    is_available = is_ipc_supported = lambda self: True
    current_device = lambda self: torch.device("cpu")  # noqa: E731
    device_count = lambda self: 1  # noqa: E731
    set_device = synchronize = set_allocator_settings = empty_cache = nothing
    profiler_start = profiler_stop = nothing
    get_device_capability = lambda self, *_: (None, None)  # noqa: E731
    communication_backend_name = lambda self: "gloo"  # noqa: E731
    visible_devices_envvar = lambda self: "CUDA_VISIBLE_DEVICES"  # noqa: E731
    ray_resource_name = lambda self: "CPU"  # noqa: E731
    ray_noset_envvars = lambda self: []  # noqa: E731

    def manual_seed(self, seed):
        torch.manual_seed(seed)

    manual_seed_all = manual_seed

    def nvtx_range(self, msg):
        import contextlib

        return contextlib.nullcontext()

    def cudart(self):
        return None
