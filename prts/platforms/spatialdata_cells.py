"""Cells of a SpatialData store: a table of counts, and the shapes or labels that it annotates."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pandas as pd
import shapely
from numpy.typing import NDArray

from prts.errors import InputError, choose, some_of
from prts.extras import install_command
from prts.io.cache import file_identity
from prts.io.h5_checks import check_matrix
from prts.io.limits import check_pixels
from prts.io.mpp import MppSource
from prts.io.nuclei import as_str, make_nuclei
from prts.io.outlines import labels_to_polygons
from prts.io.slide_zarr import refuse_pickle
from prts.platforms import platforms
from prts.platforms.affine import Matrix, move, move_shapes
from prts.platforms.anndata_cells import genes_of
from prts.platforms.cell_units import (
    count_cells,
    largest_of_each,
    mpp_of,
    require_inside,
    warn_of_size,
    whole_counts,
)

if TYPE_CHECKING:
    import geopandas as gpd
    from anndata import AnnData

    from prts.platforms.base import Registration

_GLOBAL = "global"


@platforms.register("spatialdata")
@dataclass(frozen=True)
class SpatialDataCells:
    """Cells x genes of a SpatialData store, with the outlines and transformations of the store.

    An element need not be named if the store has only one of its kind; the shapes or labels are those that the table annotates.

    Parameters
    ----------
    sdata
        The `.zarr` folder.
    table
        The table with raw counts.
    shapes
        The outlines of the cells.
    labels
        A label image of the cells, in place of shapes.
    image_element
        The image of the store with the same pixels as the section's `image`; it is the section's image if that is not given.
    coordinate_system
        The coordinate system in pixels of the section's `image`, in place of `image_element`.
    layer
        The layer of the table with raw counts; X by default.
    """

    sdata: Path | str
    table: str | None = None
    shapes: str | None = None
    labels: str | None = None
    image_element: str | None = None
    coordinate_system: str | None = None
    layer: str | None = None
    name: ClassVar[str]

    @property
    def path(self) -> Path:
        """The `.zarr` folder."""
        return Path(self.sdata)

    @property
    def files(self) -> dict[str, Path]:
        """The folders of table and cells."""
        kind, cells = self._cells_name
        return {"table": self.path / "tables" / self._table_name, "cells": self.path / kind / cells}

    def own_image(self) -> Path:
        """The H&E image of the store."""
        name = self._image_name
        if name is None:
            why = "has no image" if self.coordinate_system is None else "`coordinate_system` stands for another image"
            raise InputError(f"{self.path}: {why}; give the H&E image of the section as `image`")
        return self.path / "images" / name

    @classmethod
    def find(cls, folder: Path) -> SpatialDataCells | None:
        """None: a store may be a prediction that was exported, so that it has to be configured."""
        return None

    def identity(self) -> dict[str, Any]:
        """Identities of table and cells, the transformation, and the layer."""
        found: dict[str, Any] = {name: file_identity(path) for name, path in self.files.items()}
        return found | {"to_px": self._to_px.tolist(), **({} if self.layer is None else {"layer": self.layer})}

    def mpp_sources(self) -> list[MppSource]:
        """Stores do not state the um/px of an image."""
        return []

    def genes(self) -> pd.DataFrame:
        """Genes of the table, without controls."""
        return self._genes[0]

    def check(self, image: Path, width: int, height: int, mpp: MppSource) -> None:
        """Check that the elements are there, that the image is the store's, and that the cells are on it."""
        if (name := self._image_name) is not None:
            size = _size(self._data.images[name])
            if size != (width, height):
                raise InputError(
                    f"{self.path}: image {name!r} is {size[0]} x {size[1]} px, but {image} is {width} x {height} px; give the image that "
                    "the store was made from, or name another one as `image_element`"
                )
        xy = shapely.get_coordinates(shapely.centroid(self._shapes[1]))
        fits = f"divided by {mpp[1]:g} um/px they fit: the coordinate system must be in px of the image"
        others = {fits: move(self._to_px, xy) / mpp[1]}
        otherwise = "name the image or the coordinate system that they fit as `image_element` or `coordinate_system`"
        require_inside(self.path, move(self._to_px, xy), (image, width, height), others, otherwise)

    def outlines(self, mpp: float) -> gpd.GeoDataFrame:
        """The cells of the table that have an outline, in its order."""
        rows, shapes = self._shapes
        cells = make_nuclei(move_shapes(self._to_px, shapes), mpp, cell_id=self._cell_id[rows], source=str(self.path))
        warn_of_size(self.path, cells, "px")
        return cells

    def counts(self, nuclei: gpd.GeoDataFrame, *, registration: Registration | None = None) -> AnnData:
        """Counts of the cells; nuclei of another source get those of the cells whose center they hold."""
        own = self.outlines(mpp_of(nuclei))
        return count_cells(self._counts(), self._cell_id, self.genes(), own, nuclei, self.path)

    def _counts(self) -> Any:
        table = self._table
        if self.layer is not None and self.layer not in table.layers:
            raise InputError(f"{self._where}: has no layer {self.layer!r}{choose(self.layer, table.layers)}")
        X = table.X if self.layer is None else table.layers[self.layer]
        source = f"{self._where} {'X' if self.layer is None else self.layer}"
        check_matrix(self.path, source, X)
        others = [name for name in table.layers if name != self.layer]
        cure = (
            f"name the layer with raw counts as `layer` ({some_of(others, 5)})"
            if others
            else "give a table with raw counts"
        )
        return whole_counts(X, source, cure)[:, self._genes[1]]

    def _names(self, kind: str) -> list[str]:
        if not self.path.is_dir():
            raise InputError(f"{self.path}: no such folder; give the .zarr folder of a SpatialData object")
        if not any((self.path / name).is_file() for name in ("zarr.json", ".zgroup")):
            inside = next((path for path in sorted(self.path.glob("*.zarr")) if path.is_dir()), None)
            raise InputError(f"{self.path}: is not a SpatialData store; give {inside or 'its .zarr folder'}")
        folder = self.path / kind
        return sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []

    def _element(self, kind: str, key: str) -> str | None:
        """The element of a kind that a setting names, or the only one; None if there is none."""
        names, given = self._names(kind), getattr(self, key)
        if given is not None and given not in names:
            raise InputError(f"{self.path}: has no {given!r} in {kind}{choose(given, names)}")
        if given is None and len(names) > 1:
            raise InputError(f"{self.path}: has several {kind} ({some_of(names, 8)}); name one as `{key}`")
        return given if given is not None else next(iter(names), None)

    @cached_property
    def _table_name(self) -> str:
        name = self._element("tables", "table")
        if name is None:
            raise InputError(f"{self.path}: has no table; give a SpatialData store of cells with counts")
        return name

    @cached_property
    def _image_name(self) -> str | None:
        return None if self.coordinate_system is not None else self._element("images", "image_element")

    @cached_property
    def _cells_name(self) -> tuple[str, str]:
        """Kind and name of the element with the outlines."""
        for key in ("shapes", "labels"):
            if getattr(self, key) is not None:
                name = self._element(key, key)
                assert name is not None
                return key, name
        region = self._attrs.get("region")
        for kind in ("shapes", "labels"):
            if isinstance(region, str) and region in self._names(kind):
                return kind, region
        name = self._element("shapes", "shapes")
        if name is None:
            raise InputError(
                f"{self.path}: has no shapes that table {self._table_name!r} annotates; name them as `shapes`, or `labels`"
            )
        return "shapes", name

    @cached_property
    def _data(self) -> Any:
        """The store; images and labels are not read yet."""
        try:
            import spatialdata
        except ImportError as error:
            raise InputError(
                f"{self.path}: needs spatialdata, which is not installed; run {install_command('spatial')}"
            ) from error
        self._names("tables")
        refuse_pickle(self.path)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of dask and zarr about their own internals
                return spatialdata.read_zarr(self.path)
        except Exception as error:  # zarr, dask, ome-zarr and anndata raise anything for unexpected contents
            raise InputError(
                f"{self.path}: cannot be read ({type(error).__name__}: {error}); write it with spatialdata"
            ) from error

    @property
    def _table(self) -> AnnData:
        table: AnnData = self._data.tables[self._table_name]
        return table

    @property
    def _where(self) -> str:
        return f"{self.path}: table {self._table_name}"

    @property
    def _attrs(self) -> dict[str, Any]:
        """What the table annotates: `region`, `region_key` and `instance_key`."""
        attrs: dict[str, Any] = dict(self._table.uns.get("spatialdata_attrs", {}))
        region = attrs.get("region")
        if isinstance(region, list | np.ndarray) and len(region) == 1:
            attrs["region"] = str(region[0])
        return attrs

    @cached_property
    def _cell_id(self) -> NDArray[np.object_]:
        """Names of the cells: those that the outlines use."""
        key = self._attrs.get("instance_key")
        obs = self._table.obs
        ids = as_str(obs[key]) if key in obs else obs.index.astype(str).to_numpy(object)
        if (twice := pd.Series(ids).duplicated()).any():
            raise InputError(f"{self._where}: cell {ids[twice.argmax()]!r} occurs twice; give a table of one section")
        return np.asarray(ids, dtype=object)

    @cached_property
    def _genes(self) -> tuple[pd.DataFrame, NDArray[np.bool_]]:
        return genes_of(self._table.var, self.path)

    @cached_property
    def _shapes(self) -> tuple[NDArray[np.int64], NDArray[np.object_]]:
        """Rows of the cells that have an outline, and their outlines before the transformation."""
        kind, name = self._cells_name
        if kind == "shapes":
            frame = self._data.shapes[name]
            shapes, ids = np.asarray(frame.geometry.array, dtype=object), as_str(frame.index)
            if "radius" in frame:
                points = shapely.get_type_id(shapes) == shapely.GeometryType.POINT
                shapes[points] = shapely.buffer(
                    shapes[points], frame["radius"].to_numpy(np.float64)[points], quad_segs=8
                )
        else:
            raster = _full(self._data.labels[name])
            check_pixels(_size(raster), f"{self.path}: labels {name}", None, cure="name shapes", n_bytes=4)
            label, shapes, _ = labels_to_polygons(np.asarray(raster.data))
            ids = as_str(label)
        ids, shapes = largest_of_each(ids, shapes)
        rows = pd.Index(self._cell_id).get_indexer(pd.Index(ids))
        here = rows >= 0
        if not here.any():
            raise InputError(
                f"{self.path}: {kind} {name!r} have ids such as {ids[0] if len(ids) else 'none'!r}, but the cells of table "
                f"{self._table_name!r} are called {self._cell_id[0]!r}; name the {kind} that the table annotates"
            )
        order = np.argsort(rows[here])
        return rows[here][order], shapes[here][order]

    @cached_property
    def _to_px(self) -> Matrix:
        """From the coordinates of the outlines to full-resolution pixels."""
        kind, name = self._cells_name
        from spatialdata.transformations import get_transformation_between_coordinate_systems

        target: Any = self._data.images[self._image_name] if self._image_name is not None else self._system()
        try:
            found = get_transformation_between_coordinate_systems(self._data, getattr(self._data, kind)[name], target)
            return np.asarray(found.to_affine_matrix(("x", "y"), ("x", "y")), dtype=np.float64)
        except (RuntimeError, ValueError, TypeError) as error:
            to = f"image {self._image_name!r}" if self._image_name is not None else f"coordinate system {target!r}"
            raise InputError(
                f"{self.path}: nothing leads from {kind} {name!r} to {to} ({error}); set a transformation, or name another one"
            ) from error

    def _system(self) -> str:
        """The coordinate system that the pixels of the image are in."""
        names = list(self._data.coordinate_systems)
        given = self.coordinate_system
        if given is None:
            given = names[0] if len(names) == 1 else _GLOBAL
        if given not in names:
            raise InputError(
                f"{self.path}: has no coordinate system {given!r}{choose(given, names)}; set `coordinate_system`"
            )
        return given


def _full(raster: Any) -> Any:
    """The finest level of an image or of labels."""
    if hasattr(raster, "dims") and not hasattr(raster, "children"):
        return raster
    return next(iter(next(iter(raster.children.values())).dataset.data_vars.values()))


def _size(raster: Any) -> tuple[int, int]:
    """Width and height, px."""
    sizes = _full(raster).sizes
    return int(sizes["x"]), int(sizes["y"])
