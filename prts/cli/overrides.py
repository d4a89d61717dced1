"""The arguments of a command before Hydra reads them: paths taken as typed, flags checked, config folders found."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from prts.errors import InputError, did_you_mean

# Keys that take a path. Their values are taken literally, so that spaces, commas, = and brackets need no quoting for Hydra.
_PATH_KEYS = frozenset(
    "image slides out nuclei roi bundle prediction section train_section train_nuclei run second analysis markers orthologs visium "
    "enrich.obo enrich.annotations encoder.weights encoder.adapter segmentation.model segmentation.path panel.path paths.data_dir "
    "paths.cache_dir hydra.run.dir hydra.sweep.dir".split()
)
MULTIRUN = ("-m", "--multirun")
_CONFIG_DIR = ("--config-dir", "-cd")
# Hydra's flags that prts passes on, with the values that they take; None: anything.
_SHOWN = ("job", "hydra", "all")
_INFO = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")
_VALUES: Mapping[str, Sequence[str] | None] = {
    "--cfg": _SHOWN,
    "-c": _SHOWN,
    "--info": _INFO,
    "-i": _INFO,
    "--package": None,
    "-p": None,
    "--config-dir": None,
    "-cd": None,
}
_FLAGS = (*MULTIRUN, *_VALUES, "--resolve", "--run", "-r")


def quoted(value: str) -> str:
    """Quote text for Hydra; in single quotes, backslashes need escaping only before a quote or at the end."""
    return "'" + re.sub(r"(\\*)('|$)", lambda m: m[1] * 2 + ("\\'" if m[2] else ""), value) + "'"


def quote_paths(arguments: Sequence[str]) -> list[str]:
    """Quote the values of path keys for Hydra's grammar.

    A grid over a path key still works: with `-m`, `encoder.weights=a.pth,b.pth` is left to Hydra unless a file with that full name exists.
    """
    multirun = any(flag in arguments for flag in MULTIRUN)
    found = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        name = key.lstrip("+")
        is_path = name in _PATH_KEYS or re.fullmatch(r"tissue\.sections\.\w+\.(image|bins|nuclei|spots)", name)
        grid = multirun and "," in value and not Path(value).exists()
        if not (equals and is_path and value) or value in ("null", "???") or value[0] in "'\"" or "${" in value or grid:
            found.append(argument)
        else:
            found.append(f"{key}={quoted(_in_home(value))}")
    return found


def expanded(value: str) -> str:
    """A path with `~` or `~user` at its start replaced by that home folder, as a shell does; other text as it is.

    Examples
    --------
    >>> expanded("slides/a~b.tif")
    'slides/a~b.tif'
    """
    return os.path.expanduser(value) if value.startswith("~") else value  # noqa: PTH111  (keeps text as it is)


def _in_home(value: str) -> str:
    """A path with `~` at its start expanded, which shells do only at the start of a word."""
    there = os.path.exists(value)  # noqa: PTH110  (Path.exists raises for text that is too long to be a name)
    return value if there else expanded(value)


def split_flags(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Separate overrides from flags, because Hydra's parser expects consecutive overrides.

    Raises
    ------
    InputError
        If a flag, or its value, is unknown.
    """
    overrides, flags = [], []
    rest = iter(arguments)
    for argument in rest:
        if not argument.startswith("-"):
            overrides.append(argument)
            continue
        flag, equals, value = argument.partition("=")
        if flag not in _FLAGS:
            raise InputError(f"{argument}: no such flag{did_you_mean(flag, _FLAGS)}; options are written key=value")
        if flag not in _VALUES:
            flags.append(argument)
            continue
        if not equals:
            value = next(rest, "")
        choices = _VALUES[flag]
        if not value or (choices is not None and value not in choices):
            raise InputError(f"{flag} {value}: needs a value; give {', '.join(choices) if choices else 'one'}")
        flags += [flag, value]
    return overrides, flags


def config_folders(flags: Sequence[str], ours: Path) -> list[Path]:
    """The user's folders of config groups: `--config-dir`, and `configs` of the working folder.

    Raises
    ------
    InputError
        If the folder named does not exist or holds no groups.
    """
    folders = []
    for flag, value in pairwise(flags):
        if flag in _CONFIG_DIR:
            folder = Path(_in_home(value))
            if not folder.is_dir():
                raise InputError(f"--config-dir {folder}: no such folder")
            flat = sorted(folder.glob("*.yaml"))
            if flat and not any(folder.glob("*/*.yaml")):
                raise InputError(
                    f"--config-dir {folder}: {flat[0].name} is not in the folder of a group; a tissue, for one, belongs in "
                    f"{folder / 'tissue' / flat[0].name}"
                )
            folders.append(folder.resolve())
    here = Path("configs").resolve()
    if here.is_dir() and here != ours and here not in folders:
        folders.append(here)
    return folders


def search_path(folders: Sequence[Path]) -> list[str]:
    """The override that makes Hydra look for config groups in further folders, too."""
    places = ",".join(quoted(f"file://{folder}") for folder in folders)
    return [f"hydra.searchpath=[{places}]"] if folders else []
