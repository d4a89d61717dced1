from __future__ import annotations

import logging

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prts.data.splits import (
    LEFT_OUT,
    TEST,
    TRAIN,
    VAL,
    Blocks,
    BySection,
    Random,
    Roles,
    block_labels,
    split_report,
)
from prts.errors import InputError


def uniform(n: int, side_um: float = 2000.0, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(0, side_um, (n, 2))


def test_by_section_gives_every_nucleus_its_sections_role() -> None:
    xy = {"a": uniform(5), "b": uniform(4), "c": uniform(3)}
    parts = BySection()(xy, Roles(["b"], ["a"], ["c"]))
    assert {name: labels.tolist() for name, labels in parts.items()} == {
        "b": [TRAIN] * 4,
        "a": [VAL] * 5,
        "c": [TEST] * 3,
    }


@pytest.mark.parametrize(
    ("roles", "key"),
    [(Roles(["a"], [], ["b"]), "section for validation"), (Roles(["a"], ["b"], []), "section for test")],
)
def test_by_section_without_a_role_names_the_way_out(roles: Roles, key: str) -> None:
    with pytest.raises(InputError, match=f"{key}.*split=blocks"):
        BySection()({"a": uniform(5), "b": uniform(5)}, roles)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    n=st.integers(1, 400),
    folds=st.integers(3, 6),
    fold=st.integers(0, 2),
    blocks_per_fold=st.integers(1, 3),
    guard_um=st.floats(128, 300),
    clumped=st.booleans(),
    missing_test=st.booleans(),
)
def test_no_two_nuclei_of_different_parts_are_closer_than_the_guard(
    seed: int, n: int, folds: int, fold: int, blocks_per_fold: int, guard_um: float, clumped: bool, missing_test: bool
) -> None:
    rng = np.random.default_rng(seed)
    xy = rng.uniform(0, 3000, (n, 2))
    if clumped:  # ties and dense clusters
        xy = np.round(xy / 200) * 200 + rng.integers(0, 2, (n, 2))
    roles = Roles(["s"], [], [] if missing_test else ["t"])
    splitter = Blocks(folds=folds, fold=fold, blocks_per_fold=blocks_per_fold, guard_um=guard_um)
    labels = splitter({"s": xy, "t": uniform(3)}, roles)["s"]
    # the slow way: all pairs, distance between square tiles
    distance = np.abs(xy[:, None] - xy[None]).max(axis=2)
    kept = labels != LEFT_OUT
    different = (labels[:, None] != labels[None]) & kept[:, None] & kept[None]
    assert not different.any() or distance[different].min() >= guard_um
    assert set(labels[kept]) <= ({TRAIN, VAL, TEST} if missing_test else {TRAIN, VAL})


def test_blocks_leaves_out_no_more_than_the_guard_band() -> None:
    xy = uniform(3000)
    labels = Blocks()({"s": xy, "t": uniform(3)}, Roles(["s"], [], ["t"]))["s"]
    for nucleus in np.flatnonzero(labels == LEFT_OUT):
        assert np.abs(xy[labels == VAL] - xy[nucleus]).max(axis=1).min() < 128
    assert np.count_nonzero(labels == VAL) == 600  # validation itself loses nothing to a band beside training


def test_folds_cover_every_nucleus_once_as_validation() -> None:
    xy = uniform(1003)
    roles = Roles(["s"], [], ["t"])
    validates = np.sum(
        [Blocks(folds=4, fold=k, blocks_per_fold=2)({"s": xy, "t": xy}, roles)["s"] == VAL for k in range(4)], axis=0
    )
    assert (validates == 1).all()


def test_blocks_are_contiguous_rectangles_of_equal_size() -> None:
    xy = uniform(1000)
    labels = block_labels(xy, 5)
    assert np.bincount(labels).tolist() == [200] * 5
    for block in range(5):
        low, high = xy[labels == block].min(axis=0), xy[labels == block].max(axis=0)
        inside = ((xy >= low) & (xy <= high)).all(axis=1)
        assert (labels[inside] == block).all()


def test_blocks_carves_each_training_section_and_keeps_given_ones_whole() -> None:
    xy = {"a": uniform(500, seed=1), "b": uniform(500, seed=2), "t": uniform(50, seed=3)}
    parts = Blocks()(xy, Roles(["a", "b"], [], ["t"]))
    assert (parts["t"] == TEST).all()
    assert [np.count_nonzero(parts[name] == VAL) for name in "ab"] == [100, 100]
    assert TEST not in parts["a"]


def test_split_report_counts_parts_and_refuses_an_empty_one() -> None:
    splitter = Blocks()
    parts = splitter({"s": uniform(3000)}, Roles(["s"], [], []))
    report = split_report(splitter, parts)
    assert report["n"] == {
        "train": np.count_nonzero(parts["s"] == TRAIN),
        "val": np.count_nonzero(parts["s"] == VAL),
        "test": 600,
        "left_out": np.count_nonzero(parts["s"] == LEFT_OUT),
    }
    assert sum(report["n"].values()) == 3000
    assert report["sections"]["s"] == report["n"]
    assert report["split"]["guard_um"] == 128
    tiny = splitter({"s": uniform(300, side_um=100.0)}, Roles(["s"], [], []))
    with pytest.raises(InputError, match="split=blocks: leaves no nuclei for"):
        split_report(splitter, tiny)


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        ({"folds": 1}, "folds"),
        ({"fold": 5}, "fold"),
        ({"guard_um": 100}, "guard_um"),
        ({"blocks_per_fold": 0}, "blocks_per_fold"),
    ],
)
def test_blocks_refuses_values_outside_its_limits(arguments: dict[str, int], key: str) -> None:
    with pytest.raises(InputError, match=rf"split {key}:"):
        Blocks(**arguments)


def test_blocks_refuses_two_folds_for_three_parts_and_a_tissue_that_lacks_nothing() -> None:
    with pytest.raises(InputError, match=r"split folds"):
        Blocks(folds=2)({"s": uniform(50)}, Roles(["s"], [], []))
    with pytest.raises(InputError, match="split=by_section"):
        Blocks()({"s": uniform(5), "v": uniform(5), "t": uniform(5)}, Roles(["s"], ["v"], ["t"]))


def test_random_is_disjoint_seeded_and_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    xy, roles = {"s": uniform(1000)}, Roles(["s"], [], [])
    with caplog.at_level(logging.WARNING):
        parts = Random(fraction=0.2, seed=3)(xy, roles)
    assert "split=blocks" in caplog.text
    report = split_report(Random(fraction=0.2, seed=3), parts)
    assert report["n"] == {"train": 600, "val": 200, "test": 200, "left_out": 0}
    assert report["warning"]
    np.testing.assert_array_equal(parts["s"], Random(fraction=0.2, seed=3)(xy, roles)["s"])
    assert (parts["s"] != Random(fraction=0.2, seed=4)(xy, roles)["s"]).any()
