"""Predictions: nuclei x panel AnnData written in chunks in bounded memory, and the polygons beside it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import shapely
from anndata.io import write_elem
from numpy.typing import ArrayLike, NDArray

from prts.errors import InputError
from prts.io.cache import atomic
from prts.io.h5_checks import check_matrix, read_checked_h5ad
from prts.io.hdf5 import NewFile
from prts.io.nuclei import write_nuclei

if TYPE_CHECKING:
    import geopandas as gpd

SCALE = "umi"
_BOUNDS = ("layers/lower", "layers/upper")
_HIRES_PX, _LOWRES_PX = 2000, 600
_ROWS, _COLUMNS = 1024, 256  # of a stored chunk of `prob`: quick to read by nuclei and by gene
_NNZ = 1 << 18
_CACHE_BYTES = 128 << 20  # holds a band of unfinished chunks, so that none is compressed twice


def nuclei_path(out: Path) -> Path:
    """Where the polygons of a prediction lie: `<out>.nuclei.parquet` beside `<out>.h5ad`."""
    return Path(out).with_suffix(".nuclei.parquet")


def check_out(out: Path) -> Path:
    """The path of a prediction to be written, before any work goes into it.

    Raises
    ------
    InputError
        If it does not end in .h5ad or a folder has that name.
    """
    out = Path(out)
    if out.suffix != ".h5ad":
        raise InputError(f"out={out}: a prediction is an AnnData file; the name must end in .h5ad")
    for path in (out, nuclei_path(out)):
        if path.is_dir():
            raise InputError(f"out={out}: {path} is a folder; choose the name of a file")
    return out


def spatial_uns(library_id: str, thumbnail: NDArray[np.uint8], width: int, spot_diameter_px: float) -> dict[str, Any]:
    """The `uns["spatial"]` that scanpy and squidpy draw an image from (the layout of `scanpy.read_visium`).

    Parameters
    ----------
    library_id
        Name of the section.
    thumbnail
        RGB picture of the whole image, (height, width, 3); a larger one than 2,000 px is reduced.
    width
        Width of the full-resolution image in pixels, the unit of `obsm["spatial"]`.
    spot_diameter_px
        Diameter that a nucleus is drawn with, in full-resolution pixels.
    """
    hires = _at_most(thumbnail, _HIRES_PX)
    lowres = _at_most(hires, _LOWRES_PX)
    return {
        library_id: {
            "images": {"hires": hires, "lowres": lowres},
            "scalefactors": {
                "tissue_hires_scalef": hires.shape[1] / width,
                "tissue_lowres_scalef": lowres.shape[1] / width,
                "spot_diameter_fullres": float(spot_diameter_px),
            },
            "metadata": {},
        }
    }


class PredictionWriter:
    """Write a prediction chunk by chunk, so that a million nuclei need no more memory than one chunk.

    A context manager: both files appear, whole, when the block ends well, and neither does when it does not. `X` is CSR float32
    without stored zeros; `layers["prob"]` is dense float32 (few probabilities are 0), in compressed chunks.

    Parameters
    ----------
    out
        `<name>.h5ad`; its folder is made.
    genes
        `var`: the panel by name, with at least `gene_id` and `val_pcc`; `ceiling` and `predictable` where known.
    nuclei
        All nuclei that are predicted, in order (`prts.io.nuclei`). Columns beyond its own four, such as `ood`, go into `obs` too.
    uns
        `prts`: provenance (nested mappings of text, numbers and lists; None is dropped); `spatial`: of `spatial_uns`.
    intervals
        Whether `layers["lower"]` and `layers["upper"]` are written, the smallest and largest count to be expected: CSR int32.

    Raises
    ------
    InputError
        If `out` is not the name of an .h5ad file or cannot be written.
    """

    def __init__(
        self,
        out: Path,
        genes: pd.DataFrame,
        nuclei: gpd.GeoDataFrame,
        uns: Mapping[str, Mapping[str, Any]],
        *,
        intervals: bool = False,
    ) -> None:
        self.out = check_out(out)
        if not genes.index.is_unique or not nuclei["cell_id"].is_unique:
            raise ValueError("names of genes and nuclei must be unique")
        self._genes, self._nuclei, self._uns = genes, nuclei, uns
        self._shape = len(nuclei), len(genes)
        self._sparse = ("X", *(_BOUNDS if intervals else ()))
        self._rows, self._nnz = 0, dict.fromkeys(self._sparse, 0)
        self._stack = ExitStack()

    def __enter__(self) -> PredictionWriter:
        with ExitStack() as stack:
            try:
                write_nuclei(self._nuclei, stack.enter_context(atomic(nuclei_path(self.out))))
                path = stack.enter_context(atomic(self.out))
                self._file = stack.enter_context(NewFile(path, rdcc_nbytes=_CACHE_BYTES))
            except OSError as error:
                raise InputError(f"out={self.out}: cannot be written ({error}); choose another place") from error
            self._make_datasets()
            self._stack = stack.pop_all()
        return self

    def write(
        self, start: int, umi: ArrayLike, prob: ArrayLike, bounds: tuple[ArrayLike, ArrayLike] | None = None
    ) -> None:
        """Append a chunk of nuclei.

        Parameters
        ----------
        start
            Row of the first nucleus: chunks come in order and without gaps.
        umi
            Expected UMI of each gene, (b, n_genes), >= 0.
        prob
            P(expressed), (b, n_genes), in [0, 1].
        bounds
            Smallest and largest count, each (b, n_genes) and whole; given if and only if the file holds intervals.

        Raises
        ------
        ValueError
            If a chunk does not follow the last one, has another shape, or a value is out of its range.
        """
        level, chance = np.asarray(umi, dtype=np.float32), np.asarray(prob, dtype=np.float32)
        stop = start + len(level)
        if (
            start != self._rows
            or stop > self._shape[0]
            or level.shape != chance.shape
            or level.shape[1] != self._shape[1]
        ):
            raise ValueError(
                f"chunk of {level.shape} and {chance.shape} at {start}: {self._rows} of {self._shape} are written so far"
            )
        if not (np.isfinite(level).all() and (level >= 0).all()):
            raise ValueError("predicted UMI must be finite and not negative")
        if not ((chance >= 0) & (chance <= 1)).all():
            raise ValueError("P(expressed) must be in [0, 1]")
        matrices = [level, *(np.asarray(bound) for bound in bounds or ())]
        for name, matrix in zip(self._sparse, matrices, strict=True):
            self._append(name, start, matrix)
        self._file["layers/prob"][start:stop] = chance
        self._file.check()
        self._rows = stop

    def add(self, *, obs: Mapping[str, NDArray[Any]], prts: Mapping[str, Any]) -> None:
        """Columns of `obs`, (n_nuclei,) each, and entries of `uns["prts"]` that are known only at the end."""
        for name, values in obs.items():
            write_elem(self._file["obs"], name, np.asarray(values))
        order = [*self._file["obs"].attrs["column-order"], *obs]
        self._file["obs"].attrs["column-order"] = np.array(order, dtype=h5py.string_dtype())
        for name, value in _storable(prts).items():
            write_elem(self._file["uns/prts"], name, value)

    def _append(self, name: str, start: int, matrix: NDArray[Any]) -> None:
        """Rows at the end of a sparse matrix of the file."""
        group, before = self._file[name], self._nnz[name]
        row, column = np.nonzero(matrix)
        self._nnz[name] = before + len(row)
        for part, values in (("data", matrix[row, column]), ("indices", column)):
            group[part].resize((self._nnz[name],))
            group[part][before:] = values
        group["indptr"][start + 1 : start + 1 + len(matrix)] = before + np.cumsum(np.count_nonzero(matrix, axis=1))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        missing = kind is None and self._rows != self._shape[0]
        if missing:
            error = ValueError(f"{self.out}: {self._rows} of {self._shape[0]} nuclei were written")
            kind = type(error)
        self._stack.__exit__(kind, error, traceback)
        if missing and error is not None:
            raise error

    def _make_datasets(self) -> None:
        n, g = self._shape
        file = self._file
        file.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
        packed = {"compression": "lzf", "shuffle": True}
        for name in ("layers", "obsm", "varm", "obsp", "varp", "uns"):
            write_elem(file, name, {})
        for name in self._sparse:
            matrix = file.create_group(name)
            matrix.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": np.array([n, g])})
            dtype = np.float32 if name == "X" else np.int32
            matrix.create_dataset("data", (0,), dtype, maxshape=(None,), chunks=(_NNZ,), **packed)
            matrix.create_dataset("indices", (0,), np.int32, maxshape=(None,), chunks=(_NNZ,), **packed)
            matrix.create_dataset("indptr", (n + 1,), np.int64, fillvalue=0)
        chunks = max(1, min(_ROWS, n)), max(1, min(_COLUMNS, g))
        prob = file.create_dataset("layers/prob", (n, g), np.float32, chunks=chunks, **packed)
        prob.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})

        cell_id = pd.Index(self._nuclei["cell_id"].astype(str), name=None)
        columns = self._nuclei.drop(columns=["cell_id", "geometry", "score"], errors="ignore")
        write_elem(file, "obs", pd.DataFrame(columns).set_index(cell_id))
        write_elem(file, "var", self._genes.rename_axis(index=None))
        centres = shapely.centroid(self._nuclei.geometry.to_numpy())
        write_elem(file, "obsm/spatial", shapely.get_coordinates(centres))
        write_elem(file, "uns/spatial", dict(self._uns.get("spatial", {})))
        write_elem(file, "uns/prts", _storable({**self._uns.get("prts", {}), "scale": SCALE}))


def read_prediction(path: Path) -> ad.AnnData:
    """Read a prediction and check that it is one.

    Raises
    ------
    InputError
        If the file is missing, not an .h5ad, not written by prts, not on the UMI scale, or holds values that are no counts.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file; expected a prediction (.h5ad) of `prts predict`")
    if not h5py.is_hdf5(path):
        raise InputError(f"{path}: is not an .h5ad file; expected a prediction of `prts predict`")
    prediction = read_checked_h5ad(path)
    require_scale(path, prediction.uns)
    if prediction.X is None or "spatial" not in prediction.obsm:
        raise InputError(f"{path}: has no X or no obsm['spatial']; expected a prediction of `prts predict`")
    for name, matrix in {"X": prediction.X, **prediction.layers}.items():
        check_matrix(path, name, matrix)
    values = prediction.X.data if hasattr(prediction.X, "indptr") else prediction.X
    if not (np.isfinite(values).all() and (values >= 0).all()):
        raise InputError(f"{path}: X holds negative or non-finite values; expected UMI counts")
    return prediction


def require_scale(path: Path, uns: Any) -> None:
    """Refuse a file whose `uns["prts"]["scale"]` does not say UMI.

    Raises
    ------
    InputError
        If it says another scale or nothing.
    """
    prts = uns.get("prts") if isinstance(uns, Mapping) else None
    scale = prts.get("scale") if isinstance(prts, Mapping) else None
    if scale is None:
        raise InputError(f"{path}: has no uns['prts']['scale']; expected a prediction of `prts predict`")
    if not isinstance(scale, str) or scale != SCALE:
        raise InputError(f"{path}: uns['prts']['scale'] is {scale!r}; UMI counts, {SCALE!r}, would be right")


def _at_most(picture: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """The picture, reduced to a longest side of at most `side` px."""
    from PIL import Image

    height, width = picture.shape[:2]
    factor = side / max(height, width)
    if factor >= 1:
        return np.ascontiguousarray(picture)
    size = max(1, math.floor(width * factor)), max(1, math.floor(height * factor))
    return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BOX))


def _storable(value: Any) -> Any:
    """What anndata can store, from what JSON can: nested mappings, text, numbers; lists as arrays, mixed lists as JSON text."""
    if isinstance(value, Mapping):
        return {str(key).replace("/", "_"): _storable(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        if all(isinstance(item, str) for item in value):
            return np.array(value, dtype=object)
        if all(isinstance(item, int | float) for item in value):
            return np.array(value)
        return json.dumps(value, default=str)
    if isinstance(value, str | bool | int | float | np.ndarray | np.generic):
        return value
    return str(value)
