"""Cache files: named by a fingerprint of their inputs, written whole or not at all, built by one process at a time."""

from __future__ import annotations

import contextlib
import errno
import functools
import glob
import hashlib
import json
import logging
import os
import platform
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import filelock

from prts.errors import InputError, chain, full_disk

logger = logging.getLogger(__name__)

_SAMPLE_BYTES = 1 << 20
_BLOCKS, _INSIDE_BYTES = 256, 16 << 20
# Of file systems without locks: NFS and Lustre mounted without them, FUSE, and the 524 of some kernels.
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, 524}
_PATIENCE_S = 5.0  # until a waiting process reports it
_in_progress: set[Path] = set()  # temporary names of this process
_waits: ContextVar[bool] = ContextVar("waits", default=True)


class LockedError(Exception):
    """Another process holds a lock, inside `no_waiting`."""


def file_identity(path: Path) -> dict[str, Any]:
    """Identify the content of a file without reading gigabytes, so that a copy is the same file.

    Parameters
    ----------
    path
        A file, or a folder, of which all files are identified.

    Returns
    -------
    Size, SHA-256 of the first and last MiB, and of larger files that of blocks in between.

    Raises
    ------
    InputError
        If the file does not exist.
    """
    path = Path(path)
    if path.is_dir():
        return {str(p.relative_to(path)): file_identity(p) for p in sorted(path.rglob("*")) if p.is_file()}
    if not path.is_file():
        raise InputError(f"{path}: no such file; check the path")
    size = path.stat().st_size
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        digest.update(handle.read(_SAMPLE_BYTES))
        if size > _SAMPLE_BYTES:
            handle.seek(max(_SAMPLE_BYTES, size - _SAMPLE_BYTES))
            digest.update(handle.read(_SAMPLE_BYTES))
        found = {"size": size, "sha256": digest.hexdigest()}
        if (between := size - 2 * _SAMPLE_BYTES) <= 0:
            return found
        # all of up to 16 MiB in between, else as much in 256 blocks at equal distances
        inside, length = hashlib.sha256(), -(-min(between, _INSIDE_BYTES) // _BLOCKS)
        for block in range(_BLOCKS):
            handle.seek(_SAMPLE_BYTES + block * between // _BLOCKS)
            inside.update(handle.read(length))
    return {**found, "sha256_inside": inside.hexdigest()}


def fingerprint(settings: Mapping[str, Any]) -> str:
    """Eight hex digits that identify (JSON-like) settings, independent of the order of the keys."""
    text = json.dumps(settings, sort_keys=True, default=str, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def default_cache(cache_dir: Path | str | None = None) -> Path:
    """The cache folder: the given one, else `$PRTS_CACHE`, else `cache` in the working folder."""
    return Path(cache_dir if cache_dir is not None else os.environ.get("PRTS_CACHE") or "cache")


def log_size(folder: Path) -> None:
    """Say where cached results are and how much space they take."""
    used = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    size = f"{used / 1e9:.1f} GB" if used >= 1e8 else f"{used / 1e6:.1f} MB"
    logger.info("cache: %s in %s; the next run reuses it, and it can be deleted", size, folder)


def sha256_file(path: Path) -> str:
    """SHA-256 of a whole file, for provenance that must survive copying."""
    with Path(path).open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Write a file or folder under a temporary name that replaces `path` if the block succeeds and is removed if it fails.

    Inside the block of another `atomic`, `path` itself is used. Leftovers of killed processes are removed first.

    Raises
    ------
    InputError
        If `path` cannot be written: the disk is full, or its folder cannot be created or is deleted in the meantime.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path.parent}: cannot be created ({error.strerror}); choose another folder") from error
    if not _in_progress.isdisjoint((path, *path.parents)):
        yield path
        return
    host = re.sub(r"\W", "-", platform.node())
    temporary = path.with_name(f".{path.stem}.{host}-{os.getpid()}.tmp{path.suffix}")
    for left in path.parent.glob(f".{glob.escape(path.stem)}.{host}-*.tmp{glob.escape(path.suffix)}"):
        if _is_dead(left.name.removeprefix(f".{path.stem}.{host}-").partition(".")[0]):
            _remove(left)
    _in_progress.add(temporary)
    try:
        yield temporary
        _replace(temporary, path)
    except InputError:
        raise
    except Exception as error:
        if (why := full_disk(error)) is not None:
            raise InputError(f"{path}: {why}") from error
        if any(isinstance(each, FileNotFoundError) and str(temporary) in str(each) for each in chain(error)):
            raise InputError(
                f"{path}: its folder was deleted while it was written; run the same command again"
            ) from error
        raise
    finally:
        _in_progress.discard(temporary)
        _remove(temporary)


def _replace(temporary: Path, path: Path) -> None:
    if not (temporary.is_dir() and path.is_dir()):
        temporary.replace(path)
        return
    # A folder cannot replace another in one step: for a moment there is none, but never an incomplete one.
    old = temporary.with_name(temporary.name.replace(f"-{os.getpid()}.", f"-{os.getpid()}.old."))
    path.replace(old)
    try:
        temporary.replace(path)
    except OSError:
        old.replace(path)
        raise
    _remove(old)


def process_runs(pid: int) -> bool:
    """Whether a process of this machine runs; True where that cannot be known."""
    if os.name == "nt":  # there, signal 0 interrupts
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _is_dead(pid: str) -> bool:
    """Whether the process that left a temporary file has ended."""
    if os.name == "nt" or not pid.isdigit():
        return False
    return not process_runs(int(pid)) or int(pid) == os.getpid()  # of an earlier process: in containers, ids repeat


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


@contextmanager
def lock(path: Path) -> Iterator[None]:
    """Hold the lock of a cache file while building it; other processes wait, report who is building it, and then find it built.

    The operating system releases the lock when the process ends, however it ends. On a file system without locks, nobody waits: two
    processes may build the same file, and the last one to finish replaces that of the other.

    Raises
    ------
    LockedError
        If another process holds it, inside `no_waiting`.
    InputError
        If the lock file cannot be created.
    """
    path = Path(path)
    held = filelock.FileLock(path.with_name(f".{path.name}.lock"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if (without := _missing_locks(Path(held.lock_file))) is not None:
            _warn_of_missing_locks(path.parent, without)
        else:
            _acquire(held, path)
    except OSError as error:
        why = (
            full_disk(error) or f"does not exist and cannot be written ({error.strerror}); choose another cache folder"
        )
        raise InputError(f"{path}: {why}") from error
    if without is not None:
        yield
        return
    try:
        with contextlib.suppress(OSError):  # on a full disk; this only informs waiting processes
            Path(held.lock_file).write_text(f"process {os.getpid()} on {platform.node()}", encoding="utf-8")
        yield
    finally:
        held.release()


def _missing_locks(file: Path) -> str | None:
    """Why a file cannot be locked: its file system has no locks; None if it can."""
    try:
        import fcntl
    except ImportError:  # Windows, whose file systems have locks
        return None
    with file.open("a") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
            fcntl.flock(handle, fcntl.LOCK_UN)
        except OSError as error:
            return str(error) if error.errno in _NO_LOCKS else None
    return None


@functools.cache
def _warn_of_missing_locks(folder: Path, why: str) -> None:
    logger.warning(
        "%s: its file system has no file locks (%s), so only one run at a time may use this cache; set another one for the others",
        *(folder, why),
    )


@contextmanager
def no_waiting() -> Iterator[None]:
    """Make `lock` raise `LockedError` instead of waiting for another process."""
    token = _waits.set(False)
    try:
        yield
    finally:
        _waits.reset(token)


def _acquire(held: filelock.FileLock, path: Path) -> None:
    waits = _waits.get()
    try:
        held.acquire(timeout=_PATIENCE_S if waits else 0)
    except filelock.Timeout as error:
        if not waits:
            raise LockedError(str(path)) from error
        with contextlib.suppress(OSError):
            holder = Path(held.lock_file).read_text(encoding="utf-8", errors="replace") or "another process"
            logger.warning("%s: waiting for %s, which is writing it (lock file %s)", path, holder, held.lock_file)
        held.acquire()


@contextmanager
def reading(cache: Path) -> Iterator[None]:
    """Explain a missing cache file: it was deleted in the meantime, as on a scratch disk that is purged.

    Raises
    ------
    InputError
        Instead of a FileNotFoundError about a file in the cache.
    """
    try:
        yield
    except FileNotFoundError as error:
        quoted = (f"'{folder}{end}" for folder in (cache, Path(cache).resolve()) for end in ("'", os.sep))
        if not any(text in str(error) for text in quoted):
            raise
        raise InputError(
            f"{cache}: files were deleted while they were read ({error}); run the same command again"
        ) from error


@contextmanager
def filling(folder: Path) -> Iterator[None]:
    """Name the folder in errors that say only that the disk is full, such as those of loggers.

    Raises
    ------
    InputError
        Instead of an error about a full disk.
    """
    try:
        yield
    except Exception as error:
        full = full_disk(error)
        if full is None or any(isinstance(each, InputError) for each in chain(error)):
            raise
        raise InputError(f"{folder}: {full}") from error
