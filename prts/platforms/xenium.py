"""Xenium: transcripts in nuclei, or the counts of cells, and an H&E image of the same section that was aligned to them."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from scipy.sparse import csr_matrix

from prts.errors import InputError
from prts.io.cache import file_identity
from prts.io.mpp import MppSource, agree
from prts.io.nuclei import make_nuclei
from prts.platforms import platforms
from prts.platforms.affine import Matrix, move, move_shapes, scale_of
from prts.platforms.base import counts_table
from prts.platforms.cell_matrix import CellMatrix
from prts.platforms.cell_units import largest_of_each, mpp_of, own_rows, require_inside
from prts.platforms.xenium_files import (
    ALIGNMENTS,
    BOUNDARIES,
    CELLS,
    MANIFEST,
    MATRIX,
    TRANSCRIPTS,
    explained,
    find_alignment,
    read_alignment,
    read_boundaries,
    read_centroids,
    read_pixel_size,
    require_file,
    xenium_folder,
)
from prts.platforms.xenium_transcripts import Genes, counts_within, nuclear_counts, unique_names

if TYPE_CHECKING:
    import geopandas as gpd
    import pandas as pd
    from anndata import AnnData

    from prts.platforms.base import Registration

logger = logging.getLogger(__name__)


@platforms.register("xenium")
@dataclass(frozen=True)
class Xenium:
    """The output of a Xenium run, with the alignment of an H&E image.

    Its own nuclei or cells are the units unless the section names nuclei or a segmentation is asked for; those count the transcripts
    within them. Only genes are counted: control probes, control codewords, blanks, and unassigned and deprecated codewords are left out.

    Parameters
    ----------
    outs
        The output folder, with `experiment.xenium`.
    alignment
        The CSV file that Xenium Explorer exports for the H&E image: the matrix (`*_imagealignment.csv`, `matrix.csv`) or the keypoints
        (`keypoints.csv`); by default the one in the output folder or next to it.
    units
        `nucleus` counts transcripts in nuclei; `cell` takes the counts of Xenium's cells.
    min_qv
        Transcripts of a lower quality are not counted in nuclei; Xenium's own counts of cells need 20.
    """

    outs: Path | str
    alignment: Path | str | None = None
    units: Literal["nucleus", "cell"] = "nucleus"
    min_qv: Annotated[float, Field(ge=0, le=100)] = 20.0
    name: ClassVar[str]

    @property
    def path(self) -> Path:
        """The output folder."""
        return xenium_folder(Path(self.outs)) or Path(self.outs)

    @property
    def files(self) -> dict[str, Path]:
        """Manifest, matrix, outlines, cells, alignment, and transcripts if they are there."""
        outs = self.path
        cells = next((outs / name for name in CELLS if (outs / name).is_file()), outs / CELLS[0])
        found = {
            "experiment": outs / MANIFEST,
            "matrix": outs / MATRIX,
            "boundaries": outs / BOUNDARIES[self.units],
            "cells": cells,
            "alignment": self._alignment,
        }
        if self.units == "nucleus" or (outs / TRANSCRIPTS).is_file():
            found["transcripts"] = outs / TRANSCRIPTS
        return found

    @classmethod
    def find(cls, folder: Path) -> Xenium | None:
        """The output in a section's folder, or in `outs` in it."""
        outs = xenium_folder(folder)
        return None if outs is None else cls(outs)

    def identity(self) -> dict[str, Any]:
        """Identities of the files, the units, and the least quality."""
        files = {name: file_identity(path) for name, path in self.files.items()}
        return {**files, "units": self.units, "min_qv": float(self.min_qv)}

    def mpp_sources(self) -> list[MppSource]:
        """The scale of the alignment."""
        return [(f"{self._alignment.name}, from px of the H&E to px of Xenium", 1 / scale_of(self._to_px))]

    def genes(self) -> pd.DataFrame:
        """Genes of the panel."""
        with CellMatrix(require_file(self.path, MATRIX)) as matrix:
            return matrix.var()

    def check(self, image: Path, width: int, height: int, mpp: MppSource) -> None:
        """Check that the files are there, and that the alignment leads to this image."""
        for name in (MATRIX, BOUNDARIES[self.units], *([TRANSCRIPTS] if self.units == "nucleus" else [])):
            require_file(self.path, name)
        if not agree(1 / scale_of(self._to_px), mpp[1]):
            raise InputError(
                f"{self._alignment}: its scale makes {1 / scale_of(self._to_px):.4g} um/px of {image}, which has {mpp[1]:.4g} ({mpp[0]}); "
                f"{explained(self._to_px, mpp[1], self._pixel_size)}"
            )
        _, um = read_centroids(self.path)
        inverse = np.asarray(np.linalg.inv(self._to_px), dtype=np.float64)
        others = {
            f"with the inverse of {self._alignment.name} they fit: export it from Xenium Explorer again, unchanged": move(
                inverse, um / self._pixel_size
            )
            / self._pixel_size,
            f"without {self._alignment.name} they fit: its px are those of Xenium's image": um / self._pixel_size,
            "taken as pixels of Xenium's image they fit: the centers of cells.parquet must be in um": move(
                self._to_px, um * self._pixel_size
            ),
        }
        otherwise = f"give the H&E image that {self._alignment.name} was exported for, at full resolution"
        require_inside(self.path, move(self._to_px, um), (image, width, height), others, otherwise)

    def outlines(self, mpp: float) -> gpd.GeoDataFrame:
        """The nuclei or cells that Xenium found; of a cell with several nuclei, the largest."""
        ids, shapes = self._shapes
        return make_nuclei(move_shapes(self._to_px, shapes), mpp, cell_id=ids, source=str(self.path))

    def counts(self, nuclei: gpd.GeoDataFrame, *, registration: Registration | None = None) -> AnnData:
        """Transcripts in nuclei, or Xenium's counts of its own cells."""
        with CellMatrix(require_file(self.path, MATRIX)) as matrix:
            var, cell_id = matrix.var(), matrix.cell_id
            own = self._own_rows(nuclei, cell_id)
            counts = matrix.counts() if own is not None and self.units == "cell" else None
        report: dict[str, int] = {}
        if counts is None:
            path, genes = require_file(self.path, TRANSCRIPTS), Genes(unique_names(var, self.path), self.min_qv)
            if own is not None:
                counts, report = nuclear_counts(path, cell_id, genes)
            else:
                polygons = np.array(nuclei.geometry.array, dtype=object)
                counts, report = counts_within(path, polygons, self._to_px, genes)
        else:
            report["umi_total"] = int(counts.sum())
        counts = csr_matrix(counts if own is None else counts[own])
        report["umi_assigned"] = int(counts.sum())
        if report["umi_total"] == 0:
            raise InputError(
                f"{self.path}: has no transcript of a gene in {MATRIX} with a quality of {self.min_qv:g} or more; give files of one run "
                "of Xenium, or lower `min_qv`"
            )
        if report["umi_assigned"] == 0:
            raise InputError(
                f"{self.path}: none of {report['umi_total']} transcripts is in one of {len(nuclei)} nuclei; give nuclei of the same image"
            )
        logger.info(
            "%d of %d transcripts counted in %d nuclei", report["umi_assigned"], report["umi_total"], len(nuclei)
        )
        return counts_table(counts, nuclei, var, report)

    def _own_rows(self, nuclei: gpd.GeoDataFrame, cell_id: NDArray[np.object_]) -> NDArray[np.int64] | None:
        """Rows of the matrix for nuclei that are Xenium's own; None for others."""
        import pandas as pd

        rows = pd.Index(cell_id).get_indexer(pd.Index(nuclei["cell_id"]))
        if (rows < 0).any() or own_rows(nuclei, self.outlines(mpp_of(nuclei))) is None:
            return None
        return np.asarray(rows, dtype=np.int64)

    @cached_property
    def _shapes(self) -> tuple[NDArray[Any], NDArray[np.object_]]:
        """Cells and their outlines in um."""
        return largest_of_each(*read_boundaries(require_file(self.path, BOUNDARIES[self.units])))

    @cached_property
    def _alignment(self) -> Path:
        if self.alignment is not None:
            return Path(self.alignment)
        require_file(self.path, MANIFEST)
        found = find_alignment(self.path)
        if found is None:
            raise InputError(
                f"{self.path}: the alignment of the H&E image is missing ({', '.join(ALIGNMENTS)}); align the image in Xenium Explorer, "
                "export the matrix or the keypoints, and name the file as `alignment`"
            )
        return found

    @cached_property
    def _pixel_size(self) -> float:
        return read_pixel_size(self.path)

    @cached_property
    def _to_px(self) -> Matrix:
        """From um of Xenium to full-resolution pixels of the H&E image."""
        return read_alignment(self._alignment, self._pixel_size)
