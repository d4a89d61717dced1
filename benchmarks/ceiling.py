"""The estimated noise ceiling against the truth of a simulated section: `python benchmarks/ceiling.py [ceiling.png]`.

Prints a table and writes the figure. Two kinds of counts of the same nuclei:

* drawn: Poisson around each nucleus's true rate. Here the ceiling means what its definition says, and the true rates must reach it.
* measured: what the section's bins hold, with bursts (negative binomial), diffusion and neighbours' UMIs. All three are signal to
  binomial thinning, and none of it is in the true rates, let alone in the image: so far above the rates does a ceiling of real counts lie.
"""

import itertools
import sys
import tempfile
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

from prts.evaluation.bootstrap import spatial_blocks
from prts.evaluation.ceiling import noise_ceiling
from prts.evaluation.expression import pearson_per_gene
from prts.io.nuclei import load_nuclei
from prts.platforms.bin_counts import count_bins
from prts.preprocess.panel import Panel
from prts.report.figures import ceiling_check
from prts.simulate.section import BINS, simulate_section

MPP = 0.5
EDGES = (0.0, 0.1, 0.3, 1.0, np.inf)


def main() -> None:
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "ceiling.png")
    with tempfile.TemporaryDirectory() as folder:
        section = simulate_section(Path(folder) / "section", cells=4000, genes=1000, seed=1, mpp=MPP)
        truth = ad.read_h5ad(section / "truth.h5ad")
        counted = count_bins(section / BINS, load_nuclei(section / "truth_nuclei.parquet"))
    genes = Panel(tuple(truth.var_names), tuple(truth.var["gene_id"]), "truth", {})
    counts = {
        "drawn": sp.csr_matrix(np.random.default_rng(0).poisson(truth.X)),
        "measured": genes.align(counted[truth.obs_names]),
    }
    blocks, _ = spatial_blocks(truth.obsm["spatial"] * MPP)
    tables = {
        name: pd.DataFrame(
            {
                "mean_counts": np.asarray(matrix.mean(axis=0)).ravel(),
                "ceiling": noise_ceiling(matrix, blocks)["ceiling"],
                "reached": pearson_per_gene(matrix, truth.X),
                "image": pearson_per_gene(matrix, truth.layers["image_rate"]),
            }
        )
        for name, matrix in counts.items()
    }
    print(
        "| counts | mean UMI a nucleus | genes | estimated ceiling | PCC of true rates | PCC of what the image shows |"
    )
    print("|---|---|---|---|---|---|")
    for name, table in tables.items():
        known = table[table["ceiling"] >= 0.1]
        for low, high in [*itertools.pairwise(EDGES), (0.0, np.inf)]:
            some = known[(known["mean_counts"] >= low) & (known["mean_counts"] < high)]
            means = " | ".join(f"{some[column].mean():.3f}" for column in ("ceiling", "reached", "image"))
            print(f"| {name} | {low:g} to {high:g} | {len(some)} | {means} |")
    titles = {"drawn": "Poisson counts of the true rates", "measured": "counts of the section's nuclei"}
    print(ceiling_check({titles[name]: table for name, table in tables.items()}, out))


if __name__ == "__main__":
    main()
