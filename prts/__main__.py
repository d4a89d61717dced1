"""`python -m prts` is `prts`."""

import sys

from prts.cli.main import main

sys.exit(main())
