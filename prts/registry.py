"""Registries of encoders, segmenters, likelihoods, stain methods and platforms.

Each kind has one registry. It finds built-in members by importing the modules of one package, and members in other installed packages
through an entry point, so that an addition is one file:

>>> from prts.features.encoders import encoders
>>> "classical" in encoders.names()
True

Bundles and configs refer to members by name, so reading a file never imports code that it names.
"""

from __future__ import annotations

import importlib
import logging
import pkgutil
from collections.abc import Callable, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from prts.errors import ParameterError, did_you_mean

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Registry(Generic[T]):
    """The members of one kind, by name.

    Parameters
    ----------
    kind
        The kind as it appears in messages, such as `encoder`.
    package
        The package whose modules register the built-in members with `register`.
    group
        The entry point group through which other packages add members, such as `prts.encoders`.
    """

    def __init__(self, kind: str, *, package: str, group: str) -> None:
        self.kind = kind
        self.package = package
        self.group = group
        self._members: dict[str, type[T]] = {}
        self._discovered = False

    def register(self, name: str) -> Callable[[type[T]], type[T]]:
        """Class decorator that adds a member and sets its `name`.

        Parameters
        ----------
        name
            Name of the member in configs, bundles and the Python API.

        Raises
        ------
        ValueError
            If another class has the same name.
        """

        def add(member: type[T]) -> type[T]:
            known = self._members.get(name)
            # importing a module again redefines the same class
            if known is not None and (known.__module__, known.__qualname__) != (member.__module__, member.__qualname__):
                raise ValueError(f"{self.kind} {name!r} is already registered by {known.__module__}")
            member.name = name  # type: ignore[attr-defined]
            self._members[name] = member
            return member

        return add

    def names(self) -> list[str]:
        """Names of all members, built-in and from other packages, sorted."""
        self._discover()
        return sorted({*self._members, *(point.name for point in self._entry_points())})

    def __contains__(self, name: object) -> bool:
        return name in self.names()

    def __getitem__(self, name: str) -> type[T]:
        """The member with this name.

        Raises
        ------
        ParameterError
            If there is none, or its package cannot be imported.
        """
        self._discover()
        if name not in self._members:
            for point in self._entry_points():
                if point.name == name:
                    self.register(name)(self._load(point))
                    break
            else:
                known = self.names()
                raise ParameterError(
                    self.kind,
                    "",
                    f"{name!r} is not registered{did_you_mean(name, known)}; choose one of {', '.join(known)}",
                )
        return self._members[name]

    def build(self, settings: Mapping[str, Any], **extra: Any) -> T:
        """Build a member from plain settings, such as those in a config or a bundle.

        Parameters
        ----------
        settings
            `name`, and arguments for that member.
        extra
            More arguments, which override `settings`.

        Raises
        ------
        ParameterError
            If there is no such member, or an argument is unknown, missing or not of the type and range that the constructor's annotations
            state.
        """
        from prts.arguments import checked_call  # imports pydantic, which is not needed to list names

        given = {**settings, **extra}
        name = given.pop("name", None)
        if not isinstance(name, str):
            raise ParameterError(self.kind, "name", f"is missing; choose one of {', '.join(self.names())}")
        return checked_call(self[name], given, self.kind)

    def _discover(self) -> None:
        if self._discovered:
            return
        self._discovered = True
        package = importlib.import_module(self.package)
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{self.package}.{module.name}")

    def _entry_points(self) -> list[EntryPoint]:
        found = []
        for point in entry_points(group=self.group):
            if point.name in self._members and self._members[point.name].__module__ != point.module:
                logger.warning(
                    "%s %r of %s is ignored, because the name is already in use", self.kind, point.name, point.value
                )
            else:
                found.append(point)
        return found

    def _load(self, point: EntryPoint) -> type[T]:
        try:
            member: type[T] = point.load()
        except (ImportError, AttributeError) as error:
            raise ParameterError(
                self.kind,
                "",
                f"{point.name!r} cannot be imported from {point.value} ({error}); reinstall the package that provides it",
            ) from error
        return member
