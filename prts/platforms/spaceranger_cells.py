"""Visium HD in the cells of Space Ranger 4, with the counts as they are delivered."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import pandas as pd
import shapely
from numpy.typing import NDArray
from scipy.sparse import csr_matrix, vstack

from prts.errors import InputError
from prts.io.cache import file_identity
from prts.io.mpp import MppSource, require_agreement
from prts.io.nuclei import as_str, make_nuclei
from prts.io.nuclei_formats import ImageSize, reader_of
from prts.platforms import platforms
from prts.platforms.bin_positions import SCALEFACTORS, BinGrid, bin_files, read_positions, read_scalefactors
from prts.platforms.cell_matrix import CellMatrix
from prts.platforms.cell_units import count_cells, largest_of_each, mpp_of, own_rows, require_inside, warn_of_size
from prts.platforms.spaceranger_outs import CELL_MATRIX, OUTLINES, SEGMENTED, find_outs, has_spots

if TYPE_CHECKING:
    import geopandas as gpd
    from anndata import AnnData

    from prts.platforms.base import Registration

logger = logging.getLogger(__name__)

# Space Ranger only segments tissue; some cells at its edge have their center beyond it.
_MIN_ON_TISSUE = 0.8
# Log of the ratio of the spreads of cells and tissue: a part of the tissue may have been left out, but nothing is added.
_MAX_SPREAD = 0.25


class SpaceRangerMatrix(CellMatrix):
    """`filtered_feature_cell_matrix.h5` of Space Ranger 4."""

    _writer: ClassVar[str] = "Space Ranger"
    _file_name: ClassVar[str] = CELL_MATRIX


@platforms.register("spaceranger_cells")
@dataclass(frozen=True)
class SpaceRangerCells:
    """The cells that Space Ranger 4 segmented on Visium HD.

    Its counts are those of a nucleus and the bins around it, 8 um by default. The platform `visium_hd` counts the bins of the same output
    in the nuclei themselves.

    Parameters
    ----------
    cells
        Folder `segmented_outputs` of Space Ranger's output, or `outs`, or the folder that it is in.
    outline
        What the image is read in: the `nucleus` of each cell, as prts finds nuclei in other slides, or the whole `cell`.
    """

    cells: Path | str
    outline: Literal["nucleus", "cell"] = "nucleus"
    name: ClassVar[str]

    @property
    def path(self) -> Path:
        """The folder of cells."""
        given = Path(self.cells)
        outs = find_outs(given)
        return given if outs is None or outs.segmented is None else outs.segmented

    @property
    def files(self) -> dict[str, Path]:
        """Matrix and outlines."""
        return {"matrix": self.path / CELL_MATRIX, "outlines": self.path / OUTLINES[self.outline]}

    @classmethod
    def find(cls, folder: Path) -> SpaceRangerCells | None:
        """The cells in a section's folder or in Space Ranger's output there."""
        outs = find_outs(folder)
        if outs is None or outs.segmented is None or not (outs.segmented / CELL_MATRIX).is_file():
            return None
        return cls(outs.segmented)

    def identity(self) -> dict[str, Any]:
        """Identities of matrix and outlines."""
        return {name: file_identity(path) for name, path in self.files.items()}

    def mpp_sources(self) -> list[MppSource]:
        """`microns_per_pixel` of scalefactors_json.json."""
        if not (self.path / SCALEFACTORS).is_file():
            return []
        factors = read_scalefactors(self.path)
        return [(Path(SCALEFACTORS).name, factors["microns_per_pixel"])] if "microns_per_pixel" in factors else []

    def genes(self) -> pd.DataFrame:
        """Genes of the matrix."""
        with SpaceRangerMatrix(self._file(CELL_MATRIX)) as matrix:
            return matrix.var()

    def check(self, image: Path, width: int, height: int, mpp: MppSource) -> None:
        """Check that the files are there, and that the outlines are in pixels of this image."""
        self._file(CELL_MATRIX)
        require_agreement(image, [mpp, *self.mpp_sources()])
        outlines = self._file(OUTLINES[self.outline])
        xy = shapely.get_coordinates(shapely.centroid(self._shapes[1]))
        in_um = f"divided by {mpp[1]:.4g} um/px they fit: give outlines in full-resolution pixels, not in um"
        require_inside(
            outlines,
            xy,
            (image, width, height),
            {in_um: xy / mpp[1]},
            "give the microscope image that Space Ranger was run with",
        )
        grid = self._bins()
        if grid is None:
            return
        on_tissue, spread = _on_tissue(xy, grid)
        if_um, spread_if_um = _on_tissue(xy / mpp[1], grid)
        if if_um >= _MIN_ON_TISSUE and abs(np.log(spread_if_um)) < min(_MAX_SPREAD, abs(np.log(spread))):
            raise InputError(f"{outlines}: the cells do not cover the bins in tissue; {in_um}")
        if on_tissue < _MIN_ON_TISSUE:
            raise InputError(
                f"{outlines}: only {on_tissue:.0%} of the cells are on bins in tissue; give outlines and bins of one run of Space Ranger"
            )

    def outlines(self, mpp: float) -> gpd.GeoDataFrame:
        """The nuclei or cells, named by their barcodes."""
        found = self._outlined(self.outline, mpp)
        warn_of_size(self.path, found, "px")
        return found

    def counts(self, nuclei: gpd.GeoDataFrame, *, registration: Registration | None = None) -> AnnData:
        """Counts of the cells; nuclei of another source get those of the cells whose center they hold."""
        with SpaceRangerMatrix(self._file(CELL_MATRIX)) as matrix:
            var, cell_id, X = matrix.var(), matrix.cell_id, matrix.counts()
        mpp = mpp_of(nuclei)
        named = nuclei.assign(cell_id=_barcodes(nuclei["cell_id"].to_numpy(object)))
        # nuclei and cells have the same names, and either may be the units
        both = [self._outlined(unit, mpp) for unit in OUTLINES if (self.path / OUTLINES[unit]).is_file()]
        own = next((each for each in both if own_rows(named, each) is not None), None)
        if own is None:
            own = self._outlined(self.outline, mpp)
        if not np.isin(cell_id, own["cell_id"]).any():
            raise InputError(
                f"{self.path}: the cells of {CELL_MATRIX}, such as {cell_id[0]!r}, are not those of the outlines, such as "
                f"{own['cell_id'].iloc[0]!r}; give files of one run of Space Ranger"
            )
        # the matrix does not list cells without counts
        empty = own["cell_id"][~own["cell_id"].isin(cell_id)].to_numpy(object)
        X = csr_matrix(vstack([X, csr_matrix((len(empty), X.shape[1]), dtype=X.dtype)]))
        counted = count_cells(X, np.concatenate([cell_id, empty]), var, own, named, self.path)
        counted.obs_names = pd.Index(nuclei["cell_id"].to_numpy(object), name="cell_id")
        counted.uns["prts"]["n_cells"] = len(cell_id)
        return counted

    def _outlined(self, unit: str, mpp: float) -> gpd.GeoDataFrame:
        ids, shapes = self._shapes if unit == self.outline else _read_outlines(self._file(OUTLINES[unit]))
        return make_nuclei(shapes, mpp, cell_id=ids, source=str(self.path / OUTLINES[unit]))

    @cached_property
    def _shapes(self) -> tuple[NDArray[Any], NDArray[np.object_]]:
        """Barcodes of the units, and their outlines in full-resolution pixels."""
        return _read_outlines(self._file(OUTLINES[self.outline]))

    def _bins(self) -> BinGrid | None:
        """Positions of the smallest bins of the same output, if they are there."""
        outs = find_outs(self.path)
        bins = next(iter(outs.bins.values()), None) if outs is not None else None
        return read_positions(bins) if bins is not None and bin_files(bins)["positions"].is_file() else None

    def _file(self, name: str) -> Path:
        """A file in the folder of cells; the error says what the folder is instead."""
        path = self.path / name
        if path.is_file():
            return path
        given = Path(self.cells)
        if not given.is_dir():
            raise InputError(f"{given}: no such folder; give {SEGMENTED} of Space Ranger 4")
        if has_spots(given):
            raise InputError(
                f"{given}: is Visium with spots of 55 um, which has no cells; give the output of Space Ranger 4 for Visium HD"
            )
        outs = find_outs(given)
        if outs is not None and outs.segmented is None:
            version = outs.version() or "3"
            raise InputError(
                f"{outs.path}: is the output of Space Ranger {version} and has no {SEGMENTED}, which Space Ranger 4 writes; run "
                "Space Ranger 4, or count its bins with the platform visium_hd"
            )
        raise InputError(f"{path}: no such file; get it from {SEGMENTED} of Space Ranger 4")


def _read_outlines(path: Path) -> tuple[NDArray[Any], NDArray[np.object_]]:
    found = reader_of(path)(path, ImageSize(0, 0))
    usable = ~(shapely.is_missing(found.geometry) | shapely.is_empty(found.geometry))
    ids = found.chosen_ids(path)
    if ids is None or not usable.any():
        what = "no outlines" if not usable.any() else "outlines without cell_id"
        raise InputError(f"{path}: has {what}; give Space Ranger's own file")
    return largest_of_each(_barcodes(ids)[usable], np.asarray(found.geometry, dtype=object)[usable])


def _barcodes(ids: NDArray[Any]) -> NDArray[np.object_]:
    """Names of cells as the matrix has them: outlines only have their numbers."""
    named = [f"cellid_{int(text):09d}-1" if re.fullmatch(r"\d+", text) else text for text in as_str(ids)]
    return np.array(named, dtype=object)


def _on_tissue(xy: NDArray[np.float64], grid: BinGrid) -> tuple[float, float]:
    """Share of points that are on a bin in tissue, and their spread over that of these bins."""
    at = np.rint((xy - grid.affine[:, 2]) @ np.linalg.inv(grid.affine[:, :2]).T).astype(np.int64)
    inside = ((at >= 0) & (at < (grid.n_cols, grid.n_rows))).all(axis=1)
    tissue = grid.in_tissue if grid.in_tissue.any() else np.ones_like(grid.in_tissue)
    found = np.zeros(len(xy), bool)
    found[inside] = tissue[at[inside, 1], at[inside, 0]]
    bins = np.argwhere(tissue)[:, ::-1]
    return float(found.mean()), float(np.sqrt(at.var(axis=0).sum() / bins.var(axis=0).sum()))
