"""Claims of workers that live, have ended, or are on machines that are out of sight."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from prts.cohort import claims
from prts.cohort.claims import Claims


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The clock of this machine; its only item is the time."""
    at = [1000.0]
    monkeypatch.setattr("prts.cohort.claims.time.monotonic", lambda: at[0])
    return at


def foreign(folder: Path, name: str, **other: object) -> Path:
    path = folder / f".{name}.claim-1"
    path.write_text(json.dumps({**claims.this_process(), "host": "elsewhere", **other}))
    return path


def test_of_many_workers_one_gets_a_slide(tmp_path: Path) -> None:
    barrier, took = threading.Barrier(8), []

    def work() -> None:
        mine = Claims(tmp_path)
        barrier.wait()
        took.append(mine.take("sub/a"))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(took) == [False] * 7 + [True]


def test_a_released_slide_is_free_and_leaves_nothing(tmp_path: Path) -> None:
    with Claims(tmp_path) as first:
        assert first.take("a") and first.take("b") and not first.take("a")
        second = Claims(tmp_path)
        assert second.standing("a") == "held" and not second.take("a")
        first.release("a")
        assert second.standing("a") == "free"
    assert list(tmp_path.iterdir()) == []


def test_a_killed_worker_of_this_machine_is_succeeded_at_once(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    foreign(tmp_path, "a", host=claims.this_process()["host"], pid=ended.pid)
    foreign(tmp_path, "b", host=claims.this_process()["host"], pid=os.getppid())
    first, second = Claims(tmp_path), Claims(tmp_path)
    assert second.standing("b") == "held"
    assert second.standing("a") == "free"  # both see it, and one gets it
    assert first.take("a") and not second.take("a") and first.owns("a")
    assert (tmp_path / ".a.claim-2").is_file()
    first.release("a")
    assert [path.name for path in tmp_path.iterdir()] == [".b.claim-1"]


def test_a_worker_elsewhere_is_held_while_it_beats_and_void_when_it_does_not(
    tmp_path: Path, clock: list[float]
) -> None:
    path, mine = foreign(tmp_path, "a"), Claims(tmp_path)
    os.utime(path, (5, 5))  # that machine's clock is wrong by decades
    assert mine.standing("a") == "unsure"
    clock[0] += claims.BEAT_S
    os.utime(path, (7, 7))
    assert mine.standing("a") == "held"
    clock[0] += claims.VOID_S - 1
    assert not mine.take("a")
    clock[0] += 1
    assert mine.standing("a") == "free" and mine.take("a")
    assert not Claims(tmp_path).take("a")


def test_the_owner_touches_its_claims(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "BEAT_S", 0.01)
    with Claims(tmp_path) as mine:
        mine.take("a")
        path = tmp_path / ".a.claim-1"
        os.utime(path, (5, 5))
        for _ in range(500):
            if path.stat().st_mtime > 1e9:
                break
            time.sleep(0.01)
        assert path.stat().st_mtime > 1e9


def test_who_was_succeeded_in_its_sleep_notices(tmp_path: Path) -> None:
    sleeper = Claims(tmp_path)
    sleeper.take("a")
    later = tmp_path / ".a.claim-2"
    later.write_text(json.dumps({**claims.this_process(), "host": "elsewhere"}))
    assert not sleeper.owns("a")
    sleeper.release("a")
    assert later.is_file()  # and does not take it away from its successor
