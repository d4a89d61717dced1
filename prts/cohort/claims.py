"""Claims: which worker, on which machine, works on a slide, and whether it is still alive.

A claim is a file that only one worker can create. Its owner touches it every few seconds. A claim is void if its process has ended, which
other workers on the same machine see at once, or if it has not been touched for a while. That is measured by the clock of whoever
waits, from when it last saw a change: the clocks of two machines are never compared, and a lock of the operating system, which some
shared file systems ignore, is not needed.

A void claim is not replaced but succeeded by one with the next number, so that of two workers that want to take over only one can.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from prts.io.cache import process_runs

BEAT_S = 10.0
VOID_S = 120.0  # above the minute for which NFS may show an old time

_ours: set[Path] = set()  # held by any worker of this process
_one_at_a_time = threading.Lock()


def this_process() -> dict[str, str | int]:
    """Where this process runs: the machine, or container, in which its id means something, and the id."""
    space = Path("/proc/self/ns/pid")
    namespace = os.readlink(space) if space.is_symlink() else ""  # noqa: PTH115  (the link's target is no path)
    return {"host": platform.node(), "namespace": namespace, "pid": os.getpid()}


class Claims:
    """The claims of this worker, kept alive by a thread; a context manager that gives up what is left at its end.

    Parameters
    ----------
    folder
        The cohort folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._me = folder, this_process()
        self._held: dict[str, Path] = {}
        self._seen: dict[
            Path, tuple[int, float, bool]
        ] = {}  # time of the file, when it was seen first, whether it changed before
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="claims", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop.set()
        for name in list(self._held):
            self.release(name)

    def take(self, name: str) -> bool:
        """Claim a slide; False if another worker has it, or may have it."""
        with _one_at_a_time:
            if self.standing(name) != "free":
                return False
            path = self._path(name, self._latest(name) + 1)
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                with path.open("x", encoding="utf-8") as file:
                    json.dump(self._me, file)
            except FileExistsError:
                return False
            self._held[name] = path
            _ours.add(path)
            return True

    @property
    def held(self) -> list[str]:
        """The slides that this worker has."""
        return list(self._held)

    def owns(self, name: str) -> bool:
        """Whether this worker still has the slide: after a machine has slept, another may have taken over."""
        return name in self._held and self._path(name, self._latest(name)) == self._held[name]

    def release(self, name: str) -> None:
        """Give up a slide, finished or not."""
        latest = self._latest(name) if self.owns(name) else 0
        _ours.discard(self._held.pop(name))
        for number in range(1, latest + 1):  # ascending, so that there is never a later one without the first
            with contextlib.suppress(OSError):
                self._path(name, number).unlink()

    def standing(self, name: str) -> Literal["free", "held", "unsure"]:
        """Whether a slide is free, held by a worker that is alive, or claimed by one of which that is not known yet."""
        path = self._path(name, self._latest(name))
        try:
            text, touched = path.read_text(encoding="utf-8"), path.stat().st_mtime_ns
        except FileNotFoundError:
            return "free"
        owner = _owner(text)
        here = all(owner.get(key) == self._me[key] for key in ("host", "namespace"))
        if here and owner["pid"] == self._me["pid"]:
            return "held" if path in _ours else "free"  # of an earlier process: in containers, ids repeat
        if here and not process_runs(int(owner["pid"])):
            return "free"
        before = self._seen.get(path)
        if before is None or before[0] != touched:
            before = self._seen[path] = touched, time.monotonic(), before is not None
        if time.monotonic() - before[1] >= VOID_S:
            return "free"
        return "held" if here or before[2] else "unsure"

    def _beat(self) -> None:
        while not self._stop.wait(BEAT_S):
            for path in list(self._held.values()):
                with contextlib.suppress(OSError):
                    os.utime(path)  # the time of the file server, where there is one

    def _path(self, name: str, number: int) -> Path:
        out = self._folder / name
        return out.with_name(f".{out.name}.claim-{number}")

    def _latest(self, name: str) -> int:
        """Number of the latest claim of a slide, 0 if it has none."""
        number = 0
        while self._path(name, number + 1).exists():
            number += 1
        return number


def _owner(text: str) -> dict[str, Any]:
    """The process that a claim names; none while it is being written."""
    try:
        owner = json.loads(text)
    except ValueError:
        return {}
    return owner if isinstance(owner, dict) and isinstance(owner.get("pid"), int) else {}
