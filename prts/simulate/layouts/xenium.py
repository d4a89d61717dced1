"""Xenium: transcripts and cells in um, and the alignment of the image to them.

The image of the section plays the H&E image: Xenium's own image has other pixels and is rotated against it. Every UMI of the section is a
transcript, at the center of the bin that captured it up to a small distance, so that nuclei hold the same counts as on Visium HD.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import shapely
from anndata import AnnData
from scipy.sparse import csr_matrix, hstack

import prts
from prts.io.outlines import labels_to_polygons
from prts.platforms.affine import Matrix, move, move_shapes
from prts.platforms.bin_owners import CountSettings, assign_bins
from prts.platforms.bin_positions import BinGrid
from prts.simulate.bins import write_matrix
from prts.simulate.layouts import layouts

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from prts.simulate.layouts.base import SimulatedSection

# Xenium's image: its pixels, its angle against the H&E image, and the empty margin.
PIXEL_UM, ANGLE_DEG, _MARGIN_PX = 0.2125, 93.2, 150.0
# The growth of cells that Xenium Onboard Analysis uses by default.
EXPAND_UM = 5.0
_JITTER_UM = 0.2
_LOW_QUALITY, _CONTROLS = 0.12, 0.01
_ROWS = 1 << 20
CONTROLS = {
    "NegControlProbe_{:05d}": ("Negative Control Probe", "negative_control_probe"),
    "NegControlCodeword_{:04d}": ("Negative Control Codeword", "negative_control_codeword"),
    "UnassignedCodeword_{:04d}": ("Unassigned Codeword", "unassigned_codeword"),
    "DeprecatedCodeword_{:04d}": ("Deprecated Codeword", "deprecated_codeword"),
    "BLANK_{:04d}": ("Blank Codeword", "blank_codeword"),
}
_OF_EACH = 4


class _Cells(NamedTuple):
    """Cell of each bin in tissue (-1 for none), and whether it is in the nucleus; outlines of the cells in H&E pixels, by number."""

    of_bin: NDArray[np.int32]
    in_nucleus: NDArray[np.bool_]
    number: NDArray[np.int64]
    outlines: NDArray[np.object_]


@layouts.register("xenium")
class XeniumLayout:
    """`outs` of Xenium Onboard Analysis 3, with the alignment of the image as Xenium Explorer exports it."""

    name: ClassVar[str]
    entries: ClassVar[frozenset[str]] = frozenset({"outs"})
    previews: ClassVar[Mapping[str, int]] = {}

    def write(self, folder: Path, section: SimulatedSection) -> None:
        """Write manifest, matrix, cells, outlines, transcripts and alignment."""
        outs = folder / "outs"
        outs.mkdir()
        to_xenium = xenium_matrix(section.shape, section.mpp)
        to_um = np.diag([PIXEL_UM, PIXEL_UM, 1.0]) @ to_xenium
        features = _features(section.truth)
        grid = _grid(section)
        cells = _cells(section, grid)
        ids = cell_names(np.arange(section.truth.n_obs))
        transcripts = _transcripts(section, cells, features, grid, to_um)
        control = _write_transcripts(outs / "transcripts.parquet", transcripts, ids, features)
        genes = _cell_counts(section, cells)
        counts = csr_matrix(hstack([genes, control], format="csr"), dtype=np.int32)
        write_matrix(outs / "cell_feature_matrix.h5", counts, ids.astype("S"), AnnData(var=features))
        nuclei = move_shapes(to_um, np.asarray(section.outlines.geometry.array, dtype=object))
        whole = move_shapes(to_um, cells.outlines)
        _write_boundaries(outs / "nucleus_boundaries.parquet", ids, nuclei)
        _write_boundaries(outs / "cell_boundaries.parquet", ids[cells.number], whole)
        _cell_table(ids, nuclei, cells, whole, genes, control).to_parquet(outs / "cells.parquet", index=False)
        np.savetxt(outs / "he_imagealignment.csv", to_xenium, delimiter=",", fmt="%.15g")
        (outs / "experiment.xenium").write_text(json.dumps(_manifest(section), indent=2))


def xenium_matrix(shape: tuple[int, int], mpp: float) -> Matrix:
    """The map from pixels of the H&E image to those of Xenium's image.

    Parameters
    ----------
    shape
        Rows and columns of the H&E image.
    mpp
        um per pixel of the H&E image.
    """
    turn = np.deg2rad(ANGLE_DEG)
    matrix = np.eye(3)
    matrix[:2, :2] = mpp / PIXEL_UM * np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    corners = np.array([[x, y] for x in (0, shape[1]) for y in (0, shape[0])], dtype=np.float64)
    matrix[:2, 2] = _MARGIN_PX - move(matrix, corners).min(axis=0)
    return matrix


def cell_names(number: NDArray[np.integer[Any]]) -> NDArray[np.object_]:
    """Xenium's names of cells: the number in hexadecimal with letters from a to p, and a suffix.

    Examples
    --------
    >>> cell_names(np.array([0, 255])).tolist()
    ['aaaaaaaa-1', 'aaaaaapp-1']
    """
    digits = np.asarray(number, np.int64)[:, None] >> np.arange(28, -1, -4) & 15
    text = (digits + ord("a")).astype(np.uint8).view("S8").ravel().astype(str).astype(object)
    return np.asarray(text + "-1", dtype=object)


def _features(truth: AnnData) -> pd.DataFrame:
    """Genes, then controls: `gene_id`, `feature_type` and `category` by name."""
    genes = pd.DataFrame(
        {"gene_id": truth.var["gene_id"], "feature_type": "Gene Expression", "category": "predesigned_gene"},
        index=truth.var_names,
    )
    rows = [(name.format(i), *kinds) for name, kinds in CONTROLS.items() for i in range(1, _OF_EACH + 1)]
    names, kinds, categories = zip(*rows, strict=True)
    controls = pd.DataFrame({"gene_id": names, "feature_type": kinds, "category": categories}, index=list(names))
    return pd.concat([genes, controls])


def _grid(section: SimulatedSection) -> BinGrid:
    """The true positions of the bins in pixels of the image."""
    lattice = section.lattice
    row, col = np.indices((lattice.n_rows, lattice.n_cols), dtype=np.int32)
    xy = lattice.to_um(row, col) / section.mpp
    affine = np.column_stack([xy[0, 1] - xy[0, 0], xy[1, 0] - xy[0, 0], xy[0, 0]])
    return BinGrid(xy, section.counts.in_tissue, affine, 1e-6)


def _cells(section: SimulatedSection, grid: BinGrid) -> _Cells:
    nuclei = np.asarray(section.outlines.geometry.array, dtype=object)
    owners = assign_bins(nuclei, grid, CountSettings(expand_um=EXPAND_UM))
    number, outlines, _ = labels_to_polygons(np.maximum(owners.unit, -1) + 1)
    # pixel i of the label image covers [i, i + 1); bin i is centered at i
    outlines = shapely.transform(outlines, lambda xy: (xy - 0.5) @ grid.affine[:, :2].T + grid.affine[:, 2])
    order = np.argsort(number)
    of_bin = np.maximum(owners.unit, -1)[section.counts.in_tissue]
    return _Cells(of_bin, owners.in_nucleus[section.counts.in_tissue], number[order] - 1, outlines[order])


def _cell_counts(section: SimulatedSection, cells: _Cells) -> csr_matrix:
    bins = np.flatnonzero(cells.of_bin >= 0)
    member = (np.ones(len(bins), np.int32), (cells.of_bin[bins], bins))
    counts = csr_matrix(member, shape=(section.truth.n_obs, len(cells.of_bin))) @ section.counts.counts
    counts.sort_indices()
    return csr_matrix(counts)


def _transcripts(
    section: SimulatedSection, cells: _Cells, features: pd.DataFrame, grid: BinGrid, to_um: Matrix
) -> Iterator[dict[str, NDArray[Any]]]:
    """Columns of a million transcripts at a time: those that were simulated, others of low quality, and controls."""
    rng = np.random.default_rng([section.seed, 6])
    counts, n_genes = section.counts.counts, section.truth.n_vars
    xy = move(to_um, grid.positions[section.counts.in_tissue])
    step = max(1, int(_ROWS / max(counts.sum() / max(counts.shape[0], 1), 1e-9)))
    for start in range(0, counts.shape[0], step):
        part = counts[start : start + step].tocoo()
        place, gene = (np.repeat(each, part.data) for each in (part.row + start, part.col))
        again = rng.random(len(gene)) < _LOW_QUALITY
        n_control = rng.binomial(len(gene), _CONTROLS)
        place = np.concatenate([place, place[again], rng.integers(start, start + part.shape[0], n_control)])
        control = rng.integers(n_genes, len(features), n_control)
        qv = np.concatenate(
            [rng.uniform(20, 40, len(gene)), rng.uniform(5, 19.9, again.sum()), rng.uniform(20, 40, n_control)]
        )
        gene = np.concatenate([gene, gene[again], control])
        order = rng.permutation(len(gene))
        place = place[order]
        yield {
            "xy": xy[place] + rng.uniform(-_JITTER_UM, _JITTER_UM, (len(place), 2)),
            "z": rng.uniform(10, 20, len(place)),
            "cell": cells.of_bin[place],
            "nucleus": cells.in_nucleus[place],
            "feature": gene[order],
            "qv": qv[order],
        }


def _write_transcripts(
    path: Path, parts: Iterator[dict[str, NDArray[Any]]], ids: NDArray[np.object_], features: pd.DataFrame
) -> csr_matrix:
    """Write all transcripts; returns those of controls in cells, (n_cells, n_controls)."""
    names, categories = (pa.array(values, pa.string()) for values in (features.index, features["category"]))
    cell_ids = pa.array([*ids, "UNASSIGNED"], pa.string())
    n_genes = int((features["feature_type"] == "Gene Expression").sum())
    control = csr_matrix((len(ids), len(features) - n_genes), dtype=np.int32)
    writer, number = None, 0
    try:
        for part in parts:
            cell = np.where(part["cell"] >= 0, part["cell"], len(ids))
            columns = {
                "transcript_id": pa.array(np.arange(number, number + len(cell), dtype=np.uint64)),
                "cell_id": cell_ids.take(pa.array(cell)),
                "overlaps_nucleus": part["nucleus"].astype(np.uint8),
                "feature_name": names.take(pa.array(part["feature"])),
                "x_location": part["xy"][:, 0].astype(np.float32),
                "y_location": part["xy"][:, 1].astype(np.float32),
                "z_location": part["z"].astype(np.float32),
                "qv": part["qv"].astype(np.float32),
                "codeword_index": part["feature"].astype(np.int32),
                "codeword_category": categories.take(pa.array(part["feature"])),
                "is_gene": part["feature"] < n_genes,
            }
            table = pa.table(columns)
            writer = writer or pq.ParquetWriter(path, table.schema, compression="zstd")
            writer.write_table(table)
            number += len(cell)
            held = np.flatnonzero((part["cell"] >= 0) & (part["feature"] >= n_genes))
            at = (part["cell"][held], part["feature"][held] - n_genes)
            control += csr_matrix((np.ones(len(held), np.int32), at), shape=control.shape)
    finally:
        if writer is not None:
            writer.close()
    return control


def _write_boundaries(path: Path, ids: NDArray[np.object_], shapes: NDArray[np.object_]) -> None:
    """One row per vertex."""
    rings = shapely.get_exterior_ring(shapes)
    xy, of = shapely.get_coordinates(rings, return_index=True)
    xy = xy.astype(np.float32)
    columns = {
        "cell_id": pa.array(ids, pa.string()).take(pa.array(of)),
        "vertex_x": np.ascontiguousarray(xy[:, 0]),
        "vertex_y": np.ascontiguousarray(xy[:, 1]),
        "label_id": (of + 1).astype(np.int32),
    }
    pq.write_table(pa.table(columns), path)


def _cell_table(
    ids: NDArray[np.object_],
    nuclei: NDArray[np.object_],
    cells: _Cells,
    whole: NDArray[np.object_],
    genes: csr_matrix,
    control: csr_matrix,
) -> pd.DataFrame:
    center = shapely.get_coordinates(shapely.centroid(nuclei))
    area = np.zeros(len(ids))
    area[cells.number] = shapely.area(whole)
    n_genes, n_controls = (np.asarray(counts.sum(axis=1), np.int64).ravel() for counts in (genes, control))
    columns = {
        "cell_id": ids,
        "x_centroid": center[:, 0],
        "y_centroid": center[:, 1],
        "transcript_counts": n_genes,
        "control_probe_counts": n_controls,
        "total_counts": n_genes + n_controls,
        "cell_area": area,
        "nucleus_area": shapely.area(nuclei),
        "nucleus_count": np.ones(len(ids), np.int64),
    }
    return pd.DataFrame(columns)


def _manifest(section: SimulatedSection) -> dict[str, Any]:
    return {
        "major_version": 5,
        "minor_version": 0,
        "run_name": "simulated",
        "region_name": "simulated",
        "panel_name": "simulated panel",
        "num_cells": section.truth.n_obs,
        "pixel_size": PIXEL_UM,
        "analysis_sw_version": f"prts-{prts.__version__} (as xenium-3.0)",
    }
