"""From an image to a prediction with its page, every stage of one whole section measured in one process."""

from __future__ import annotations

import logging
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.harness import Part, cache_folder, child, data_folder
from benchmarks.slides import GENES, make_model, make_slide

NEEDS_DATA = True
NUCLEI, TISSUE_MM2, MPP = 60_000, 6.5 * 6.5, 0.2738
_STAGES = ("segment", "artefacts", "features", "predict", "page")


def run(quick: bool) -> Part:
    part = Part()
    nuclei = 200 if quick else NUCLEI
    data = None if quick else str(data_folder())
    image = cache_folder() / f"slide-{nuclei}.tif"
    if not image.is_file():
        child(make, image=str(image), nuclei=nuclei)
    measured = child(predict, image=str(image), data=data)
    seconds = measured.result["seconds"]
    total = sum(seconds.values())
    part.figures = {"whole_slide/seconds": total, "whole_slide/peak_gb": measured.peak_gb}
    part.row(
        f"image ({measured.result['mpx']:,.0f} Mpx, {nuclei * TISSUE_MM2 / NUCLEI:.3g} mm2 of tissue, {measured.result['nuclei']:,} nuclei "
        f"found) to `.h5ad` of {GENES:,} genes with page: "
        + ", ".join(f"{stage} {seconds[stage]:.1f} s" for stage in _STAGES),
        f"{total:.0f} s, {measured.peak_gb:.1f} GB",
        keys=["whole_slide/seconds", "whole_slide/peak_gb"],
    )
    if data is not None:
        stardist = child(segment_stardist, image=str(image), model=f"{data}/stardist/he_dsb2018")
        part.row(
            f"the same, its nuclei by StarDist (the small model): {stardist.result['nuclei']:,} nuclei",
            f"{stardist.result['seconds']:.0f} s, {stardist.peak_gb:.1f} GB",
        )
    return part


def make(image: str, nuclei: int) -> None:
    """The image of a section with the density of the full one."""
    make_slide(Path(image), nuclei, TISSUE_MM2 * nuclei / NUCLEI, MPP)


def predict(image: str, data: str | None) -> dict[str, Any]:
    """Seconds of each stage of a slide, with nothing in the cache."""
    import h5py

    from prts.api.predict import SlidePredictor
    from prts.models.bundle import load_bundle
    from prts.report.pipeline import page_of_prediction

    logging.getLogger("prts").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        weights = None if data is None else Path(data) / "weights/vits16_dinov2_fp16.pth"
        predictor = SlidePredictor(load_bundle(make_model(folder / "model", weights)), cache_dir=folder / "cache")
        slide = predictor.segment(image)
        made = predictor.predict(slide, folder / "slide.h5ad")
        start = time.perf_counter()
        page_of_prediction(made.out, Path(image), folder / "slide.html")
        seconds = {**made.seconds, "page": time.perf_counter() - start}
        with h5py.File(made.out) as file:
            n = int(file["X"].attrs["shape"][0])
        return {"seconds": seconds, "nuclei": n, "mpx": slide.section.width * slide.section.height / 1e6}


def segment_stardist(image: str, model: str) -> dict[str, float]:
    """Seconds of StarDist on the slide."""
    from prts.section import read_section
    from prts.segmentation.stardist import StarDist

    logging.getLogger("prts").setLevel(logging.ERROR)
    start = time.perf_counter()
    with read_section(image).open_slide() as slide:
        n = len(StarDist(model=model, model_mpp=0.5)(slide))
    return {"seconds": time.perf_counter() - start, "nuclei": n}
