"""OpenRLHF's own command line, with our operators in each process that Ray starts.

    python examples/integrations/openrlhf/train.py --KEY VALUE ...

Three lines are ours.  OpenRLHF starts Ray only where it is not started yet, and would give its
processes the three variables that stand here.  An OpenRLHF that is absent or another version ends
the script with one sentence.
"""

import os
import runpy
import sys

from tppo_kernels.integrations import openrlhf

VARIABLES = {"TOKENIZERS_PARALLELISM": "true", "NCCL_DEBUG": "WARN",
             "RAY_ENABLE_ZERO_COPY_TORCH_TENSORS": "1"}

if __name__ == "__main__":
    try:
        openrlhf.patch()
    except ImportError as error:
        sys.exit(str(error))
    import ray

    given = {name: os.environ.get(name, value) for name, value in VARIABLES.items()}
    ray.init(runtime_env={"worker_process_setup_hook": openrlhf.HOOK, "env_vars": given})
    runpy.run_module("openrlhf.cli.train_ppo_ray", run_name="__main__")
