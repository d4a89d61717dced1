"""Cache files: named by a fingerprint of what made them, written whole or not at all, built by one process at a time."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import logging
import os
import platform
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filelock

from prts.errors import InputError, chain, full_disk

logger = logging.getLogger(__name__)

_SAMPLE_BYTES = 1 << 20
_PATIENCE_S, _REMINDER_S = 5.0, 600.0  # until a process that waits says so, and says so again


def file_identity(path: Path) -> dict[str, Any]:
    """What tells one version of a file from another without reading gigabytes.

    Parameters
    ----------
    path
        A file, or a folder (a model folder), whose files are all taken.

    Returns
    -------
    For a file its size, modification time (ns) and the SHA-256 of its first and last MiB.

    Raises
    ------
    InputError
        If there is no such file.
    """
    path = Path(path)
    if path.is_dir():
        return {str(p.relative_to(path)): file_identity(p) for p in sorted(path.rglob("*")) if p.is_file()}
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    stat = path.stat()
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        digest.update(handle.read(_SAMPLE_BYTES))
        if stat.st_size > _SAMPLE_BYTES:
            handle.seek(max(_SAMPLE_BYTES, stat.st_size - _SAMPLE_BYTES))
            digest.update(handle.read(_SAMPLE_BYTES))
    return {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "sha256": digest.hexdigest()}


def fingerprint(settings: Mapping[str, Any]) -> str:
    """Eight hex digits that change when any of the (JSON-like) settings changes, whatever the order of the keys."""
    text = json.dumps(settings, sort_keys=True, default=str, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def sha256_file(path: Path) -> str:
    """SHA-256 of a whole file, for provenance that must survive copying."""
    with Path(path).open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` (same suffix) that takes its place when the block ends well, and vanishes when it does not.

    The block may write a file or make a folder at the name it gets. A folder is swapped in whole. What a process that was killed left
    of an earlier attempt is removed first.

    Raises
    ------
    InputError
        If `path` cannot be written: the disk is full, its folder cannot be made or is deleted meanwhile.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path.parent}: cannot be made a folder ({error.strerror}): choose another place") from error
    host = re.sub(r"\W", "-", platform.node())
    temporary, old = (
        path.with_name(f".{path.stem}.{host}-{os.getpid()}{mark}.tmp{path.suffix}") for mark in ("", ".old")
    )
    stem, suffix = glob.escape(path.stem), glob.escape(path.suffix)
    # the second: what a block left that itself wrote to a temporary name beside ours
    for pattern in (f".{stem}.{host}-*.tmp{suffix}", f"..{stem}.{host}-*.tmp.{host}-*.tmp{suffix}"):
        for left in path.parent.glob(pattern):
            pid, _, mark = left.name.partition(f"{path.stem}.{host}-")[2].partition(".")
            if not _is_alive(pid):
                _put_back(left, path) if mark.startswith("old.tmp") else _remove(left)
    try:
        yield temporary
        if temporary.is_dir() and path.is_dir():
            # a folder cannot take another's place in one step; between the two there is none, but never a part of one
            path.replace(old)
        temporary.replace(path)
    except Exception as error:
        if (why := _unwritable(error, path, temporary)) is not None:
            raise UnwritableError(path, why) from error
        raise
    finally:
        _remove(temporary)
        _put_back(old, path)


class UnwritableError(InputError):
    """A file that was begun could not be finished, through no fault of its content."""

    def __init__(self, path: Path, why: str) -> None:
        super().__init__(f"{path}: {why}")
        self.why = why


def _unwritable(error: Exception, path: Path, temporary: Path) -> str | None:
    """Why writing failed, where that is the disk's doing. Of nested names, the outermost is the one that the user knows."""
    if isinstance(error, UnwritableError):
        return error.why
    if isinstance(error, InputError):
        return None
    if (full := full_disk(error)) is not None:
        return full
    gone = any(isinstance(each, FileNotFoundError) and str(temporary) in str(each) for each in chain(error))
    return f"{path.parent} was deleted while it was written; run the same command again" if gone else None


def _is_alive(pid: str) -> bool:
    """Whether another process of this machine still runs; also where it cannot be told."""
    try:
        if int(pid) == os.getpid():
            return False  # in a container, whose processes have the same few ids each time
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except (ValueError, OSError):
        return True
    return True


def _put_back(old: Path, path: Path) -> None:
    """Give a folder its name again where no other has taken it, or remove it."""
    if path.exists():
        _remove(old)
    else:
        with contextlib.suppress(OSError):
            old.replace(path)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


@contextmanager
def lock(path: Path) -> Iterator[None]:
    """Hold the lock of a cache file while building it; other processes wait here, say for whom, and then find it built.

    The lock is the operating system's: it ends with its process, however that ends, and a lock file that is left behind locks nothing.

    Raises
    ------
    InputError
        If the lock file cannot be made.
    """
    path = Path(path)
    file = path.with_name(f".{path.name}.lock")
    held = filelock.FileLock(file)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _wait(held, path, file)
    except OSError as error:
        if (full := full_disk(error)) is not None:
            raise UnwritableError(path, full) from error
        raise InputError(
            f"{path}: is not there yet and may not be written ({error.strerror}); change the permissions of {path.parent} or "
            "choose another place (paths.cache_dir for the cache)"
        ) from error
    try:
        with contextlib.suppress(OSError):  # on a full disk: a courtesy to those who wait
            file.write_text(f"process {os.getpid()} on {platform.node()}", encoding="utf-8")
        yield
    finally:
        held.release()


def _wait(held: filelock.FileLock, path: Path, file: Path) -> None:
    """Take a lock; where another process holds it, say so after some seconds and then now and again."""
    began = time.monotonic()
    patience = _PATIENCE_S
    while True:
        try:
            held.acquire(timeout=patience)
        except filelock.Timeout:
            holder = ""
            with contextlib.suppress(OSError, UnicodeDecodeError):
                holder = file.read_text(encoding="utf-8")
            logger.warning(
                "waiting for %s, which makes %s, for %.0f s now (lock file %s; it is free once that process ends)",
                *(holder or "another process", path.name, time.monotonic() - began, file),
            )
            patience = _REMINDER_S
        else:
            return


@contextmanager
def reading(cache: Path) -> Iterator[None]:
    """Where a file of the cache is missed that was there before, say that somebody deleted it.

    Raises
    ------
    InputError
        Instead of a FileNotFoundError about a file of the cache.
    """
    try:
        yield
    except FileNotFoundError as error:
        text = str(error)
        # as all libraries quote it; the name alone may be part of any other
        if not any(f"'{folder}{end}" in text for folder in (cache, Path(cache).resolve()) for end in ("'", os.sep)):
            raise
        raise InputError(
            f"{cache}: was deleted, or a part of it, while it was read ({text}); run the same command again, it makes what is missing"
        ) from error


@contextmanager
def filling(folder: Path) -> Iterator[None]:
    """Where the disk is full and nobody said which file that concerns, as loggers and their like do, name their folder.

    Raises
    ------
    InputError
        Instead of an error that says that there is no room.
    """
    try:
        yield
    except Exception as error:
        full = full_disk(error)
        if full is None or any(isinstance(each, InputError) for each in chain(error)):
            raise
        raise UnwritableError(Path(folder), full) from error
