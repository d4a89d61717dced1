"""What a config says in other words: paths in the home folder, and names that YAML reads as numbers."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf, flag_override
from omegaconf.errors import OmegaConfBaseException

from prts.cli.overrides import expanded

_ROLES = ("train", "val", "test")


def tidy(cfg: DictConfig) -> None:
    """Expand `~` in the values of a config, and make the names of sections text.

    Parameters
    ----------
    cfg
        The composed config of a command; changed in place.
    """
    with flag_override(cfg, ["struct", "readonly"], [False, False]):
        _expand(cfg)
        tissue = cfg.get("tissue")
        if isinstance(tissue, DictConfig):
            _name_sections(tissue)


def _expand(node: Any) -> None:
    keys: list[Any] = list(node.keys()) if isinstance(node, DictConfig) else list(range(len(node)))
    for key in keys:
        if OmegaConf.is_missing(node, key):
            continue
        try:
            value = node[key]
        except OmegaConfBaseException:  # an interpolation that cannot be resolved is named when it is used
            continue
        if isinstance(value, DictConfig | ListConfig):
            if not OmegaConf.is_interpolation(node, key):
                _expand(value)
        elif isinstance(value, str) and expanded(value) != value:
            node[key] = expanded(value)


def _name_sections(tissue: DictConfig) -> None:
    sections = tissue.get("sections")
    if isinstance(sections, DictConfig) and any(_is_number(name) for name in sections):
        content = OmegaConf.to_container(sections, resolve=False)
        assert isinstance(content, dict)
        tissue["sections"] = {str(name): each for name, each in content.items()}
    for role in _ROLES:
        names = tissue.get(role)
        if isinstance(names, ListConfig) and any(_is_number(name) for name in names):
            tissue[role] = [str(name) if _is_number(name) else name for name in names]


def _is_number(name: object) -> bool:
    return isinstance(name, int | float) and not isinstance(name, bool)
