"""Cells that any tool segmented and counted, as AnnData: CosMx, MERSCOPE, Stereo-seq and others."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import h5py
import numpy as np
import pandas as pd
import shapely
from numpy.typing import NDArray
from pydantic import Field
from scipy.sparse import csr_matrix

from prts.errors import InputError, ParameterError, choose, some_of
from prts.io.cache import file_identity
from prts.io.h5_checks import check_h5, check_matrix
from prts.io.mpp import MppSource, agree
from prts.io.nuclei import as_str, make_nuclei
from prts.io.nuclei_formats import ImageSize, reader_of
from prts.io.slide import image_size
from prts.platforms import platforms
from prts.platforms.affine import Matrix, as_matrix, move, move_shapes, read_matrix, scale_of, scaling
from prts.platforms.cell_units import (
    count_cells,
    is_control,
    largest_of_each,
    mpp_of,
    require_inside,
    warn_of_corner,
    warn_of_size,
    whole_counts,
)

if TYPE_CHECKING:
    import geopandas as gpd
    from anndata import AnnData

    from prts.platforms.base import Registration

logger = logging.getLogger(__name__)

# Columns of var with ids and symbols, as scanpy, CELLxGENE, squidpy and others name them.
_IDS = ("gene_id", "gene_ids", "ensembl_id", "feature_id")
_SYMBOLS = ("symbol", "gene_symbol", "gene_symbols", "gene_name", "gene_names", "feature_name")
_TYPES = ("feature_types", "feature_type")
_SOURCES = ("polygons", "labels", "radius")


@platforms.register("anndata")
@dataclass(frozen=True)
class AnnDataCells:
    """Cells x genes in an `.h5ad` file, with outlines in the file or next to it.

    Exactly one of `polygons`, `labels` and `radius` says where the cells are.

    Parameters
    ----------
    cells
        The `.h5ad` file with raw counts.
    coordinates
        Unit of the outlines and positions: `px`, full-resolution pixels of the image, or `um`.
    polygons
        A file of outlines in any format that `prts.io.nuclei` reads, or a column of obs with WKB (hexadecimal) or WKT.
    labels
        A label image; its values are the ids of the cells.
    radius
        Radius of the cells around `obsm[spatial_key]` in the unit of `coordinates`, or a column of obs with it.
    layer
        The layer with raw counts; X by default.
    id_column
        The column of obs with the ids that polygons or labels use; `obs_names` by default.
    affine
        3 x 3 (or 2 x 3) matrix, or a CSV file of it, that takes `coordinates` to full-resolution pixels of the image. By default pixels
        are taken as they are, and um are counted from the top left corner of the image.
    spatial_key
        Key of the centers in obsm, for `radius`.
    """

    cells: Path | str
    coordinates: Literal["px", "um"]
    polygons: Path | str | None = None
    labels: Path | str | None = None
    radius: Annotated[float, Field(gt=0)] | str | None = None
    layer: str | None = None
    id_column: str | None = None
    affine: list[list[float]] | Path | str | None = None
    spatial_key: str = "spatial"
    name: ClassVar[str]

    def __post_init__(self) -> None:
        given = [key for key in _SOURCES if getattr(self, key) is not None]
        if len(given) != 1:
            what = " and ".join(given) or "none"
            raise ParameterError(
                "",
                "polygons",
                f"{what} given; give exactly one of polygons, labels and radius, for the outlines of the cells",
            )
        if self.coordinates == "um" and self.labels is not None and self.affine is None:
            raise ParameterError(
                "",
                "coordinates",
                "um, but label images are in px; set px, or give `affine` from their pixels to those of the image",
            )

    @property
    def path(self) -> Path:
        """The `.h5ad` file."""
        return Path(self.cells)

    @property
    def files(self) -> dict[str, Path]:
        """The `.h5ad` file, and those of outlines and matrix."""
        found = {"cells": self.path}
        if (outlines := self._outlines_file()) is not None:
            found["outlines"] = outlines
        if isinstance(self.affine, Path | str):
            found["affine"] = Path(self.affine)
        return found

    @classmethod
    def find(cls, folder: Path) -> AnnDataCells | None:
        """None: an `.h5ad` file does not say in which unit its positions are, so that it has to be configured."""
        return None

    def identity(self) -> dict[str, Any]:
        """Identities of the files, and the settings."""
        settings = ("coordinates", "radius", "layer", "id_column", "spatial_key")
        found: dict[str, Any] = {name: file_identity(path) for name, path in self.files.items()}
        found |= {key: value for key in settings if (value := getattr(self, key)) is not None}
        if self._outlines_file() is None and self.polygons is not None:
            found["polygons"] = str(self.polygons)
        if not isinstance(self.affine, Path | str | None):
            found["affine"] = self._affine().tolist()  # type: ignore[union-attr]
        return found

    def mpp_sources(self) -> list[MppSource]:
        """The scale of `affine`, if it starts from um."""
        matrix = self._affine() if self.coordinates == "um" else None
        return [] if matrix is None else [("the scale of `affine` (um to px)", 1 / scale_of(matrix))]

    def check(self, image: Path, width: int, height: int, mpp: MppSource) -> None:
        """Check that the files are there and the cells are on the image."""
        for what, path in self.files.items():
            if not path.is_file():
                raise InputError(f"{path}: no such file; give the {what} of the section")
        if self.labels is not None and self.affine is None and image_size(Path(self.labels)) != (width, height):
            has = "{} x {}".format(*image_size(Path(self.labels)))
            raise InputError(
                f"{self.labels}: a label image of {has} px for an image of {width} x {height} px; give one of the same size, or `affine`"
            )
        for where, value in self.mpp_sources():
            if not agree(value, mpp[1]):
                raise InputError(
                    f"{self.path}: {where} makes {value:.4g} um/px of {image}, which has {mpp[1]:.4g} ({mpp[0]}); give `affine` from um to "
                    "full-resolution pixels, or set `coordinates: px` if it starts from the pixels of another image"
                )
        xy = shapely.get_coordinates(shapely.centroid(self._shapes[1]))
        to_px = self._to_px(mpp[1])
        others = {"with x and y swapped they fit: swap them, or the columns of `affine`": move(to_px, xy[:, ::-1])}
        otherwise = "give the image that `affine` leads to"
        if self.affine is not None:
            why = "with the inverse of `affine` they fit: it must take the cells to the image"
            others[why] = move(np.asarray(np.linalg.inv(to_px), dtype=np.float64), xy)
        else:
            otherwise = "give `affine`, from the pixels or um of the cells to the pixels of this image"
            if self.coordinates == "px":
                others[f"divided by {mpp[1]:g} um/px they fit: set `coordinates: um`"] = xy / mpp[1]
            else:
                others["taken as pixels they fit: set `coordinates: px`"] = xy
        require_inside(self.path, move(to_px, xy), (image, width, height), others, otherwise)
        if self.affine is None and self.coordinates == "px":
            warn_of_corner(self.path, xy, (image, width, height), mpp[1])

    def outlines(self, mpp: float) -> gpd.GeoDataFrame:
        """The cells of the file that have an outline, in its order."""
        rows, shapes = self._shapes
        moved = move_shapes(self._to_px(mpp), shapes)
        cells = make_nuclei(moved, mpp, cell_id=self._obs.index.to_numpy(object)[rows], source=str(self.path))
        warn_of_size(self.path, cells, self.coordinates)
        return cells

    def counts(self, nuclei: gpd.GeoDataFrame, *, registration: Registration | None = None) -> AnnData:
        """Counts of the cells; nuclei of another source get those of the cells whose center they hold."""
        own = self.outlines(mpp_of(nuclei))
        return count_cells(self._counts(), self._obs.index.to_numpy(object), self.genes(), own, nuclei, self.path)

    def _to_px(self, mpp: float) -> Matrix:
        """From the coordinates of the file to full-resolution pixels."""
        if (matrix := self._affine()) is not None:
            return matrix
        return scaling(1 / mpp) if self.coordinates == "um" else scaling(1.0)

    def _affine(self) -> Matrix | None:
        if self.affine is None:
            return None
        return (
            read_matrix(Path(self.affine)) if isinstance(self.affine, Path | str) else as_matrix(self.affine, "affine")
        )

    def _outlines_file(self) -> Path | None:
        """The file of polygons or labels; None if the outlines are in the `.h5ad` file."""
        if self.labels is not None:
            return Path(self.labels)
        if self.polygons is None:
            return None
        path = Path(self.polygons)
        return path if path.suffix or path.exists() else None

    def _read(self, name: str) -> Any:
        """One element of the file."""
        from anndata.io import read_elem

        check_h5(self.path)
        with h5py.File(self.path) as file:
            parent, _, key = name.rpartition("/")
            held = list(file.get(parent, [])) if parent else list(file)
            if key not in held:
                raise InputError(f"{self.path}: has no {name}{choose(key, held)}")
            try:
                return read_elem(file[name])
            except Exception as error:  # anndata raises anything for unexpected contents
                raise InputError(
                    f"{self.path}: {name} cannot be read ({error}); write the file with anndata"
                ) from error

    @cached_property
    def _obs(self) -> pd.DataFrame:
        obs: pd.DataFrame = self._read("obs")
        obs.index = obs.index.astype(str)
        if not obs.index.is_unique:
            twice = obs.index[obs.index.duplicated()][0]
            raise InputError(f"{self.path}: obs_names are not unique, such as {twice!r}; call obs_names_make_unique()")
        return obs

    def _column(self, key: str, name: str) -> pd.Series[Any]:
        """A column of obs that a setting names."""
        if name not in self._obs:
            raise InputError(
                f"{self.path}: obs has no column {name!r}, which `{key}` names{choose(name, map(str, self._obs))}"
            )
        return self._obs[name]

    @cached_property
    def _shapes(self) -> tuple[NDArray[np.int64], NDArray[np.object_]]:
        """Rows of the cells that have an outline, and their outlines in the coordinates of the file."""
        if self.radius is not None:
            shapes = self._circles()
        elif self._outlines_file() is None:
            shapes = self._shapes_in_obs()
        else:
            return self._shapes_in_file()
        rows = np.flatnonzero(~(shapely.is_missing(shapes) | shapely.is_empty(shapes)))
        return rows, shapes[rows]

    def _circles(self) -> NDArray[np.object_]:
        centers = self._read(f"obsm/{self.spatial_key}")
        centers = np.asarray(centers, dtype=np.float64)
        if centers.ndim != 2 or centers.shape[1] < 2 or not np.isfinite(centers[:, :2]).all():
            raise InputError(
                f"{self.path}: obsm[{self.spatial_key!r}] must have x and y of every cell; give another `spatial_key`"
            )
        radius: Any = self.radius
        if isinstance(radius, str):
            radius = pd.to_numeric(self._column("radius", radius), errors="coerce").to_numpy(np.float64)
            if not (radius > 0).all():
                raise InputError(
                    f"{self.path}: obs[{self.radius!r}] must be positive for every cell; give another `radius`"
                )
        return np.asarray(shapely.buffer(shapely.points(centers[:, :2]), radius, quad_segs=8), dtype=object)

    def _shapes_in_obs(self) -> NDArray[np.object_]:
        column = self._column("polygons", str(self.polygons))
        text = column.astype(object).where(column.notna(), None).to_numpy(object)
        is_wkt = any(isinstance(each, str) and "(" in each for each in text[:1])
        shapes = (shapely.from_wkt if is_wkt else shapely.from_wkb)(text, on_invalid="ignore")
        if shapely.is_missing(shapes).all():
            raise InputError(
                f"{self.path}: obs[{self.polygons!r}] holds no polygons; give a column with hexadecimal WKB or with WKT"
            )
        return np.asarray(shapes, dtype=object)

    def _shapes_in_file(self) -> tuple[NDArray[np.int64], NDArray[np.object_]]:
        path = self._outlines_file()
        assert path is not None
        width, height = image_size(path) if self.labels is not None else (0, 0)
        found = reader_of(path)(path, ImageSize(height, width))
        usable = ~(shapely.is_missing(found.geometry) | shapely.is_empty(found.geometry))
        found_ids = found.chosen_ids(path)
        if found_ids is None or not usable.any():
            what = "no outlines" if not usable.any() else "outlines without ids"
            raise InputError(f"{path}: has {what}; give one for each cell, with its id as `cell_id`")
        ids, shapes = largest_of_each(as_str(found_ids)[usable], np.asarray(found.geometry, dtype=object)[usable])
        own = self._obs.index if self.id_column is None else pd.Index(as_str(self._column("id_column", self.id_column)))
        if not own.is_unique:
            raise InputError(
                f"{self.path}: obs[{self.id_column!r}] is not unique; give a column with an id for each cell"
            )
        rows = own.get_indexer(pd.Index(ids))
        here = rows >= 0
        if not here.any():
            raise InputError(
                f"{path}: its ids, such as {ids[0]!r}, are not those of the cells, such as {own[0]!r}; name the column of obs with the "
                "ids of the outlines as `id_column`"
            )
        if (lost := len(own) - int(here.sum())) > 0:
            logger.warning("%s: %d of %d cells have no outline in %s and are left out", self.path, lost, len(own), path)
        order = np.argsort(rows[here])
        return rows[here][order], shapes[here][order]

    @cached_property
    def _genes(self) -> tuple[pd.DataFrame, NDArray[np.bool_]]:
        """Genes as in `counts_table`, and which features of the file they are."""
        return genes_of(self._read("var"), self.path)

    def genes(self) -> pd.DataFrame:
        """Genes of the file, without controls."""
        return self._genes[0]

    def _counts(self) -> csr_matrix:
        name = "X" if self.layer is None else f"layers/{self.layer}"
        X = self._read(name)
        check_matrix(self.path, name, X)
        layers = self._layers()
        cure = (
            f"name the layer with raw counts as `layer` ({some_of(layers, 5)})"
            if layers
            else "give a file with raw counts"
        )
        return csr_matrix(whole_counts(X, f"{self.path}: {name}", cure)[:, self._genes[1]])

    def _layers(self) -> list[str]:
        with h5py.File(self.path) as file:
            return [name for name in file.get("layers", {}) if name != self.layer]


def genes_of(var: pd.DataFrame, source: Path) -> tuple[pd.DataFrame, NDArray[np.bool_]]:
    """Genes of a table of features: ids and symbols by the names of their columns, without controls.

    Parameters
    ----------
    var
        Features, (n_features,).
    source
        The file, for messages.

    Returns
    -------
    genes
        `gene_id` (unique) and `symbol`, indexed by a unique name, (n_genes,).
    kept
        Which features they are, (n_features,).

    Raises
    ------
    InputError
        If no gene is left, or an id occurs twice.
    """
    names = pd.Series(var.index.astype(str))
    symbols = next((pd.Series(var[key].astype(str).to_numpy(object)) for key in _SYMBOLS if key in var), names)
    ids = next((pd.Series(var[key].astype(str).to_numpy(object)) for key in _IDS if key in var), names)
    types = next((var[key].astype(str).to_numpy() for key in _TYPES if key in var), None)
    kept = ~(is_control(names) | is_control(symbols))
    if types is not None and (types == "Gene Expression").any():
        kept &= types == "Gene Expression"
    if not kept.any():
        raise InputError(f"{source}: has no genes, only controls; give a file of cells x genes")
    if n_controls := int((~kept).sum()):
        logger.info("%s: %d of %d features are controls or blanks and are left out", source, n_controls, len(kept))
    names, symbols, ids = (each[kept].reset_index(drop=True) for each in (names, symbols, ids))
    if (twice := ids.duplicated()).any():
        raise InputError(f"{source}: gene {ids[twice.argmax()]!r} occurs twice; sum or rename its columns")
    index = symbols.where(~symbols.duplicated(keep=False), symbols + "_" + ids)
    return pd.DataFrame({"gene_id": ids, "symbol": symbols}).set_index(pd.Index(index, dtype=object)), kept
