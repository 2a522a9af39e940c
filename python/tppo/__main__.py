"""`python -m tppo` is `tppo`."""

from tppo.cli import main

main()
