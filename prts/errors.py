"""The one exception that means "your input is wrong", as opposed to a bug in prts."""

from __future__ import annotations


class InputError(Exception):
    """Something the user gave (a file, a key, a value) is wrong.

    The message is one line that names the file or key, says what is wrong and what would be right. The command line prints it
    and exits with status 2; every other exception is a bug and exits with 1.
    """

    def __init__(self, message: object) -> None:
        super().__init__(" ".join(str(message).split()))
