"""A cohort by two workers against the stages alone: what claims, states, start, summary and idle workers cost."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.harness import ROOT, Part, cache_folder, child
from benchmarks.slides import make_model, make_slide

NEEDS_DATA = False
SLIDES, WORKERS = 12, 2
NUCLEI, TISSUE_MM2, MPP = 3_000, 2.0, 0.5


def run(quick: bool) -> Part:
    part = Part()
    n_slides, nuclei = (2, 100) if quick else (SLIDES, NUCLEI)
    slides = cache_folder() / f"cohort-{n_slides}-{nuclei}"
    if len(list(slides.glob("*.tif"))) < n_slides:
        child(make, folder=str(slides), n_slides=n_slides, nuclei=nuclei)
    with tempfile.TemporaryDirectory() as name:
        child(make_model_in, folder=f"{name}/model")
        wall = _cohort(slides, Path(name))
        images = sorted(map(str, slides.glob("*.tif")))
        with ThreadPoolExecutor(WORKERS) as pool:
            bare = list(pool.map(lambda k: _bare(images[k::WORKERS], name, k), range(WORKERS)))
    alone = max(bare)
    part.figures = {"cohort/overhead": wall / alone}
    part.row(
        f"{n_slides} slides of {nuclei:,} nuclei, `classical`, with pages, by {WORKERS} workers of one core (joblib)",
        f"{wall:.0f} s",
        "",
        f"{alone:.0f} s: the stages alone, in as many processes",
        ["cohort/overhead"],
    )
    return part


def make(folder: str, n_slides: int, nuclei: int) -> None:
    """The slides, which differ."""
    for k in range(n_slides):
        make_slide(Path(folder) / f"slide{k:02d}.tif", nuclei, TISSUE_MM2 * nuclei / NUCLEI, MPP, seed=k)


def make_model_in(folder: str) -> None:
    """The model."""
    make_model(Path(folder), None)


def _cohort(slides: Path, folder: Path) -> float:
    """Seconds of the command, its start and summary included."""
    workers = ",".join(map(str, range(WORKERS)))
    command = [
        *(sys.executable, "-m", "prts.cli.main", "predict", "-m", f"bundle={folder / 'model'}", f"slides={slides}"),
        *(f"out={folder / 'out'}", f"worker={workers}", f"paths.cache_dir={folder / 'cache'}"),
        *("hydra/launcher=joblib", f"hydra.launcher.n_jobs={WORKERS}"),
    ]
    start = time.perf_counter()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the cohort ended with {done.returncode}:\n{done.stderr[-4000:]}")
    return time.perf_counter() - start


def _bare(images: list[str], folder: str, k: int) -> float:
    return float(child(stages, images=images, folder=folder, k=k).result)


def stages(images: list[str], folder: str, k: int) -> float:
    """Seconds of the stages of some slides, on one core."""
    import torch

    from prts.api.predict import SlidePredictor
    from prts.models.bundle import load_bundle
    from prts.report.pipeline import page_of_prediction

    torch.set_num_threads(1)
    here = Path(folder) / f"bare{k}"
    predictor = SlidePredictor(load_bundle(Path(folder) / "model"), cache_dir=here / "cache")
    total = 0.0
    for image in images:
        out = here / f"{Path(image).stem}.h5ad"
        total += sum(predictor.predict(predictor.segment(image), out).seconds.values())
        start = time.perf_counter()
        page_of_prediction(out, Path(image), out.with_suffix(".html"))
        total += time.perf_counter() - start
    return total
