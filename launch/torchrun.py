"""torchrun that keeps the exit codes of the workers; the same as `python -m olmoe_train.cli.torchrun`."""

import sys

from olmoe_train.cli.torchrun import main

sys.exit(main(sys.argv[1:]))
