"""A PPO script of NeMo-RL, the GAE of its driver ours.

    python examples/integrations/nemo_rl/train.py NEMO/examples/run_ppo.py --config CONFIG ...

Two lines are ours.
"""

import runpy
import sys

from tppo_kernels.integrations import nemo_rl

if __name__ == "__main__":
    nemo_rl.patch()
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")
