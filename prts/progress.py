"""Progress of long steps: a bar on terminals, and a log line a minute."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TextIO, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

T = TypeVar("T")

LOG_EVERY_S = 60.0

logger = logging.getLogger(__name__)

_section: ContextVar[str] = ContextVar("section", default="")
_shown: set[Progress] = set()  # at most one: two bars would overwrite each other


class ConsoleLog(logging.StreamHandler[TextIO]):
    """Writes log lines above the bar, if one is shown."""

    def emit(self, record: logging.LogRecord) -> None:
        """Clear the line of the bar, which draws itself again below."""
        if _shown and self.stream.isatty():
            self.stream.write("\r\x1b[2K")
        super().emit(record)


@contextmanager
def of_section(name: str) -> Iterator[None]:
    """Name the steps in this block after a section."""
    before = _section.set(name)
    try:
        yield
    finally:
        _section.reset(before)


def track(iterable: Iterable[T], description: str, total: float | None = None) -> Iterator[T]:
    """Iterate with progress.

    Parameters
    ----------
    iterable
        Items to iterate over.
    description
        Name of the step, such as "features"; that of the section follows (`of_section`).
    total
        Number of items, if the iterable has no length.
    """
    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
    with working(description, total) as advance:
        for item in iterable:
            yield item
            advance()


@contextmanager
def working(description: str, total: float | None = None) -> Iterator[Callable[[], None]]:
    """Show that a step is running.

    Parameters
    ----------
    description
        Name of the step; that of the section follows (`of_section`).
    total
        Number of its parts, if that is known.

    Yields
    ------
    Function to call after each part.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        *((MofNCompleteColumn(),) if total is not None else ()),
        TimeElapsedColumn(),
        *((TextColumn("left"), TimeRemainingColumn()) if total is not None else ()),
    )
    hidden = bool(_shown) or not sys.stderr.isatty()
    with Progress(*columns, console=Console(stderr=True), disable=hidden, transient=True) as progress, _only(progress):
        task = progress.add_task(f"{description} {_section.get()}".rstrip(), total=total)
        with _reminders(progress):
            yield lambda: progress.advance(task)


@contextmanager
def _only(progress: Progress) -> Iterator[None]:
    """Keep other bars hidden while this one is shown."""
    if not progress.disable:
        _shown.add(progress)
    try:
        yield
    finally:
        _shown.discard(progress)


@contextmanager
def _reminders(progress: Progress) -> Iterator[None]:
    """Log how far a step is, once a minute."""
    over = threading.Event()

    def remind() -> None:
        while not over.wait(LOG_EVERY_S):
            logger.info("%s", _state(progress))

    threading.Thread(target=remind, daemon=True).start()
    try:
        yield
    finally:
        over.set()


def _state(progress: Progress) -> str:
    """How far a step is, in words."""
    (task,) = progress.tasks
    elapsed = f"{task.description}: running for {(task.elapsed or 0) / 60:.0f} min"
    if task.total is None:
        return elapsed
    left = "" if task.time_remaining is None else f", about {max(1, round(task.time_remaining / 60))} min left"
    return f"{elapsed}, {task.completed:,.0f} of {task.total:,.0f} done{left}"
