"""Size of the page of a whole section: 60,000 nuclei x 200 genes, predicted and measured, with outlines."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import Part, child

NEEDS_DATA = False
NUCLEI, GENES = 60_000, 200
# Standard deviation of what neighboring nuclei do not share, in log UMI. The first is that of a smooth map; with the second, hardly
# anything is left to compress.
NOISE = {"smooth": 0.1, "noisy": 1.0}
_INTERVAL_SD = 1.645  # of a 90% interval


def run(quick: bool) -> Part:
    part = Part()
    nuclei, genes = (500, 20) if quick else (NUCLEI, GENES)
    done = {name: child(write, nuclei=nuclei, genes=genes, noise=noise) for name, noise in NOISE.items()}
    part.figures = {f"page/{name}_mb": each.result["mb"] for name, each in done.items()}
    smooth, noisy = done.values()
    part.row(
        f"`report.html` of {nuclei:,} nuclei x {genes} genes, values that change smoothly; noisy values",
        f"{smooth.result['mb']:.1f} MB; {noisy.result['mb']:.1f} MB "
        f"({smooth.result['cpu_s']:.0f} and {noisy.result['cpu_s']:.0f} CPU s)",
        keys=list(part.figures),
    )
    return part


def write(nuclei: int, genes: int, noise: float) -> dict[str, float]:
    """Write the page of a simulated section; its size and the processor time of writing alone."""
    import time

    from prts.report.html import write_page

    page = content(nuclei, genes, noise)
    with tempfile.TemporaryDirectory() as name:
        start = time.process_time()
        out = write_page(Path(name) / "report.html", page, genes=genes)
        return {"mb": out.stat().st_size / 1e6, "cpu_s": time.process_time() - start}


def content(nuclei: int, genes: int, noise: float) -> Any:
    """A section with simulated tissue, and genes of about one UMI that vary with position and by `noise`."""
    import anndata as ad
    import pandas as pd
    import scipy.sparse as sp

    from prts.report.html import MeasuredCounts, PageContent
    from prts.report.load import PICTURE_PX
    from prts.simulate.nuclei import place_nuclei
    from prts.simulate.stain import render, shifted_stain
    from prts.simulate.tissue import build_layout

    rng = np.random.default_rng(0)
    layout = build_layout(nuclei, rng)
    placed = place_nuclei(layout, nuclei, rng)
    mpp = 0.25
    outlines = placed.polygons(mpp)
    wide, high = layout.width_um, layout.height_um
    coarse = max(wide, high) / PICTURE_PX
    bands = render(
        layout, placed, (math.ceil(high / coarse), math.ceil(wide / coarse)), coarse, shifted_stain(0.0), rng
    )
    picture = np.concatenate(list(bands))

    import shapely

    xy = shapely.get_coordinates(shapely.centroid(outlines))
    waves = np.sin(xy @ rng.normal(0, 20 / (max(wide, high) / mpp), (2, 12)) + rng.uniform(0, 7, 12))
    level = rng.normal(-1.0, 1.0, genes) + waves @ rng.normal(0, 0.3, (12, genes))
    mean = np.exp((level + rng.normal(0, noise, level.shape)).clip(max=5)).astype(np.float32)
    dispersion = 2 * np.exp(rng.normal(0, 0.2 * noise, level.shape))
    sd = np.sqrt(mean + mean**2 / dispersion)
    counts = sp.csr_matrix(rng.poisson(rng.gamma(dispersion, mean / dispersion)).astype(np.int32))
    names = [f"GENE{gene}" for gene in range(genes)]
    obs = pd.DataFrame(
        {
            "area_um2": shapely.area(outlines) * mpp**2,
            "ood": rng.uniform(size=nuclei),
            "cluster": pd.Categorical(np.digitize(waves[:, 0], [-0.5, 0, 0.5]).astype(str)),
        },
        index=[f"nucleus_{k}" for k in range(nuclei)],
    )
    about = {
        "section": "simulated",
        "mpp": mpp,
        "width": int(wide / mpp),
        "height": int(high / mpp),
        "interval_level": 0.9,
    }
    prediction = ad.AnnData(
        sp.csr_matrix(mean),
        obs=obs,
        var=pd.DataFrame(index=names),
        obsm={"spatial": xy},
        uns={"prts": about},
        layers={
            "prob": 1 - (1 + mean / dispersion) ** -dispersion,
            "lower": np.floor((mean - _INTERVAL_SD * sd).clip(min=0)),
            "upper": np.ceil(mean + _INTERVAL_SD * sd),
        },
    )
    per_gene = pd.DataFrame({"gene": names, "pcc": rng.uniform(0, 0.5, genes), "ceiling": 0.6, "mean_counts": 1.0})
    measured = MeasuredCounts(counts, np.arange(nuclei))
    return PageContent(prediction, picture, measured, per_gene=per_gene, outlines=outlines)
