"""`python -m prts` is `prts`."""

import sys

from prts.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
