"""Sections that cannot be used: all of them are named at once, or left out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from prts.data.splits import Roles
from prts.errors import InputError, full_disk
from prts.io.cache import LockedError, no_waiting

logger = logging.getLogger(__name__)


class BadSections:
    """Collects what is wrong with sections until `settle`.

    Parameters
    ----------
    skip
        Leave them out instead of raising an error.
    """

    def __init__(self, *, skip: bool) -> None:
        self._skip = skip
        self._errors: dict[str, InputError] = {}

    @property
    def reasons(self) -> dict[str, str]:
        """What is wrong, by section."""
        return {name: str(error) for name, error in self._errors.items()}

    @contextmanager
    def noting(self, name: str) -> Iterator[None]:
        """Note what is wrong with a section instead of stopping at it."""
        try:
            yield
        except InputError as error:
            if full_disk(error) is not None:  # says nothing about the section
                raise
            self._errors[name] = error

    def settle(self, roles: Roles) -> Roles:
        """The roles without the sections noted.

        Parameters
        ----------
        roles
            The sections of each role.

        Raises
        ------
        InputError
            If a section was noted and none may be left out, or a role has none left.
        """
        if not self._errors:
            return roles
        n = len({*roles.train, *roles.val, *roles.test})
        if not self._skip:
            raise self._combined(n)
        kept = Roles(*([name for name in names if name not in self._errors] for names in _lists(roles)))
        for role, before, after in zip(("train", "val", "test"), _lists(roles), _lists(kept), strict=True):
            if before and not after:
                raise InputError(f"skip_bad: leaves no section for {role}; {self._combined(n)}")
        for name, reason in self.reasons.items():
            if name in {*roles.train, *roles.val, *roles.test}:
                logger.warning("section %s is left out: %s", name, reason)
        return kept

    def _combined(self, n: int) -> InputError:
        first, *others = self._errors.values()
        if not {str(error) for error in others} - {str(first)}:  # one section, or one reason for all
            return first
        for name, reason in self.reasons.items():
            logger.error("section %s: %s", name, reason)
        listed = "; ".join(f"{name} ({reason})" for name, reason in self.reasons.items())
        return InputError(
            f"{len(self._errors)} of {n} sections cannot be used: {listed}; correct them, or leave them out with skip_bad"
        )


def _lists(roles: Roles) -> tuple[list[str], list[str], list[str]]:
    return list(roles.train), list(roles.val), list(roles.test)


def in_turn(names: Iterable[str], step: Callable[[str], None]) -> None:
    """Take a step for each section; those that another process is working on come last.

    Parameters
    ----------
    names
        The sections.
    step
        Called with the name of a section; up to twice, so what is finished must be in the cache.
    """
    later = []
    for name in names:
        try:
            with no_waiting():
                step(name)
        except LockedError:
            logger.info("%s: another process is working on it; it comes last", name)
            later.append(name)
    for name in later:
        step(name)
