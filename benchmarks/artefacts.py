"""How many planted artefacts are found, and what is flagged where none were planted: `python benchmarks/artefacts.py [data folder]`.

Folds, blurred patches, bubbles and pen strokes (`prts.simulate.artefacts`) are drawn onto three simulated sections and, with a data
folder, onto her2st C2 to C4 and CMU-1-Small-Region (real H&E). Precision is that of planted and flagged nuclei of the whole image.
"""

import logging
import sys
import tempfile
from pathlib import Path

import geopandas as gpd
import numpy as np
import pandas as pd
import shapely
import tifffile

from prts.io.nuclei import load_nuclei, make_nuclei, read_nuclei
from prts.io.slide import Slide, open_slide
from prts.preprocess.artefacts import KINDS, find_artefacts
from prts.section import open_section_folder
from prts.segmentation.watershed import Watershed
from prts.simulate.artefacts import ARTEFACT_KINDS, draw_artefacts
from prts.simulate.section import simulate_section

MPP = 1.0
EACH = 3


def main() -> None:
    logging.disable(logging.WARNING)
    print(
        "| image | nuclei | flagged as it is | "
        + " | ".join(f"recall, {kind}" for kind in ARTEFACT_KINDS[1:])
        + " | precision |"
    )
    print("|---" * (len(ARTEFACT_KINDS) + 3) + "|", flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for seed in (1, 2, 3):
            section = simulate_section(folder / f"simulated{seed}", cells=1500, genes=50, seed=seed)
            nuclei = load_nuclei(section / "truth_nuclei.parquet")
            with open_section_folder(section).open_slide() as slide:
                row(f"simulated, seed {seed}", slide, nuclei, folder)
        if len(sys.argv) > 1:
            data = Path(sys.argv[1])
            for tissue in ("C2", "C3", "C4"):
                section = open_section_folder(data / "her2st_hd" / tissue)
                with section.open_slide() as slide:
                    row(
                        f"her2st {tissue}",
                        slide,
                        read_nuclei(section.nuclei, mpp=slide.mpp, width=slide.width, height=slide.height),
                        folder,
                    )
            with open_slide(data / "images" / "CMU-1-Small-Region.svs") as slide:
                row("CMU-1-Small-Region", slide, Watershed()(slide), folder)


def row(name: str, slide: Slide, nuclei: gpd.GeoDataFrame, folder: Path) -> None:
    """Shares flagged before and after planting."""
    clean = pd.Series(find_artefacts(slide, nuclei))
    image = slide.read_region(0, 0, *slide.size_at(MPP), MPP)
    spoilt = draw_artefacts(image, MPP, EACH, np.random.default_rng(0))
    tifffile.imwrite(folder / "planted.tif", image, photometric="rgb", tile=(256, 256))
    polygons = shapely.transform(np.asarray(nuclei.geometry.array, dtype=object), lambda xy: xy * slide.mpp / MPP)
    x, y = shapely.get_coordinates(shapely.centroid(polygons)).astype(int).T
    truth = np.array(ARTEFACT_KINDS)[spoilt[y.clip(0, image.shape[0] - 1), x.clip(0, image.shape[1] - 1)]]
    with open_slide(folder / "planted.tif", mpp=MPP) as planted:
        found = np.asarray(find_artefacts(planted, make_nuclei(polygons, MPP)))
    flagged, kinds = (
        found != "none",
        [f"{(clean == kind).mean():.1%} {kind}" for kind in KINDS[1:] if (clean == kind).any()],
    )
    recall = [
        f"{flagged[truth == kind].mean():.0%} of {(truth == kind).sum()} ({(found == kind)[truth == kind].mean():.0%} as such)"
        if (truth == kind).any()
        else "no nucleus there"
        for kind in ARTEFACT_KINDS[1:]
    ]
    precision = (truth != "none")[flagged].mean()
    share = f"{(clean != 'none').mean():.1%}" + (f": {', '.join(kinds)}" if kinds else "")
    print("| " + " | ".join([name, f"{len(nuclei):,}", share, *recall, f"{precision:.0%}"]) + " |", flush=True)


if __name__ == "__main__":
    main()
