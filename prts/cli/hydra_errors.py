"""Turn Hydra's errors into one line that names the key and the closest valid one."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from prts.cli.config import compose, config_groups, plain
from prts.cli.config_keys import all_keys
from prts.cli.schema import SCHEMAS
from prts.errors import InputError, did_you_mean
from prts.extras import install_command


def explained(error: Exception, command: str, overrides: Sequence[str], folders: Sequence[Path]) -> Exception:
    """An error of Hydra's as an InputError that names the key; other errors unchanged.

    Parameters
    ----------
    error
        As raised while Hydra composed the config.
    command
        The command.
    overrides
        In Hydra's grammar.
    folders
        The user's folders of config groups.
    """
    from hydra.errors import ConfigCompositionException, MissingConfigException, OverrideParseException

    lines = str(error).splitlines() or [""]
    if isinstance(error, OverrideParseException):
        return InputError(
            f"{error.override}: not a valid override; write key=value, and quote a value that contains brackets or commas"
        )
    if isinstance(error, MissingConfigException) and error.missing_cfg_file is not None:
        group, _, name = str(error.missing_cfg_file).rpartition("/")
        options = [str(option) for option in error.options or [] if not str(option).startswith("_")]
        if group in ("hydra/launcher", "hydra/sweeper") and name.startswith(("joblib", "submitit_", "optuna")):
            return InputError(f"{group}={name}: needs the extra `sweeps`; run {install_command('sweeps')}")
        return InputError(
            f"{group}={name}: no such choice{did_you_mean(name, options)} (there are: {', '.join(options)})"
        )
    if isinstance(error, ConfigCompositionException):
        cause = str(error.__cause__).splitlines()[0] if error.__cause__ else ""
        if match := re.match(r"Could not override '([^']+)'", lines[0]):
            return _unknown_key(match[1], command, overrides, folders)
        if match := re.match(r"Error merging override (.*)", lines[0]):
            return InputError(f"{match[1]}: {cause}; `prts {command} --cfg job` prints the config")
        if match := re.match(r"Ambiguous value for argument '(.*)'", lines[0]):
            return InputError(
                f"{match[1]}: contains commas; write [A,B] for a list, or add -m to run one job per value"
            )
        if match := re.match(r"You must specify '([^']+)'", lines[0]):
            options = config_groups(folders).get(match[1], [])
            return InputError(
                f"{match[1]}: is required; choose one with {match[1]}=NAME (there are: {', '.join(options)})"
            )
        if match := re.match(r"In '([^']+)': ConfigKeyError", lines[0]):
            key = re.search(r"full_key: (\S+)", str(error))
            name = key[1] if key else "a key"
            hint = did_you_mean(name, all_keys(SCHEMAS[command])) or f"; `prts {command} --cfg job` prints them all"
            return InputError(f"{match[1]}.yaml: {name}: no such key{hint}")
    if lines[0].startswith("Config group override must be"):
        groups = config_groups(folders)
        wrong = next((each for each in overrides if each.partition("=")[0] in groups), "")
        options = groups.get(wrong.partition("=")[0], [])
        return InputError(f"{wrong}: is not the name of a choice (there are: {', '.join(options)})")
    return error


def _unknown_key(key: str, command: str, overrides: Sequence[str], folders: Sequence[Path]) -> InputError:
    """Suggest the closest key of the config with the user's choices of options."""
    groups = config_groups(folders)
    choices = [each for each in overrides if each.partition("=")[0] in groups and "," not in each]
    try:
        known = [*_leaves(plain(compose(command, choices, folders))), *groups]
    except Exception:  # noqa: BLE001  (a hint only: the choices may be wrong themselves)
        known = list(groups)
    hint = did_you_mean(key, known)
    if not hint and "." not in key:
        # typed without its group: `epochs` for `trainer.max_epochs`
        full = next((name for name in known if name.rsplit(".", 1)[-1] == key), None)
        hint = f", did you mean {full!r}?" if full else ""
    return InputError(f"{key}: no such key{hint or f'; `prts {command} --cfg job` prints them all'}")


def _leaves(node: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in node.items():
        yield f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
