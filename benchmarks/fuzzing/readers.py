"""Every reader of a user's file, with a function that uses all of its result."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.fuzzing import seeds
from benchmarks.fuzzing.seeds import SIDE
from prts.analysis.annotate import read_markers
from prts.analysis.enrich import enrich_gmt, read_annotations
from prts.analysis.symbols import read_orthologs
from prts.errors import InputError
from prts.export.source import open_prediction
from prts.features.encoders import encoder_from_settings
from prts.features.store import StoreReader, read_store_attrs
from prts.features.weights import read_weights
from prts.io.cache import sha256_file
from prts.io.gene_list import read_gene_list
from prts.io.nuclei import NUCLEI_COLUMNS, load_nuclei, read_nuclei
from prts.io.prediction import read_prediction
from prts.io.region import read_region
from prts.io.slide import image_size, open_slide
from prts.io.spots import read_spots
from prts.models.bundle import load_bundle
from prts.platforms.bin_matrix import BinMatrix
from prts.platforms.bin_positions import read_positions, read_scalefactors
from prts.preprocess.panel import Panel


@dataclass(frozen=True)
class Reader:
    """A reader under test.

    Attributes
    ----------
    name
        What `--only` calls it.
    where
        Path of the fuzzed file below a folder of its own.
    seeds
        Sound files, some hundred bytes to some ten thousand.
    read
        Reads the file at a path and goes through what it gets, as the commands do.
    beside
        Files that lie around it, by their paths.
    kind
        What structure the inputs of Hypothesis have: h5, json, geojson, parquet, tiff, picture, text, pickle or safetensors;
        bytes have none.
    """

    name: str
    where: str
    seeds: list[bytes]
    read: Callable[[Path], object]
    kind: str
    beside: Mapping[str, bytes]


def readers(work: Path) -> dict[str, Reader]:
    """All readers, with seeds made in a scratch folder."""
    work.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bundle, prediction = seeds.bundle(work / "bundle"), seeds.prediction(work / "prediction.h5ad")
        polygons = (work / "prediction.nuclei.parquet").read_bytes()
        model, weights = ((bundle / name).read_bytes() for name in ("model.json", "model.safetensors"))
        shapefile = seeds.shapefile(work / "nuclei.shp")
        made = [
            Reader("h5", "filtered_feature_bc_matrix.h5", seeds.matrices(work), _read_matrix, "h5", {}),
            Reader("parquet", "spatial/tissue_positions.parquet", seeds.positions(), _read_positions, "parquet", {}),
            Reader(
                "scalefactors", "spatial/scalefactors_json.json", seeds.SCALEFACTORS, _read_scalefactors, "json", {}
            ),
            Reader("geojson", "nuclei.geojson", seeds.geojson(), _read_nuclei, "geojson", {}),
            Reader("geoparquet", "nuclei.parquet", [polygons], _read_polygons, "parquet", {}),
            Reader("wkt", "nuclei.csv", seeds.wkt(), _read_nuclei, "text", {}),
            Reader("shapefile", "nuclei.shp", [shapefile.pop("nuclei.shp")], _read_nuclei, "bytes", shapefile),
            Reader("labels", "nuclei.tif", seeds.labels(), _read_nuclei, "tiff", {}),
            Reader("region", "region.geojson", seeds.geojson()[:1], _read_region, "geojson", {}),
            Reader("tiff", "slide.tif", seeds.tiffs(), _read_slide, "tiff", {}),
            Reader("svs", "slide.svs", seeds.svs(), _read_slide, "tiff", {}),
            Reader("picture", "slide.png", seeds.pictures(), _read_slide, "picture", {}),
            Reader("bundle", "model.json", [model], _read_bundle, "json", {"model.safetensors": weights}),
            Reader(
                "bundle-weights",
                "model.safetensors",
                [weights],
                _read_bundle_weights,
                "safetensors",
                {"model.json": model},
            ),
            Reader("panel", "panel.json", seeds.panels(), _read_panel, "json", {}),
            Reader("genes", "genes.txt", seeds.GENE_LISTS, read_gene_list, "text", {}),
            Reader("tables", "table.tsv", seeds.TABLES, _read_tables, "text", {}),
            Reader("store", "features.h5", [seeds.store(work / "features.h5")], _read_store, "h5", {}),
            Reader("spots", "spots.h5ad", [seeds.spots(work / "spots.h5ad")], read_spots, "h5", {}),
            Reader("prediction", "p.h5ad", [prediction], _read_prediction, "h5", {"p.nuclei.parquet": polygons}),
            Reader("pth", "weights.pth", seeds.checkpoints(), read_weights, "pickle", {}),
            Reader("safetensors", "weights.safetensors", [weights], read_weights, "safetensors", {}),
        ]
    return {reader.name: reader for reader in made}


def _read_matrix(path: Path) -> None:
    with BinMatrix(path) as matrix:
        matrix.var()
        for first, stop, counts in matrix.chunks(max_nnz=7):
            assert counts.shape == (stop - first, matrix.n_genes)
            counts.sum()


def _read_positions(path: Path) -> None:
    grid = read_positions(path.parent.parent)
    grid.share_outside(SIDE, SIDE)
    assert len(grid.pitch_px) == 2
    here = np.zeros(1, np.int64)
    assert grid.xy(here, here).shape == (1, 2)
    grid.lists(here, here)


def _read_scalefactors(path: Path) -> None:
    assert read_scalefactors(path.parent.parent)["bin_size_um"] == 2


def _read_nuclei(path: Path) -> None:
    nuclei = read_nuclei(path, mpp=0.5, width=SIDE, height=SIDE)
    assert tuple(nuclei.columns) == NUCLEI_COLUMNS and len(nuclei) and nuclei.geometry.is_valid.all()


def _read_polygons(path: Path) -> None:
    """As nuclei that a user gives and, where they are laid out so, as those that prts writes."""
    _read_nuclei(path)
    load_nuclei(path)


def _read_region(path: Path) -> None:
    assert read_region(str(path), SIDE, SIDE).area > 0


def _read_slide(path: Path) -> None:
    image_size(path)
    with open_slide(path, mpp=0.5) as slide:
        assert slide.thumbnail(512).ndim == 3
        assert slide.read_region(-3, -3, 10, 15, mpp=1.0).shape == (15, 10, 3)
        assert slide.read_region(-3, -3, 20, 30).shape == (30, 20, 3)
        slide.read_region(slide.width - 8, slide.height - 8, 16, 16)


def _read_bundle(path: Path) -> None:
    """Opens it and asks of it what `predict` does."""
    bundle = load_bundle(path.parent)
    assert len(bundle.genes) == len(bundle.gene_ids) == len(bundle.val_pcc) == len(bundle.ceiling)
    width = sum(bundle.input_widths[block] for block in bundle.input_use)
    bundle.predict_all(np.zeros((2, width), np.float32))
    if bundle.intervals is not None:
        bundle.intervals.bounds(np.ones((2, len(bundle.genes)), np.float32))
    if bundle.ood is not None:
        bundle.ood.share(np.zeros((2, width), np.float32))
    try:
        encoder_from_settings(bundle.metadata["encoder"])
    except InputError as error:
        raise InputError(f"{path}: {error}") from error  # the command's message names the key `encoder`


def _read_bundle_weights(path: Path) -> None:
    """With the SHA-256 that model.json asks for: a file that is only another one is refused for that already."""
    description = path.parent / "model.json"
    settings = json.loads(description.read_text(encoding="utf-8"))
    description.write_text(json.dumps({**settings, "weights_sha256": sha256_file(path)}), encoding="utf-8")
    _read_bundle(description)


def _read_panel(path: Path) -> None:
    read_gene_list(path)
    panel = Panel.from_json(path)
    assert len(panel.genes) == len(panel.gene_ids)


def _read_tables(path: Path) -> None:
    """The tables of `analyze`; each reader is asked, whatever the others say."""
    genes = ["SNAP25", "PLP1", "CAMK2A"]
    refusals = []
    for read in (
        partial(read_markers, species="human", genes=genes),
        read_orthologs,
        read_annotations,
        partial(enrich_gmt, {"0": genes[:1]}, genes),
    ):
        try:
            read(path)
        except InputError as error:
            refusals.append(error)
            if str(path) not in str(error):
                raise
    if len(refusals) == 4:
        raise refusals[0]


def _read_store(path: Path) -> None:
    reader = StoreReader(path)
    read_store_attrs(path)
    reader.read(None, ("local", "global"))
    reader.read(list(reader.known[:1]), ("local",))


def _read_prediction(path: Path) -> None:
    whole = read_prediction(path)
    file = open_prediction(path)
    for rows, values in file.chunks(np.arange(min(2, len(file.var))), size=2):
        assert len(values) == rows.stop - rows.start
    assert len(whole) == len(file.nuclei())
