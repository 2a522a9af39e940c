"""slime's own train.py, its advantages ours in each process that Ray starts.

    PYTHONPATH=SLIME python examples/integrations/slime/train.py SLIME/train.py --KEY VALUE ...

Three lines are ours.  For rewards of tokens there is nothing to write: add
`--custom-advantage-function-path tppo_kernels.integrations.slime.token_advantages`.  A slime that
is absent or another version ends the script with one sentence.
"""

import runpy
import sys

from tppo_kernels.integrations import slime

if __name__ == "__main__":
    try:
        slime.patch()
    except ImportError as error:
        sys.exit(str(error))
    import ray

    ray.init(runtime_env={"worker_process_setup_hook": slime.HOOK})
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")
