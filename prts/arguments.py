"""Check plain arguments, as in YAML or JSON, against the type annotations of the callable they are for.

Values are not converted: a whole number is accepted as a number and a list as a tuple, but `"3"` is not a number and `true` is not 1.
Ranges and choices are stated once, in the annotation: `Annotated[int, Field(ge=16, le=256)]`, `Literal["exact", "grid"]`.
"""

from __future__ import annotations

import functools
import inspect
import json
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MaxLen, MinLen
from pydantic import ConfigDict, PydanticUserError, TypeAdapter, ValidationError
from pydantic.errors import PydanticSchemaGenerationError
from pydantic.fields import FieldInfo

from prts.errors import ParameterError, did_you_mean

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., None])

# Errors of annotations that pydantic or Python cannot interpret: such a parameter is left to its owner.
_NO_SCHEMA = (PydanticUserError, PydanticSchemaGenerationError, NameError, TypeError, AttributeError)
_NAMES = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    Path: "a path",
    type(None): "null",
}


@dataclass(frozen=True)
class Parameter:
    """A parameter of a callable: its annotation, None if it cannot be checked, and whether it is required."""

    annotation: Any
    required: bool


def checked(owner: str) -> Callable[[F], F]:
    """Decorator for `__init__`: an argument that does not fit its annotation raises a `ParameterError`.

    Parameters
    ----------
    owner
        What the argument belongs to, such as `network`.

    Examples
    --------
    >>> from pydantic import Field
    >>> class Blur:
    ...     @checked("stain")
    ...     def __init__(self, radius: Annotated[int, Field(ge=1)]) -> None: ...
    >>> Blur(0)
    Traceback (most recent call last):
    prts.errors.ParameterError: stain radius: 0 is not accepted; give a whole number of at least 1
    """

    def decorate(init: F) -> F:
        names = list(inspect.signature(init).parameters)[1:]

        @functools.wraps(init)
        def run(self: object, *args: object, **kwargs: object) -> None:
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            if len(args) + len(kwargs) > len(given) or len(args) > len(names):
                init(self, *args, **kwargs)  # Python's own error: too many, or one twice
            init(self, **check_settings(init, given, owner, complete=True))

        return run  # type: ignore[return-value]

    return decorate


def checked_call(factory: Callable[..., T], settings: Mapping[str, Any], owner: str) -> T:
    """Call with plain settings, checked against the annotations.

    Parameters
    ----------
    factory
        A class or function.
    settings
        Its keyword arguments.
    owner
        What the settings belong to, for errors.

    Raises
    ------
    ParameterError
        If a setting is unknown or missing, or its value is not of the annotated type or range.

    Examples
    --------
    >>> def blur(sigma: float) -> float:
    ...     return sigma
    >>> checked_call(blur, {"sigma": 2}, "stain")
    2.0
    """
    return factory(**check_settings(factory, settings, owner, complete=True))


def check_settings(
    factory: Callable[..., Any], settings: Mapping[str, Any], owner: str, *, complete: bool = False
) -> dict[str, Any]:
    """Check plain settings against the parameters of a callable.

    Parameters
    ----------
    factory
        A class or function.
    settings
        Some of its keyword arguments.
    owner
        What they belong to, for errors.
    complete
        Whether a required parameter must be among them.

    Returns
    -------
    The settings as the annotations have them, such as tuples for lists.

    Raises
    ------
    ParameterError
        If a setting is unknown or missing, or its value is not of the annotated type or range.
    """
    known, is_open = parameters(factory)
    checked = {}
    for name, value in settings.items():
        if name in known:
            checked[name] = check_value(owner, name, value, known[name].annotation)
        elif is_open:
            checked[name] = value
        else:
            has = f"choose from {', '.join(known)}" if known else "it has none"
            raise ParameterError(
                owner, name, f"{_name(factory)} has no such setting{did_you_mean(name, known) or f'; {has}'}"
            )
    if complete:
        for name, parameter in known.items():
            if parameter.required and name not in settings:
                raise ParameterError(owner, name, f"is missing; give {expected(parameter.annotation)}")
    return checked


def check_value(owner: str, name: str, value: Any, annotation: Any) -> Any:
    """Check one plain value against an annotation and return it as annotated.

    Raises
    ------
    ParameterError
        If it has the wrong type or is out of range; the message says what is accepted.
    """
    adapter = _adapter(annotation)
    if adapter is None:
        return value
    if type(value).__module__ == "numpy" and hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, bool) and get_origin(annotation) is Literal and bool not in map(type, get_args(annotation)):
        # true equals 1 in Python, and so for pydantic
        raise ParameterError(owner, name, f"{shown(value)} is not accepted; give {expected(annotation)}")
    try:
        return adapter.validate_python(value, strict=True)
    except ValidationError:
        pass
    try:
        # strict JSON mode: lists for tuples, text for paths and enums, and no other conversions
        return adapter.validate_json(json.dumps(value, default=_plain), strict=True)
    except (ValidationError, ValueError, TypeError, AttributeError) as error:
        raise ParameterError(owner, name, f"{shown(value)} is not accepted; give {expected(annotation)}") from error


def _plain(value: Any) -> Any:
    """Convert for JSON: a path to text, an array or any other sequence (such as a config's list) to a list."""
    if isinstance(value, PurePath):
        return str(value)
    return list(value) if isinstance(value, Sequence) else value.tolist()


@functools.cache
def parameters(factory: Callable[..., Any]) -> tuple[dict[str, Parameter], bool]:
    """The parameters of a class or function by name, and whether it takes any others, too.

    A constructor that passes `**kwargs` on to its base class has the base's parameters as well.
    """
    functions = [factory]
    for kind in getattr(factory, "__mro__", (factory,)):
        if "__signature__" in getattr(kind, "__dict__", {}):  # set explicitly, with types
            given = inspect.signature(kind).parameters.values()
            return {each.name: Parameter(each.annotation, each.default is each.empty) for each in given}, False
        if "__init__" in getattr(kind, "__dict__", {}):
            break
    if inspect.isclass(factory):
        functions = [
            vars(kind)["__init__"] for kind in factory.__mro__ if "__init__" in vars(kind) and kind is not object
        ]
    namespace = {}
    for kind in reversed(getattr(factory, "__mro__", (factory,))):
        namespace.update(vars(sys.modules.get(kind.__module__, types)))
    found: dict[str, Parameter] = {}
    for function in functions:
        inner = inspect.unwrap(function)
        scope = {**namespace, **getattr(inner, "__globals__", {})}
        takes_others = False
        for name, parameter in inspect.signature(inner).parameters.items():
            if parameter.kind is parameter.VAR_KEYWORD:
                takes_others = True
            elif parameter.kind is not parameter.VAR_POSITIONAL and name != "self":
                required = parameter.default is parameter.empty
                found.setdefault(name, Parameter(_resolve(parameter.annotation, scope), required))
        if not takes_others:
            return found, False
    return found, bool(functions)


def _resolve(annotation: Any, scope: dict[str, Any]) -> Any:
    if annotation is inspect.Parameter.empty:
        return None
    if isinstance(annotation, str):
        try:
            return eval(annotation, scope)  # like typing.get_type_hints, but one parameter at a time
        except _NO_SCHEMA:
            return None  # from a module that is imported for type checkers only
    return annotation


@functools.lru_cache(maxsize=1024)
def _cached_adapter(annotation: Any) -> TypeAdapter[Any] | None:
    try:
        return TypeAdapter(annotation, config=ConfigDict(arbitrary_types_allowed=True, allow_inf_nan=False))
    except PydanticUserError as error:
        if error.code != "type-adapter-config-unused":
            return None
        return TypeAdapter(annotation)  # a dataclass or model already has a config
    except _NO_SCHEMA:
        return None


def _adapter(annotation: Any) -> TypeAdapter[Any] | None:
    if annotation is None or annotation is Any:
        return None
    try:
        return _cached_adapter(annotation)
    except TypeError:  # not hashable
        return _cached_adapter.__wrapped__(annotation)


def shown(value: Any) -> str:
    """A value as in YAML, on one line."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]}[...]{text[-15:]}"


def expected(annotation: Any) -> str:
    """Describe in words what an annotation accepts.

    Examples
    --------
    >>> expected(Literal["exact", "grid"])
    'exact or grid'
    >>> from pydantic import Field
    >>> expected(Annotated[int, Field(ge=16, le=256)] | None)
    'a whole number from 16 to 256, or null'
    """
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _limited(arguments[0], _limits(arguments[1:]))
    if origin is Literal:
        return _either([choice if isinstance(choice, str) else shown(choice) for choice in arguments])
    if origin in (Union, types.UnionType):
        options = [expected(option) for option in arguments if option is not type(None)]
        return _either(list(dict.fromkeys(options))) + (", or null" if type(None) in arguments else "")
    if origin is tuple and arguments and arguments[-1] is not Ellipsis:
        return f"a list of {len(arguments)}, each {_either(list(dict.fromkeys(map(expected, arguments))))}"
    if origin is not None and inspect.isclass(origin):
        if issubclass(origin, Mapping):
            return "a mapping"
        if issubclass(origin, Sequence | set | frozenset):
            return f"a list, each {expected(arguments[0])}" if arguments and arguments[0] is not Any else "a list"
    if annotation in _NAMES:
        return _NAMES[annotation]
    return getattr(annotation, "__name__", str(annotation).replace("typing.", ""))


def _limits(metadata: Sequence[Any]) -> list[Any]:
    found = []
    for item in metadata:
        if isinstance(item, FieldInfo):
            if item.description:
                return [item.description]
            found += item.metadata
        else:
            found.append(item)
    return found


def _limited(annotation: Any, limits: Sequence[Any]) -> str:
    """An annotation with its range; a description given with `Field` replaces both."""
    for limit in limits:
        if isinstance(limit, str):
            return limit
    base = expected(annotation)
    low = next((limit for limit in limits if isinstance(limit, Ge | Gt)), None)
    high = next((limit for limit in limits if isinstance(limit, Le | Lt)), None)
    if isinstance(low, Ge) and isinstance(high, Le):
        return f"{base} from {_short(low.ge)} to {_short(high.le)}"
    parts = []
    if low is not None:
        parts.append(f"of at least {_short(low.ge)}" if isinstance(low, Ge) else f"above {_short(low.gt)}")
    if high is not None:
        parts.append(f"of at most {_short(high.le)}" if isinstance(high, Le) else f"below {_short(high.lt)}")
    for limit in limits:
        if isinstance(limit, MinLen):
            parts.append("that is not empty" if limit.min_length == 1 else f"with at least {limit.min_length}")
        if isinstance(limit, MaxLen):
            parts.append(f"with at most {limit.max_length}")
    kind, comma, items = base.partition(", each ")
    return " ".join(filter(None, (kind, " and ".join(parts)))) + comma + items


def _short(limit: Any) -> str:
    return f"{limit:g}" if isinstance(limit, float) else str(limit)


def _either(options: Sequence[str]) -> str:
    return options[0] if len(options) == 1 else f"{', '.join(options[:-1])} or {options[-1]}"


def _name(factory: Callable[..., Any]) -> str:
    name = getattr(factory, "name", None)
    return (
        name
        if isinstance(name, str) and name
        else str(getattr(factory, "__qualname__", factory)).removesuffix(".__init__")
    )
