"""The keys of the schema, as Hydra learns them."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator
from dataclasses import MISSING, field, is_dataclass
from typing import Any

from prts.cli import schema
from prts.cli.schema import SCHEMAS


def annotated_fields(kind: type) -> dict[str, Any]:
    """The annotations of a dataclass of the schema, by field, with their ranges."""
    hints = typing.get_type_hints(kind, include_extras=True)
    return {item.name: hints[item.name] for item in dataclasses.fields(kind)}


def optional(kind: type) -> set[str]:
    """The fields of a dataclass that a config may lack."""
    return {item.name for item in dataclasses.fields(kind) if item.default is not MISSING}


def all_keys(kind: type, prefix: str = "") -> Iterator[str]:
    """The dotted keys of a dataclass of the schema and of those in it."""
    for key, hint in annotated_fields(kind).items():
        yield f"{prefix}{key}"
        if is_dataclass(hint):
            yield from all_keys(typing.cast(type, hint), f"{prefix}{key}.")


def register() -> None:
    """Tell Hydra the keys of every command, as `<command>_schema`, which each primary config names first."""
    from hydra.core.config_store import ConfigStore

    store = ConfigStore.instance()
    for command, kind in SCHEMAS.items():
        store.store(name=f"{command}_schema", node=_keys(kind))


def _keys(kind: type) -> type:
    """A dataclass with the same keys and values of any kind.

    OmegaConf has no ranges or choices and converts values (`"3"` to 3, 150 to 150.0): it learns the keys only, and pydantic checks
    the values as they were written.
    """
    name = f"{kind.__name__}Keys"
    if name not in globals():
        fields: list[tuple[str, Any, Any]] = []
        for key, hint in annotated_fields(kind).items():
            if is_dataclass(hint):
                keys = _keys(typing.cast(type, hint))
                fields.append((key, keys, field(default_factory=keys)))
            else:
                fields.append((key, Any, field(default=None if key in optional(kind) else "???")))
        made = dataclasses.make_dataclass(name, fields)
        # pickle looks it up here, through __getattr__ if necessary, when a job is sent to another process
        made.__module__, globals()[name] = __name__, made
    found: type = globals()[name]
    return found


def __getattr__(name: str) -> Any:
    """Create the key class of a dataclass in a process that has not registered it."""
    kind = getattr(schema, name.removesuffix("Keys"), None)
    if name.endswith("Keys") and isinstance(kind, type) and is_dataclass(kind):
        return _keys(kind)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
