"""Check a constructor's arguments against its type annotations."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import TypeVar

from pydantic import ConfigDict, ValidationError, validate_call

from prts.errors import ParameterError, did_you_mean

F = TypeVar("F", bound=Callable[..., None])


def checked(owner: str) -> Callable[[F], F]:
    """Decorator for `__init__`: an argument that does not fit its annotation raises a `ParameterError`.

    Parameters
    ----------
    owner
        What the argument belongs to, such as `network`.

    Examples
    --------
    >>> from typing import Annotated
    >>> from pydantic import Field
    >>> class Blur:
    ...     @checked("stain")
    ...     def __init__(self, radius: Annotated[int, Field(ge=1)]) -> None: ...
    >>> Blur(0)
    Traceback (most recent call last):
    prts.errors.ParameterError: stain radius: 0: input should be greater than or equal to 1
    """

    def decorate(init: F) -> F:
        validated = validate_call(config=ConfigDict(arbitrary_types_allowed=True))(init)
        known = list(inspect.signature(init).parameters)[1:]

        @functools.wraps(init)
        def run(*args: object, **kwargs: object) -> None:
            try:
                validated(*args, **kwargs)
            except ValidationError as error:
                raise _parameter_error(owner, known, error) from None

        return run  # type: ignore[return-value]

    return decorate


def _parameter_error(owner: str, known: list[str], error: ValidationError) -> ParameterError:
    first = error.errors()[0]
    name, *inside = (str(part) for part in first["loc"])
    problem = first["msg"][0].lower() + first["msg"][1:]
    if first["type"] == "unexpected_keyword_argument":
        return ParameterError(
            owner, name, f"no such setting{did_you_mean(name, known)}; choose from {', '.join(known)}"
        )
    if first["type"] == "missing_argument":
        return ParameterError(owner, name, problem)
    where = f"[{']['.join(inside)}] = " if inside else ""
    return ParameterError(owner, name, f"{where}{first['input']!r}: {problem}")
