"""Atomic writes, and locks between processes that may be killed."""

from __future__ import annotations

import errno
import logging
import os
import platform
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import h5py
import pytest

from prts.errors import InputError
from prts.io import cache
from prts.io.cache import atomic, file_identity, lock, reading

Start = Callable[..., "subprocess.Popen[str]"]

# A process that builds a file under its lock, step by step: it reports each step and waits for a line on stdin.
BUILDER = """
    import logging, sys, time
    from pathlib import Path
    from prts.io import cache

    logging.basicConfig(format="%(message)s")
    cache._PATIENCE_S = float(sys.argv[3])
    path, slow = Path(sys.argv[1]), sys.argv[2] == "slow"
    if not path.exists():
        with cache.lock(path):
            if not path.exists():
                print("builds", flush=True)
                if slow:
                    sys.stdin.readline()
                with cache.atomic(path) as temporary:
                    temporary.write_text("half")
                    if slow:
                        print("half", flush=True)
                        sys.stdin.readline()
                    temporary.write_text("whole")
    print("has", path.read_text(), flush=True)
"""


@pytest.fixture
def start() -> Iterator[Start]:
    """Start builders; those still running at the end are killed."""
    running = []

    def go(path: Path, how: str = "quick", patience_s: float = 5.0) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", textwrap.dedent(BUILDER), str(path), how, str(patience_s)]
        pipe = subprocess.PIPE
        process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
        running.append(process)
        return process

    yield go
    for process in running:
        process.kill()
        process.communicate()


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def step(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def test_one_builds_and_the_others_wait_and_use_it(start: Start, tmp_path: Path) -> None:
    path = tmp_path / "cache" / "f.txt"
    first = start(path, "slow")
    assert said(first) == "builds"
    others = [start(path, patience_s=0.2) for _ in range(3)]
    for other in others:  # all three are waiting
        assert other.stderr is not None
        line = other.stderr.readline()
        assert f"{path}: waiting for process {first.pid} on {platform.node()}, which is writing it" in line
        assert str(path.with_name(".f.txt.lock")) in line
    assert not path.exists()
    step(first)
    assert said(first) == "half"
    assert not path.exists()
    step(first)
    assert said(first) == "has whole"
    assert [said(other) for other in others] == ["has whole"] * 3


def test_another_builds_when_the_builder_is_killed(start: Start, tmp_path: Path) -> None:
    path = tmp_path / "f.txt"
    first = start(path, "slow")
    assert said(first) == "builds"
    others = [start(path, patience_s=0.2) for _ in range(2)]
    for other in others:
        assert other.stderr is not None and "waiting for" in other.stderr.readline()
    step(first)
    assert said(first) == "half"
    first.kill()
    assert first.wait() == -signal.SIGKILL
    lines = sorted(other.communicate()[0] for other in others)
    assert lines == ["builds\nhas whole\n", "has whole\n"]
    # nothing of the killed one is left
    assert sorted(file.name for file in tmp_path.iterdir()) == [".f.txt.lock", "f.txt"]


def test_a_lock_file_of_a_dead_process_locks_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "f.txt"
    path.with_name(".f.txt.lock").write_text("process 1 on another-host-that-is-gone")
    began = time.monotonic()
    with caplog.at_level(logging.WARNING), lock(path):
        assert path.with_name(".f.txt.lock").read_text() == f"process {os.getpid()} on {platform.node()}"
    assert time.monotonic() - began < 1
    assert not caplog.records


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_failed_write_keeps_the_old_file(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "model.x"
    make = Path.mkdir if kind == "folder" else Path.touch
    make(path)
    before = path.stat().st_ino
    with pytest.raises(RuntimeError), atomic(path) as temporary:
        make(temporary)
        raise RuntimeError
    assert [file.name for file in tmp_path.iterdir()] == ["model.x"] and path.stat().st_ino == before
    with atomic(path) as temporary:
        make(temporary)
    assert [file.name for file in tmp_path.iterdir()] == ["model.x"] and path.stat().st_ino != before


def test_a_folder_is_never_seen_in_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At any step of the swap there is the old folder, none, or the new one."""
    path = tmp_path / "model"
    path.mkdir()
    for name in ("a", "b"):
        (path / name).write_text("old")
    seen = []

    def watched(function: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            seen.append({file.name: file.read_text() for file in path.iterdir()} if path.is_dir() else None)
            return function(*args, **kwargs)

        return call

    with atomic(path) as temporary:
        temporary.mkdir()
        for name in ("a", "b"):
            (temporary / name).write_text("new")
        for owner, name in ((os, "unlink"), (os, "rmdir"), (os, "rename"), (os, "replace")):
            monkeypatch.setattr(owner, name, watched(getattr(owner, name)))
    monkeypatch.undo()
    assert len(seen) > 4
    assert all(state in (None, dict.fromkeys("ab", "old"), dict.fromkeys("ab", "new")) for state in seen)
    assert {file.name: file.read_text() for file in path.iterdir()} == dict.fromkeys("ab", "new")
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


def test_leftovers_of_dead_processes_only_are_removed(tmp_path: Path) -> None:
    host = re.sub(r"\W", "-", platform.node())
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    path = tmp_path / "a.b.h5"
    left = [f".a.b.{host}-{pid}.tmp.h5" for pid in (dead.pid, os.getpid())]
    left += [f".a.b.{host}-{dead.pid}.old.tmp.h5"]
    others = [f".a.b.{host}-{os.getppid()}.tmp.h5", f".a.b.elsewhere-{dead.pid}.tmp.h5", f".x.{host}-{dead.pid}.tmp.h5"]
    for name in (*left, *others):
        (tmp_path / name).mkdir()
        (tmp_path / name / "part").touch()
    with atomic(path) as temporary:
        assert not temporary.exists()  # from an earlier process with the same id
        temporary.write_text("x")
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted([*others, "a.b.h5"])


def test_a_folder_is_restored_if_the_swap_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model"
    path.mkdir()
    (path / "weights").write_text("old")
    replace = Path.replace

    def full(self: Path, target: Path) -> Path:
        if self.name.endswith(".tmp") and ".old." not in self.name:
            raise OSError(errno.ENOSPC, "No space left on device")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(InputError, match="the disk is full"), atomic(path) as temporary:
        temporary.mkdir()
    assert [file.name for file in tmp_path.iterdir()] == ["model"] and (path / "weights").read_text() == "old"


def test_a_full_disk_names_the_outermost_file(tmp_path: Path) -> None:
    with (
        pytest.raises(InputError, match=r"/folder: the disk is full; free some space") as caught,
        atomic(tmp_path / "folder") as outer,
        atomic(outer / "file") as inner,
    ):
        inner.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert "tmp" not in str(caught.value).removeprefix(str(tmp_path))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_folder_deleted_during_a_write_is_named(tmp_path: Path, when: str) -> None:
    folder = tmp_path / "cache"
    with (
        pytest.raises(
            InputError, match=r"cache/f: its folder was deleted while it was written; run the same command again"
        ),
        atomic(folder / "f") as temporary,
    ):
        if when == "after":
            temporary.write_text("x")
        cache._remove(folder)
        if when == "before":
            temporary.write_text("x")
    assert not folder.exists()


def test_files_missing_outside_the_cache_are_not_explained(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="c: files were deleted while they were read"), reading(tmp_path / "c"):
        (tmp_path / "c" / "x").read_text()
    with pytest.raises(InputError, match="were deleted"), reading(tmp_path / "c"):
        h5py.File(tmp_path / "c" / "x.h5")
    for elsewhere in (tmp_path / "d" / "x", tmp_path / "cc", tmp_path / "c.txt"):
        with pytest.raises(FileNotFoundError), reading(tmp_path / "c"):
            elsewhere.read_text()
    with pytest.raises(FileNotFoundError), reading(Path("cache")):  # a plain word that is part of many paths
        (tmp_path / ".cache" / "cache.txt").read_text()


def test_a_cache_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(InputError, match=r"file/x/f: does not exist and cannot be written"),
        lock(tmp_path / "file" / "x" / "f"),
    ):
        pass


@pytest.mark.parametrize("size", [0, 10, 3 << 20, 40 << 20])
def test_a_copy_is_the_same_file_and_a_change_is_not(tmp_path: Path, size: int) -> None:
    path, copy = tmp_path / "a.bin", tmp_path / "b.bin"
    path.write_bytes(os.urandom(size))
    copy.write_bytes(path.read_bytes())
    os.utime(copy, (1, 1))
    assert file_identity(path) == file_identity(copy)
    # blocks at both ends and in between, up to 256 of them in larger files
    for at in {0, size // 2, size - 1} if 0 < size < 16 << 20 else {0, size - 1} if size else ():
        data = bytearray(copy.read_bytes())
        data[at] ^= 1
        (tmp_path / "c.bin").write_bytes(data)
        assert file_identity(path) != file_identity(tmp_path / "c.bin"), at
    data = bytearray(copy.read_bytes())
    data[size // 3 : size // 2] = bytes(size // 2 - size // 3)
    (tmp_path / "c.bin").write_bytes(data)
    assert (file_identity(path) == file_identity(tmp_path / "c.bin")) == (size == 0)
    (tmp_path / "c.bin").write_bytes(copy.read_bytes() + b"x")
    assert file_identity(path) != file_identity(tmp_path / "c.bin")


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, 524])
def test_a_file_system_without_locks_is_used_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, code: int
) -> None:
    def flock(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("fcntl.flock", flock)
    cache._warn_of_missing_locks.cache_clear()
    for name in ("a", "b"):
        with lock(tmp_path / name), atomic(tmp_path / name) as temporary:
            temporary.write_text("whole")
        assert (tmp_path / name).read_text() == "whole"
    (line,) = [record.getMessage() for record in caplog.records]
    assert "has no file locks" in line and "only one run at a time" in line


def test_another_error_of_a_lock_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("fcntl.flock", flock)
    with pytest.raises(InputError, match="Input/output error"), lock(tmp_path / "a"):
        pass
