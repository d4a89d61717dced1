from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from prts.analysis.types import TypeClassifier, accuracy, agreement, confusion, true_types
from prts.errors import InputError

PROFILE = np.array([[8.0, 1, 1, 2], [1, 8, 1, 2], [1, 1, 8, 2]])


def test_the_classifier_gives_the_type_with_the_largest_likelihood() -> None:
    rng = np.random.default_rng(0)
    kind = rng.integers(0, 3, 600)
    names = pd.Series(np.array(["a", "b", "c"], dtype=object)[kind])
    names[:50] = None  # without a type: not used for training
    counts = rng.poisson(PROFILE[kind])
    counts[:50] = [0, 0, 0, 90]
    classifier = TypeClassifier(counts, names)
    assert classifier.names == ["a", "b", "c"]
    known = counts[50:]
    profiles = np.vstack(
        [(known[kind[50:] == k].sum(axis=0) + 1) / (known[kind[50:] == k].sum() + 4) for k in range(3)]
    )
    prior = np.bincount(kind[50:]) / 550
    test = rng.poisson(PROFILE[rng.integers(0, 3, 200)])
    expected = np.array(["a", "b", "c"])[(test @ np.log(profiles).T + np.log(prior)).argmax(axis=1)]
    assert (classifier(test) == expected).all()
    # expected counts need not be whole
    assert list(classifier(PROFILE * 0.1)) == ["a", "b", "c"]


def test_one_type_only_is_refused() -> None:
    with pytest.raises(InputError, match="a classifier needs at least two"):
        TypeClassifier(np.ones((3, 2)), pd.Series(["a", "a", None]))


def test_agreement_leaves_out_what_either_side_leaves_out() -> None:
    figures = agreement(["x", "x", "y", "y", None], ["1", "1", "2", "2", "1"])
    assert figures == {"ari": 1.0, "nmi": 1.0, "n": 4}
    assert np.isnan(agreement([None], ["1"])["ari"])


def test_accuracy_by_hand() -> None:
    figures = accuracy(["a", "a", "a", "b"], ["a", "a", "b", "c"])
    assert figures["accuracy"] == 0.5
    assert figures["majority"] == 0.75
    # a: precision 1, recall 2/3; b: nothing right; c is no label of the reference
    assert figures["macro_f1"] == pytest.approx((0.8 + 0) / 2)
    table = confusion(["a", "a", "a", "b"], ["a", "a", "b", "c"])
    assert table.to_numpy().tolist() == [[2, 1, 0], [0, 0, 1], [0, 0, 0]]


def test_true_types_are_those_of_the_mutually_nearest_nuclei() -> None:
    truth = ad.AnnData(obs=pd.DataFrame({"cell_type": ["a", "b"]}, index=["1", "2"]))
    truth.obsm["spatial"] = np.array([[0.0, 0.0], [100.0, 0.0]])
    xy = np.array([[102.0, 0.0], [103.0, 0.0], [0.0, 10.0]])  # px of 0.5 um: 1, 1.5 and 5 um away
    assert true_types(xy, truth, 0.5).tolist() == ["b", None, None]
