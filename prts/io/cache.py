"""Cache files: named by a fingerprint of what made them, written whole or not at all, built by one process at a time."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import platform
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filelock

from prts.errors import InputError

_SAMPLE_BYTES = 1 << 20


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
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path.parent}: cannot be made a folder ({error.strerror}): choose another place") from error
    host = re.sub(r"\W", "-", platform.node())
    for left in path.parent.glob(f".{glob.escape(path.stem)}.{host}-*.tmp{glob.escape(path.suffix)}"):
        if not _is_alive(left.name[len(path.stem) + len(host) + 3 :].partition(".")[0]):
            _remove(left)
    temporary = path.with_name(f".{path.stem}.{host}-{os.getpid()}.tmp{path.suffix}")
    try:
        yield temporary
        if temporary.is_dir() and path.is_dir():
            shutil.rmtree(path)
        temporary.replace(path)
    finally:
        _remove(temporary)


def _is_alive(pid: str) -> bool:
    """Whether a process of this machine still runs; also where it cannot be told."""
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except (ValueError, OSError):
        return True
    return True


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


@contextmanager
def lock(path: Path) -> Iterator[None]:
    """Hold the lock of a cache file while building it; other processes wait here and then find it built.

    The lock is the operating system's, so a killed process leaves none behind.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(path.with_name(f".{path.name}.lock")):
        yield
