"""torchrun that keeps the workers' exit codes: see olmoe_train/cli/launch.py."""

import sys

from olmoe_train.cli.launch import main

sys.exit(main(sys.argv[1:]))
