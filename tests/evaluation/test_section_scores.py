import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from scipy.stats import pearsonr

from prts.errors import InputError, ParameterError
from prts.evaluation.matching import match
from prts.evaluation.section_scores import PredictedCounts, SectionScores, score_section
from prts.evaluation.settings import EvaluationSettings
from prts.evaluation.spot_scores import spot_pcc

GENES = [f"g{j}" for j in range(10)]
CONTRACT = (
    "pcc_mean pcc_median spearman_mean rmse_mean skill_mean lognorm_pcc_mean ceiling_mean ceiling_share accuracy majority_accuracy "
    "balanced_accuracy mcc auroc auprc n_cells n_genes n_constant_genes"
).split()
COLUMNS = "gene mean_counts pcc spearman rmse skill auroc auprc ceiling constant".split()


def score(measured, umi, prob=None, *, genes=GENES, n_replicates=1000, **given) -> SectionScores:
    settings = EvaluationSettings(bootstrap=n_replicates)
    return score_section(measured, PredictedCounts(umi, genes, prob), settings=settings, **given)


class Spots:
    def __init__(self, counts, xy, radius_px):
        self.counts, self.xy, self.radius_px = counts, np.asarray(xy, float), radius_px


@pytest.fixture
def section():
    rng = np.random.default_rng(0)
    rate = rng.gamma(0.8, 0.8, size=(500, 10))
    counts = rng.poisson(rate)
    counts[:, 0] = 0
    return sp.csr_matrix(counts), rate, rng.random((500, 2)) * 1000


def test_summary_and_table_keep_the_contract(section):
    counts, rate, xy_um = section
    rate[:, 1] = 0  # a gene that the model cannot emit
    result = score(counts, rate.astype(np.float32), xy_um=xy_um, n_replicates=200)
    assert set(CONTRACT) <= set(result.summary)
    assert list(result.per_gene.columns[:10]) == COLUMNS
    assert result.per_gene["gene"].tolist() == GENES
    s, table = result.summary, result.per_gene
    assert (s["n_cells"], s["n_genes"], s["n_constant_genes"]) == (500, 10, 1)
    assert table.loc[0, ["pcc", "auroc", "ceiling"]].isna().all()
    assert table.loc[1, "pcc"] == 0
    assert s["pcc_mean"] == pytest.approx(table["pcc"][1:].mean())
    assert s["pcc_median"] == pytest.approx(table["pcc"][1:].median())
    assert s["pcc_mean_low"] < s["pcc_mean"] < s["pcc_mean_high"]
    assert s["ceiling_share"] == pytest.approx(table["pcc"][1:].sum() / table["ceiling"][1:].sum())
    assert all(np.isfinite(v) for v in s.values())


def test_gene_sets_and_maps_have_figures_of_their_own(section):
    counts, rate, xy_um = section
    sets = {"hvg50": np.array([0, 2, 5]), "hvg200": np.arange(10)}
    result = score(counts, rate, xy_um=xy_um, gene_sets=sets, n_replicates=50)
    table, summary = result.per_gene, result.summary
    assert summary["hvg50_pcc_mean"] == pytest.approx(table["pcc"][[2, 5]].mean())  # gene 0 is constant
    assert summary["hvg200_pcc_mean"] == pytest.approx(summary["pcc_mean"])
    assert summary["moran_agreement"] == pytest.approx(
        np.corrcoef(table["moran"][1:], table["moran_predicted"][1:])[0, 1]
    )
    assert summary["moran_difference"] == pytest.approx((table["moran"] - table["moran_predicted"])[1:].abs().mean())
    itself = score(counts, counts, xy_um=xy_um, gene_sets=sets, n_replicates=50).summary
    assert 0 < summary["ssim_mean"] < 1 == pytest.approx(itself["ssim_mean"])
    assert itself["moran_agreement"] == pytest.approx(1)


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        *(({"block_um": value}, "block_um") for value in (0, -250.0, float("nan"), float("inf"), "wide")),
        *(({"bootstrap": value}, "bootstrap") for value in (-5, 0, 1, 100.0, None)),
    ],
)
def test_settings_that_give_no_interval_are_refused(settings, key):
    with pytest.raises(ParameterError, match=rf"^evaluation {key}: [^\n]+ must be [^\n]+$"):
        EvaluationSettings(**settings)


def test_true_rates_reach_the_whole_ceiling(section):
    counts, rate, xy_um = section
    summary = score(counts, rate, xy_um=xy_um).summary
    assert summary["ceiling_share"] == pytest.approx(1, abs=0.06)
    shuffled = score(counts, np.random.default_rng(1).permutation(rate), xy_um=xy_um).summary
    assert abs(shuffled["ceiling_share"]) < 0.15


def test_without_probabilities_those_of_a_poisson_count_are_taken(section):
    counts, rate, _ = section
    given = score(counts, rate, 1 - np.exp(-rate), n_replicates=50)
    for predicted in (rate, sp.csr_matrix(rate)):
        implied = score(counts, predicted, n_replicates=50)
        for name, value in given.summary.items():
            assert implied.summary[name] == pytest.approx(value, rel=1e-9), name
    assert given.summary["calibration_error"] < 0.03
    assert given.sums is None


def test_nothing_to_evaluate_is_a_bug(section):
    counts, rate, _ = section
    with pytest.raises(ValueError, match="names"):
        score(counts, rate, genes=GENES[1:])
    with pytest.raises(ValueError, match="0 nuclei"):
        score(counts[:0], rate[:0])


def var(names, **columns):
    return pd.DataFrame(columns, index=pd.Index(names))


def test_spot_pcc_sums_nuclei_in_spots():
    xy = np.array([[0, 0], [3, 4], [100, 0], [102, 0], [205, 0], [0, 300]], float)
    predicted = np.array([[1, 0, 2], [2, 0, 0], [0, 4, 1], [1, 1, 1], [7, 0, 0], [50, 50, 50]], float)
    spots = Spots(
        ad.AnnData(sp.csr_matrix(np.array([[5, 9, 1], [1, 0, 6], [8, 1, 0], [0, 0, 0]])), var=var(["B", "A", "other"])),
        [[0, 0], [100, 0], [200, 0], [900, 900]],
        5.0,
    )
    mean, per_gene = spot_pcc(sp.csr_matrix(predicted), xy, spots, ["A", "B", "C"])
    # Both nuclei at distance 0 and 5 belong to the first spot, (0, 300) to none; the fourth spot holds none.
    summed = np.array([[3, 0, 2], [1, 5, 2], [7, 0, 0]], float)
    a = pearsonr(np.log1p([9, 0, 1]), np.log1p(summed[:, 0]))[0]
    b = pearsonr(np.log1p([5, 1, 8]), np.log1p(summed[:, 1]))[0]
    np.testing.assert_allclose(per_gene["pcc"], [a, b, np.nan])
    assert per_gene["constant"].tolist() == [False, False, True]
    assert mean == pytest.approx((a + b) / 2)
    assert per_gene.attrs == {"n_spots": 3, "n_empty_spots": 1}
    with pytest.raises(InputError, match="same image"):
        spot_pcc(predicted, xy + 5000, spots, ["A", "B", "C"])
    with pytest.raises(InputError, match="species"):
        spot_pcc(predicted, xy, spots, ["X", "Y", "Z"])


def table(ids, xy, X, genes):
    return ad.AnnData(
        sp.csr_matrix(np.asarray(X, float)),
        obs=pd.DataFrame(index=pd.Index(ids)),
        var=genes,
        obsm={"spatial": np.asarray(xy, float)},
    )


@pytest.fixture
def pair():
    """Nuclei 100 px apart; the prediction knows them in another order, with one more, and its genes in another order."""
    xy = np.array([[100.0 * i, 50.0] for i in range(4)])
    counts = table(
        list("abcd"),
        xy,
        np.arange(12).reshape(4, 3),
        var(["x", "y", "z"], gene_id=["E1", "E2", "E3"], symbol=["x", "y", "z"]),
    )
    order = [3, 1, 0, 2]
    genes = var(["Z", "new", "x"], gene_id=["E3", "E9", "unknown"])
    prediction = table([*"dbac", "e"], np.vstack([xy[order], [[900, 900]]]), np.arange(15).reshape(5, 3), genes)
    prediction.layers["prob"] = np.asarray(prediction.X.toarray()) / 20
    return prediction, counts


def test_match_by_id_and_gene_id_then_name(pair):
    prediction, counts = pair
    matched = match(prediction, counts, mpp=0.5)
    assert matched.by == "cell_id"
    assert matched.genes == ("Z", "new", "x")
    assert matched.cell_id.tolist() == list("abcd")
    # Z is E3, the section's z; x is found by its name; "new" was not measured.
    assert matched.measured.toarray().tolist() == [[2, 0, 0], [5, 0, 3], [8, 0, 6], [11, 0, 9]]
    assert matched.predicted.toarray()[:, 0].tolist() == [6, 3, 9, 0]
    np.testing.assert_allclose(matched.prob, matched.predicted.toarray() / 20)


def test_equal_ids_of_other_nuclei_are_not_believed(pair):
    prediction, counts = pair
    prediction.obs_names = [*"acdb", "e"]  # numbers of another segmentation, say
    prediction.obsm["spatial"] += [3.0, 4.0]  # 5 px, 2.5 um
    matched = match(prediction, counts, mpp=0.5)
    assert matched.by == "centroid"
    assert matched.predicted.toarray()[:, 0].tolist() == [6, 3, 9, 0]
    with pytest.raises(InputError, match="none of its 5 nuclei"):
        match(prediction, counts, mpp=0.7)  # 3.5 um


def test_nearest_must_be_mutual(pair):
    prediction, counts = pair
    prediction.obs_names = [f"n{i}" for i in range(5)]
    prediction.obsm["spatial"][0] = [1.0, 50.0]  # beside the one that is at "a" already
    matched = match(prediction, counts, mpp=0.5)
    assert matched.cell_id.tolist() == ["a", "b", "c"]
    assert matched.predicted.toarray()[:, 0].tolist() == [6, 3, 9]


def test_no_common_gene_is_an_input_error(pair):
    prediction, counts = pair
    prediction.var_names = ["p", "q", "r"]
    prediction.var["gene_id"] = ["1", "2", "3"]
    with pytest.raises(InputError, match="section: none of the 3 predicted genes"):
        match(prediction, counts, mpp=0.5)
