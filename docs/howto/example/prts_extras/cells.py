"""Cells counted by another tool, as AnnData."""

from dataclasses import dataclass
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
import shapely

from prts.errors import InputError
from prts.io.cache import file_identity
from prts.platforms import platforms
from prts.platforms.base import counts_table


@platforms.register("cells")
@dataclass(frozen=True)
class Cells:
    """Counts of cells, each assigned to the nucleus that contains its center.

    Parameters
    ----------
    cells
        An `.h5ad` file: X with integer counts, `obsm["spatial"]` with centers in full-resolution pixels.
    """

    cells: Path | str

    @property
    def path(self) -> Path:
        """The file that messages name."""
        return Path(self.cells)

    @property
    def files(self) -> dict[str, Path]:
        """Recorded in the provenance of models."""
        return {"cells": self.path}

    @classmethod
    def find(cls, folder: Path):
        """The file in a section's folder, or None."""
        path = folder / "cells.h5ad"
        return cls(path) if path.is_file() else None

    def identity(self):
        """Everything that affects the counts, for the cache."""
        return {"cells": file_identity(self.path)}

    def mpp_sources(self):
        """The file does not state the um/px of the image."""
        return []

    def check(self, image: Path, width: int, height: int, mpp) -> None:
        """Check that the cells are on the image."""
        if not self.path.is_file():
            raise InputError(f"{self.path}: not found; give an .h5ad file of cells")
        xy = ad.read_h5ad(self.path, backed="r").obsm["spatial"]
        if np.any(xy < 0) or np.any(xy > (width, height)):
            raise InputError(f"{self.path}: has cells outside {image}; give obsm['spatial'] in its pixels")

    def counts(self, nuclei, *, registration=None):
        """Counts of all nuclei, (n_nuclei, n_genes)."""
        cells = ad.read_h5ad(self.path)
        tree = shapely.STRtree(shapely.points(cells.obsm["spatial"]))
        nucleus, cell = tree.query(np.asarray(nuclei.geometry.array, dtype=object), predicate="contains")
        shape = (len(nuclei), cells.n_obs)
        member = sp.csr_matrix((np.ones(len(cell), np.int32), (nucleus, cell)), shape=shape)
        counts = sp.csr_matrix(member @ cells.X).astype(np.int32)
        counts.eliminate_zeros()
        names = cells.var_names.astype(str)
        return counts_table(counts, nuclei, pd.DataFrame({"gene_id": names, "symbol": names}, index=names))
