from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from anndata import AnnData

from prts.data.nucleus_set import NucleusSet
from prts.evaluation.against_baselines import score_baselines
from prts.evaluation.expression import pearson_per_gene
from prts.evaluation.scored_section import ScoredSection, Scoring
from prts.evaluation.section_scores import PredictedCounts, score_section
from prts.evaluation.settings import EvaluationSettings
from prts.evaluation.summaries import json_ready, unpooled_mean
from prts.io.spots import Spots
from prts.preprocess.panel import Panel

PANEL = Panel(tuple(f"g{j}" for j in range(20)), tuple(f"i{j}" for j in range(20)), "file", {})
SCORING = Scoring(PANEL, {"hvg50": np.array([0, 3])}, EvaluationSettings(250, 50))


@pytest.fixture
def scored(poisson_nuclei: Callable[..., NucleusSet]) -> ScoredSection:
    rng = np.random.default_rng(0)
    nuclei = replace(poisson_nuclei(400, 1), xy_um=rng.uniform(0, 2000, (400, 2)))
    umi = (nuclei.counts.toarray() + rng.gamma(1.0, 0.5, (400, 20))).astype(np.float32)
    result = score_section(
        nuclei.counts,
        PredictedCounts(umi, PANEL.genes),
        xy_um=nuclei.xy_um,
        gene_sets=SCORING.gene_sets,
        settings=SCORING.settings,
    )
    return ScoredSection(nuclei, SimpleNamespace(mpp=0.5), None, umi, umi, result)


def test_a_baseline_is_scored_as_the_model_is(scored: ScoredSection) -> None:
    worse = scored.umi + np.random.default_rng(1).gamma(1.0, 2.0, scored.umi.shape).astype(np.float32)
    figures, _ = score_baselines({"itself": lambda _: scored.umi, "ridge": lambda _: worse}, scored, SCORING)
    model = scored.result.summary
    assert figures["itself/pcc_mean"] == pytest.approx(model["pcc_mean"])
    assert figures["itself/hvg50_pcc_mean"] == pytest.approx(model["hvg50_pcc_mean"])
    assert [figures[f"itself/difference{end}"] for end in ("", "_low", "_high")] == [0, 0, 0]
    pcc = pearson_per_gene(scored.nuclei.counts, worse)
    assert figures["ridge/pcc_median"] == pytest.approx(np.median(pcc))
    assert figures["ridge/difference"] == pytest.approx(model["pcc_mean"] - pcc.mean())
    assert 0 < figures["ridge/difference_low"] < figures["ridge/difference"] < figures["ridge/difference_high"]


def test_the_difference_at_spots_has_an_interval_from_the_same_spots_for_both(scored: ScoredSection) -> None:
    rng = np.random.default_rng(2)
    xy_px = scored.nuclei.xy_um / 0.5
    centres = np.stack(np.meshgrid(np.arange(200, 4000, 400), np.arange(200, 4000, 400)), axis=-1).reshape(-1, 2)
    inside = np.linalg.norm(centres[:, None] - xy_px, axis=-1) <= 200
    var = pd.DataFrame(index=list(PANEL.genes))
    truth = AnnData(sp.csr_matrix(inside @ scored.nuclei.counts.toarray()).astype(np.int32), var=var)
    scored = replace(scored, spots=Spots(truth, centres.astype(float), 200.0))
    worse = scored.umi + rng.gamma(0.3, 4.0, scored.umi.shape).astype(np.float32)
    scoring = replace(SCORING, settings=EvaluationSettings(250, 300))
    baselines = {"itself": lambda _: scored.umi, "ridge": lambda _: worse}
    figures, _ = score_baselines(baselines, scored, scoring)
    assert [figures[f"itself/spot_difference{end}"] for end in ("", "_low", "_high")] == [0, 0, 0]

    def level(umi: np.ndarray) -> np.ndarray:
        return np.log1p(inside @ umi.astype(float))[inside.any(axis=1)]

    measured, ours, theirs = level(scored.nuclei.counts.toarray()), level(scored.umi), level(worse)

    def mean_pcc(spots: np.ndarray, predicted: np.ndarray) -> float:
        return np.mean([np.corrcoef(measured[spots, g], predicted[spots, g])[0, 1] for g in range(20)])

    every = np.arange(len(measured))
    assert figures["ridge/spot_pcc_mean"] == pytest.approx(mean_pcc(every, theirs))
    assert figures["ridge/spot_difference"] == pytest.approx(mean_pcc(every, ours) - mean_pcc(every, theirs))
    drawn = [rng.choice(every, len(every)) for _ in range(300)]
    ends = np.percentile([mean_pcc(spots, ours) - mean_pcc(spots, theirs) for spots in drawn], [2.5, 97.5])
    found = [figures["ridge/spot_difference_low"], figures["ridge/spot_difference_high"]]
    np.testing.assert_allclose(found, ends, atol=0.15 * (ends[1] - ends[0]))


def test_a_permuted_baseline_that_predicts_stops_the_run(scored: ScoredSection) -> None:
    with pytest.raises(RuntimeError, match="leakage"):
        score_baselines({"permuted": lambda _: scored.umi}, scored, SCORING)


def test_sections_without_a_baseline_are_left_out_of_its_mean() -> None:
    merged = unpooled_mean(
        {"a": {"position/pcc_mean": 0.2, "ridge/pcc_mean": 0.3}, "b": {"ridge/pcc_mean": 0.1}}, "baseline"
    )
    assert merged["baseline/position/pcc_mean"] == 0.2
    assert merged["baseline/ridge/pcc_mean"] == pytest.approx(0.2)
    assert "baseline/b/position/pcc_mean" not in merged


def test_intervals_of_several_sections_stay_with_them() -> None:
    a, b = ({"pcc_mean": pcc, "pcc_mean_low": pcc - 0.1, "pcc_mean_high": pcc + 0.1} for pcc in (0.2, 0.4))
    assert unpooled_mean({"a": a}, "test") == {f"test/{key}": value for key, value in a.items()}
    merged = unpooled_mean({"a": a, "b": b}, "test")
    assert merged["test/pcc_mean"] == pytest.approx(0.3)
    assert merged["test/b/pcc_mean_low"] == b["pcc_mean_low"]
    assert not {"test/pcc_mean_low", "test/pcc_mean_high"} & merged.keys()


def test_the_mean_over_three_sections_or_more_has_an_interval() -> None:
    figures = {"pcc_mean": 0.0, "pcc_mean_low": -9.0, "pcc_mean_high": 9.0, "n_cells": 5}
    merged = unpooled_mean(
        {name: {**figures, "pcc_mean": pcc} for name, pcc in (("a", 0.1), ("b", 0.2), ("c", 0.3))}, "test"
    )
    # 0.2 +- 4.3027 * 0.1 / sqrt(3), by a table of Student's t with 2 degrees of freedom
    assert merged["test/pcc_mean_low"] == pytest.approx(0.2 - 4.3027 * 0.1 / 3**0.5, abs=1e-4)
    assert merged["test/pcc_mean_high"] == pytest.approx(0.2 + 4.3027 * 0.1 / 3**0.5, abs=1e-4)
    assert "test/n_cells_low" not in merged


def test_json_has_no_nan_and_keeps_words() -> None:
    assert json_ready({"b": float("nan"), "warning/split": "beware", "a": 1.5}) == {
        "a": 1.5,
        "b": None,
        "warning/split": "beware",
    }
