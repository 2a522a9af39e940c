"""The command `tppo`, also as `python -m tppo`."""

from __future__ import annotations

import sys


def main() -> None:
    """Runs the command line, or says what is not installed and how to get it."""
    try:
        from tppo import cli
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] in ("tppo", "tppo_kernels"):
            raise
        sys.exit(f"tppo: {error.name} is not installed: pip install 'tppo-kernels[train]'")
    except KeyboardInterrupt:  # before the command line handles signals, nothing is under way
        sys.exit(130)
    cli.main()


if __name__ == "__main__":
    main()
