"""Read a prediction file in chunks of nuclei, so that exporting a whole slide takes little memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata.io import read_elem
from numpy.typing import NDArray

from prts.errors import InputError, ParameterError, did_you_mean
from prts.io.h5_checks import DAMAGED, check_h5
from prts.io.nuclei import load_nuclei
from prts.io.prediction import nuclei_path, plain_text, require_scale
from prts.progress import track

if TYPE_CHECKING:
    import geopandas as gpd

CHUNK = 2048


@dataclass(frozen=True)
class PredictionFile:
    """Nuclei and genes of a prediction, whose values stay on disk; made by `open_prediction`.

    Attributes
    ----------
    path
        The `.h5ad` file.
    obs, var
        Tables of nuclei and of genes.
    uns
        `prts` (provenance) and `spatial` (a small picture).
    xy_px
        Centers in full-resolution pixels, (n_nuclei, 2).
    """

    path: Path
    obs: pd.DataFrame
    var: pd.DataFrame
    uns: dict[str, Any]
    xy_px: NDArray[np.float64]

    def genes_at(self, genes: Sequence[str]) -> NDArray[np.intp]:
        """Columns of genes.

        Raises
        ------
        InputError
            If the prediction does not have a gene.
        """
        place = self.var.index.get_indexer(pd.Index(genes))
        if (place < 0).any():
            unknown = genes[int(np.flatnonzero(place < 0)[0])]
            raise ParameterError(
                "", "genes", f"{self.path} has no gene {unknown!r}{did_you_mean(unknown, self.var.index)}"
            )
        return np.asarray(place, dtype=np.intp)

    def chunks(self, columns: NDArray[np.intp], size: int = CHUNK) -> Iterator[tuple[slice, NDArray[np.float32]]]:
        """Yield slices of rows in order, with the expected UMI of the genes at `columns`, (n_rows, n_columns)."""
        with h5py.File(self.path) as file:
            x = by_rows(file["X"])
            starts = range(0, len(self.obs), size)
            for start in track(starts, f"export {self.path.stem}", total=len(starts)):
                rows = slice(start, min(start + size, len(self.obs)))
                try:
                    values = _rows(x, rows, len(self.var))
                except DAMAGED as error:
                    raise InputError(f"{self.path}: X is damaged ({error}); predict again") from error
                yield rows, values[:, columns]

    def nuclei(self) -> gpd.GeoDataFrame:
        """Polygons from `<name>.nuclei.parquet`, in the order of the nuclei.

        Raises
        ------
        InputError
            If the file is missing, or does not contain all nuclei of the prediction.
        """
        path = nuclei_path(self.path)
        if not path.is_file():
            raise InputError(f"{path}: no such file; keep the polygons next to {self.path.name}")
        nuclei = load_nuclei(path).set_index("cell_id")
        place = nuclei.index.get_indexer(self.obs.index)
        if (place < 0).any():
            missing = self.obs.index[place < 0][0]
            raise InputError(f"{path}: has no nucleus {missing!r}; use the file that was written with {self.path.name}")
        return nuclei.iloc[place].rename_axis("cell_id").reset_index()


def open_prediction(path: Path) -> PredictionFile:
    """Open a prediction without reading its values.

    Raises
    ------
    InputError
        If the file is missing, is not an .h5ad file, or is not a prediction on the UMI scale.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file; expected a prediction (.h5ad) of `prts predict`")
    if not h5py.is_hdf5(path):
        raise InputError(f"{path}: is not an .h5ad file; expected a prediction of `prts predict`")
    check_h5(path)
    try:
        with h5py.File(path) as file:
            obs, var, uns, xy_px = (read_elem(file[key]) for key in ("obs", "var", "uns", "obsm/spatial"))
            shape = _shape(file["X"])
        obs, var = plain_text(obs), plain_text(var)
        xy_px = np.asarray(xy_px, dtype=np.float64).reshape(len(obs), 2)
    except Exception as error:  # anndata can raise anything on a malformed HDF5 file
        raise InputError(f"{path}: is not a prediction of `prts predict` ({error})") from error
    require_scale(path, uns)
    if shape != (len(obs), len(var)):
        raise InputError(f"{path}: X has shape {shape} instead of {len(obs)} nuclei x {len(var)} genes; predict again")
    return PredictionFile(path, obs.rename_axis("cell_id"), var, uns, xy_px)


def _shape(x: h5py.Group | h5py.Dataset) -> tuple[int, int]:
    rows, columns = x.attrs["shape"] if isinstance(x, h5py.Group) else x.shape
    return int(rows), int(columns)


def by_rows(x: h5py.Group | h5py.Dataset) -> Any:
    """A matrix of a file that can be read by rows; one that another program stored by columns is converted in memory.

    Raises
    ------
    InputError
        If it is damaged.
    """
    kind = x.attrs.get("encoding-type") if isinstance(x, h5py.Group) else None
    if kind != "csc_matrix":
        return x
    try:
        matrix = sp.csc_matrix((x["data"][:], x["indices"][:], x["indptr"][:]), _shape(x))
        matrix.check_format(full_check=True)
    except DAMAGED as error:
        raise InputError(f"{x.file.filename}: {x.name.strip('/')} is damaged ({error}); predict again") from error
    return matrix.tocsr()


def _rows(x: Any, rows: slice, width: int) -> NDArray[np.float32]:
    """Rows of a matrix that is stored dense or as CSR, or in memory, (n_rows, width)."""
    if sp.issparse(x):
        return np.asarray(x[rows].toarray(), dtype=np.float32)
    if isinstance(x, h5py.Dataset):
        return np.asarray(x[rows], dtype=np.float32)
    pointers = x["indptr"][rows.start : rows.stop + 1]
    part = slice(int(pointers[0]), int(pointers[-1]))
    block = sp.csr_matrix((x["data"][part], x["indices"][part], pointers - pointers[0]), (len(pointers) - 1, width))
    block.check_format(full_check=True)
    return np.asarray(block.toarray(), dtype=np.float32)
