"""The one exception that means "your input is wrong", as opposed to a bug in prts; and what the operating system refused."""

from __future__ import annotations

import difflib
import errno
import re
from collections.abc import Iterable, Iterator

_LONGEST = 1500


class InputError(Exception):
    """Something the user gave (a file, a key, a value) is wrong.

    The message is one line that names the file or key, says what is wrong and what would be right. The command line prints it
    and exits with status 2; every other exception is a bug and exits with 1.
    """

    def __init__(self, message: object) -> None:
        line = " ".join(str(message).split())
        # what a message quotes of a file could steer the terminal, or fill it
        line = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in line)
        if len(line) > _LONGEST:
            line = f"{line[: _LONGEST // 2]} [...] {line[-_LONGEST // 2 :]}"
        super().__init__(line)


class ParameterError(InputError):
    """A parameter of something that the user configures is wrong.

    The command line prints it under the name of the config key.

    Parameters
    ----------
    owner
        What the parameter belongs to, such as `encoder`; empty for a parameter of the called function itself.
    name
        The parameter; empty where the choice of the owner itself is wrong.
    problem
        What is wrong and what to do.

    Examples
    --------
    >>> str(ParameterError("encoder", "stride", "8 is below 16; choose 16 to 256"))
    'encoder stride: 8 is below 16; choose 16 to 256'
    """

    def __init__(self, owner: str, name: str, problem: str) -> None:
        super().__init__(f"{' '.join(filter(None, (owner, name)))}: {problem}")
        self.owner = owner
        self.name = name
        self.problem = problem

    def __reduce__(self) -> tuple[type[ParameterError], tuple[str, str, str]]:
        """Survive the way back from a worker process."""
        return type(self), (self.owner, self.name, self.problem)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """', did you mean ...?' for a mistyped word; empty where nothing known is similar.

    Examples
    --------
    >>> did_you_mean("watersheed", ["stardist", "watershed"])
    ", did you mean 'watershed'?"
    """
    match = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f", did you mean {match[0]!r}?" if match else ""


# Of what numpy and tifffile say when `ndarray.tofile` came to the end of the disk: they raise an OSError without errno.
_CUT_SHORT = re.compile(r"\d+ requested and \d+ written")


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """An exception and those behind it: libraries wrap what the operating system said."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        yield error
        seen.add(id(error))
        error = error.__cause__ or error.__context__


def full_disk(error: BaseException | None) -> str | None:
    """What is to be said where the disk is full; None where it is not. Libraries tell it in ways of their own."""
    for each in chain(error):
        text = " ".join(str(each).split())
        full = getattr(each, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or (
            isinstance(each, OSError) and _CUT_SHORT.fullmatch(text)
        )
        if full or "No space left" in text or "Disk quota exceeded" in text:
            return (
                "the disk is full; free some space or choose another folder, and run it again: what is finished is kept"
            )
    return None


def refusal(error: BaseException | None) -> str | None:
    """What the operating system would not let prts do (no room, no permission, no memory), in one line; None if it was something else."""
    if (full := full_disk(error)) is not None:
        names = (getattr(each, "filename", None) for each in chain(error))
        name = next((name for name in names if isinstance(name, str)), None)
        return full if name is None else f"{name}: {full}"
    for each in chain(error):
        text = " ".join(str(each).split())
        name = getattr(each, "filename", None)
        where = f"{name}: " if isinstance(name, str) else ""
        if (
            isinstance(each, PermissionError)
            or getattr(each, "errno", None) == errno.EROFS
            or "Read-only file system" in text
        ):
            return f"{where}may not be read or written ({text}); change the permissions or choose another place"
        if isinstance(each, MemoryError):
            return f"there is not enough memory ({text or 'none left'}); give the machine more, or a smaller image or batch"
    return None
