from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scanpy as sc
import scipy.sparse as sp
import shapely
from anndata import AnnData
from scipy.stats import t

from prts.data.nucleus_set import NucleusSet
from prts.evaluation.baseline_features import with_colour, with_context, with_morphology
from prts.evaluation.baselines import Position, fit_baselines, fit_position, refuse_leakage
from prts.evaluation.expression import pearson_per_gene
from prts.evaluation.gene_sets import gene_sets, variable_genes
from prts.features.store import Rows, write_store
from prts.io.nuclei import make_nuclei, write_nuclei
from prts.models.ridge import permuted, ridge
from prts.preprocess.panel import Panel


def on_a_gradient(make_nuclei: Callable[..., NucleusSet], n: int, seed: int, section: str = "s") -> NucleusSet:
    """Genes whose rate depends on where a nucleus lies."""
    rng = np.random.default_rng(seed)
    xy = rng.uniform(0, 1000, (n, 2))
    rate = np.exp(np.sin(xy[:, :1] / 200 + np.arange(6)) + xy[:, 1:] / 1000)
    return replace(make_nuclei(rng.normal(size=(n, 4)), rng.poisson(rate), section), xy_um=xy)


def test_position_is_the_mean_of_log1p_over_the_nearest(make_nuclei: Callable[..., NucleusSet]) -> None:
    train, test = on_a_gradient(make_nuclei, 80, 0), on_a_gradient(make_nuclei, 15, 1)
    predicted = Position(train, 7)(test)
    log = np.log1p(train.counts.toarray())
    for i in range(len(test)):
        near = np.argsort(np.linalg.norm(train.xy_um - test.xy_um[i], axis=1))[:7]
        np.testing.assert_allclose(np.log1p(predicted[i]), log[near].mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(np.log1p(Position(train, 500)(test)), np.tile(log.mean(axis=0), (15, 1)), rtol=1e-5)


def test_position_takes_the_neighbours_that_validate_best_in_the_section(
    make_nuclei: Callable[..., NucleusSet],
) -> None:
    train, val = on_a_gradient(make_nuclei, 400, 0), on_a_gradient(make_nuclei, 400, 1)
    elsewhere = on_a_gradient(make_nuclei, 50, 2, "elsewhere")
    fitted = fit_position([elsewhere, train], [val], "s")
    assert fitted is not None
    scores = {k: pearson_per_gene(val.counts, Position(train, k)(val)).mean() for k in (10, 30, 100, 300)}
    assert fitted.k == max(scores, key=scores.__getitem__) == 30
    assert scores[30] > 0.4
    without = fit_position([train], [elsewhere], "s")
    assert without is not None
    assert without.k == 100


def test_position_is_absent_where_no_nucleus_of_the_section_trains(
    make_nuclei: Callable[..., NucleusSet], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="prts")
    assert fit_position([on_a_gradient(make_nuclei, 30, 0, "other")], [], "s") is None
    assert "skipped for s, which has no training nuclei" in caplog.text


def test_permuted_deals_the_same_counts_out_anew(poisson_nuclei: Callable[..., NucleusSet]) -> None:
    sets = [poisson_nuclei(300, 1), poisson_nuclei(200, 2)]
    dealt = permuted(sets, seed=3)
    assert [len(nuclei) for nuclei in dealt] == [300, 200]
    assert [nuclei.counts.shape for nuclei in dealt] == [(300, 20), (200, 20)]
    before, after = (sp.vstack([nuclei.counts for nuclei in some]).toarray() for some in (sets, dealt))
    np.testing.assert_array_equal(np.sort(before, axis=0), np.sort(after, axis=0))
    # neither with their own nucleus nor with each other do genes keep company
    own = [np.corrcoef(before[:, g], after[:, g])[0, 1] for g in range(20)]
    assert np.abs(own).mean() < 0.08
    together = np.corrcoef(after, rowvar=False)[np.triu_indices(20, 1)]
    assert np.abs(together).mean() < 0.06
    np.testing.assert_array_equal(dealt[0].features, sets[0].features)
    again = permuted(sets, seed=3)
    assert (again[0].counts != dealt[0].counts).nnz == 0


def test_permuted_scores_nothing_and_the_rest_of_the_check_is_exact(poisson_nuclei: Callable[..., NucleusSet]) -> None:
    train, val, test = (poisson_nuclei(500, seed, g=100) for seed in (1, 2, 3))
    honest = ridge(permuted([train]), [val])
    refuse_leakage(pearson_per_gene(test.counts, honest.predict(test.features)), "t")
    with pytest.raises(RuntimeError, match=r"leakage: .* on t.* do not trust any result"):
        refuse_leakage(pearson_per_gene(test.counts, ridge([train], [val]).predict(test.features)), "t")
    spread = np.tile([0.1, -0.1], 50)
    bound = 0.02 + t.ppf(0.99865, 99) * spread.std(ddof=1) / 10
    refuse_leakage(np.append(spread + bound - 1e-6, np.nan), "t")
    for shift in (bound + 1e-6, -bound - 1e-6):
        with pytest.raises(RuntimeError, match="leakage"):
            refuse_leakage(spread + shift, "t")


def test_chance_among_a_few_genes_is_not_called_leakage(caplog: pytest.LogCaptureFixture) -> None:
    # 10 genes: beyond 3 standard errors, where a t of 9 degrees of freedom is five times as often as a normal variable
    spread = np.tile([0.1, -0.1], 5)
    error = spread.std(ddof=1) / np.sqrt(10)
    refuse_leakage(spread + 0.02 + 3.5 * error, "t")
    with pytest.raises(RuntimeError, match="leakage"):
        refuse_leakage(spread + 0.02 + 5 * error, "t")
    assert not caplog.records
    refuse_leakage(np.array([0.3, 0.31, 0.32, 0.3, np.nan]), "t")  # four genes stop no run
    assert "0.307 on t" in caplog.text and "4 genes are too few" in caplog.text


def test_variable_genes_are_scanpys_most_variable_after_log_normalisation(
    poisson_nuclei: Callable[..., NucleusSet],
) -> None:
    sets = [poisson_nuclei(200, 1, g=260), poisson_nuclei(100, 2, g=260)]
    nuclei = AnnData(sp.vstack([s.counts for s in sets]).astype(np.float32))
    sc.pp.normalize_total(nuclei)
    sc.pp.log1p(nuclei)
    variance = nuclei.X.toarray().astype(np.float64).var(axis=0)
    ordered, chosen = np.sort(variance)[::-1], variable_genes(sets)
    # variances, not genes: in float32 two close ones may change places
    np.testing.assert_allclose(variance[chosen["hvg50"]], ordered[:50], rtol=1e-5)
    np.testing.assert_allclose(variance[chosen["hvg200"]], ordered[:200], rtol=1e-5)


def test_marker_genes_are_a_set_of_their_own_where_the_panel_has_some(
    poisson_nuclei: Callable[..., NucleusSet], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    sets, panel = [poisson_nuclei(50, 1)], Panel(tuple(f"g{j}" for j in range(20)), ("",) * 20, "file", {})
    assert gene_sets(sets, panel, ["g7", "g2", "absent"])["markers"].tolist() == [2, 7]
    assert "2 of the tissue's 3 are in the panel" in caplog.text
    assert set(gene_sets(sets, panel, ["absent"])) == {"hvg50", "hvg200"}


def prepared(folder: Path, name: str, n: int, seed: int) -> tuple[SimpleNamespace, NucleusSet]:
    """A section whose gene 0 follows colour, gene 1 the nucleus' size, gene 2 the features, gene 3 the context."""
    rng = np.random.default_rng(seed)
    ids = np.array([f"{name}-{i}" for i in range(n)], dtype=object)
    side = rng.uniform(6, 14, n + 5)
    corner = rng.uniform(0, 2000, (n + 5, 2))
    polygons = make_nuclei(shapely.box(*corner.T, *(corner + side[:, None]).T), 0.5, cell_id=[*ids, *"abcde"])
    write_nuclei(polygons, folder / f"{name}.parquet")
    colour, features = rng.normal(size=(n, 12)).astype(np.float32), rng.normal(size=(n, 3)).astype(np.float32)
    other = np.random.default_rng(seed + 100)
    context = other.normal(size=(n, 42)).astype(np.float32)
    order = rng.permutation(n)
    rows = Rows(colour[order, 6:], colour[order, :6])
    write_store(folder / f"{name}.h5", ids[order], np.zeros((n, 2)), (6, 6), [rows], {})
    rows = Rows(context[order, 18:], context[order, :18])
    write_store(folder / f"{name}.context.h5", ids[order], np.zeros((n, 2)), (24, 18), [rows], {})
    log_area = np.log(side[:n] ** 2 / 100)
    rate = 5 * np.exp(np.stack([0.5 * colour[:, 7], log_area, 0.5 * features[:, 1]], axis=1))
    around = other.poisson(5 * np.exp(0.5 * context[:, [30]]))
    counts = sp.csr_matrix(np.hstack([rng.poisson(rate), around]).astype(np.int32))
    nuclei = NucleusSet(
        name, ids, np.zeros((n, 2)), features, counts, np.asarray(counts.sum(axis=1)).ravel(), side[:n] ** 2 / 4
    )
    section = SimpleNamespace(
        nuclei=folder / f"{name}.parquet",
        colour=folder / f"{name}.h5",
        context=folder / f"{name}.context.h5",
        section=SimpleNamespace(mpp=0.5),
    )
    return section, nuclei


def test_each_baseline_predicts_what_it_sees_and_nothing_else(tmp_path: Path) -> None:
    made = {name: prepared(tmp_path, name, 600, seed) for seed, name in enumerate(("train", "val", "test"))}
    tissue = SimpleNamespace(sections={name: section for name, (section, _) in made.items()}, bins=False)
    test = made["test"][1]
    fitted = fit_baselines([made["train"][1]], [made["val"][1]], tissue)
    assert list(fitted) == ["gene_mean", "colour", "context", "morphology", "ridge", "permuted"]
    pcc = {name: pearson_per_gene(test.counts, predict(test)) for name, predict in fitted.items()}
    assert not pcc["gene_mean"].any()
    for gene, name in enumerate(("colour", "morphology", "ridge", "context")):
        assert pcc[name][gene] > 0.5
        assert np.abs(np.delete(pcc[name], gene)).max() < 0.2
    assert np.abs(pcc["permuted"]).max() < 0.25


def test_descriptions_are_found_by_cell_id(tmp_path: Path) -> None:
    section, nuclei = prepared(tmp_path, "a", 30, 0)
    tissue = SimpleNamespace(sections={"a": section})
    some = nuclei.take(np.array([7, 2, 29]))
    for described_by, width in ((with_colour, 12), (with_context, 42)):
        whole = described_by([nuclei], tissue)[0].features
        assert whole.shape == (30, width)
        np.testing.assert_array_equal(described_by([some], tissue)[0].features, whole[[7, 2, 29]])
    (described,) = with_morphology([some], tissue)
    np.testing.assert_allclose(described.features[:, 0], np.log10(some.area_um2), rtol=1e-4)
    assert described.features.shape == (3, 21)
    assert described.cell_id is some.cell_id
