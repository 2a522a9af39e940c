"""OpenRLHF's own command line, with our operators in each process that Ray starts.

    python examples/integrations/openrlhf/train.py --KEY VALUE ...

Three lines are ours.  OpenRLHF starts Ray only where it is not started yet.
"""

import runpy

import ray

from tppo_kernels.integrations import openrlhf

if __name__ == "__main__":
    openrlhf.patch_when_imported()
    ray.init(runtime_env={"worker_process_setup_hook": openrlhf.HOOK})
    runpy.run_module("openrlhf.cli.train_ppo_ray", run_name="__main__")
