from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pandas as pd
import pytest
import torch

from prts.data.slide_scale import SlideScale
from prts.features.feature_reader import InputReader
from prts.features.store import Rows, write_store
from prts.models.predict import View, predict_store, predict_views


class Copy:
    """Predicts the features themselves."""

    input_use = ("local", "global")
    ood = None
    slide_scale = None
    limit = None

    def predict_chunks(self, features: np.ndarray, chunk: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for start in range(0, len(features), chunk):
            part = features[start : start + chunk]
            yield part, part


@pytest.fixture
def rows_read(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Rows read of each dataset of any HDF5 file."""
    read, counts = h5py.Dataset.__getitem__, Counter()

    def counting(dataset: h5py.Dataset, *arguments: object, **options: object) -> np.ndarray:
        values = read(dataset, *arguments, **options)
        counts[dataset.name] += len(values)
        return values

    monkeypatch.setattr(h5py.Dataset, "__getitem__", counting)
    return counts


@pytest.mark.parametrize("passes", [1, 2])
def test_the_store_is_read_once_for_nuclei_in_any_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows_read: Counter[str], passes: int
) -> None:
    n = 20_000
    if passes > 1:  # what is held at a time has a limit; each helping is one pass
        monkeypatch.setattr("prts.models.predict._HELD_BYTES", 4 * 2 * 10_240)
        monkeypatch.setattr("prts.features.store._ROWS_PER_READ", 1024)
    number = np.arange(n, dtype=np.float32)[:, None]
    ids = np.array([f"c{i}" for i in range(n)])
    write_store(tmp_path / "s.h5", ids, np.zeros((n, 2)), (1, 1), [Rows(-number, number)], {})
    order = np.random.default_rng(0).permutation(n)
    rows_read.clear()
    chunks = list(predict_store(Copy(), tmp_path / "s.h5", pd.DataFrame({"cell_id": ids[order]}), 0.5, 1024))
    assert [len(umi) for umi, *_ in chunks] == [1024] * 19 + [n - 19 * 1024]
    np.testing.assert_array_equal(np.concatenate([umi for umi, *_ in chunks]), np.stack([order, -order], axis=1))
    assert rows_read["/cell_id"] == n
    for block in ("/local", "/global"):
        assert n * 0.9 <= rows_read[block] <= passes * n


def test_one_helping_of_features_is_held_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    n, helpings = 4000, []
    monkeypatch.setattr("prts.models.predict._HELD_BYTES", 4 * 2 * 1024)
    ids = [f"c{i}" for i in range(n)]
    write_store(tmp_path / "s.h5", ids, np.zeros((n, 2)), (1, 1), [Rows(*np.zeros((2, n, 1)))], {})
    read = InputReader.__call__

    def watched(self: InputReader, wanted: np.ndarray) -> np.ndarray:
        assert [helping() for helping in helpings] == [None] * len(helpings)
        features = read(self, wanted)
        helpings.append(weakref.ref(features))
        return features

    class Fresh(Copy):
        """Its predictions are its own memory, as a network's are."""

        def predict_chunks(self, features: np.ndarray, chunk: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
            for umi, prob in super().predict_chunks(features, chunk):
                yield umi.copy(), prob.copy()

    monkeypatch.setattr(InputReader, "__call__", watched)
    assert sum(1 for _ in predict_store(Fresh(), tmp_path / "s.h5", pd.DataFrame({"cell_id": ids}), 0.5, 512)) == 8
    assert len(helpings) == 4


def test_a_slide_is_matched_as_a_whole_but_not_a_region_or_a_few_nuclei(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("prts.models.predict._HELD_BYTES", 4 * 3 * 512)  # several helpings, one mean and spread
    n, rng = 2000, np.random.default_rng(0)
    local, others = rng.normal(50, 4, (n, 2)).astype(np.float32), rng.gamma(2, 9, (n, 1)).astype(np.float32)
    ids = np.array([f"c{i}" for i in range(n)])
    write_store(tmp_path / "s.h5", ids, np.zeros((n, 2)), (1, 2), [Rows(others, local)], {})

    class FirstColumn:
        def share(self, features: np.ndarray) -> np.ndarray:
            return features[:, 0].copy()

    class Matching(Copy):
        slide_scale = SlideScale(3)
        ood = FirstColumn()

    Matching.slide_scale.mean[:], Matching.slide_scale.spread[:] = (
        torch.tensor([1.0, 2.0, 3.0]),
        torch.tensor([2.0, 1.0, 0.5]),
    )

    def predict(of: np.ndarray, among: np.ndarray | None = None) -> np.ndarray:
        everywhere = None if among is None else pd.DataFrame({"cell_id": among})
        chunks = predict_store(Matching(), tmp_path / "s.h5", pd.DataFrame({"cell_id": of}), 0.5, 256, among=everywhere)
        umi, unusual = zip(*((part.umi, part.ood) for part in chunks), strict=True)
        np.testing.assert_array_equal(
            np.concatenate(unusual), raw[: len(of), 0]
        )  # how unusual it is before it is matched
        return np.concatenate(umi)

    raw = np.hstack([local, others])
    expected = (raw - raw.mean(axis=0)) / raw.std(axis=0) * [2.0, 1.0, 0.5] + [1.0, 2.0, 3.0]
    np.testing.assert_allclose(predict(ids, ids), expected, rtol=1e-4, atol=1e-4)
    assert "used as they are" not in caplog.text
    np.testing.assert_array_equal(predict(ids[:1500], ids), raw[:1500])
    assert "only a region is predicted" in caplog.text
    np.testing.assert_array_equal(predict(ids[:999]), raw[:999])
    assert "999 nuclei are too few (at least 1000)" in caplog.text


def test_few_nuclei_read_few_rows(tmp_path: Path, rows_read: Counter[str]) -> None:
    n = 5000
    write_store(
        tmp_path / "s.h5", [f"c{i}" for i in range(n)], np.zeros((n, 2)), (1, 1), [Rows(*np.zeros((2, n, 1)))], {}
    )
    rows_read.clear()
    list(predict_store(Copy(), tmp_path / "s.h5", pd.DataFrame({"cell_id": ["c900", "c800", "c850"]}), 0.5))
    assert rows_read["/local"] == 101


def test_views_are_averaged_in_step_and_only_the_first_says_how_strange(tmp_path: Path) -> None:
    """Three stores of the same nuclei in other orders; 8 of 20 nuclei at a time."""
    values = np.random.default_rng(0).gamma(2.0, size=(3, 20, 2)).astype(np.float32)
    ids = np.array([f"c{i}" for i in range(20)])
    nuclei = pd.DataFrame({"cell_id": ids})
    views = []
    for k, rows in enumerate(values):
        order = np.random.default_rng(k).permutation(20)
        write_store(
            tmp_path / f"{k}.h5",
            ids[order],
            np.zeros((20, 2)),
            (1, 1),
            [Rows(rows[order, 1:], rows[order, :1])],
            {},
        )
        views.append(View(nuclei, nuclei, tmp_path / f"{k}.h5", None))

    class Judged(Copy):
        ood = SimpleNamespace(share=lambda features: features[:, 0])

    chunks = list(predict_views(Judged(), views, 0.5, 8))

    assert [len(chunk.umi) for chunk in chunks] == [8, 8, 4]
    umi, prob, ood, spread = (
        np.concatenate([getattr(chunk, name) for chunk in chunks]) for name in ("umi", "prob", "ood", "spread")
    )
    np.testing.assert_allclose(umi, values.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(prob, values.mean(axis=0), rtol=1e-6)
    np.testing.assert_array_equal(ood, values[0, :, 0])
    np.testing.assert_allclose(spread, np.sqrt(np.log1p(values).var(axis=0).mean(axis=1)), rtol=1e-5)
