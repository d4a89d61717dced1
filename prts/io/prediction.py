"""Predictions: nuclei x panel AnnData, written in chunks in bounded memory, and the polygons of the nuclei."""

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
import scipy.sparse as sp
import shapely
from anndata.io import write_elem
from numpy.typing import ArrayLike, NDArray

from prts.errors import InputError, ParameterError
from prts.io.cache import atomic
from prts.io.h5_checks import check_matrix, read_checked_h5ad
from prts.io.hdf5 import NewFile
from prts.io.nuclei import write_nuclei

if TYPE_CHECKING:
    import geopandas as gpd

SCALE = "umi"
_BOUNDS = ("layers/lower", "layers/upper")
_HIRES_PX, _LOWRES_PX = 2000, 600
_ROWS, _COLUMNS = 1024, 256  # chunk of `prob`: quick to read by nucleus and by gene
_NNZ = 1 << 18
_CACHE_BYTES = 128 << 20  # keeps a band of unfinished chunks, so that none is compressed twice
# R, Julia and h5wasm can read gzip, but not LZF.
_PACKED = {"compression": "gzip", "compression_opts": 1, "shuffle": True}


def nuclei_path(out: Path) -> Path:
    """Path of the polygons of a prediction: `<name>.nuclei.parquet` for `<name>.h5ad`."""
    return Path(out).with_suffix(".nuclei.parquet")


def check_out(out: Path) -> Path:
    """Check the path of a prediction before any work is done.

    Raises
    ------
    InputError
        If it does not end in .h5ad or is a folder.
    """
    out = Path(out)
    if out.suffix != ".h5ad":
        raise ParameterError("", "out", f"{out} does not end in .h5ad; a prediction is an AnnData file")
    for path in (out, nuclei_path(out)):
        if path.is_dir():
            raise ParameterError("", "out", f"{path} is a folder; give a file")
    return out


def spatial_uns(library_id: str, thumbnail: NDArray[np.uint8], width: int, spot_diameter_px: float) -> dict[str, Any]:
    """`uns["spatial"]` from which scanpy and squidpy draw the image, as from `scanpy.read_visium`.

    Parameters
    ----------
    library_id
        Name of the section.
    thumbnail
        The whole image in RGB, (height, width, 3); reduced if larger than 2,000 px.
    width
        Width of the full-resolution image in pixels, the unit of `obsm["spatial"]`.
    spot_diameter_px
        Diameter of a nucleus in drawings, in full-resolution pixels.
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
    """Write a prediction chunk by chunk: a million nuclei need no more memory than one chunk.

    A context manager: both files are written completely if the block succeeds, and not at all if it fails. `X` is CSR float32
    without stored zeros; `layers["prob"]` is dense float32 (few probabilities are 0). All arrays are compressed with gzip.

    Parameters
    ----------
    out
        `<name>.h5ad`; its folder is created.
    genes
        `var`: the panel indexed by name, with at least `gene_id` and `val_pcc`, and `ceiling` and `predictable` if known.
    nuclei
        All predicted nuclei, in order (`prts.io.nuclei`). Additional columns, such as `ood`, become columns of `obs`.
    uns
        `prts`: provenance (nested mappings of text, numbers and lists; None is dropped); `spatial`: see `spatial_uns`.
    intervals
        Whether to write `layers["lower"]` and `layers["upper"]`, the smallest and largest expected count: CSR int32.

    Raises
    ------
    InputError
        If `out` does not end in .h5ad or cannot be written.
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
        self._rows = 0
        self._indptr = {name: np.zeros(len(nuclei) + 1, np.int64) for name in self._sparse}
        self._stack = ExitStack()

    def __enter__(self) -> PredictionWriter:
        with ExitStack() as stack:
            try:
                write_nuclei(self._nuclei, stack.enter_context(atomic(nuclei_path(self.out))))
                path = stack.enter_context(atomic(self.out))
                self._file = stack.enter_context(NewFile(path, rdcc_nbytes=_CACHE_BYTES))
            except OSError as error:
                raise ParameterError(
                    "", "out", f"{self.out} cannot be written ({error}); choose another folder"
                ) from error
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
            Row of the first nucleus; chunks are written in order and without gaps.
        umi
            Expected UMI of each gene, (b, n_genes), >= 0.
        prob
            P(expressed), (b, n_genes), in [0, 1].
        bounds
            Smallest and largest count, each (b, n_genes), whole numbers; required if and only if the file has intervals.

        Raises
        ------
        ValueError
            If the chunk does not follow the previous one, has the wrong shape, or a value is out of range.
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

    def add(self, *, obs: Mapping[str, NDArray[Any]], prts: Mapping[str, Any] | None = None) -> None:
        """Add columns of `obs`, (n_nuclei,) each, and entries of `uns["prts"]` that are known only at the end."""
        for name, values in obs.items():
            write_elem(self._file["obs"], name, np.asarray(values))
        order = [*self._file["obs"].attrs["column-order"], *obs]
        self._file["obs"].attrs["column-order"] = np.array(order, dtype=h5py.string_dtype())
        for name, value in _storable(prts or {}).items():
            write_elem(self._file["uns/prts"], name, value)

    def _append(self, name: str, start: int, matrix: NDArray[Any]) -> None:
        """Append rows to a sparse matrix of the file."""
        group, before = self._file[name], int(self._indptr[name][start])
        row, column = np.nonzero(matrix)
        for part, values in (("data", matrix[row, column]), ("indices", column)):
            group[part].resize((before + len(row),))
            group[part][before:] = values
        self._indptr[name][start + 1 : start + 1 + len(matrix)] = before + np.cumsum(np.count_nonzero(matrix, axis=1))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        missing = kind is None and self._rows != self._shape[0]
        if missing:
            error = ValueError(f"{self.out}: {self._rows} of {self._shape[0]} nuclei were written")
            kind = type(error)
        if kind is None:
            for name, values in self._indptr.items():  # int32 like the indices, if it fits
                dtype = np.int32 if values[-1] <= np.iinfo(np.int32).max else np.int64
                self._file[name].create_dataset("indptr", data=values.astype(dtype), **_PACKED)
        self._stack.__exit__(kind, error, traceback)
        if missing and error is not None:
            raise error

    def _make_datasets(self) -> None:
        n, g = self._shape
        file = self._file
        file.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
        for name in ("layers", "obsm", "varm", "obsp", "varp", "uns"):
            write_elem(file, name, {})
        for name in self._sparse:
            matrix = file.create_group(name)
            matrix.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": np.array([n, g])})
            dtype = np.float32 if name == "X" else np.int32
            matrix.create_dataset("data", (0,), dtype, maxshape=(None,), chunks=(_NNZ,), **_PACKED)
            matrix.create_dataset("indices", (0,), np.int32, maxshape=(None,), chunks=(_NNZ,), **_PACKED)
        chunks = max(1, min(_ROWS, n)), max(1, min(_COLUMNS, g))
        prob = file.create_dataset("layers/prob", (n, g), np.float32, chunks=chunks, **_PACKED)
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
    """Read a prediction and check it.

    Raises
    ------
    InputError
        If the file is missing, not an .h5ad, not written by prts, not on the UMI scale, or contains invalid values.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file; give a prediction (.h5ad)")
    if not h5py.is_hdf5(path):
        raise InputError(f"{path}: not an .h5ad file; give a prediction written by prts")
    prediction = read_checked_h5ad(path)
    require_scale(path, prediction.uns)
    if prediction.X is None or "spatial" not in prediction.obsm:
        raise InputError(f"{path}: has no X or no obsm['spatial']; give a prediction written by prts")
    for name, matrix in {"X": prediction.X, **prediction.layers}.items():
        check_matrix(path, name, matrix)
    values = prediction.X.data if hasattr(prediction.X, "indptr") else prediction.X
    if not (np.isfinite(values).all() and (values >= 0).all()):
        raise InputError(f"{path}: X contains negative or non-finite values; give UMI counts")
    return _as_written(prediction)


def plain_text(table: pd.DataFrame) -> pd.DataFrame:
    """A table whose text, also that of its index, is str: newer versions of anndata store nullable strings."""
    table = table.copy()
    table.index = table.index.astype(str).astype(object)
    for name in table.columns:
        if isinstance(table[name].dtype, pd.StringDtype):
            table[name] = table[name].astype(object)
        elif isinstance(table[name].dtype, pd.CategoricalDtype):
            words = table[name].cat.categories
            if isinstance(words.dtype, pd.StringDtype):
                table[name] = table[name].cat.rename_categories(list(words))
    return table


def _as_written(prediction: ad.AnnData) -> ad.AnnData:
    """A prediction that another program may have saved again, in the layout of `PredictionWriter`."""
    if not (sp.issparse(prediction.X) and prediction.X.format == "csr"):
        prediction.X = sp.csr_matrix(prediction.X)
    for name, layer in list(prediction.layers.items()):
        if name == "prob" and sp.issparse(layer):
            prediction.layers[name] = layer.toarray()
        elif name != "prob" and not (sp.issparse(layer) and layer.format == "csr"):
            prediction.layers[name] = sp.csr_matrix(layer)
    prediction.obs, prediction.var = plain_text(prediction.obs), plain_text(prediction.var)
    return prediction


def require_scale(path: Path, uns: Any) -> None:
    """Refuse a file that is not on the UMI scale according to `uns["prts"]["scale"]`.

    Raises
    ------
    InputError
        If the file states another scale or none.
    """
    prts = uns.get("prts") if isinstance(uns, Mapping) else None
    scale = prts.get("scale") if isinstance(prts, Mapping) else None
    if scale is None and isinstance(uns, Mapping) and "clusters" in uns:
        raise InputError(f"{path}: is an analysis; give the prediction here, and this file as `analysis`")
    if scale is None:
        raise InputError(f"{path}: has no uns['prts']['scale']; give a prediction written by prts")
    if not isinstance(scale, str) or scale != SCALE:
        raise InputError(f"{path}: uns['prts']['scale'] is {scale!r}; give UMI counts ({SCALE!r})")


def _at_most(picture: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """Reduce an image until its longest side has at most `side` px."""
    from PIL import Image

    height, width = picture.shape[:2]
    factor = side / max(height, width)
    if factor >= 1:
        return np.ascontiguousarray(picture)
    size = max(1, math.floor(width * factor)), max(1, math.floor(height * factor))
    return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BOX))


def _storable(value: Any) -> Any:
    """Convert JSON-like values to those that anndata can store: lists become arrays, mixed lists JSON text."""
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
