"""Entry point of `prts`: find the command's module and run it."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from prts import __version__
from prts.cli.app import COMMANDS, command_help, overview, run
from prts.errors import did_you_mean


def main(argv: Sequence[str] | None = None) -> int:
    """Run `prts <command> [overrides]` and return the exit status.

    Parameters
    ----------
    argv
        The arguments after `prts`; by default those of the process.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        sys.stdout.write(overview())
        return 0
    command, rest = arguments[0], arguments[1:]
    if command in ("-V", "--version"):
        sys.stdout.write(f"prts {__version__}\n")
        return 0
    if command not in COMMANDS:
        sys.stderr.write(f"prts: no command {command!r}{did_you_mean(command, COMMANDS)}; `prts --help` lists them\n")
        return 2
    if any(flag in rest for flag in ("-h", "--help")):
        sys.stdout.write(command_help(command))
        return 0
    return run(command, rest)


if __name__ == "__main__":
    sys.exit(main())
