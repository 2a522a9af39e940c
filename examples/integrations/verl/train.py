"""verl's own entry point, its PPO functions and its rewards of tokens on our operators.

    python examples/integrations/verl/train.py --config-path="$PWD/examples/integrations/verl" \
      --config-name=one_gpu KEY=VALUE ...

Two lines are ours, for this process; in the processes that Ray starts verl loads our plugin by
itself, and so it does here where tppo-kernels is installed rather than on the path.  A verl that is
absent or another version ends the script with one sentence.
"""

import sys

from tppo_kernels.integrations import verl

if __name__ == "__main__":
    try:
        verl.patch()
    except ImportError as error:
        sys.exit(str(error))
    from verl.trainer.main_ppo import main

    main()
