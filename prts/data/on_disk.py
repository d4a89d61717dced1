"""Features and counts that stay on disk: read when indexed, like the arrays of a `NucleusSet` in memory.

Features come from the stores in which the encoder and the statistics left them. Counts are stored gzipped and with all genes, which takes
longer to read than a nucleus to train on, so those of the panel's genes are written once more, uncompressed (`inputs-<fp>.h5`, about 1.2 kB
a nucleus), together with the shape of the polygons. Nothing is mapped into memory: a read returns a copy, and files are opened again in
every process.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp
from numpy.typing import NDArray

from prts.data.nucleus_set import NucleusSet
from prts.data.prepare_input import build
from prts.errors import InputError
from prts.features.feature_reader import STORED
from prts.features.morphology import morphology
from prts.features.store import StoreReader, rows_of
from prts.io.cache import fingerprint
from prts.io.hdf5 import NewFile
from prts.io.nuclei import load_nuclei

if TYPE_CHECKING:
    from prts.data.prepared import PreparedSection
    from prts.data.slide_scale import SlideMoments, SlideScale
    from prts.preprocess.panel import Panel

    Floats = NDArray[np.float32]
    Rows = slice | NDArray[np.intp] | NDArray[np.bool_]

_VERSION = 1
_ROWS_PER_READ = 16_384
# Rows that are not wanted but read all the same where that saves a read.
_GAP = 64
_open: dict[tuple[int, Path], h5py.File] = {}


def _file(path: Path) -> h5py.File:
    """The file, opened once in each process, since an HDF5 handle does not survive a fork."""
    key = (os.getpid(), path)
    if key not in _open:
        _open[key] = h5py.File(path, "r")
    return _open[key]


def runs(ascending: NDArray[np.intp]) -> Iterator[slice]:
    """Slices of ascending rows that are worth one read each."""
    starts = np.flatnonzero(np.diff(ascending, prepend=-_GAP - 2) > _GAP)
    for first, stop in zip(starts, [*starts[1:], len(ascending)], strict=False):
        while first < stop:
            # rows that are read, wanted or not
            last = min(stop, int(np.searchsorted(ascending, ascending[first] + _ROWS_PER_READ)))
            yield slice(first, last)
            first = last


@dataclass(frozen=True)
class Columns:
    """Datasets of a file with a row for each nucleus, side by side.

    Parameters
    ----------
    path
        The HDF5 file.
    names
        The datasets, (n, d) each.
    width
        Columns of all.
    order
        Row in the file of each nucleus; None: the same.
    """

    path: Path
    names: tuple[str, ...]
    width: int
    order: NDArray[np.intp] | None = None

    def read(self, rows: NDArray[np.intp], out: Floats) -> None:
        """Read nuclei into (len(rows), width)."""
        wanted = rows if self.order is None else self.order[rows]
        at = np.argsort(wanted, kind="stable")
        ascending = wanted[at]
        datasets = [_file(self.path)[name] for name in self.names]
        for run in runs(ascending):
            here, start = ascending[run], 0
            for dataset in datasets:
                block = dataset[here[0] : here[-1] + 1]
                out[at[run], start : start + block.shape[1]] = block[here - here[0]]
                start += block.shape[1]


@dataclass(frozen=True)
class StoredFeatures:
    """Features (n, d) float32 of nuclei of a section: `features[rows]` reads them.

    Parameters
    ----------
    parts
        Their columns, in order.
    inputs
        From `write_inputs`.
    rows
        Row of each nucleus among the section's nuclei.
    scale, slide
        If given, features are matched to training (`prts.data.slide_scale`).
    """

    parts: tuple[Columns, ...]
    inputs: Path
    rows: NDArray[np.intp]
    scale: SlideScale | None = None
    slide: SlideMoments | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Number of nuclei and of features."""
        return len(self.rows), sum(part.width for part in self.parts)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows: Rows) -> Floats:
        """Read the features of some nuclei."""
        wanted = self.rows[rows]
        out = np.empty((len(wanted), self.shape[1]), dtype=np.float32)
        start = 0
        for part in self.parts:
            part.read(wanted, out[:, start : start + part.width])
            start += part.width
        if self.scale is not None and self.slide is not None:
            self.scale.match(out, self.slide)
        return out

    def take(self, rows: Rows) -> StoredFeatures:
        """The features of some nuclei, still on disk."""
        return replace(self, rows=self.rows[rows])


@dataclass(frozen=True)
class StoredCounts:
    """Counts (n, g) of the panel's genes: `counts[rows]` reads them as CSR.

    Parameters
    ----------
    path
        From `write_inputs`.
    rows
        Row of each nucleus in the file.
    n_genes
        Genes of the panel.
    starts
        Where each row of the file starts, (rows of the file + 1,).
    """

    path: Path
    rows: NDArray[np.intp]
    n_genes: int
    starts: NDArray[np.int64] = field(repr=False)

    @property
    def shape(self) -> tuple[int, int]:
        """Number of nuclei and of genes."""
        return len(self.rows), self.n_genes

    @property
    def nnz(self) -> int:
        """Counts above 0."""
        return int((self.starts[self.rows + 1] - self.starts[self.rows]).sum())

    def __getitem__(self, rows: Rows) -> sp.csr_matrix:
        """Read the counts of some nuclei, int32."""
        wanted = self.rows[rows]
        at = np.argsort(wanted, kind="stable")
        ascending = wanted[at]
        file, parts = _file(self.path), []
        for run in runs(ascending):
            here = ascending[run]
            indptr = self.starts[here[0] : here[-1] + 2]
            stored = slice(int(indptr[0]), int(indptr[-1]))
            shape = (len(indptr) - 1, self.n_genes)
            begins = (indptr - indptr[0]).astype(np.int32)
            block = sp.csr_matrix((file["data"][stored], file["indices"][stored], begins), shape)
            parts.append(block[here - here[0]])
        if not parts:
            return sp.csr_matrix((0, self.n_genes), dtype=np.int32)
        back = np.empty(len(at), dtype=np.intp)
        back[at] = np.arange(len(at))
        stacked = parts[0] if len(parts) == 1 else sp.vstack(parts, format="csr")
        return stacked if np.array_equal(at, np.arange(len(at))) else stacked[back]

    def take(self, rows: Rows) -> StoredCounts:
        """The counts of some nuclei, still on disk."""
        return replace(self, rows=self.rows[rows])


def write_inputs(folder: Path, prepared: PreparedSection, panel: Panel, *, with_shape: bool) -> Path:
    """The file with a section's counts of the panel's genes and, unless the units are bins, the shape of its nuclei; written if needed.

    Parameters
    ----------
    folder
        The section's cache folder.
    prepared
        The section.
    panel
        The genes.
    with_shape
        Whether to write `morphology`, too.
    """
    decides = {
        "version": _VERSION,
        "counts": prepared.counts.name,
        "nuclei": prepared.nuclei.name if with_shape else None,
        "genes": list(panel.gene_ids),
    }

    def make(path: Path) -> None:
        import anndata as ad

        counts = ad.read_h5ad(prepared.counts, backed="r")
        try:
            _write(path, counts, prepared, panel, with_shape=with_shape)
        finally:
            counts.file.close()

    return build(
        folder / f"inputs-{fingerprint(decides)}.h5", make, what=f"{prepared.section.name}: counts of the panel"
    )


def _write(path: Path, counts: Any, prepared: PreparedSection, panel: Panel, *, with_shape: bool) -> None:
    starts, selector = [0], panel.selector(counts.var, np.int32)
    cell_id = counts.obs_names.to_numpy(dtype=object)
    with NewFile(path) as file:
        file.create_dataset("cell_id", data=cell_id, dtype=h5py.string_dtype())
        for name, dtype in (("data", np.int32), ("indices", np.int32)):
            file.create_dataset(name, shape=(0,), maxshape=(None,), chunks=(1 << 18,), dtype=dtype)
        for first in range(0, counts.n_obs, _ROWS_PER_READ):
            block = sp.csr_matrix(counts.X[first : first + _ROWS_PER_READ]) @ selector
            block.sort_indices()
            for name, values in (("data", block.data), ("indices", block.indices)):
                file[name].resize((starts[-1] + block.nnz,))
                file[name][starts[-1] :] = values
            starts.extend((starts[-1] + block.indptr[1:].astype(np.int64)).tolist())
            file.check()
        file["indptr"] = np.array(starts, dtype=np.int64)
        if with_shape:
            polygons = load_nuclei(prepared.nuclei)
            lacks = f"{prepared.nuclei}: has no polygons of"
            rows = rows_of(pd.Index(polygons["cell_id"]), cell_id, lacks, "delete it and prepare again")
            file["morphology"] = morphology(polygons, prepared.section.mpp)[rows]


def section_features(
    prepared: PreparedSection, inputs: Path, use: Sequence[str]
) -> tuple[StoredFeatures, dict[str, int]]:
    """Features of all nuclei of a section, on disk, and the width of each block.

    Parameters
    ----------
    prepared
        The section.
    inputs
        From `write_inputs`.
    use
        Blocks in the order of the network's input, or `colour`.
    """
    parts: list[Columns] = []
    with h5py.File(inputs) as file:
        cell_id = file["cell_id"].asstr()[:]
    for block in use:
        if block == "morphology":
            with h5py.File(inputs) as file:
                parts.append(Columns(inputs, ("morphology",), file["morphology"].shape[1]))
            continue
        store = {"context": prepared.context, "colour": prepared.colour}.get(block, prepared.features)
        if store is None:
            raise InputError(f"features: {block} were not extracted; prepare the section again")
        parts.append(_columns(store, (block,) if block in STORED else STORED, cell_id))
    rows = np.arange(len(cell_id))
    widths = {block: part.width for block, part in zip(use, parts, strict=True)}
    return StoredFeatures(tuple(parts), inputs, rows), widths


def _columns(store: Path, names: tuple[str, ...], cell_id: NDArray[np.object_]) -> Columns:
    reader = StoreReader(store)
    order = reader.known.get_indexer(pd.Index(cell_id))  # -1 for nuclei without features, which the caller leaves out
    same = len(order) == len(reader.known) and np.array_equal(order, np.arange(len(order)))
    return Columns(store, names, sum(map(reader.width, names)), None if same else order)


def section_counts(inputs: Path, n_genes: int) -> StoredCounts:
    """The counts of all nuclei in a file of `write_inputs`."""
    with h5py.File(inputs) as file:
        starts = file["indptr"][:]
    return StoredCounts(inputs, np.arange(len(starts) - 1), n_genes, starts)


def on_disk(nuclei: NucleusSet) -> bool:
    """Whether features and counts are read when they are used."""
    return isinstance(nuclei.features, StoredFeatures)


def described_on_disk(nuclei: NucleusSet, prepared: PreparedSection, block: str) -> NucleusSet | None:
    """The same nuclei with other statistics of the section as features, on disk; None if their own are in memory."""
    features, counts = nuclei.features, nuclei.counts
    if not isinstance(features, StoredFeatures):
        return None
    inputs = features.inputs
    described, _ = section_features(prepared, inputs, (block,))
    return replace(nuclei, features=described.take(features.rows), counts=counts)


def with_counts_in_memory(nuclei: NucleusSet) -> NucleusSet:
    """The same nuclei with their counts, which are sparse, in memory."""
    return replace(nuclei, counts=nuclei.counts[:]) if isinstance(nuclei.counts, StoredCounts) else nuclei


def scratch(nuclei: NucleusSet) -> Floats:
    """An array (n, g) to be filled: in memory if the features are, otherwise in a file that vanishes with the array.

    In the file the values of a gene lie together, as they are read when they are scored.
    """
    n, n_genes = nuclei.counts.shape
    if not isinstance(nuclei.features, StoredFeatures) or n == 0:
        return np.empty((n, n_genes), dtype=np.float32)
    with tempfile.TemporaryFile(dir=nuclei.features.inputs.parent) as file:
        values: Floats = np.memmap(file, dtype=np.float32, mode="w+", shape=(n_genes, n)).T
    return values
