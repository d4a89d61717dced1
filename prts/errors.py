"""The exception for wrong input, as opposed to a bug in prts, and messages for errors of the operating system."""

from __future__ import annotations

import difflib
import errno
import re
from collections.abc import Iterable, Iterator

_LONGEST = 1500
# As torch words it on CUDA, MPS and the CPU, and the libraries that it calls on a GPU.
_OUT_OF_MEMORY = r"out of memory|DefaultCPUAllocator|_STATUS_ALLOC_FAILED|Invalid buffer size"


class InputError(Exception):
    """A file or a value that the user gave is wrong.

    The message is one line: `<file or parameter>: <what is wrong>; <what to do>`. The command line prints it and exits with status 2;
    any other exception is a bug in prts and exits with status 1.
    """

    def __init__(self, message: object) -> None:
        line = " ".join(str(message).split())
        # text quoted from a file could control or flood the terminal
        line = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in line)
        if len(line) > _LONGEST:
            line = f"{line[: _LONGEST // 2]} [...] {line[-_LONGEST // 2 :]}"
        super().__init__(line)


class ParameterError(InputError):
    """A parameter has a wrong value.

    The command line prints it under the name of the config key.

    Parameters
    ----------
    owner
        Object that the parameter belongs to, such as `encoder`; empty for a parameter of the called function.
    name
        The parameter; empty if the choice of the owner itself is wrong.
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
        """Pickle, to return from worker processes."""
        return type(self), (self.owner, self.name, self.problem)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """', did you mean ...?' for a mistyped word; empty if nothing known is similar.

    Examples
    --------
    >>> did_you_mean("watersheed", ["stardist", "watershed"])
    ", did you mean 'watershed'?"
    """
    match = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f", did you mean {match[0]!r}?" if match else ""


def some_of(names: Iterable[str], n: int = 3) -> str:
    """Shorten a list of names for a message.

    Examples
    --------
    >>> some_of(["a", "b", "c", "d", "e"])
    'a, b, c and 2 more'
    """
    listed = [str(name) for name in names]
    more = f" and {len(listed) - n} more" if len(listed) > n else ""
    return ", ".join(listed[:n]) + more


def choose(word: str, known: Iterable[str]) -> str:
    """The end of a message about a name that a file lacks: the nearest one, and what there is.

    Examples
    --------
    >>> choose("count", ["counts", "lognorm"])
    ", did you mean 'counts'?; choose from counts, lognorm"
    >>> choose("x", [])
    '; there is none'
    """
    names = list(known)
    return f"{did_you_mean(word, names)}; choose from {some_of(names, 8)}" if names else "; there is none"


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """An exception and its causes, since libraries wrap what the operating system reported."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        yield error
        seen.add(id(error))
        error = error.__cause__ or error.__context__


def full_disk(error: BaseException | None) -> str | None:
    """Message if an exception was caused by a full disk, else None."""
    for each in chain(error):
        # libraries lose the errno; numpy and tifffile report a short write instead
        if getattr(each, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or re.search(
            r"No space left|Disk quota exceeded|^\d+ requested and \d+ written$", str(each).strip()
        ):
            return (
                "the disk is full; free some space or choose another folder and run it again (finished parts are kept)"
            )
    return None


def out_of_memory(error: BaseException | None) -> str | None:
    """What torch or a library that it calls says of a device without memory, in one sentence, else None."""
    for each in chain(error):
        text = " ".join(str(each).split())
        if isinstance(each, RuntimeError) and re.search(_OUT_OF_MEMORY, text):
            return text.split(". ")[0]
    return None


def refusal(error: BaseException | None) -> str | None:
    """Message if the operating system refused something (no space, permission or memory), else None."""
    names = (getattr(each, "filename", None) for each in chain(error))
    where = next((f"{name}: " for name in names if isinstance(name, str)), "")
    if (full := full_disk(error)) is not None:
        return where + full
    for each in chain(error):
        text = " ".join(str(each).split())
        if isinstance(each, PermissionError) or getattr(each, "errno", None) == errno.EROFS or "Read-only" in text:
            return f"{where}cannot be read or written ({text}); change the permissions or choose another place"
        if isinstance(each, MemoryError):
            return f"not enough memory ({text or 'none left'}); use a machine with more memory, a smaller image or a smaller batch"
    return None
