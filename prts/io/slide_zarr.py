"""OME-Zarr images, such as those of a SpatialData store: only the chunks that a region touches are read."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from prts.errors import InputError
from prts.io.limits import check_pixels
from prts.io.mpp import MppSource, from_axes, um_per_unit
from prts.io.slide_readers import Level, composite, to_uint8, used_bits

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from prts.io.slide_bounds import Bounds

_METADATA = (".zarray", ".zmetadata", "zarr.json")
_COLORS = {"r": 0, "red": 0, "g": 1, "green": 1, "b": 2, "blue": 2}


def is_zarr_image(folder: Path) -> bool:
    """Whether a folder is an OME-Zarr image, with one or several resolutions."""
    return bool(_multiscales(folder))


def refuse_pickle(folder: Path) -> None:
    """Refuse a store with pickled objects, which run code when they are read.

    Raises
    ------
    InputError
        If it has some.
    """
    for name in _METADATA:
        for file in folder.rglob(name):
            if "pickle" in file.read_text(encoding="utf-8", errors="replace"):
                raise InputError(
                    f"{file}: contains pickled objects, which can run code; write the store with spatialdata"
                )


class ZarrReader:
    """The resolutions of an OME-Zarr image, and its colors in the order of its channels' names."""

    bounds: Bounds | None = None

    def __init__(self, folder: Path, max_pixels: int | None = None) -> None:
        import zarr

        refuse_pickle(folder)
        self._about = _multiscales(folder)[0]
        self._axes = [str(axis["name"] if isinstance(axis, Mapping) else axis) for axis in self._about["axes"]]
        if not {"x", "y"} <= set(self._axes):
            raise InputError(f"has the axes {', '.join(self._axes)}; give an image with x and y")
        group = zarr.open_group(str(folder), mode="r")
        self._arrays: list[Any] = [group[dataset["path"]] for dataset in self._about["datasets"]]
        self._arrays.sort(key=lambda array: -array.shape[self._axes.index("x")])
        x, y = self._axes.index("x"), self._axes.index("y")
        self.levels = [Level(a.shape[x], a.shape[y], a.chunks[x], a.chunks[y]) for a in self._arrays]
        for level in self.levels:
            check_pixels((level.tile_width, level.tile_height), "one chunk", max_pixels)
        for name, size in zip(self._axes, self._arrays[0].shape, strict=True):
            if name not in "cyx" and size > 1:
                raise InputError(f"has {size} planes along {name}; give an image of one plane")
        self._channels = self._color_channels(_channel_names(folder))
        self._bits = self._used_bits(folder)

    def tile(self, level: int, row: int, column: int) -> NDArray[np.uint8]:
        """See `Reader`."""
        samples = self._samples(level, row, column)
        pixels = to_uint8(samples[..., self._channels], self._bits)
        if len(self._channels) == 1:
            return np.repeat(pixels, 3, axis=2)
        if len(self._channels) == 4:
            return composite(pixels[..., :3], pixels[..., 3])
        return np.ascontiguousarray(pixels)

    def mpp_sources(self) -> list[MppSource]:
        """See `Reader`."""
        first = self._about["datasets"][0].get("coordinateTransformations", [])
        outer = self._about.get("coordinateTransformations", [])
        own = _product(self._axes, [*first, *(each for each in outer if "output" not in each)])
        named = {str(axis["name"]): axis for axis in self._about["axes"] if isinstance(axis, Mapping)}
        units = [um_per_unit(str(named.get(name, {}).get("unit", ""))) for name in "xy"]
        sources = _source("the OME-Zarr axes", own, units)
        for each in outer:
            if "output" not in each:
                continue
            output = each["output"]
            of_name = um_per_unit(str(output.get("name", "")))
            axes = {axis["name"]: um_per_unit(str(axis.get("unit", ""))) for axis in output.get("axes", [])}
            units = [of_name if axes.get(name) is None else axes[name] for name in "xy"]
            matrix = _product(self._axes, [*first, each])
            sources += _source(f"the coordinate system {output.get('name')!r}", matrix, units)
        return sources

    def close(self) -> None:
        """See `Reader`."""
        self._arrays = []

    def _samples(self, level: int, row: int, column: int) -> NDArray[Any]:
        """A tile with its channels last."""
        grid, array = self.levels[level], self._arrays[level]
        place: dict[str, Any] = {
            "y": slice(row * grid.tile_height, min((row + 1) * grid.tile_height, grid.height)),
            "x": slice(column * grid.tile_width, min((column + 1) * grid.tile_width, grid.width)),
            "c": slice(None),
        }
        samples = np.asarray(array[tuple(place.get(name, 0) for name in self._axes)])
        kept = [name for name in self._axes if name in place]
        if "c" not in kept:
            return samples.transpose([kept.index("y"), kept.index("x")])[..., None]
        return samples.transpose([kept.index(name) for name in "yxc"])

    def _color_channels(self, names: list[str]) -> list[int]:
        """Indices of red, green and blue, with opacity if there is any; or of gray."""
        n = self._arrays[0].shape[self._axes.index("c")] if "c" in self._axes else 1
        colors = {_COLORS[name.lower()]: i for i, name in enumerate(names[:n]) if name.lower() in _COLORS}
        if len(colors) == 3:
            return [colors[color] for color in range(3)]
        if n not in (1, 3, 4):
            raise InputError(f"has {n} channels; give an H&E image, whose channels are called r, g and b")
        return list(range(n))

    def _used_bits(self, folder: Path) -> int:
        """Bits of the samples, by the coarsest resolution."""
        dtype = self._arrays[-1].dtype
        if dtype.kind not in "bu" or dtype.itemsize > 2:
            raise InputError(f"contains {dtype} pixels; give an RGB image with 8 or 16 bits")
        if dtype.itemsize == 1:
            return 1 if dtype.kind == "b" else 8
        level = len(self.levels) - 1
        grid = self.levels[level]
        rows, columns = math.ceil(grid.height / grid.tile_height), math.ceil(grid.width / grid.tile_width)
        top = max(int(self._samples(level, r, c).max(initial=0)) for r in range(rows) for c in range(columns))
        return used_bits(folder, top, 16)


def _attributes(folder: Path) -> dict[str, Any]:
    """The attributes of a zarr group, of format 2 or 3."""
    for name in ("zarr.json", ".zattrs"):
        file = folder / name
        if not file.is_file():
            continue
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f"{name} is not JSON ({error}); get a complete copy") from error
        attributes = content.get("attributes", {}) if name == "zarr.json" and isinstance(content, dict) else content
        return attributes if isinstance(attributes, dict) else {}
    return {}


def _multiscales(folder: Path) -> list[dict[str, Any]]:
    attributes = _attributes(folder)
    found = attributes.get("ome", attributes).get("multiscales", [])
    return found if isinstance(found, list) else []


def _channel_names(folder: Path) -> list[str]:
    attributes = _attributes(folder)
    omero = attributes.get("ome", attributes).get("omero") or attributes.get("omero") or {}
    return [str(channel.get("label", "")) for channel in omero.get("channels", [])]


def _product(axes: Sequence[str], transformations: Sequence[Mapping[str, Any]]) -> NDArray[np.float64]:
    """The linear part of transformations in this order, (x, y) to (x, y); NaN if one is of another kind."""
    matrix = np.eye(2)
    for each in transformations:
        matrix = _linear(axes, each) @ matrix
    return matrix


def _linear(axes: Sequence[str], transformation: Mapping[str, Any]) -> NDArray[np.float64]:
    before, after = (_axes_of(transformation, side) or list(axes) for side in ("input", "output"))
    columns = [before.index(name) for name in "xy"]
    match transformation.get("type"):
        case "identity" | "translation":
            return np.eye(2)
        case "scale":
            return np.diag([float(transformation["scale"][column]) for column in columns])
        case "affine":
            rows = [after.index(name) for name in "xy"]
            return np.asarray(transformation["affine"], dtype=np.float64)[np.ix_(rows, columns)]
        case "sequence":
            return _product(axes, transformation["transformations"])
    return np.full((2, 2), np.nan)


def _axes_of(transformation: Mapping[str, Any], side: str) -> list[str]:
    """Names of the axes before or after a transformation, in the order of its columns or rows, if it says."""
    return [str(axis["name"]) for axis in transformation.get(side, {}).get("axes", [])]


def _source(where: str, matrix: NDArray[np.float64], units: Sequence[float | None]) -> list[MppSource]:
    """um/px along x and y of the image, in a system whose axes have these units."""
    if any(unit is None for unit in units) or not np.isfinite(matrix).all():
        return []
    um = np.linalg.norm(np.asarray(units, dtype=np.float64)[:, None] * matrix, axis=0)
    return from_axes(where, float(um[0]), float(um[1]))
