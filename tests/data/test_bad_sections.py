"""Sections that cannot be used, and sections that another process is working on."""

import filelock
import pytest

from prts.data.bad_sections import BadSections, in_turn
from prts.data.splits import Roles
from prts.errors import InputError
from prts.io.cache import LockedError, lock, no_waiting

ROLES = Roles(["a", "b"], ["c"], ["d"])


def noted(skip, **errors):
    bad = BadSections(skip=skip)
    for name, reason in errors.items():
        with bad.noting(name):
            raise InputError(reason)
    return bad


def test_every_bad_section_is_named_at_once():
    with pytest.raises(
        InputError, match=r"^2 of 4 sections cannot be used: a \(a.tif: is cut\); c \(c.tif: is a photo\); "
    ):
        noted(False, a="a.tif: is cut", c="c.tif: is a photo").settle(ROLES)
    with pytest.raises(InputError, match=r"^a.tif: is cut$"):  # one is said as it is
        noted(False, a="a.tif: is cut").settle(ROLES)
    assert noted(False).settle(ROLES) is ROLES


def test_bad_sections_are_left_out_if_every_role_keeps_one(caplog):
    bad = noted(True, a="a.tif: is cut")
    assert bad.settle(ROLES) == Roles(["b"], ["c"], ["d"])
    assert bad.reasons == {"a": "a.tif: is cut"}
    assert "section a is left out: a.tif: is cut" in caplog.text
    with pytest.raises(InputError, match=r"^skip_bad: leaves no section for val; "):
        noted(True, a="a.tif: is cut", c="c.tif: is a photo").settle(ROLES)


def test_a_full_disk_is_not_the_fault_of_a_section():
    bad = BadSections(skip=True)
    with pytest.raises(InputError, match="the disk is full"), bad.noting("a"):
        try:
            raise OSError(28, "No space left on device")
        except OSError as error:
            raise InputError("cache: the disk is full") from error
    assert bad.reasons == {}


def test_locked_sections_come_last(tmp_path):
    held = filelock.FileLock(tmp_path / ".a.lock")
    held.acquire()
    order = []

    def step(name):
        if name == "c":
            held.release()  # the other process is done
        with lock(tmp_path / name):
            order.append(name)

    in_turn(["a", "b", "c"], step)
    assert order == ["b", "c", "a"]


def test_only_no_waiting_raises(tmp_path):
    with filelock.FileLock(tmp_path / ".a.lock"), pytest.raises(LockedError), no_waiting(), lock(tmp_path / "a"):
        pass
