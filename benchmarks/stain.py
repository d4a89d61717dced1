"""What another stain costs, and what matching it wins back: `python benchmarks/stain.py [cells] [her2st folder]`.

Prints a table of the mean PCC of log1p counts. Ridge on classical features learns one section and predicts slides that look otherwise,
read as they are and recoloured to the training section; segmented anew each time, as `prts predict` would, on simulated sections, and at
the given nuclei on her2st (real H&E and spot counts, simulated 2 um layout).
"""

import io
import logging
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import tifffile
from PIL import Image, ImageFilter
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler

from prts.evaluation.expression import pearson_per_gene
from prts.features.encoders import Classical
from prts.features.extract import extract
from prts.features.store import read_features
from prts.io.nuclei import read_nuclei
from prts.preprocess.counts import measured_counts
from prts.preprocess.panel import TopPanel
from prts.preprocess.stains import stains
from prts.preprocess.stains.base import match_stain, sample_slides, statistics
from prts.section import Section, open_section_folder
from prts.segmentation.segment import segment
from prts.segmentation.watershed import Watershed
from prts.simulate.section import simulate_section

N_GENES = 300
ALPHA = 300.0


def main() -> None:
    logging.disable(logging.WARNING)
    cells = int(sys.argv[1] if len(sys.argv) > 1 else 2000)
    print("| slide | none | " + " | ".join(stains.names()) + " |")
    print("|---|---|" + "---|" * len(stains.names()))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = Model(open_section_folder(simulate_section(folder / "train", cells=cells, seed=1)))
        for stain in (0.0, 1.0, 2.0, -2.0):
            section = open_section_folder(simulate_section(folder / f"test{stain}", cells=cells, seed=3, stain=stain))
            model.row(f"simulated, stain={stain:g}", section)
        if len(sys.argv) > 2:
            data = Path(sys.argv[2])
            model = Model(open_section_folder(data / "C2"), n=800)
            section = open_section_folder(data / "C4")
            model.row("her2st C4", section)
            model.row(
                "her2st C4, JPEG 30, blurred, brighter", replace(section, image=worse(section, folder / "worse.tif"))
            )


class Model:
    """Ridge on the classical features of a section's nuclei (`n` of them, if given)."""

    def __init__(self, section: Section, n: int | None = None) -> None:
        self.n = n
        with section.open_slide() as slide:
            self.reference = statistics(sample_slides([slide]))
        features, counts = self.measured(section)
        self.panel = TopPanel(n_genes=N_GENES)([counts])
        self.scaler = StandardScaler().fit(features)
        target = self.panel.align(counts).log1p().toarray()
        self.largest = target.max()
        self.ridge = Ridge(alpha=ALPHA).fit(self.scaler.transform(features), target)

    def measured(self, section: Section):
        """Features and counts of the nuclei that pass quality control."""
        with section.open_slide() as slide, tempfile.TemporaryDirectory() as folder:
            if section.nuclei is None:
                nuclei = segment(slide, Watershed())
            else:
                nuclei = read_nuclei(section.nuclei, mpp=section.mpp, width=section.width, height=section.height)
            counts = measured_counts(section, nuclei, species="human")
            if self.n is not None:
                counts = counts[np.random.default_rng(0).permutation(counts.n_obs)[: self.n]].copy()
            kept = nuclei.set_index("cell_id").loc[counts.obs_names].reset_index(names="cell_id")
            extract(slide, kept, Classical(), Path(folder) / "features.h5")
            return read_features(Path(folder) / "features.h5", kept["cell_id"].to_numpy()), counts

    def row(self, name: str, section: Section) -> None:
        """One line of the table."""
        figures = []
        for method in ("none", *stains.names()):
            features, counts = self.measured(match_stain(section, method, self.reference))
            # features far from those of training take a line beyond anything that was counted
            predicted = np.clip(self.ridge.predict(self.scaler.transform(features)), 0, self.largest)
            figures.append(float(np.nanmean(pearson_per_gene(self.panel.align(counts), np.expm1(predicted)))))
        print(f"| {name} | " + " | ".join(f"{figure:.3f}" for figure in figures) + " |", flush=True)


def worse(section: Section, path: Path) -> Path:
    """The image blurred by 1 px, a fifth brighter, and compressed as JPEG of quality 30."""
    with section.open_slide() as slide:
        image = Image.fromarray(slide.read_region(0, 0, slide.width, slide.height)).filter(ImageFilter.GaussianBlur(1))
    brighter = image.point([min(255, round(1.2 * grey)) for grey in range(256)] * 3)
    packed = io.BytesIO()
    brighter.save(packed, "jpeg", quality=30)
    pixels = np.asarray(Image.open(packed))
    tifffile.imwrite(
        path, pixels, photometric="rgb", tile=(512, 512), compression="jpeg", compressionargs={"level": 95}
    )
    return path


if __name__ == "__main__":
    main()
