"""How a slide is read: as it lies in its file, or turned and mirrored to lie as the tissue of training did.

An encoder does not see a turned tile as it sees the upright one. Whoever has slides in another position says so (`rotate=`, `flip=`), and
all that looks at pixels sees the slide turned; coordinates that a user gives or gets are always those of the file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import shapely
from numpy.typing import NDArray

from prts.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable

    from geopandas import GeoDataFrame

N = TypeVar("N", int, float)

ROTATE = (0, 90, 180, 270)
FLIP = ("none", "horizontal", "vertical")


@dataclass(frozen=True)
class Orientation:
    """A rotation, then a reflection: `numpy.rot90(image, rotate // 90)`, then `numpy.fliplr` (horizontal) or `numpy.flipud` (vertical).

    "File" is the image as it lies in its file, "read" as it is seen turned. Places are pixels from the top left corner, x right, y down,
    and may lie between pixels: the far corner of a file is (width, height).

    Parameters
    ----------
    rotate
        Degrees counter-clockwise: 0, 90, 180 or 270.
    flip
        `none`, `horizontal` (left becomes right) or `vertical` (top becomes bottom).

    Raises
    ------
    InputError
        If there is no such rotation or reflection.
    """

    rotate: int = 0
    flip: str = "none"

    def __post_init__(self) -> None:
        if isinstance(self.rotate, bool) or self.rotate not in ROTATE:
            raise InputError(
                f"rotate={self.rotate}: no such rotation (there are: {', '.join(map(str, ROTATE))}, degrees counter-clockwise)"
            )
        if self.flip not in FLIP:
            raise InputError(f"flip={self.flip}: no such reflection (there are: {', '.join(FLIP)})")

    def settings(self) -> dict[str, int | str]:
        """What it is, JSON-like."""
        return {"rotate": self.rotate, "flip": self.flip}

    @property
    def transposes(self) -> bool:
        """Whether rows become columns: that comes first, then the mirroring of columns and rows."""
        return self.rotate in (90, 270)

    @property
    def mirrors(self) -> tuple[bool, bool]:
        """Whether left and right, and top and bottom, are exchanged."""
        return (self.rotate in (180, 270)) != (self.flip == "horizontal"), (self.rotate in (90, 180)) != (
            self.flip == "vertical"
        )

    def size(self, width: N, height: N) -> tuple[N, N]:
        """Width and height as read, of a file of this width and height; and the other way round."""
        return (height, width) if self.transposes else (width, height)

    def window(self, x: int, y: int, width: int, height: int, of: tuple[int, int]) -> tuple[int, int, int, int]:
        """Where a window of what is read lies in the file, whose width and height are `of`: left, top, width, height."""
        whole_width, whole_height = self.size(*of)
        across, down = self.mirrors
        x = whole_width - x - width if across else x
        y = whole_height - y - height if down else y
        return (y, x, height, width) if self.transposes else (x, y, width, height)

    def pixels(self, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Pixels (rows, columns, 3) of the file as they are read."""
        if self == UPRIGHT:
            return pixels
        across, down = self.mirrors
        turned = pixels.swapaxes(0, 1) if self.transposes else pixels
        return np.ascontiguousarray(turned[:: -1 if down else 1, :: -1 if across else 1])

    def places(self, xy: NDArray[np.float64], of: tuple[int, int]) -> NDArray[np.float64]:
        """Places (n, 2) in the file, whose width and height are `of`, as they are read."""
        xy = xy[:, ::-1] if self.transposes else xy
        return np.where(self.mirrors, np.subtract(self.size(*of), xy), xy)

    def places_in_file(self, xy: NDArray[np.float64], of: tuple[int, int]) -> NDArray[np.float64]:
        """Places (n, 2) as they are read, in the file, whose width and height are `of`."""
        xy = np.where(self.mirrors, np.subtract(self.size(*of), xy), xy)
        return xy[:, ::-1] if self.transposes else xy

    def nuclei(self, nuclei: GeoDataFrame, of: tuple[int, int]) -> GeoDataFrame:
        """Nuclei in pixels of the file, whose width and height are `of`, as they are read."""
        return nuclei if self == UPRIGHT else _moved(nuclei, lambda xy: self.places(xy, of))

    def nuclei_in_file(self, nuclei: GeoDataFrame, of: tuple[int, int]) -> GeoDataFrame:
        """Nuclei as they are read, in pixels of the file, whose width and height are `of`."""
        return nuclei if self == UPRIGHT else _moved(nuclei, lambda xy: self.places_in_file(xy, of))


UPRIGHT = Orientation()


def _moved(nuclei: GeoDataFrame, move: Callable[[NDArray[np.float64]], NDArray[np.float64]]) -> GeoDataFrame:
    return nuclei.assign(geometry=shapely.transform(nuclei.geometry.to_numpy(), move))
