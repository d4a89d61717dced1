from __future__ import annotations

from prts.errors import InputError


def test_messages_are_one_printable_line() -> None:
    message = str(InputError("slide é.tif: its tag\nsays \x1b[2J\u202e and \ud800"))
    assert message == "slide é.tif: its tag says \\x1b[2J\\u202e and \\ud800"
    assert str(InputError(message)) == message


def test_long_messages_keep_both_ends() -> None:
    message = str(InputError(f"a.csv: has the columns {'x' * 100_000}; a marker table is needed"))
    assert message.startswith("a.csv: has the columns xxx") and message.endswith("xxx; a marker table is needed")
    assert len(message) < 2000
