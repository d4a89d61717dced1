"""Find and compose the config of a command."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prts.cli.overrides import search_path
from prts.errors import ParameterError

if TYPE_CHECKING:
    from omegaconf import DictConfig


def config_dir() -> Path:
    """The folder of the config groups: inside an installed package, or next to it in a source tree.

    Also registers the schema with Hydra, since the configs in the folder refer to it.
    """
    from prts.cli.config_keys import register  # with pydantic, which `prts --help` does not need

    package = Path(__file__).resolve().parents[1]
    for folder in (package / "configs", package.parent / "configs"):
        if (folder / "train.yaml").is_file():
            register()
            return folder
    raise FileNotFoundError(f"no configs in {package} or next to it: the installation is damaged")


def compose(command: str, overrides: Sequence[str] = (), folders: Sequence[Path] = ()) -> DictConfig:
    """Compose the config of a command.

    Parameters
    ----------
    command
        One of `prts.cli.schema.SCHEMAS`.
    overrides
        In Hydra's grammar.
    folders
        The user's own folders of config groups.
    """
    import hydra

    with hydra.initialize_config_dir(str(config_dir()), version_base="1.3"):
        cfg: DictConfig = hydra.compose(command, [*search_path(folders), *overrides])
    return cfg


def plain(node: DictConfig) -> dict[str, Any]:
    """A config node as plain Python containers, interpolations resolved."""
    from omegaconf import OmegaConf

    content = OmegaConf.to_container(node, resolve=True)
    assert isinstance(content, dict)
    return {str(key): value for key, value in content.items()}


def require(cfg: DictConfig, *keys: str) -> None:
    """Raise an error before any work if a required key is missing."""
    from omegaconf import OmegaConf

    for key in keys:
        if OmegaConf.is_missing(cfg, key) or cfg[key] is None:
            raise missing(key)


def missing(key: str) -> ParameterError:
    """The error for a missing required key."""
    return ParameterError("", key, f"is required; write {key}=... (`prts <command> --help` shows an example)")


def config_groups(folders: Sequence[Path]) -> dict[str, list[str]]:
    """The names of the choices of every config group."""
    groups: dict[str, list[str]] = {}
    for root in (config_dir(), *folders):
        for file in sorted(root.rglob("*.yaml")):
            if file.parent != root and not file.stem.startswith("_"):  # those are bases of other choices
                groups.setdefault(file.parent.relative_to(root).as_posix(), []).append(file.stem)
    return groups
