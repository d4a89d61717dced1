"""The estimated ceiling against the simulated section, whose rates are known."""

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp

from prts.evaluation.bootstrap import spatial_blocks
from prts.evaluation.ceiling import noise_ceiling
from prts.evaluation.expression import pearson_per_gene
from prts.io.nuclei import load_nuclei
from prts.platforms.visium_hd import VisiumHD
from prts.preprocess.counts import count_nuclei
from prts.preprocess.panel import Panel
from prts.simulate.section import BINS, simulate_section

pytestmark = pytest.mark.slow

MPP = 0.5


@pytest.fixture(scope="module")
def section(tmp_path_factory):
    folder = simulate_section(tmp_path_factory.mktemp("sim") / "a", cells=2000, genes=400, seed=5, mpp=MPP)
    truth = ad.read_h5ad(folder / "truth.h5ad")
    counted = count_nuclei(VisiumHD(folder / BINS), load_nuclei(folder / "truth_nuclei.parquet"), species="human")
    panel = Panel(tuple(truth.var_names), tuple(truth.var["gene_id"]), "truth", {})
    return truth, panel.align(counted[truth.obs_names]), spatial_blocks(truth.obsm["spatial"] * MPP)[0]


def test_true_rates_reach_the_ceiling_of_counts_drawn_around_them(section):
    truth, _, blocks = section
    drawn = sp.csr_matrix(np.random.default_rng(0).poisson(truth.X))
    estimated = noise_ceiling(drawn, blocks, n_replicates=200)["ceiling"].to_numpy()
    reached = pearson_per_gene(drawn, truth.X)
    # chosen by the truth: among genes chosen by their estimate those that err upwards would be too many
    known = reached > 0.3
    assert known.sum() > 100
    assert (estimated[known] > 0).mean() > 0.95
    known &= estimated > 0
    error = (estimated - reached)[known]
    assert abs(error.mean()) < 0.03
    assert np.abs(error).mean() < 0.045
    assert np.corrcoef(estimated[known], reached[known])[0, 1] > 0.97


def test_bursts_and_spill_count_as_signal_so_the_ceiling_of_real_counts_lies_above_the_rates(section):
    truth, measured, blocks = section
    estimated = noise_ceiling(measured, blocks, n_replicates=200)["ceiling"].to_numpy()
    reached, image = (pearson_per_gene(measured, rate) for rate in (truth.X, truth.layers["image_rate"]))
    known = estimated >= 0.1
    share = reached[known].sum() / estimated[known].sum()
    assert 0.7 < share < 0.9
    assert image[known].sum() < 0.9 * reached[known].sum()
