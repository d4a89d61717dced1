"""Check every value of a composed config before any work."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_origin

from prts.arguments import check_settings, check_value, shown
from prts.cli.config import compose, missing, plain
from prts.cli.config_keys import annotated_fields, optional
from prts.cli.hydra_errors import explained
from prts.cli.overrides import quote_paths
from prts.cli.schema import SCHEMAS, Built, SectionFiles, Simulation, Tissue
from prts.cli.tidy import tidy
from prts.errors import InputError, ParameterError, did_you_mean

if TYPE_CHECKING:
    from omegaconf import DictConfig

# The registry of each kind, by the owner name that its parameters have in errors.
_REGISTRIES = {
    "encoder": ("prts.features.encoders", "encoders"),
    "segmenter": ("prts.segmentation", "segmenters"),
    "likelihood": ("prts.models.likelihoods", "likelihoods"),
}
# Built once before any work, so that constructors check their own settings; none of them reads a file.
_TRIED = ("encoder", "segmenter", "likelihood", "panel", "split")
_MISSING = "???"


def check_config(command: str, overrides: Sequence[str] = ()) -> DictConfig:
    """Compose and check the config of a command, as the command itself does first.

    Parameters
    ----------
    command
        One of `prts.cli.schema.SCHEMAS`.
    overrides
        As typed, paths unquoted.

    Returns
    -------
    The config.

    Raises
    ------
    InputError
        If a key, a choice or a value is wrong.
    """
    arguments = quote_paths(overrides)
    try:
        cfg = compose(command, arguments)
    except Exception as error:
        raise explained(error, command, arguments, ()) from error
    check(command, cfg)
    return cfg


def check(command: str, cfg: DictConfig) -> None:
    """Check every value of a composed config against the schema of its command, after `tidy`.

    Raises
    ------
    ParameterError
        If a value is missing, or has the wrong type or range; the error names its config key.
    """
    tidy(cfg)
    check_values(command, plain(cfg))


def check_values(command: str, values: Mapping[str, Any]) -> None:
    """Check a config in plain containers; see `check`."""
    _check_fields(SCHEMAS[command], values, "")


def _check_fields(kind: type, values: Any, prefix: str, *, partial: bool = False) -> None:
    """Check a mapping against a dataclass of the schema; a partial one may lack keys and hold others."""
    if not isinstance(values, Mapping):
        raise ParameterError("", prefix.rstrip("."), f"{shown(values)} is not accepted; give a mapping")
    hints = annotated_fields(kind)
    for key in values:
        if key not in hints and not partial:
            hint = did_you_mean(str(key), hints) or f" (there are: {', '.join(hints)})"
            raise ParameterError("", f"{prefix}{key}", f"no such key{hint}")
    for key, hint in hints.items():
        name, value = f"{prefix}{key}", values.get(key, _MISSING)
        if value == _MISSING:
            if (key in values or key not in optional(kind)) and not partial:
                raise missing(name)
            continue
        built, nested, nullable = _read(hint)
        if value is None and nullable:
            continue
        if nested is not None:
            _check_fields(nested, value, f"{name}.")
            if nested is Tissue:
                _check_sections(value)
        elif built is not None:
            _check_built(built, name, value)
        elif isinstance(value, Mapping) and (item := _item_of(hint)) is not None:
            for each in value:
                check_value("", f"{name}.{each}", value[each], item)
        else:
            check_value("", name, value, hint)


def _read(hint: Any) -> tuple[Built | None, type | None, bool]:
    """Read an annotation: how the value is built, or its schema dataclass; and whether it may be null."""
    options = [hint] if get_origin(hint) is Annotated else [hint, *get_args(hint)]
    built = nested = None
    for option in options:
        if get_origin(option) is Annotated:
            built = next((item for item in option.__metadata__ if isinstance(item, Built)), built)
        elif isinstance(option, type) and is_dataclass(option):
            nested = option
    return built, nested, type(None) in options


def _item_of(hint: Any) -> Any:
    """The type of the values of a mapping; None for any other annotation."""
    return next((get_args(option)[1] for option in (hint, *get_args(hint)) if get_origin(option) is dict), None)


def _check_sections(tissue: Mapping[str, Any]) -> None:
    from prts.data.tissue import parse_tissue

    for name, section in tissue["sections"].items():
        _check_fields(SectionFiles, section, f"tissue.sections.{name}.", partial=True)
        simulation = section.get("simulate")
        if simulation is not None:
            where = f"tissue.sections.{name}.simulate."
            known = annotated_fields(Simulation)
            for key in simulation:
                if key not in known:
                    raise ParameterError("", f"{where}{key}", f"no such key{did_you_mean(key, known)}")
            _check_fields(Simulation, simulation, where, partial=True)
    parse_tissue(tissue)


def _check_built(built: Built, key: str, node: Any) -> None:
    """Check the settings of something that is built from a mapping against its constructor."""
    if not isinstance(node, Mapping) or not (node or built.several):
        raise ParameterError("", key, f"{shown(node)} is not accepted; choose one with {key}=NAME")
    if built.several:
        for name, child in node.items():
            _check_built(Built(built.owner, limits=built.limits), f"{key}.{name}", child)
        return
    if built.limits is not None:
        _check_fields(built.limits, node, f"{key}.", partial=True)
    factory = _factory(built, key, node)
    own = annotated_fields(built.limits) if built.limits is not None and built.owner in ("segmenter", "encoder") else {}
    settings = {name: value for name, value in node.items() if not name.startswith("_") and name not in own}
    if _is_registered(built, node):
        del settings["name"]
    if built.owner == "logger":  # folders and names that the run fills in
        settings = {name: value for name, value in settings.items() if value is not None}
    if built.owner == "trainer" and settings.get("precision") == "auto":
        del settings["precision"]
    nested = [name for name, value in settings.items() if isinstance(value, Mapping) and "_target_" in value]
    for name in nested:
        del settings[name]
    check_settings(factory, settings, key)
    _try(built.owner, key, factory, settings)


def _is_registered(built: Built, node: Mapping[str, Any]) -> bool:
    return built.owner in _REGISTRIES and "name" in node


def _factory(built: Built, key: str, node: Mapping[str, Any]) -> Any:
    import prts._torchvision  # noqa: F401  (before the first import of torchvision)

    if _is_registered(built, node):
        module, attribute = _REGISTRIES[built.owner]
        registry = getattr(importlib.import_module(module), attribute)
        name = node["name"]
        if not isinstance(name, str):
            raise ParameterError(
                "", f"{key}.name", f"{shown(name)} is not accepted; give one of {', '.join(registry.names())}"
            )
        return registry[name]
    target = node.get("_target_")
    if target is None and built.owner in _REGISTRIES:
        raise ParameterError("", f"{key}.name", f"is missing; choose one with {key}=NAME")
    if not isinstance(target, str):
        raise ParameterError("", f"{key}._target_", f"{shown(target)} is not accepted; choose one with {key}=NAME")
    partial = node.get("_partial_", False)
    if not isinstance(partial, bool):
        raise ParameterError("", f"{key}._partial_", f"{shown(partial)} is not accepted; give true or false")
    try:
        return pkgutil.resolve_name(target)
    except (ImportError, AttributeError, ValueError) as error:
        raise ParameterError(
            "", f"{key}._target_", f"{target} cannot be imported ({error}); check the name and what is installed"
        ) from error


def _try(owner: str, key: str, factory: Any, settings: dict[str, Any]) -> None:
    """Build a small instance with settings that only the constructor can check."""
    if owner not in (*_TRIED, "network", "optimizer", "scheduler"):
        return
    import torch

    try:
        if owner in _TRIED:
            factory(**settings)
        elif owner == "network":
            with torch.device("meta"):  # of any size, without its memory
                factory(in_features=1, n_genes=1, **settings)
        elif owner == "optimizer":
            factory([torch.nn.Parameter(torch.zeros(1))], **settings)
        else:
            from prts.models.module import lacks_length

            length = {"total_steps": 2} if lacks_length(partial(factory, **settings)) else {}
            factory(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0), **settings, **length)
    except InputError:
        raise
    except (ValueError, TypeError, RuntimeError, ArithmeticError, AssertionError) as error:
        problem = str(error) or type(error).__name__
        raise ParameterError("", key, f"{problem}; `--cfg job` prints its settings") from error
