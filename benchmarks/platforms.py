"""Platforms that measure cells: whole-section reading, from files to counts, in CPU seconds and peak memory."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.harness import QUICK_SIZES, Part, cache_folder, child

NEEDS_DATA = False
CELLS = 60_000
GENES = (400, 5_000)
# Entries a 2 um bin; about 20 million transcripts for 60,000 cells.
_ENTRIES_A_BIN = 1.7
_MPP = 0.2738


def run(quick: bool) -> Part:
    part = Part()
    n, panels, rounds = (QUICK_SIZES[-1], (60,), 1) if quick else (CELLS, GENES, 1)
    for genes in panels:
        given = {"n": n, "genes": genes}
        child(make, **given)
        child(make_ranger, **given)
        size = json.loads((folder_of(**given) / "size.json").read_text())
        what = f"{size['cells']:,} cells x {genes:,} genes"
        transcripts = f"{size['transcripts'] / 1e6:.1f} M transcripts"
        for name, label, plain in (
            ("xenium_nuclei", f"Xenium, own nuclei ({what}, {transcripts})", "xenium_pandas"),
            ("xenium_positions", f"Xenium, other nuclei by position ({what}, {transcripts})", ""),
            ("xenium_cells", f"Xenium, own cells ({what})", "xenium_scanpy"),
            ("spaceranger_cells", f"Space Ranger 4, cells as delivered ({what})", "spaceranger_scanpy"),
            ("anndata", f"AnnData with GeoParquet ({what})", "anndata_alone"),
            ("spatialdata", f"SpatialData ({what})", "spatialdata_alone"),
        ):
            runs = [child(count, way=name, **given) for _ in range(rounds)]
            seconds = statistics.median(each.result["seconds"] for each in runs)
            peak = max(each.peak_gb for each in runs)
            slow = child(count, way=plain, **given) if plain else None
            if slow is not None and slow.result["umi"] != runs[0].result["umi"]:
                raise RuntimeError(f"{name} counts {runs[0].result['umi']}, {plain} {slow.result['umi']}")
            keys = [f"platforms/{name}_cpu_s", f"platforms/{name}_peak_gb"]
            part.figures |= dict(zip(keys, (seconds, peak), strict=True))
            beside = "" if slow is None else f"{slow.result['seconds']:.1f} CPU s, {slow.peak_gb:.1f} GB"
            keys = keys if genes == panels[-1] else []
            part.row(label, f"{seconds:.1f} CPU s, {peak:.1f} GB", beside, "", keys)
    return part


def folder_of(n: int, genes: int) -> Path:
    """Where the files of such a section are kept."""
    return cache_folder() / f"platforms-{n}-{genes}"


def make(n: int, genes: int) -> None:
    """Make `outs` of Xenium, `cells.h5ad` and `cells.zarr` of one section, with neither an image nor biology."""
    import warnings

    import numpy as np
    import pandas as pd
    from anndata import AnnData
    from scipy.sparse import csr_matrix

    from benchmarks.sections import BIN_UM, FULL_NUCLEI, FULL_SIDE, matrix_of, outlines_of
    from prts.io.cache import atomic
    from prts.io.nuclei import make_nuclei, write_nuclei
    from prts.platforms.xenium import Xenium
    from prts.simulate.draw_counts import BinCounts
    from prts.simulate.lattice import BinLattice
    from prts.simulate.layouts import layouts
    from prts.simulate.layouts.base import SimulatedSection

    if folder_of(n, genes).is_dir():
        return
    rng = np.random.default_rng(n)
    side = round(FULL_SIDE * (n / FULL_NUCLEI) ** 0.5)
    lattice = BinLattice(side, side, (100.0, 20.0), float(np.deg2rad(1.3)), (0.0, 0.0))
    names = [f"GENE{k}" for k in range(genes)]
    nuclei = make_nuclei(outlines_of(n, lattice, rng), _MPP, source="benchmark nuclei")
    truth = AnnData(
        csr_matrix((len(nuclei), genes), dtype=np.float32),
        obs=pd.DataFrame(index=nuclei["cell_id"].to_numpy()),
        var=pd.DataFrame({"gene_id": [f"ENSG{k:011d}" for k in range(genes)]}, index=names),
    )
    counts = BinCounts(np.ones((side, side), bool), matrix_of(side, genes, rng, _ENTRIES_A_BIN), 0, 0)
    shape = (round(side * BIN_UM / _MPP) + 500,) * 2
    with atomic(folder_of(n, genes)) as temporary, warnings.catch_warnings():
        temporary.mkdir()
        layouts["xenium"]().write(temporary, SimulatedSection(truth, nuclei, lattice, counts, _MPP, shape, {}, seed=0))
        write_nuclei(nuclei, temporary / "nuclei.parquet")
        cells = Xenium(temporary / "outs", units="cell")
        outlines = cells.outlines(_MPP)
        write_nuclei(outlines, temporary / "cells.parquet")
        table = cells.counts(outlines)
        table.uns.clear()
        table.write_h5ad(temporary / "cells.h5ad", compression="gzip")
        warnings.simplefilter("ignore")
        _write_store(temporary / "cells.zarr", table, outlines)
        size = {"cells": len(outlines), "genes": genes, "transcripts": _rows(temporary / "outs/transcripts.parquet")}
        (temporary / "size.json").write_text(json.dumps(size))


def make_ranger(n: int, genes: int) -> None:
    """Make `segmented_outputs` of Space Ranger 4 with the cells of the section."""
    import anndata as ad
    import numpy as np

    from prts.io.cache import atomic
    from prts.io.nuclei import load_nuclei
    from prts.simulate.bins import write_matrix
    from prts.simulate.layouts.spaceranger4 import cell_barcodes, write_geojson

    folder = folder_of(n, genes)
    if (folder / "ranger").is_dir():
        return
    table, cells = ad.read_h5ad(folder / "cells.h5ad"), load_nuclei(folder / "cells.parquet")
    number = np.arange(1, len(cells) + 1)
    outlines = np.asarray(cells.geometry.array, dtype=object)
    with atomic(folder / "ranger") as temporary:
        segmented = temporary / "outs/segmented_outputs"
        segmented.mkdir(parents=True)
        for name in ("cell", "nucleus"):
            write_geojson(segmented / f"{name}_segmentations.geojson", outlines, number)
        write_matrix(segmented / "filtered_feature_cell_matrix.h5", table.X, cell_barcodes(number), table)


def _rows(path: Path) -> int:
    import pyarrow.parquet as pq

    return int(pq.read_metadata(path).num_rows)


def _write_store(path: Path, table: Any, outlines: Any) -> None:
    import spatialdata as sd
    from spatialdata.models import ShapesModel, TableModel

    table.obs = table.obs.assign(cell_id=table.obs_names, region="cells").rename_axis(None)
    table.obs["region"] = table.obs["region"].astype("category")
    shapes = ShapesModel.parse(outlines.set_index("cell_id")[["geometry"]])
    made = TableModel.parse(table, region="cells", region_key="region", instance_key="cell_id")
    sd.SpatialData(shapes={"cells": shapes}, tables={"counts": made}).write(path)


def count(way: str, n: int, genes: int) -> dict[str, Any]:
    """CPU seconds (user and system, of all threads) of one way from files to counts, and the UMIs that it counts."""
    ways: dict[str, Callable[[Path], int]] = {
        "xenium_nuclei": lambda folder: _own("xenium", outs=folder / "outs"),
        "xenium_cells": lambda folder: _own("xenium", outs=folder / "outs", units="cell"),
        "xenium_positions": _positions,
        "spaceranger_cells": lambda folder: _own("spaceranger_cells", cells=folder / "ranger/outs"),
        "anndata": lambda folder: _own(
            "anndata", cells=folder / "cells.h5ad", coordinates="px", polygons=folder / "cells.parquet"
        ),
        "spatialdata": lambda folder: _own("spatialdata", sdata=folder / "cells.zarr"),
        "xenium_pandas": _pandas,
        "xenium_scanpy": _scanpy,
        "spaceranger_scanpy": _scanpy_cells,
        "anndata_alone": _anndata,
        "spatialdata_alone": _spatialdata,
    }
    import prts.section  # noqa: F401 (imports are not part of the time)

    start = time.process_time()
    umi = ways[way](folder_of(n, genes))
    return {"seconds": time.process_time() - start, "umi": umi}


def _own(platform: str, **files: Any) -> int:
    """Outlines and counts of a platform's own cells or nuclei."""
    from prts.section import make_measurement

    measurement: Any = make_measurement("s", platform, files)
    return int(measurement.counts(measurement.outlines(_MPP)).X.sum())


def _positions(folder: Path) -> int:
    from prts.io.nuclei import load_nuclei
    from prts.platforms.xenium import Xenium

    return int(Xenium(folder / "outs").counts(load_nuclei(folder / "nuclei.parquet")).X.sum())


def _pandas(folder: Path) -> int:
    """The whole table in memory, filtered and counted."""
    import pandas as pd
    import scanpy as sc

    genes = sc.read_10x_h5(folder / "outs/cell_feature_matrix.h5").var_names
    rows = pd.read_parquet(folder / "outs/transcripts.parquet")
    rows = rows[(rows["qv"] >= 20) & (rows["overlaps_nucleus"] == 1) & (rows["cell_id"] != "UNASSIGNED")]
    rows = rows[rows["feature_name"].isin(genes)]
    return int(rows.groupby(["cell_id", "feature_name"]).size().sum())


def _scanpy(folder: Path) -> int:
    import pandas as pd
    import scanpy as sc

    pd.read_parquet(folder / "outs/cell_boundaries.parquet")
    return int(sc.read_10x_h5(folder / "outs/cell_feature_matrix.h5").X.sum(dtype="int64"))


def _scanpy_cells(folder: Path) -> int:
    import geopandas as gpd
    import scanpy as sc

    gpd.read_file(folder / "ranger/outs/segmented_outputs/nucleus_segmentations.geojson")
    return int(
        sc.read_10x_h5(folder / "ranger/outs/segmented_outputs/filtered_feature_cell_matrix.h5").X.sum(dtype="int64")
    )


def _anndata(folder: Path) -> int:
    import anndata as ad
    import geopandas as gpd

    gpd.read_parquet(folder / "cells.parquet")
    return int(ad.read_h5ad(folder / "cells.h5ad").X.sum())


def _spatialdata(folder: Path) -> int:
    import spatialdata as sd

    return int(sd.read_zarr(folder / "cells.zarr").tables["counts"].X.sum())
