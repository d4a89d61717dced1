"""Rotate or flip a slide as it is read, to match the orientation of the training tissue.

Encoders are not invariant to rotation. With `rotate` and `flip`, pixels are read from the reoriented slide, while all coordinates that a
user gives or gets are those of the image file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import shapely
from numpy.typing import NDArray

from prts.errors import ParameterError

if TYPE_CHECKING:
    from collections.abc import Callable

    from geopandas import GeoDataFrame

N = TypeVar("N", int, float)

ROTATE = (0, 90, 180, 270)
FLIP = ("none", "horizontal", "vertical")
VIEWS = (1, 4, 8)


@dataclass(frozen=True)
class Orientation:
    """A rotation, then a reflection: `numpy.rot90(image, rotate // 90)`, then `numpy.fliplr` (horizontal) or `numpy.flipud` (vertical).

    "In the file" refers to the image file, "as read" to the reoriented image. Positions are in pixels from the top left corner, x right, y
    down, and may be fractional: the bottom right corner of a file is (width, height).

    Parameters
    ----------
    rotate
        Degrees counterclockwise: 0, 90, 180 or 270.
    flip
        `none`, `horizontal` (left becomes right) or `vertical` (top becomes bottom).

    Raises
    ------
    ParameterError
        If the rotation or flip is not supported.
    """

    rotate: int = 0
    flip: str = "none"

    def __post_init__(self) -> None:
        if isinstance(self.rotate, bool) or self.rotate not in ROTATE:
            problem = f"{self.rotate!r} is not supported; choose one of {', '.join(map(str, ROTATE))} degrees counterclockwise"
            raise ParameterError("", "rotate", problem)
        if self.flip not in FLIP:
            raise ParameterError("", "flip", f"{self.flip!r} is not supported; choose one of {', '.join(FLIP)}")

    def settings(self) -> dict[str, int | str]:
        """Rotation and flip, JSON-like."""
        return {"rotate": self.rotate, "flip": self.flip}

    def views(self, n: int) -> tuple[Orientation, ...]:
        """Orientations of the same slide, this one first.

        Parameters
        ----------
        n
            1: only this one; 4: its four rotations; 8: these and their mirror images, which are all there are.

        Raises
        ------
        ParameterError
            If `n` is another number.
        """
        if isinstance(n, bool) or n not in VIEWS:
            raise ParameterError("", "tta", f"{n!r} is not supported; choose one of {', '.join(map(str, VIEWS))} views")
        mirrored = "horizontal" if self.flip == "none" else "none"
        turned = [
            Orientation((self.rotate + degrees) % 360, flip) for flip in (self.flip, mirrored) for degrees in ROTATE
        ]
        return tuple(turned[: int(n)])

    @property
    def transposes(self) -> bool:
        """Whether rows and columns are swapped; columns and rows are mirrored afterwards."""
        return self.rotate in (90, 270)

    @property
    def mirrors(self) -> tuple[bool, bool]:
        """Whether left and right, and top and bottom, are swapped."""
        return (self.rotate in (180, 270)) != (self.flip == "horizontal"), (self.rotate in (90, 180)) != (
            self.flip == "vertical"
        )

    def size(self, width: N, height: N) -> tuple[N, N]:
        """Width and height as read, from those in the file, or the reverse."""
        return (height, width) if self.transposes else (width, height)

    def window(self, x: int, y: int, width: int, height: int, of: tuple[int, int]) -> tuple[int, int, int, int]:
        """Window in the file (left, top, width, height) for a window as read; `of` is the size of the file."""
        whole_width, whole_height = self.size(*of)
        across, down = self.mirrors
        x = whole_width - x - width if across else x
        y = whole_height - y - height if down else y
        return (y, x, height, width) if self.transposes else (x, y, width, height)

    def pixels(self, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Reorient pixels of the file, (rows, columns, 3)."""
        if self == UPRIGHT:
            return pixels
        across, down = self.mirrors
        turned = pixels.swapaxes(0, 1) if self.transposes else pixels
        return np.ascontiguousarray(turned[:: -1 if down else 1, :: -1 if across else 1])

    def places(self, xy: NDArray[np.float64], of: tuple[int, int]) -> NDArray[np.float64]:
        """Positions as read, (n, 2), from those in the file; `of` is the size of the file."""
        xy = xy[:, ::-1] if self.transposes else xy
        return np.where(self.mirrors, np.subtract(self.size(*of), xy), xy)

    def places_in_file(self, xy: NDArray[np.float64], of: tuple[int, int]) -> NDArray[np.float64]:
        """Positions in the file, (n, 2), from those as read; `of` is the size of the file."""
        xy = np.where(self.mirrors, np.subtract(self.size(*of), xy), xy)
        return xy[:, ::-1] if self.transposes else xy

    def nuclei(self, nuclei: GeoDataFrame, of: tuple[int, int]) -> GeoDataFrame:
        """Nuclei as read, from those in the file; `of` is the size of the file."""
        return nuclei if self == UPRIGHT else _moved(nuclei, lambda xy: self.places(xy, of))

    def nuclei_in_file(self, nuclei: GeoDataFrame, of: tuple[int, int]) -> GeoDataFrame:
        """Nuclei in the file, from those as read; `of` is the size of the file."""
        return nuclei if self == UPRIGHT else _moved(nuclei, lambda xy: self.places_in_file(xy, of))


UPRIGHT = Orientation()


def _moved(nuclei: GeoDataFrame, move: Callable[[NDArray[np.float64]], NDArray[np.float64]]) -> GeoDataFrame:
    return nuclei.assign(geometry=shapely.transform(nuclei.geometry.to_numpy(), move))
