"""Messages that say what to do: doing it works.

Each case is a function that yields what fails, and what its message advises, taken from the message where it names a value.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import shapely
import tifffile
from PIL import Image

from prts.data.splits import Blocks, Random
from prts.errors import InputError
from prts.io.nuclei import make_nuclei, read_nuclei
from prts.io.region import read_region
from prts.io.slide import open_slide
from prts.io.spots import read_spots
from prts.models.scale import check_scale, describe_nuclei
from prts.platforms.bin_positions import read_positions, read_scalefactors
from prts.platforms.visium_hd import VisiumHD
from prts.preprocess.counts import QCSettings, quality_control
from prts.preprocess.species import mitochondrial_genes, mitochondrial_prefix
from prts.section import Section, open_section_folder, read_section
from prts.segmentation import segmenters
from prts.segmentation.bins import Bins
from prts.segmentation.segment import segment

Attempt = Callable[[], object]
Advice = Callable[[str], object]
SIZE: dict[str, Any] = {"mpp": 0.5, "width": 200, "height": 100}
DISCS = [shapely.Point(x, 40).buffer(6) for x in (30, 80, 130)]


def image(path: Path, pixels: np.ndarray | None = None, **options: Any) -> Path:
    options.setdefault("photometric", "rgb")
    tifffile.imwrite(path, np.full((64, 64, 3), 200, np.uint8) if pixels is None else pixels, **options)
    return path


def write(path: Path, features: list[dict[str, Any]]) -> Path:
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    return path


def features_of(shapes: list[Any], **properties: Any) -> list[dict[str, Any]]:
    return [
        {
            "type": "Feature",
            "geometry": shapely.geometry.mapping(s),
            "properties": {k: v[i] for k, v in properties.items() if v[i]},
        }
        for i, s in enumerate(shapes)
    ]


def the(pattern: str, message: str) -> str:
    found = re.search(pattern, message)
    assert found, message
    return found[1]


def unknown_mpp(tmp_path: Path) -> tuple[Attempt, Advice]:
    path = image(tmp_path / "a.tif")
    return lambda: open_slide(path), lambda said: open_slide(path, mpp=float(the(r"set mpp .*about (0\.\d+)", said)))


def contradictory_mpp(tmp_path: Path) -> tuple[Attempt, Advice]:
    path = image(tmp_path / "a.tif", resolution=(20000, 20000), resolutionunit="CENTIMETER")
    wrong = [("scalefactors_json.json", 0.27)]
    return (
        lambda: open_slide(path, sources=wrong),
        lambda said: open_slide(
            path, sources=wrong, mpp=float(the(r"but ([\d.]+) in .*set mpp to the right value", said))
        ),
    )


def too_many_pixels(tmp_path: Path) -> tuple[Attempt, Advice]:
    Image.new("RGB", (300, 200)).save(tmp_path / "a.png")
    attempt = lambda n: open_slide(tmp_path / "a.png", mpp=0.5, max_pixels=n)  # noqa: E731
    return lambda: attempt(1000), lambda said: attempt(int(the(r"set max_pixels=(\d+)", said)))


def arrays(tmp_path: Path) -> tuple[Attempt, Advice]:
    labels = np.zeros((100, 200), np.int32)
    labels[10:20, 10:20], labels[30:40, 50:60] = 1, 2
    np.save(tmp_path / "a.npy", labels)

    def advice(said: str) -> int:
        assert "save its labels with tifffile.imwrite" in said
        tifffile.imwrite(tmp_path / "a.tif", np.load(tmp_path / "a.npy"))
        return len(read_nuclei(tmp_path / "a.tif", **SIZE))

    return lambda: read_nuclei(tmp_path / "a.npy", **SIZE), advice


def mask(tmp_path: Path) -> tuple[Attempt, Advice]:
    from skimage.measure import label

    labels = np.zeros((100, 200), np.uint8)
    for x in (10, 40, 70):
        labels[10:20, x : x + 10] = 255
    tifffile.imwrite(tmp_path / "a.tif", labels)

    def advice(said: str) -> None:
        assert "give one label per nucleus" in said
        tifffile.imwrite(tmp_path / "b.tif", label(labels > 0).astype(np.uint16))
        assert len(read_nuclei(tmp_path / "b.tif", **SIZE)) == 3

    return lambda: read_nuclei(tmp_path / "a.tif", **SIZE), advice


def ids_of_some(tmp_path: Path) -> tuple[Attempt, Advice]:
    path = write(tmp_path / "a.geojson", features_of(DISCS, cell_id=["a", "b", None]))

    def advice(said: str) -> object:
        assert "to all nuclei or to none" in said
        return read_nuclei(write(path, features_of(DISCS)), **SIZE)

    return lambda: read_nuclei(path, **SIZE), advice


def nuclei_in_um(tmp_path: Path) -> tuple[Attempt, Advice]:
    """At 2 um per pixel, positions in um are outside the image."""
    size = {**SIZE, "mpp": 2.0, "width": 300}
    shapes = [shapely.transform(s, lambda xy: xy * 2 + [300, 0]) for s in DISCS[1:]]
    path = write(tmp_path / "a.geojson", features_of(shapes))

    def advice(said: str) -> object:
        mpp = float(the(r"divided by ([\d.]+) um/px they fit", said))
        return read_nuclei(
            write(path, features_of([shapely.transform(s, lambda xy: xy / mpp) for s in shapes])), **size
        )

    return lambda: read_nuclei(path, **size), advice


def swapped_axes(tmp_path: Path) -> tuple[Attempt, Advice]:
    right = [shapely.Point(x, 40).buffer(6) for x in (130, 170)]
    swapped = [shapely.transform(s, lambda xy: xy[:, ::-1]) for s in right]
    path = write(tmp_path / "a.geojson", features_of(swapped))

    def advice(said: str) -> object:
        assert "with x and y swapped they fit" in said
        return read_nuclei(write(path, features_of(right)), **SIZE)

    return lambda: read_nuclei(path, **SIZE), advice


def a_box_upside_down(_: Path) -> tuple[Attempt, Advice]:
    return (
        lambda: read_region("[90,10,20,60]", 200, 100),
        lambda said: read_region("[20,10,90,60]" if "give x0 < x1 and y0 < y1" in said else said, 200, 100),
    )


def dark_image(tmp_path: Path) -> tuple[Attempt, Advice]:
    from prts.data.prepare import prepare_nuclei

    path = image(tmp_path / "a.tif", np.random.default_rng(0).integers(0, 60, (300, 300, 3), np.uint8))

    def attempt(**options: bool) -> object:
        return prepare_nuclei(tmp_path / "cache", read_section(path, mpp=0.5), Bins(bin_um=8), False, **options)

    return attempt, lambda said: attempt(**{the(r"turn the `(check_image)` option off", said): False})


def no_nuclei(tmp_path: Path) -> tuple[Attempt, Advice]:
    """Small, faint nuclei."""
    pixels = np.full((200, 200, 3), (228, 170, 205), np.uint8)
    y, x = np.mgrid[:200, :200]
    for cx in range(30, 190, 40):
        pixels[(x - cx) ** 2 + (y - 100) ** 2 < 30] = (150, 110, 180)
    path = image(tmp_path / "a.tif", pixels)

    def attempt(**settings: Any) -> object:
        with open_slide(path, mpp=0.25) as slide:
            return segment(slide, segmenters.build({"name": "watershed", **settings}))

    return attempt, lambda said: attempt(**{the(r"lower `floor` or `(min_area_um2)`", said): 2.0})


def scale(mpp: float, refuse: bool = True) -> object:
    nuclei = make_nuclei([shapely.box(x, 0, x + 14, 14) for x in range(0, 2000, 20)], mpp)
    usual = make_nuclei([shapely.box(x, 0, x + 14, 14) for x in range(0, 2000, 20)], 0.5)
    section = Section("s", Path("a.tif"), mpp, "mpp=", 2000, 2000)
    return check_scale(nuclei, section, 0.5, describe_nuclei({"s": usual}, {"s": 0.5}), refuse=refuse)


def another_scale(_: Path) -> tuple[Attempt, Advice]:
    def advice(said: str) -> None:
        scale(float(the(r"would match at ([\d.]+) um/px; give the correct `mpp`", said)))
        scale(2.0, refuse=the(r"set `check_scale` to (false)", said) != "false")

    return lambda: scale(2.0), advice


def quality(_: Path) -> tuple[Attempt, Advice]:
    obs = pd.DataFrame(
        {"area_um2": [30.0] * 4, "total_counts": [90, 80, 70, 60], "pct_counts_mt": [40.0, 50.0, 60.0, 5.0]}
    )
    table = ad.AnnData(np.ones((4, 1), np.float32), obs=obs.set_index(pd.Index(list("abcd"))))
    limits = {"min_umi": 65, "max_pct_mt": 15.0, "max_area_um2": 150.0}

    def advice(said: str) -> object:
        assert "relax the limit that removes most" in said
        failed = {name: int(n) for n, name in re.findall(r"(\d+) for (\w+)=", said)}
        return quality_control(table, QCSettings(**{**limits, max(failed, key=failed.__getitem__): None}), mpp=0.5)

    return lambda: quality_control(table, QCSettings(**limits), mpp=0.5), advice


def another_species(_: Path) -> tuple[Attempt, Advice]:
    var = pd.DataFrame({"gene_id": ["ENSRNOG1", "ENSRNOG2"], "symbol": ["Actb", "Mt-nd1"]})
    attempt = lambda *given: mitochondrial_genes(var, given[0], Path("f.h5"), *given[1:])  # noqa: E731

    def advice(said: str) -> None:
        assert attempt(the(r"choose (\w+)", said)).sum() == 1
        assert attempt("mouse", the(r"set `qc.mt_prefix` to '([^']+)'", said)).sum() == 1

    return lambda: attempt("mouse"), advice


def unknown_species(_: Path) -> tuple[Attempt, Advice]:
    def advice(said: str) -> None:
        mitochondrial_prefix(the(r"choose (\w+),", said))
        assert "or set `qc.mt_prefix`" in said and mitochondrial_prefix("axolotl", "MT-") == "MT-"

    return lambda: mitochondrial_prefix("axolotl"), advice


def normalized_spots(tmp_path: Path) -> tuple[Attempt, Advice]:
    counts = np.array([[0, 3.0], [2.0, 0]])
    spots = ad.AnnData(np.log1p(counts / 7), obsm={"spatial": np.ones((2, 2))}, uns={"spot_radius_px": 5.0})
    path = tmp_path / "spots.h5ad"
    spots.write_h5ad(path)

    def advice(said: str) -> object:
        spots.layers[the(r"layers\['(counts)'\]", said)] = counts
        spots.write_h5ad(path)
        return read_spots(path)

    return lambda: read_spots(path), advice


def spots_without_radius(tmp_path: Path) -> tuple[Attempt, Advice]:
    spots = ad.AnnData(np.ones((2, 2)), obsm={"spatial": np.ones((2, 2))})
    path = tmp_path / "spots.h5ad"
    spots.write_h5ad(path)

    def advice(said: str) -> object:
        spots.uns[the(r"uns\['(\w+)'\] is missing", said)] = 27.5
        spots.write_h5ad(path)
        return read_spots(path)

    return lambda: read_spots(path), advice


def the_folder_above(tmp_path: Path) -> tuple[Attempt, Advice]:
    from prts.platforms.bin_positions import bins_folder

    inner = tmp_path / "outs/binned_outputs" / bins_folder(2)
    (inner / "spatial").mkdir(parents=True)
    (inner / "spatial/scalefactors_json.json").write_text('{"bin_size_um": 2.0}')
    return (
        lambda: read_scalefactors(tmp_path / "outs"),
        lambda said: read_scalefactors(Path(the(r"give (\S+)$", said))),
    )


def another_bin_size(tmp_path: Path) -> tuple[Attempt, Advice]:
    for size in ("002", "008"):
        (tmp_path / f"square_{size}um").mkdir()
    bins = VisiumHD(tmp_path / "square_002um")
    return lambda: bins.with_units(16), lambda said: bins.with_units(int(the(r"a size that is there \(2, (8)\)", said)))


def lone_image(tmp_path: Path) -> tuple[Attempt, Advice]:
    for name in ("tissue_image.tif", "tissue_image.png"):
        Image.new("RGB", (64, 64), (200, 120, 180)).save(tmp_path / name)
    tags = {"resolution": (20000, 20000), "resolutionunit": "CENTIMETER"}
    image(tmp_path / "tissue_image.tif", **tags)

    def advice(said: str) -> object:
        assert "expected exactly one tissue_image" in said
        (tmp_path / the(r"contains (tissue_image.png)", said)).unlink()
        return open_section_folder(tmp_path)

    return lambda: open_section_folder(tmp_path), advice


def guard_band(_: Path) -> tuple[Attempt, Advice]:
    return lambda: Blocks(guard_um=10), lambda said: Blocks(guard_um=float(the(r"use ([\d.]+) um or more", said)))


def random_share(_: Path) -> tuple[Attempt, Advice]:
    return lambda: Random(fraction=0.7), lambda said: Random(fraction=float(the(r"between 0 and (0\.5)", said)) / 2)


def mistyped_name(_: Path) -> tuple[Attempt, Advice]:
    return (
        lambda: segmenters.build({"name": "watersheed"}),
        lambda said: segmenters.build({"name": the(r"did you mean '(\w+)'", said)}),
    )


def folder_of_dicom(tmp_path: Path) -> tuple[Attempt, Advice]:
    (tmp_path / "series").mkdir()
    path = image(tmp_path / "series/level0.tif")
    return (
        lambda: read_section(tmp_path / "series", mpp=0.5),
        lambda said: read_section(path if "give the image file" in said else tmp_path, mpp=0.5),
    )


def bins_listed_twice(tmp_path: Path) -> tuple[Attempt, Advice]:
    row, col = (axis.ravel() for axis in np.mgrid[:4, :4])
    table = pd.DataFrame(
        {"array_row": row, "array_col": col, "pxl_row_in_fullres": row * 4.0, "pxl_col_in_fullres": col * 4.0}
    )
    table["in_tissue"] = 1
    (tmp_path / "spatial").mkdir()
    pd.concat([table, table[:2]]).to_parquet(tmp_path / "spatial/tissue_positions.parquet")

    def advice(said: str) -> object:
        assert "one position per (array_row, array_col)" in said
        table.drop_duplicates(["array_row", "array_col"]).to_parquet(tmp_path / "spatial/tissue_positions.parquet")
        return read_positions(tmp_path)

    return lambda: read_positions(tmp_path), advice


CASES = [
    unknown_mpp,
    contradictory_mpp,
    too_many_pixels,
    arrays,
    mask,
    ids_of_some,
    nuclei_in_um,
    swapped_axes,
    a_box_upside_down,
    dark_image,
    no_nuclei,
    another_scale,
    quality,
    another_species,
    unknown_species,
    normalized_spots,
    spots_without_radius,
    the_folder_above,
    another_bin_size,
    lone_image,
    guard_band,
    random_share,
    mistyped_name,
    folder_of_dicom,
    bins_listed_twice,
]


@pytest.mark.parametrize("case", CASES)
def test_the_advice_of_a_message_works(case: Callable[[Path], tuple[Attempt, Advice]], tmp_path: Path) -> None:
    attempt, advice = case(tmp_path)
    with pytest.raises(InputError) as refused:
        attempt()
    assert "\n" not in str(refused.value)
    advice(str(refused.value))
