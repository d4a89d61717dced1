"""Draw the UMIs of a simulated section and the bins that capture them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy import sparse
from scipy.spatial import cKDTree

from prts.simulate.fields import sample_field
from prts.simulate.gene_programs import true_rates
from prts.simulate.lattice import BIN_UM, BinLattice
from prts.simulate.nuclei import SimulatedNuclei, lattice_around
from prts.simulate.tissue import GRID_UM, TYPES, Layout

if TYPE_CHECKING:
    import anndata as ad
    from numpy.typing import NDArray

    Ints = NDArray[np.int64]
    Floats = NDArray[np.float64]

_CYTOPLASM_UM = 12.0
_AMBIENT_UMI_PER_BIN = 0.12
_CHUNK_ENTRIES = 10_000_000


@dataclass(frozen=True)
class BinCounts:
    """UMIs of a section by bin."""

    in_tissue: NDArray[np.bool_]
    """(rows, columns) of the lattice."""
    counts: sparse.csr_matrix
    """Bins in tissue (row by row) x genes, int32."""
    umi_drawn: int
    umi_lost: int
    """Drawn, but outside the capture area or off the tissue."""


def draw_counts(
    layout: Layout,
    nuclei: SimulatedNuclei,
    truth: ad.AnnData,
    lattice: BinLattice,
    diffusion_um: float,
    rng: np.random.Generator,
    capture: tuple[Floats, Floats] | None = None,
) -> BinCounts:
    """Draw every UMI of the section and put it into a bin.

    The UMIs of a nucleus are negative binomial around `true_rates` and start in a bin whose center is inside the nucleus. UMIs of its
    cytoplasm follow the same rates and start in a bin outside all nuclei that is closest to it. Both then diffuse. Ambient UMIs land
    anywhere in the tissue.

    Parameters
    ----------
    layout, nuclei, truth
        The section.
    lattice
        The bins.
    diffusion_um
        Standard deviation, per direction, of the distance between origin and capture of a UMI; 0 keeps each UMI in its bin.
    rng
        Source of all randomness here.
    capture
        Relative capture of rows (n_rows,) and columns (n_cols,) of bins, at most 1; None: all bins capture alike.

    Returns
    -------
    Counts per bin.
    """
    shape = (lattice.n_rows, lattice.n_cols)
    row, col = (a.ravel() for a in np.indices(shape, dtype=np.int32))
    centres = lattice.to_um(row, col)
    in_tissue = _inside(layout, centres) & sample_field(layout.outline, GRID_UM, centres).astype(bool)
    nuclear, cytoplasm = _homes(nuclei, lattice, centres, in_tissue, layout)
    share = np.array([t.cytoplasm_umi for t in TYPES])[nuclei.kind]
    share = np.where(cytoplasm.size > 0, share, 0.0)

    n_genes = truth.n_vars
    keys: list[Ints] = []
    drawn, profile = 0, np.zeros(n_genes)
    size = truth.var["dispersion"].to_numpy().astype(np.float32)
    step = max(1, _CHUNK_ENTRIES // n_genes)
    for start in range(0, truth.n_obs, step):
        cells = slice(start, start + step)
        rates = true_rates(truth[cells])
        profile += rates.sum(axis=0, dtype=np.float64)
        cell, gene = _negative_binomial(rates * (1 + share[cells, None]).astype(np.float32), size, rng)
        drawn += len(cell)
        cell += start
        home = np.where(
            rng.random(len(cell)) * (1 + share[cell]) < 1, nuclear.pick(cell, rng), cytoplasm.pick(cell, rng)
        )
        keys.append(_caught(home, gene, shape, n_genes, diffusion_um, rng))
    n_ambient = int(rng.poisson(_AMBIENT_UMI_PER_BIN * in_tissue.sum()))
    ambient = rng.choice(np.flatnonzero(in_tissue), n_ambient)
    keys.append(ambient * n_genes + rng.choice(n_genes, n_ambient, p=profile / profile.sum()))

    key = np.concatenate(keys)
    keys.clear()
    key = key[in_tissue[key // n_genes]]
    if capture is not None:
        at_row, at_col = np.divmod(key // n_genes, shape[1])
        key = key[rng.random(len(key)) < capture[0][at_row] * capture[1][at_col]]
    counts = _tally(key, in_tissue, n_genes)
    return BinCounts(in_tissue.reshape(shape), counts, drawn + n_ambient, drawn + n_ambient - len(key))


def _inside(layout: Layout, xy: Floats) -> NDArray[np.bool_]:
    return np.asarray((xy > 0).all(axis=1) & (xy < [layout.width_um, layout.height_um]).all(axis=1))


@dataclass(frozen=True)
class _Homes:
    """Bins in which the UMIs of each nucleus start."""

    bins: Ints
    start: Ints
    size: Ints

    def pick(self, cell: Ints, rng: np.random.Generator) -> Ints:
        """A random bin of each cell (an arbitrary bin for a cell without any)."""
        at = self.start[cell] + (rng.random(len(cell)) * self.size[cell]).astype(np.int64)
        return np.asarray(self.bins[np.minimum(at, len(self.bins) - 1)])


def _grouped(cell: Ints, bins: Ints, n: int) -> _Homes:
    order = np.argsort(cell, kind="stable")
    size = np.bincount(cell, minlength=n)
    return _Homes(bins[order], np.cumsum(size) - size, size)


def _homes(
    nuclei: SimulatedNuclei, lattice: BinLattice, centres: Floats, in_tissue: NDArray[np.bool_], layout: Layout
) -> tuple[_Homes, _Homes]:
    """Bins of each nucleus and of the cytoplasm around it."""
    at = lattice.from_um(nuclei.xy_um)
    row, col, index = lattice_around(at, nuclei.reach_um() / BIN_UM, (lattice.n_rows, lattice.n_cols))
    flat = row * lattice.n_cols + col
    dx, dy = (centres[flat] - nuclei.xy_um[index]).T
    within = nuclei.depth(index, dx, dy) < 1
    # A nucleus too small to contain a bin center gets the nearest bin.
    without = np.setdiff1d(np.arange(len(nuclei)), index[within])
    nearest = np.clip(np.rint(at[without]).astype(np.int64), 0, [lattice.n_cols - 1, lattice.n_rows - 1])
    nuclear = _grouped(
        np.concatenate([index[within], without]),
        np.concatenate([flat[within], nearest[:, 1] * lattice.n_cols + nearest[:, 0]]),
        len(nuclei),
    )
    free = in_tissue & (sample_field(layout.clearance, GRID_UM, centres) > 0)
    free[flat[within]] = False
    free_bins = np.flatnonzero(free)
    distance, owner = cKDTree(nuclei.xy_um).query(centres[free_bins], distance_upper_bound=_CYTOPLASM_UM)
    near = np.isfinite(distance)
    return nuclear, _grouped(owner[near], free_bins[near], len(nuclei))


def _negative_binomial(
    mean: NDArray[np.float32], size: NDArray[np.float32], rng: np.random.Generator
) -> tuple[Ints, Ints]:
    """Negative binomial counts, one entry (cell, gene) per UMI.

    A negative binomial is a Poisson number of bursts with logarithmic sizes (Quenouille 1949): only bursts that happen cost time, and
    nearly all genes of a nucleus have none.
    """
    mean /= size
    bursts = np.cumsum(np.log1p(mean, out=mean) * size, dtype=np.float64)
    n_genes = len(size)
    ends = bursts[n_genes - 1 :: n_genes]
    starts = np.concatenate([[0.0], ends[:-1]])
    happened = rng.poisson(ends - starts)
    cell = np.repeat(np.arange(len(ends)), happened)
    at = starts[cell] + rng.random(len(cell)) * (ends - starts)[cell]
    gene = np.minimum(np.searchsorted(bursts, at, side="right"), bursts.size - 1)
    # log1p(mean / size) is -log(1 - p) of the logarithmic distribution.
    umis = rng.logseries(-np.expm1(-mean.ravel()[gene].astype(np.float64)))
    return np.repeat(cell, umis), np.repeat(gene % n_genes, umis)


def _caught(
    home: Ints, gene: Ints, shape: tuple[int, int], n_genes: int, diffusion_um: float, rng: np.random.Generator
) -> Ints:
    """Key (bin x genes + gene) of each UMI that diffusion leaves in the capture area."""
    row, col = np.divmod(home, shape[1])
    if diffusion_um > 0:
        # Starting anywhere in the bin, in units of bins.
        way = rng.random((2, len(home)), np.float32) - np.float32(0.5)
        way += np.float32(diffusion_um / BIN_UM) * rng.standard_normal((2, len(home)), np.float32)
        row, col = row + np.rint(way[0]).astype(np.int64), col + np.rint(way[1]).astype(np.int64)
    kept = (row >= 0) & (row < shape[0]) & (col >= 0) & (col < shape[1])
    return np.asarray((row[kept] * shape[1] + col[kept]) * n_genes + gene[kept])


def _tally(key: Ints, in_tissue: NDArray[np.bool_], n_genes: int) -> sparse.csr_matrix:
    """Count equal keys; sorted, they are the entries of a CSR matrix in order."""
    key.sort()
    first = np.flatnonzero(np.diff(key, prepend=-1))
    data = np.diff(first, append=len(key)).astype(np.int32)
    key = key[first]
    bins = np.cumsum(in_tissue) - 1
    indptr = np.concatenate([[0], np.cumsum(np.bincount(bins[key // n_genes], minlength=int(in_tissue.sum())))])
    return sparse.csr_matrix((data, (key % n_genes).astype(np.int32), indptr), shape=(len(indptr) - 1, n_genes))
