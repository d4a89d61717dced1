"""Bins to nuclei: join and sums on a real section against the straightforward way, and files to counts at the size of a whole slide."""

from __future__ import annotations

import statistics
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.harness import QUICK_SIZES, SIZES, Part, child, data_folder, growth, interleave

NEEDS_DATA = True
_STRAIGHTFORWARD_SIZES = (2_500, 5_000, 10_000)


def run(quick: bool) -> Part:
    part = Part()
    source = "a simulated section" if quick else "her2st C2"
    real = child(compare, folder=None if quick else str(data_folder() / "her2st_hd/C2"), rounds=1 if quick else 3)
    seconds, size = real.result["seconds"], real.result["size"]
    part.figures["counts/speedup"] = seconds["straightforward"] / seconds["ours"]
    part.row(
        f"join and sums, {source} ({size['bins']:,} bins, {size['nuclei']:,} nuclei), without reading; identical counts",
        f"{seconds['ours']:.2f} s",
        f"{seconds['straightforward']:.1f} s",
        f"{real.result['limit']:.3f} s: its bytes at memory bandwidth",
        ["counts/speedup"],
    )
    sizes = QUICK_SIZES if quick else SIZES
    runs: dict[int, list[Any]] = {n: [] for n in sizes}
    for _ in range(1 if quick else 3):
        for n in sizes:
            runs[n].append(child(count, n=n, genes=200 if quick else None))
    ours = {n: statistics.median(run.result["seconds"] for run in these) for n, these in runs.items()}
    full = runs[sizes[-1]]
    size = full[0].result["size"]
    peak = max(run.peak_gb for run in full)
    bare = child(read_bare, n=sizes[-1], genes=200 if quick else None).result
    part.figures |= {"counts/seconds_full": ours[sizes[-1]], "counts/peak_gb_full": peak}
    part.row(
        f"files to counts, simulated whole slide: {size['bins'] / 1e6:.1f} M bins x {size['genes']:,} genes, {size['nuclei']:,} nuclei, "
        f"{size['entries'] / 1e6:.0f} M entries",
        f"{ours[sizes[-1]]:.1f} s, {peak:.1f} GB",
        "",
        f"{bare:.1f} s: the same files read by h5py and pyarrow alone",
        ["counts/seconds_full", "counts/peak_gb_full"],
    )
    slow = {
        n: child(count_straightforward, n=n, genes=200 if quick else None)
        for n in (QUICK_SIZES if quick else _STRAIGHTFORWARD_SIZES)
    }
    part.row(
        "growth with nuclei (files to counts; straightforward: join and sums, "
        f"{max(run.peak_gb for run in slow.values()):.1f} GB at {max(slow):,})",
        growth(ours),
        growth({n: run.result for n, run in slow.items()}),
    )
    return part


def compare(folder: str | None, rounds: int) -> dict[str, Any]:
    """Ours and the straightforward way, interleaved, on bins that are in memory; refuses counts that differ."""
    from benchmarks import straightforward
    from benchmarks.machine import copy_bandwidth
    from prts.platforms.bin_counts import nucleus_of_bins, sum_bins
    from prts.platforms.bin_positions import read_positions

    bins, nuclei = _section(folder)
    grid, held = read_positions(bins), Held(bins)
    positions, barcodes = _tables(bins, held)
    polygons = nuclei.geometry.to_numpy()
    found: dict[str, Any] = {}

    def ours() -> None:
        found["ours"], _ = sum_bins(held, nucleus_of_bins(polygons, grid, held), len(polygons))

    def slow() -> None:
        found["straightforward"] = straightforward.count(positions, barcodes, held.counts, nuclei)

    seconds = interleave({"ours": ours, "straightforward": slow}, rounds)
    ids, counts = found["straightforward"]
    row = nuclei["cell_id"].reset_index(drop=True).reset_index().set_index("cell_id")["index"].loc[ids].to_numpy()
    if (found["ours"][row] != counts).nnz or found["ours"].sum() != counts.sum() or not counts.sum():
        raise RuntimeError("the two ways count differently")
    n_bytes = (
        held.counts.data.nbytes + held.counts.indices.nbytes + held.counts.indptr.nbytes + 16 * len(held.array_row)
    )
    size = {"bins": len(held.array_row), "nuclei": len(polygons), "umi": int(counts.sum())}
    return {"seconds": seconds, "size": size, "limit": n_bytes / copy_bandwidth()}


def count(n: int, genes: int | None) -> dict[str, Any]:
    """Files to counts, once."""
    import time

    from benchmarks.sections import FULL_GENES, size_of
    from prts.io.nuclei import load_nuclei
    from prts.platforms.bin_counts import count_bins

    folder = _made(n, genes or FULL_GENES)
    start = time.perf_counter()
    counts = count_bins(folder / "square_002um", load_nuclei(folder / "nuclei.parquet"))
    return {"seconds": time.perf_counter() - start, "size": size_of(folder), "umi": int(counts.X.sum())}


def read_bare(n: int, genes: int | None) -> float:
    """Seconds to read a section's files with the libraries alone, chunk by chunk."""
    import time

    import h5py
    import pyarrow.parquet as pq

    from benchmarks.sections import FULL_GENES

    folder = _made(n, genes or FULL_GENES) / "square_002um"
    start = time.perf_counter()
    pq.read_table(folder / "spatial/tissue_positions.parquet", columns=["array_row", "array_col", "in_tissue"])
    pq.read_table(folder / "spatial/tissue_positions.parquet", columns=["pxl_row_in_fullres", "pxl_col_in_fullres"])
    with h5py.File(folder / "filtered_feature_bc_matrix.h5") as file:
        for name in ("barcodes", "indptr", "indices", "data"):
            dataset = file["matrix"][name]
            for first in range(0, len(dataset), 20_000_000):
                dataset[first : first + 20_000_000]
    return time.perf_counter() - start


def count_straightforward(n: int, genes: int | None) -> float:
    """Seconds of the straightforward join and sums on a simulated section."""
    import time

    from benchmarks import straightforward
    from benchmarks.sections import FULL_GENES
    from prts.io.nuclei import load_nuclei

    folder = _made(n, genes or FULL_GENES)
    held = Held(folder / "square_002um")
    positions, barcodes = _tables(folder / "square_002um", held)
    nuclei = load_nuclei(folder / "nuclei.parquet")
    start = time.perf_counter()
    straightforward.count(positions, barcodes, held.counts, nuclei)
    return time.perf_counter() - start


class Held:
    """A matrix of bins that was read before: what `sum_bins` and `nucleus_of_bins` ask of a `BinMatrix`."""

    def __init__(self, bins: Path) -> None:
        import scipy.sparse as sp

        from prts.platforms.bin_matrix import BinMatrix
        from prts.platforms.bin_positions import matrix_path

        self.path = matrix_path(bins)
        with BinMatrix(self.path) as matrix:
            self.array_row, self.array_col = matrix.array_row, matrix.array_col
            self.n_genes, self.nnz = matrix.n_genes, matrix.nnz
            self.counts = sp.vstack([chunk for _, _, chunk in matrix.chunks()], format="csr")

    def chunks(self, max_nnz: int) -> Any:
        yield 0, self.counts.shape[0], self.counts


def _section(folder: str | None) -> tuple[Path, Any]:
    """Bins and nuclei of a section of her2st, or without a folder of a small simulated one."""
    from prts.io.nuclei import load_nuclei
    from prts.section import read_visium_hd

    if folder is None:
        simulated = _made(QUICK_SIZES[-1], 200)
        return simulated / "square_002um", load_nuclei(simulated / "nuclei.parquet")
    from prts.io.nuclei import read_nuclei

    where = Path(folder)
    section = read_visium_hd(where)
    nuclei = where / "nucleus_segmentations.geojson.gz"
    assert section.measurement is not None
    return section.measurement.path, read_nuclei(nuclei, mpp=section.mpp, width=section.width, height=section.height)


def _made(n: int, genes: int) -> Path:
    """The simulated section; a large one is made in a process of its own, which needs more memory than counting."""
    from benchmarks.sections import folder_of

    folder = folder_of(n, genes)
    if not folder.is_dir():
        (make if n < 1_000 else partial(child, make))(n=n, genes=genes)
    return folder


def make(n: int, genes: int) -> None:
    """Make the simulated section."""
    from benchmarks.sections import make_section

    make_section(n, genes)


def _tables(bins: Path, held: Held) -> tuple[Any, Any]:
    """Positions of all bins by barcode, and the barcodes of the matrix, as pandas has them."""
    import h5py
    import pandas as pd

    columns = {"pxl_col_in_fullres": "x", "pxl_row_in_fullres": "y"}
    positions = pd.read_parquet(bins / "spatial/tissue_positions.parquet", columns=["barcode", *columns])
    with h5py.File(held.path) as file:
        barcodes = pd.Index(file["matrix/barcodes"].asstr()[:])
    return positions.rename(columns=columns).set_index("barcode"), barcodes
