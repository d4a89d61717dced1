"""One measurement in a process of its own: `python -m benchmarks.child MODULE FUNCTION JSON-ARGUMENTS`; prints one line of JSON."""

from __future__ import annotations

import importlib
import json
import logging
import sys

from benchmarks.harness import peak_gb


def main() -> None:
    module, function, arguments = sys.argv[1:]
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    result = getattr(importlib.import_module(module), function)(**json.loads(arguments))
    print("\n" + json.dumps({"result": result, "peak_gb": peak_gb()}))


if __name__ == "__main__":
    main()
