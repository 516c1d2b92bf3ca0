"""`python -m mlxterp`: the command line."""

import sys

from mlxterp.cli.main import main

sys.exit(main())
