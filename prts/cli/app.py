"""Runs a command of `prts`: its config, one-line errors and the exit status.

Exit status: 0 success; 2 the input or the config is wrong (one line on stderr); 1 a bug. `PRTS_DEBUG=1` shows the traceback of either.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from prts.cli.config import config_dir, plain, require
from prts.cli.exit_status import INTERRUPTED, TERMINATED, system_exit_status, verdict
from prts.cli.overrides import config_folders, quote_paths, split_flags
from prts.extras import require_extra

__all__ = ["COMMANDS", "command_help", "config_dir", "overview", "plain", "require", "run", "verdict"]

COMMANDS = (
    *("simulate", "prepare", "train", "predict", "evaluate", "analyze", "report", "export", "push", "download"),
    *("bench", "doctor"),
)

# Extras without which a command cannot start.
_NEEDS = {"prepare": "train", "train": "train", "evaluate": "train", "analyze": "analysis", "report": "report"}


def overview() -> str:
    """The text of `prts --help`."""
    lines = [f"  {name:<10}{command_help(name).splitlines()[0].rstrip('.')}" for name in COMMANDS]
    return "\n".join(
        [
            "prts: single-cell spatial gene expression from an H&E image",
            "",
            "usage: prts <command> [key=value ...]",
            "",
            *lines,
            "",
            "`prts <command> --help` explains a command; `prts <command> --cfg job` prints its full config.",
            "Options are Hydra overrides; -m runs a grid: prts train -m ablation=full,local_only,global_only",
            "Put your own configs in ./configs or pass a folder with --config-dir: configs/tissue/mine.yaml is tissue=mine",
            "",
        ]
    )


def command_help(command: str) -> str:
    """The text of `prts <command> --help`: the docstring of the command's module."""
    return inspect.cleandoc(importlib.import_module(f"prts.cli.{command}").__doc__ or "") + "\n"


def run(command: str, arguments: Sequence[str]) -> int:
    """Run a command.

    Parameters
    ----------
    command
        One of `COMMANDS`.
    arguments
        Hydra's flags and overrides, paths unquoted.

    Returns
    -------
    The exit status.
    """
    debug = os.environ.get("PRTS_DEBUG", "") not in ("", "0")
    with _hydra_raises(), _logging_restored():
        try:
            overrides, flags = split_flags(quote_paths(arguments))
            folders = config_folders(flags, config_dir())
            if (extra := _NEEDS.get(command)) is not None:
                require_extra(extra, command)
            from prts.cli.hydra_main import launch  # slow to import, and not needed to reject a wrong flag

            return launch(command, overrides, flags, folders)
        except KeyboardInterrupt:
            sys.stderr.write("prts: interrupted; finished parts are kept, and the next run resumes from them\n")
            return INTERRUPTED
        except SystemExit as error:
            if (status := system_exit_status(error)) == TERMINATED:
                sys.stderr.write("prts: terminated; finished parts are kept, and the next run resumes from them\n")
            return status
        except Exception as error:  # noqa: BLE001  (the last frame of the program: every error becomes an exit status)
            status, text = verdict(error)
            if debug or status == 1:
                traceback.print_exc()
            if status == 1:
                text = f"this is a bug in prts ({type(error).__name__}); please report it with the lines above"
            sys.stderr.write(f"prts: {text}\n")
            return status


@contextmanager
def _hydra_raises() -> Iterator[None]:
    """Make Hydra raise its errors instead of printing several lines of them."""
    previous = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    finally:
        if previous is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = previous


@contextmanager
def _logging_restored() -> Iterator[None]:
    """Remove Hydra's log handlers afterwards: one left behind would write to a run folder or stream that is gone."""
    root = logging.getLogger()
    level, handlers = root.level, root.handlers[:]
    try:
        yield
    finally:
        for handler in set(root.handlers) - set(handlers):
            handler.close()
        root.handlers[:] = handlers
        root.setLevel(level)
