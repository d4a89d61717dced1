"""Arguments are checked against annotations, without conversions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pytest
from pydantic import Field

from prts.arguments import check_settings, check_value, checked, checked_call
from prts.errors import ParameterError


@pytest.mark.parametrize(
    ("annotation", "value", "kept"),
    [
        (float, 3, 3.0),
        (tuple[float, float], [1, 2], (1.0, 2.0)),
        (Sequence[int], (1, 2), (1, 2)),
        (Path, "a b", Path("a b")),
        (str | Path, Path("a"), Path("a")),
        (Literal["auto"] | bool, True, True),
        (int, np.int64(4), 4),
        (tuple[float, ...], np.array([1.5]), (1.5,)),
    ],
)
def test_a_value_is_kept(annotation, value, kept):
    found = check_value("o", "n", value, annotation)
    assert found == kept and type(found) is type(kept)


@pytest.mark.parametrize(
    ("annotation", "value", "line"),
    [
        (float, "3", "'3' is not accepted; give a number"),
        (float, True, "true is not accepted; give a number"),
        (int, True, "true is not accepted; give a whole number"),
        (int, 3.0, "3.0 is not accepted; give a whole number"),
        (float, float("nan"), "nan is not accepted; give a number"),
        (Annotated[float, Field(gt=0)] | None, 0, "0 is not accepted; give a number above 0, or null"),
        (Annotated[list[str], Field(min_length=1)], [], "[] is not accepted; give a list that is not empty, each text"),
        (Sequence[int], 5, "5 is not accepted; give a list, each a whole number"),
        (Literal["exact", "grid"], "grit", "'grit' is not accepted; give exact or grid"),
        (Path, object, "<class 'object'> is not accepted; give a path"),
    ],
)
def test_a_value_is_refused(annotation, value, line):
    with pytest.raises(ParameterError) as caught:
        check_value("stain", "sigma", value, annotation)
    assert caught.value.problem == line
    assert str(caught.value) == f"stain sigma: {line}"


class Base:
    def __init__(self, *, width: Annotated[int, Field(ge=1)], unknowable: NotImported = None) -> None:  # noqa: F821
        self.width = width


class Derived(Base):
    def __init__(self, name: str = "x", **more: Any) -> None:
        super().__init__(**more)
        self.name = name


def test_settings_of_a_base_class_are_checked_through_keywords():
    assert checked_call(Derived, {"width": 2, "unknowable": object}, "network").width == 2
    with pytest.raises(ParameterError, match="network width: 0 is not accepted"):
        checked_call(Derived, {"width": 0}, "network")
    with pytest.raises(ParameterError, match="network widht: Derived has no such setting, did you mean 'width'"):
        check_settings(Derived, {"widht": 2}, "network")
    with pytest.raises(ParameterError, match="network width: is missing; give a whole number of at least 1"):
        checked_call(Derived, {}, "network")


def test_the_decorator_checks_positional_arguments_and_leaves_pythons_errors():
    class Blur:
        @checked("stain")
        def __init__(self, sigma: float, mode: Literal["near", "wrap"] = "near") -> None:
            self.sigma, self.mode = sigma, mode

    assert Blur(2, "wrap").sigma == 2.0
    with pytest.raises(ParameterError, match="stain mode: 'far'"):
        Blur(1.0, "far")
    with pytest.raises(TypeError):
        Blur(1.0, "near", 3)
    with pytest.raises(TypeError):
        Blur(1.0, sigma=2.0)


def test_true_is_not_the_choice_1():
    assert check_value("", "tta", 1, Literal[1, 4, 8]) == 1
    assert check_value("", "on", True, Literal[True, "auto"]) is True
    with pytest.raises(ParameterError, match="tta: true is not accepted; give 1, 4 or 8"):
        check_value("", "tta", True, Literal[1, 4, 8])
