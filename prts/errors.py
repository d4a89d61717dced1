"""The one exception that means "your input is wrong", as opposed to a bug in prts."""

from __future__ import annotations

_LONGEST = 1500


class InputError(Exception):
    """Something the user gave (a file, a key, a value) is wrong.

    The message is one printable line that names the file or key, says what is wrong and what would be right. The command line prints it
    and exits with status 2; every other exception is a bug and exits with 1.
    """

    def __init__(self, message: object) -> None:
        line = " ".join(str(message).split())
        # what a message quotes of a file could steer the terminal, or fill it
        line = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in line)
        if len(line) > _LONGEST:
            line = f"{line[: _LONGEST // 2]} [...] {line[-_LONGEST // 2 :]}"
        super().__init__(line)
