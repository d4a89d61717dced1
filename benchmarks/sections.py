"""A section of full size, fast: Visium HD's lattice, files and density, but neither an image nor biology."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import shapely
from anndata import AnnData
from scipy.sparse import csr_matrix

from benchmarks.harness import cache_folder
from prts.io.cache import atomic
from prts.io.nuclei import make_nuclei, write_nuclei
from prts.simulate.bins import write_bins
from prts.simulate.draw_counts import BinCounts
from prts.simulate.lattice import BinLattice

MPP = 0.2738
BIN_UM = 2.0
FULL_NUCLEI, FULL_SIDE, FULL_GENES = 60_000, 3350, 19_000
ENTRIES_A_BIN = 9.3
_ROWS_AT_ONCE = 128


def folder_of(n_nuclei: int, genes: int = FULL_GENES) -> Path:
    """Where such a section is kept."""
    return cache_folder() / f"section-{n_nuclei}-{genes}"


def make_section(n_nuclei: int, genes: int = FULL_GENES) -> None:
    """Make a section with this many nuclei at the density of the full one: `square_002um/` and `nuclei.parquet`.

    At 60,000 nuclei it has 3,350 x 3,350 bins (11.2 million, all in tissue) and 104 million entries. Genes differ in abundance by a
    factor of some hundred, entries are sorted within a bin, and the lattice is tilted by 1.3 degrees, as Space Ranger has them.
    """
    rng = np.random.default_rng(n_nuclei)
    side = round(FULL_SIDE * (n_nuclei / FULL_NUCLEI) ** 0.5)
    lattice = BinLattice(side, side, (100.0, 20.0), float(np.deg2rad(1.3)), (0.0, 0.0))
    ids = [f"ENSG{k:011d}" for k in range(genes)]
    names = [f"MT-{k}" if k < 13 else f"GENE{k}" for k in range(genes)]
    truth = AnnData(var=pd.DataFrame({"gene_id": ids}, index=names))
    counts = BinCounts(np.ones((side, side), dtype=bool), matrix_of(side, genes, rng), 0, 0)
    nuclei = make_nuclei(outlines_of(n_nuclei, lattice, rng), MPP, source="benchmark nuclei")
    size_px = round(side * BIN_UM / MPP)
    with atomic(folder_of(n_nuclei, genes)) as temporary:
        write_bins(temporary / "square_002um", lattice, counts, truth, MPP, (size_px, size_px), 0.1)
        write_nuclei(nuclei, temporary / "nuclei.parquet")
        size = {"nuclei": len(nuclei), "bins": side * side, "entries": int(counts.counts.nnz), "genes": genes}
        (temporary / "size.json").write_text(json.dumps(size))


def size_of(folder: Path) -> dict[str, int]:
    """Nuclei, bins, entries and genes of a section."""
    return dict(json.loads((folder / "size.json").read_text()))


def matrix_of(side: int, genes: int, rng: np.random.Generator, entries_a_bin: float = ENTRIES_A_BIN) -> csr_matrix:
    """Bins x genes: a Poisson number of entries a bin, of 1 or 2 UMI, rare genes rarer."""
    data, indices, lengths = [], [], []
    for first in range(0, side, _ROWS_AT_ONCE):
        n_bins = (min(first + _ROWS_AT_ONCE, side) - first) * side
        entries = rng.poisson(entries_a_bin * 1.01, n_bins)
        gene = (genes * rng.random(int(entries.sum()), np.float32) ** 2).astype(np.int64)
        key = np.sort(np.repeat(np.arange(n_bins) * genes, entries) + np.minimum(gene, genes - 1))
        key = key[np.r_[True, key[1:] != key[:-1]]]  # an entry is listed once
        indices.append((key % genes).astype(np.int32))
        lengths.append(np.bincount(key // genes, minlength=n_bins))
        data.append((1 + (rng.random(len(key), np.float32) > 0.93)).astype(np.int32))
    indptr = np.concatenate([[0], np.cumsum(np.concatenate(lengths))])
    return csr_matrix((np.concatenate(data), np.concatenate(indices), indptr), shape=(side * side, genes))


def outlines_of(n: int, lattice: BinLattice, rng: np.random.Generator) -> np.ndarray:
    """Wobbly discs of about 45 um2 on a jittered grid, in full-resolution pixels: some touch, few overlap."""
    a_side = int(np.ceil(n**0.5))
    place = np.stack(np.divmod(np.arange(n), a_side), axis=1)
    step = (lattice.n_cols - 10) / a_side
    row, col = ((place + rng.uniform(0.1, 0.9, place.shape)) * step + 5).T
    centre = lattice.to_um(row, col)
    angle = np.linspace(0, 2 * np.pi, 33)[:-1]
    radius = rng.normal(3.8, 0.5, (n, 1)).clip(2.5, 5.5) * (1 + 0.12 * np.cos(2 * angle + rng.uniform(0, 6.28, (n, 1))))
    ring = centre[:, None] + radius[..., None] * np.stack([np.cos(angle), np.sin(angle)], axis=-1)
    return np.asarray(shapely.polygons(ring / MPP), dtype=object)
