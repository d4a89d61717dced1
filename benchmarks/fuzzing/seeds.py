"""Small valid files of every kind that prts reads, as bytes."""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path
from typing import Any

import anndata as ad
import geopandas as gpd
import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp
import shapely
import tifffile
import torch
from PIL import Image

from prts.features.encoders import Classical
from prts.features.store import Rows, write_store
from prts.io.nuclei import NUCLEI_COLUMNS
from prts.io.prediction import PredictionWriter, spatial_uns
from prts.models.bundle import save_bundle
from prts.models.likelihoods.paper import Paper
from prts.models.network import PRTSNet
from prts.models.ood import MahalanobisOOD
from prts.models.output import OutputRule

SIDE = 48  # px of the images, and of the plane in which nuclei lie
_GENES = [("Plp1", "ENSG1"), ("Ttr", "ENSG2"), ("Snap25", "ENSG3")]


def matrices(work: Path) -> list[bytes]:
    counts = sp.random(5, 9, 0.5, "csc", random_state=0, data_rvs=lambda n: np.arange(1, n + 1))
    found = []
    for options in ({}, {"compression": "gzip", "shuffle": True, "chunks": True, "maxshape": (None,)}):
        path = work / "matrix.h5"
        with h5py.File(path, "w") as file:
            file.attrs["filetype"] = "matrix"
            barcodes = [f"s_002um_{i // 3:05}_{i % 3:05}-1" for i in range(9)]
            parts = {"data": counts.data.astype(np.int32), "indices": counts.indices, "indptr": counts.indptr}
            parts |= {"barcodes": np.array(barcodes, "S"), "shape": np.array([5, 9], np.int32)}
            features = {"id": "ENSG{}", "name": "Gene{}", "feature_type": "Gene Expression", "genome": "GRCh38"}
            parts |= {f"features/{k}": np.array([v.format(i) for i in range(5)], "S") for k, v in features.items()}
            parts["features/_all_tag_keys"] = np.array(["genome"], "S")
            for name, values in parts.items():
                file.create_dataset(f"matrix/{name}", data=values, **options)
        found.append(path.read_bytes())
    return found


def positions() -> list[bytes]:
    row, col = np.divmod(np.arange(12), 4)
    table = {
        "barcode": [f"s_002um_{r:05}_{c:05}-1" for r, c in zip(row, col, strict=True)],
        "in_tissue": np.ones(12, np.int64),
        "array_row": row,
        "array_col": col,
        "pxl_row_in_fullres": 4.0 * row + 2,
        "pxl_col_in_fullres": 4.0 * col + 2,
    }
    return [
        _parquet(pd.DataFrame(table), **options) for options in ({}, {"compression": "none", "use_dictionary": False})
    ]


def _parquet(frame: pd.DataFrame, **options: Any) -> bytes:
    out = io.BytesIO()
    frame.to_parquet(out, index=False, **options)
    return out.getvalue()


SCALEFACTORS = [
    json.dumps(
        {
            "bin_size_um": 2.0,
            "microns_per_pixel": 0.5,
            "tissue_hires_scalef": 0.1,
            "spot_diameter_fullres": 4.0,
            "regist_target_img_scalef": 1,
        }
    ).encode()
]


def _squares() -> gpd.GeoDataFrame:
    xy = np.array([[8, 8], [24, 8], [8, 30]])
    boxes = [shapely.box(x, y, x + 9, y + 11) for x, y in xy]
    boxes[1] = boxes[1].difference(shapely.box(27, 12, 29, 14))
    return gpd.GeoDataFrame({"cell_id": ["a", "b", "c"], "geometry": boxes, "score": [0.5, 0.75, 1.0]}, crs=None)


def geojson() -> list[bytes]:
    features = []
    for row in _squares().itertuples():
        geometry = shapely.geometry.mapping(row.geometry)
        properties = {"objectType": "detection", "cell_id": row.cell_id, "score": row.score}
        features.append({"type": "Feature", "id": f"q{row.Index}", "geometry": geometry, "properties": properties})
    qupath = [{**item, "nucleusGeometry": item["geometry"], "properties": {"objectType": "cell"}} for item in features]
    collection = json.dumps({"type": "FeatureCollection", "features": features}).encode()
    return [collection, json.dumps(qupath).encode(), gzip.compress(collection, mtime=0)]


def shapefile(path: Path) -> dict[str, bytes]:
    _squares().to_file(path)
    return {f"nuclei.{suffix}": path.with_suffix(f".{suffix}").read_bytes() for suffix in ("shp", "shx", "dbf")}


def wkt() -> list[bytes]:
    rows = [(row.cell_id, row.score, row.geometry.wkt) for row in _squares().itertuples()]
    tab = "\n".join("\t".join(map(str, row)) for row in [("cell_id", "score", "geometry"), *rows])
    comma = "\n".join(f'{i},"SRID=0;{wkt}"' for i, (_, _, wkt) in enumerate(rows))
    return [tab.encode(), f"id,wkt\n{comma}\n".encode()]


def labels() -> list[bytes]:
    labels = np.zeros((SIDE, SIDE), np.uint16)
    labels[5:15, 5:12], labels[20:30, 22:40], labels[33:36, 4:9] = 1, 2, 7
    found = []
    for options in ({}, {"compression": "zlib", "tile": (16, 16)}):
        out = io.BytesIO()
        tifffile.imwrite(out, labels, **options)
        found.append(out.getvalue())
    out = io.BytesIO()
    Image.fromarray(labels).save(out, "png")
    return [*found, out.getvalue()]


def _picture(side: int = SIDE) -> np.ndarray:
    rng = np.random.default_rng(0)
    return (np.linspace(90, 220, side)[:, None, None] + rng.integers(0, 20, (side, side, 3))).astype(np.uint8)


def tiffs() -> list[bytes]:
    rgb, found = _picture(), []
    resolution = {"resolution": (20_000, 20_000), "resolutionunit": "CENTIMETER"}
    kinds: list[dict[str, Any]] = [
        {**resolution, "rowsperstrip": 8},
        {**resolution, "tile": (16, 16), "compression": "zlib", "predictor": True},
        {**resolution, "tile": (16, 16), "compression": "jpeg"},
        {"compression": "lzw", "bigtiff": True},
        {"planarconfig": "separate", "byteorder": ">"},
        {"ome": True, "tile": (32, 32), "metadata": {"axes": "YXS", "PhysicalSizeX": 0.5, "PhysicalSizeXUnit": "µm"}},
    ]
    for options in kinds:
        out = io.BytesIO()
        ome = options.pop("ome", False)
        pixels = rgb.transpose(2, 0, 1) if "planarconfig" in options else rgb
        tifffile.imwrite(out, pixels, photometric="rgb", ome=ome, **options)
        found.append(out.getvalue())
    pyramid = io.BytesIO()
    with tifffile.TiffWriter(pyramid) as tif:
        tif.write(rgb, photometric="rgb", tile=(16, 16), subifds=1, compression="zlib")
        tif.write(rgb[::2, ::2], photometric="rgb", tile=(16, 16), subfiletype=1, compression="zlib")
    return [*found, pyramid.getvalue()]


def svs() -> list[bytes]:
    out = io.BytesIO()
    said = "Aperio Image Library v12\n48x48 [0,0 48x48] (16x16) JPEG/RGB Q=70|AppMag = 20|MPP = 0.5"
    with tifffile.TiffWriter(out) as tif:
        for step in (1, 2):
            tif.write(
                _picture()[::step, ::step],
                photometric="rgb",
                tile=(16, 16),
                compression="jpeg",
                description=said,
                metadata=None,
                software=False,
            )
    return [out.getvalue()]


def pictures() -> list[bytes]:
    found = []
    for mode, kind, options in (
        ("RGB", "png", {"dpi": (50_800, 50_800)}),
        ("RGBA", "png", {}),
        ("P", "png", {}),
        ("RGB", "jpeg", {"dpi": (50_800, 50_800)}),
        ("L", "jpeg", {}),
        ("RGB", "bmp", {}),
    ):
        out = io.BytesIO()
        Image.fromarray(_picture(24)).convert(mode).save(out, kind, **options)
        found.append(out.getvalue())
    return found


def bundle(folder: Path) -> Path:
    torch.manual_seed(0)
    metadata: dict[str, Any] = {
        "encoder": Classical().settings(),
        "encoder_weights": None,
        "mpp": 0.5,
        "tile": 256,
        "pooling": "nucleus",
        "input": {"use": ["local", "global"], "widths": {"local": 2, "global": 3}},
        "segmentation": {"name": "watershed", "arguments": {}},
        "qc": {"min_umi": 20},
        "tissue": "demo",
        "species": "human",
        "train_sections": ["a"],
        "split": {"name": "by_section"},
        "seed": 0,
        "validation": {"pcc": [0.5, None, 0.25], "ceiling": [0.9, 0.8, None], "predictable": [True, False, True]},
        "intervals": {"level": 0.9, "scale": [1.0, 1.1, 0.9], "dispersion": [0.1, 0.2, 0.3], "mass": [0.9, 0.92, 0.95]},
    }
    likelihood = Paper().fit([sp.csr_matrix([[1, 0, 7], [4, 2, 0]])])
    net = PRTSNet(5, 3, hidden=(2,), standardize=True)
    save_bundle(
        folder,
        net=net,
        likelihood=likelihood,
        rule=OutputRule("soft", 0.3),
        genes=_GENES,
        metadata=metadata,
        ood=MahalanobisOOD(5, 2),
    )
    return folder


def panels() -> list[bytes]:
    names, ids = zip(*_GENES, strict=True)
    return [json.dumps({"genes": names, "gene_ids": ids, "method": "top", "steps": {"kept": 3}}).encode()]


GENE_LISTS = [
    b"# markers\nPlp1\nTtr\nSnap25\n",
    b'gene_id,symbol\nENSG1,Plp1\n"ENSG2",Ttr\n',
    b'["Plp1", "Ttr"]',
    b'{"genes": ["Plp1"], "gene_ids": ["ENSG1"]}',
]
TABLES = [
    b"type\tgene\tspecies\nNeuron\tSNAP25\thuman\nGlia\tPLP1\tmouse\n",
    b"CAMK2A,Camk2a\nPLP1,Plp1\n",
    b"SNAP25\tGO:0007409; GO:0005886\nPLP1\tGO:0042552\n",
    b"axonogenesis (GO:0007409)\t\tSNAP25\tPLP1,1.0\n",
]


def store(path: Path) -> bytes:
    rows = Rows(np.ones((4, 3), np.float32), np.ones((4, 2), np.float32))
    write_store(path, list("abcd"), np.ones((4, 2)), (3, 2), [rows], {"encoder": "x", "mpp": 0.5, "tile": [256]})
    return path.read_bytes()


def spots(path: Path) -> bytes:
    spots = ad.AnnData(
        sp.csr_matrix(np.arange(6, dtype=np.int32).reshape(2, 3)),
        obs=pd.DataFrame(index=["s1", "s2"]),
        var=pd.DataFrame({"gene_id": [gene for _, gene in _GENES]}, index=[name for name, _ in _GENES]),
        obsm={"spatial": np.array([[8.0, 8.0], [20.0, 30.0]])},
        uns={"spot_radius_px": 5.0, "mpp": 0.5},
    )
    spots.write_h5ad(path)
    return path.read_bytes()


def prediction(path: Path) -> bytes:
    names, ids = zip(*_GENES, strict=True)
    genes = pd.DataFrame({"gene_id": ids, "val_pcc": 0.5, "predictable": True}, index=pd.Index(names))
    nuclei = _squares().assign(area_um2=25.0)[list(NUCLEI_COLUMNS)]
    uns = {"prts": {"mpp": 0.5, "train": ["a"]}, "spatial": spatial_uns("s", _picture(8), SIDE, 9.0)}
    with PredictionWriter(path, genes, nuclei, uns, intervals=True) as writer:
        umi = np.arange(9, dtype=np.float32).reshape(3, 3)
        writer.write(0, umi, umi / 9, (umi, umi + 1))
    # the writer makes chunks for a million nuclei; a file of these few with small ones is a hundredth as long
    small = ad.read_h5ad(path)
    small.write_h5ad(path)
    return path.read_bytes()


def checkpoints() -> list[bytes]:
    tensors = {"module.a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.float16)}
    found = []
    for options in ({}, {"_use_new_zipfile_serialization": False}):
        out = io.BytesIO()
        torch.save(tensors, out, **options)
        found.append(out.getvalue())
    return found
