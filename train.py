"""`python train.py tissue=lung` is `prts train tissue=lung`."""

import sys

from prts.cli.main import main

sys.exit(main(["train", *sys.argv[1:]]))
