"""A PPO script of NeMo-RL, the GAE of its driver ours.

    python examples/integrations/nemo_rl/train.py NEMO/examples/run_ppo.py --config CONFIG ...

Two lines are ours.  A NeMo-RL that is absent or another version ends the script with one sentence.
"""

import runpy
import sys

from tppo_kernels.integrations import nemo_rl

if __name__ == "__main__":
    try:
        nemo_rl.patch()
    except ImportError as error:
        sys.exit(str(error))
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")
