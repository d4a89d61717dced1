"""What a shift between bins and nuclei costs, and what measuring it wins back: `python benchmarks/registration.py [cells]`.

Prints a table. Each row takes the demo's training and test section with the positions of all bins off by a known shift and turned by a
known angle: as they are, and as `preprocess.register=true` corrects them. Ridge on the classical features of the training section's
nuclei, fitted to the counts of either, predicts the nuclei of the test section. The PCC is with counts at the TRUE positions of the
test section's bins, so that all rows are judged alike.
"""

import logging
import math
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler

from prts.evaluation.expression import pearson_per_gene
from prts.features.encoders import Classical
from prts.features.extract import extract
from prts.features.store import read_features
from prts.platforms.base import Registration
from prts.platforms.bin_counts import count_bins
from prts.platforms.bin_positions import BinGrid, read_positions
from prts.platforms.bin_registration import corrected, moved, register_bins
from prts.preprocess.counts import QCSettings, add_quality_figures, quality_control
from prts.preprocess.panel import TopPanel
from prts.section import open_section_folder
from prts.segmentation.segment import segment
from prts.segmentation.watershed import Watershed
from prts.simulate.section import BINS, simulate_section

MPP = 0.5
N_GENES = 300
OFF = (
    ((0.0, 0.0), 0.0),
    ((1.0, -1.0), 0.0),
    ((3.0, 2.0), 0.0),
    ((-6.0, 5.0), 0.2),
    ((12.0, -9.0), -0.4),
    ((25.0, 20.0), 0.8),
)


class Known:
    """A simulated section with its nuclei and their features; the bins may be elsewhere than the files say."""

    def __init__(self, folder: Path, seed: int, stain: float, cells: int) -> None:
        simulate_section(folder, cells=cells, genes=1000, seed=seed, stain=stain, mpp=MPP)
        self.bins = folder / BINS
        self.grid = read_positions(self.bins)
        with open_section_folder(folder).open_slide() as slide:
            self.nuclei = segment(slide, Watershed())
            extract(slide, self.nuclei, Classical(), folder / "features.h5")
        features = read_features(folder / "features.h5", self.nuclei["cell_id"].to_numpy())
        self.features = pd.DataFrame(features, index=self.nuclei["cell_id"])

    def counts(self, grid: BinGrid):
        """Counts of the nuclei that pass quality control with the bins at these positions."""
        counts = count_bins(self.bins, self.nuclei, grid)
        add_quality_figures(counts, "human", self.bins)
        return quality_control(counts, QCSettings(), mpp=MPP)

    def off(self, shift: tuple[float, float], turn: float) -> BinGrid:
        """The bins, turned and shifted."""
        return moved(self.grid, np.array(shift) / MPP, turn, middle(self.grid))


def middle(grid: BinGrid) -> np.ndarray:
    """The middle of the lattice, px."""
    return grid.affine @ [grid.n_cols / 2, grid.n_rows / 2, 1]


def left_um(found: Registration, true: BinGrid, off: BinGrid) -> float:
    """Root mean square distance, over the tissue, between where the correction puts bins and where they are."""
    away = (corrected(off, found).positions - true.positions)[true.in_tissue] * MPP
    return math.sqrt(float(np.square(away).sum(axis=1).mean()))


def main() -> None:
    logging.disable(logging.WARNING)
    cells = int(sys.argv[1] if len(sys.argv) > 1 else 2000)
    with tempfile.TemporaryDirectory() as folder:
        table(Known(Path(folder) / "train", 1, 0.0, cells), Known(Path(folder) / "test", 3, 0.6, cells))


def table(train: Known, test: Known) -> None:
    """Print it."""
    panel = TopPanel(n_genes=N_GENES)([train.counts(train.grid)])
    truth = test.counts(test.grid)
    measured = panel.align(truth)
    scaler = StandardScaler().fit(train.features)

    def pcc(grid: BinGrid) -> float:
        """Of a model that learnt from these positions."""
        counts = train.counts(grid)
        seen = scaler.transform(train.features.loc[counts.obs_names])
        model = Ridge(alpha=300.0).fit(seen, panel.align(counts).log1p().toarray())
        predicted = model.predict(scaler.transform(test.features.loc[truth.obs_names]))
        return float(np.nanmean(pearson_per_gene(measured, np.expm1(np.maximum(predicted, 0.0)))))

    print(
        "| shift x, y (um) | turn (degrees) | measured x, y | turn | left after correction (um) | PCC as it is | PCC corrected |"
    )
    print("|---|---|---|---|---|---|---|")
    for shift, turn in OFF:
        errors = []
        for section in (test, train):
            off = section.off(shift, turn)
            found = register_bins(section.bins, section.nuclei, MPP, grid=off)
            errors.append(left_um(found, section.grid, off))
        back = corrected(off, found)
        print(
            f"| {shift[0]:g}, {shift[1]:g} | {turn:g} | {found.shift_x_um:.2f}, {found.shift_y_um:.2f} | "
            f"{found.rotation_deg:.2f} | {max(errors):.2f} | {pcc(off):.3f} | {pcc(back):.3f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
