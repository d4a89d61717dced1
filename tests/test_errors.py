from __future__ import annotations

from prts.errors import InputError


def test_a_message_is_one_line_that_a_terminal_can_show() -> None:
    message = str(InputError("slide é.tif: its tag\nsays \x1b[2J\u202e and \ud800"))
    assert message == "slide é.tif: its tag says \\x1b[2J\\u202e and \\ud800"
    assert str(InputError(message)) == message


def test_a_message_that_quotes_a_file_keeps_its_two_ends() -> None:
    message = str(InputError(f"a.csv: has the columns {'x' * 100_000}; a marker table is needed"))
    assert message.startswith("a.csv: has the columns xxx") and message.endswith("xxx; a marker table is needed")
    assert len(message) < 2000
