from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pytest
import scipy.sparse as sp
import shapely
import torch
from geopandas import GeoDataFrame

from prts.data import datamodule
from prts.data.batches import DeviceBatches, NucleusBatches, ShuffledBatches
from prts.data.datamodule import PRTSDataModule
from prts.data.nucleus_set import NucleusSet, feature_moments
from prts.data.prepare import PreparedSection, PreparedTissue
from prts.data.splits import Blocks, BySection
from prts.errors import InputError
from prts.features.feature_reader import InputReader
from prts.features.morphology import morphology
from prts.features.store import Rows, read_features, write_store

MPP = 0.5
GENES = ("A", "B", "C", "D")
Write = Callable[..., PreparedSection]


def ready(tissue: PreparedTissue, **arguments: object) -> PRTSDataModule:
    module = PRTSDataModule(lambda: tissue, BySection(), **arguments)
    module.prepare_data()
    module.setup()
    return module


def test_rows_of_features_counts_and_positions_belong_together(tissue: PreparedTissue) -> None:
    module = ready(tissue)
    assert [nuclei.section for nuclei in module.train_sets] == ["a", "b"]
    assert module.split_report["n"] == {"train": 105, "val": 30, "test": 20, "left_out": 0}
    for nuclei in (*module.train_sets, *module.val_sets, *module.test_sets):
        measured = ad.read_h5ad(tissue.sections[nuclei.section].counts)[nuclei.cell_id]
        number = [int(cell_id.split("-")[1]) for cell_id in nuclei.cell_id]
        np.testing.assert_array_equal(nuclei.features, np.outer(number, [1, 1, -1, 0, 0]))
        np.testing.assert_array_equal(nuclei.counts.toarray(), measured[:, list(GENES)].X.toarray())
        np.testing.assert_allclose(nuclei.xy_um, measured.obsm["spatial"] * MPP)
        np.testing.assert_array_equal(nuclei.total_counts, measured.obs["total_counts"])
        np.testing.assert_array_equal(nuclei.area_um2, measured.obs["area_um2"])


@pytest.mark.parametrize(("use", "width"), [(("local",), 2), (("global",), 3), (("global", "local"), 5)])
def test_an_ablation_changes_the_input_width(tissue: PreparedTissue, use: tuple[str, ...], width: int) -> None:
    module = ready(tissue, use=use)
    assert module.in_features == width == module.train_sets[0].features.shape[1]
    assert list(module.feature_widths) == list(use)


def test_an_epoch_has_every_training_nucleus_once_in_a_new_order(tissue: PreparedTissue) -> None:
    module = ready(tissue, batch_size=32)
    loader = module.train_dataloader()
    epochs = [list(loader) for _ in range(2)]
    assert [len(batch.features) for batch in epochs[0]] == [32, 32, 32, 9]
    rows = [torch.cat([batch.features for batch in epoch]) for epoch in epochs]
    expected = np.sort(np.concatenate([nuclei.features[:, 0] for nuclei in module.train_sets]))
    for epoch in rows:
        np.testing.assert_array_equal(np.sort(epoch[:, 0]), expected)
    assert not torch.equal(*rows)


def test_a_batch_over_two_sections_keeps_features_and_counts_together(tissue: PreparedTissue) -> None:
    module = ready(tissue)
    batches = NucleusBatches(module.train_sets)
    indices = np.random.default_rng(0).permutation(len(batches))
    batch = batches[indices]
    features = np.vstack([nuclei.features for nuclei in module.train_sets])
    counts = np.vstack([nuclei.counts.toarray() for nuclei in module.train_sets])
    np.testing.assert_array_equal(batch.features, features[indices])
    np.testing.assert_array_equal(batch.counts, counts[indices])
    assert batch.counts.dtype == torch.float32


def test_work_counts_are_densified_once_a_batch_and_nothing_else_is_copied(
    tissue: PreparedTissue, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense: list[int] = []

    def counted(
        self: sp.csr_matrix, *args: object, toarray: Callable[..., np.ndarray] = sp.csr_matrix.toarray
    ) -> np.ndarray:
        dense.append(self.shape[0])
        return toarray(self, *args)

    monkeypatch.setattr(sp.csr_matrix, "toarray", counted)
    monkeypatch.setattr(sp.csr_matrix, "todense", None)
    module = ready(tissue, batch_size=16)
    module.feature_moments()
    train, (val,) = module.train_dataloader(), module.val_dataloader()
    assert dense == []  # preparing to train densifies nothing
    assert [len(batch.counts) for batch in val] == dense == [16, 14]
    for _ in range(2):
        dense.clear()
        n_batches = sum(1 for _ in train)
        assert n_batches == len(train) == 7
        assert sum(dense) == 105 and len(dense) <= n_batches * len(module.train_sets)


def test_work_memory_of_an_epoch_is_that_of_a_batch() -> None:
    n, d, g, size = 20_000, 64, 200, 256
    counts = sp.random(n, g, density=0.05, format="csr", random_state=0, dtype=np.float32)
    features = np.ones((n, d), dtype=np.float32)
    nuclei = NucleusSet("s", np.arange(n).astype(object), np.zeros((n, 2)), features, counts, np.ones(n), np.ones(n))
    batches = NucleusBatches([nuclei])
    assert batches._features[0] is features  # the store's array itself
    order = ShuffledBatches(n, size, 0)
    tracemalloc.start()
    try:
        for indices in order:
            batches[indices]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # two batches, the last and the next, and the order of the epoch; the whole set dense would be 21 MB
    assert peak < 3 * size * (d + g) * 4 + 8 * n


def test_batches_made_on_the_device_are_the_same(tissue: PreparedTissue) -> None:
    sets = ready(tissue).train_sets
    here, there = NucleusBatches(sets), DeviceBatches(sets, torch.device("cpu"))
    order = np.random.default_rng(0).permutation(len(here))
    for indices in (order[:40], order, order[:0]):
        for mine, theirs in zip(here[indices][:2], there[indices][:2], strict=True):  # there is no exposure
            assert torch.equal(mine, theirs) and mine.dtype == theirs.dtype
    assert len(there) == len(here)
    stored = sum(nuclei.counts.nnz for nuclei in sets)
    assert DeviceBatches.n_bytes(sets) == len(here) * 5 * 4 + stored * (4 + 4)


def test_a_set_goes_to_the_gpu_where_half_the_free_memory_holds_it(
    tissue: PreparedTissue, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = ready(tissue, batch_size=32, seed=5, num_workers=2)
    size, gpu = DeviceBatches.n_bytes(module.train_sets), torch.device("cuda")
    for free, fits in ((2 * size, False), (2 * size + 2, True)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 10 * free))
        assert datamodule._fits(module.train_sets, gpu) is fits
    assert not datamodule._fits(module.train_sets, torch.device("cpu"))

    alone = list(ready(tissue, batch_size=32, seed=5).train_dataloader())
    monkeypatch.setattr(datamodule, "_fits", lambda sets, device: True)
    loader = module.train_dataloader()
    assert isinstance(loader.dataset, DeviceBatches) and loader.num_workers == 0
    for mine, theirs in zip(alone, loader, strict=True):
        assert torch.equal(mine.features, theirs.features) and torch.equal(mine.counts, theirs.counts)


@pytest.mark.slow
def test_workers_change_nothing(tissue: PreparedTissue) -> None:
    def epochs(num_workers: int) -> list[torch.Tensor]:
        loader = ready(tissue, batch_size=32, num_workers=num_workers, seed=5).train_dataloader()
        return [torch.cat([batch.counts for batch in loader]) for _ in range(2)]

    alone = epochs(0)
    for num_workers in (1, 2):
        for mine, theirs in zip(alone, epochs(num_workers), strict=True):
            assert torch.equal(mine, theirs)


def test_the_seed_decides_the_order() -> None:
    def order(seed: int) -> list[int]:
        return np.concatenate(list(ShuffledBatches(50, 8, seed))).tolist()

    assert order(1) == order(1) != order(2)


@pytest.mark.parametrize(("n", "sizes"), [(16, [8, 8]), (17, [8, 8]), (18, [8, 8, 2])])
def test_a_last_batch_of_one_nucleus_is_dropped(n: int, sizes: list[int]) -> None:
    sampler = ShuffledBatches(n, 8, 0)
    assert [len(batch) for batch in sampler] == sizes
    assert len(sampler) == len(sizes)


def test_validation_keeps_sections_apart_and_all_nuclei(tissue: PreparedTissue) -> None:
    module = ready(tissue, batch_size=29)
    (loader,) = module.val_dataloader()
    assert torch.equal(torch.cat([batch.features for batch in loader]), torch.from_numpy(module.val_sets[0].features))


def test_nuclei_without_features_are_left_out(
    tmp_path: Path, tissue: PreparedTissue, write_section: Write, caplog: pytest.LogCaptureFixture
) -> None:
    tissue.sections["v"] = write_section(tmp_path, "v2", 30, 9, without_features=4)
    module = ready(tissue)
    assert len(module.val_sets[0]) == 26
    assert "4 nuclei have no features" in caplog.text


def test_features_of_other_nuclei_are_refused(tmp_path: Path, tissue: PreparedTissue, write_section: Write) -> None:
    other = write_section(tmp_path, "other", 30, 9)
    kept = tissue.sections["v"]
    tissue.sections["v"] = replace(kept, features=other.features)
    with pytest.raises(InputError, match="features of none of the nuclei"):
        ready(tissue)


def test_blocks_split_one_section_into_sets(tissue: PreparedTissue) -> None:
    one = PreparedTissue("demo", "human", tissue.sections, ["a"], [], ["t"], tissue.panel)
    module = PRTSDataModule(lambda: one, Blocks())
    module.setup()
    assert [nuclei.section for nuclei in (*module.train_sets, *module.val_sets)] == ["a", "a"]
    distance = np.abs(module.train_sets[0].xy_um[:, None] - module.val_sets[0].xy_um[None]).max(axis=2)
    assert distance.min() >= 128


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        ({"use": ()}, "use"),
        ({"use": ("local", "cls")}, "use"),
        ({"batch_size": 1}, "batch_size"),
    ],
)
def test_bad_settings_name_their_key(tissue: PreparedTissue, arguments: dict[str, object], key: str) -> None:
    with pytest.raises(InputError, match=rf"data {key}:"):
        PRTSDataModule(lambda: tissue, BySection(), **arguments)


def test_feature_moments_span_sections_and_survive_constant_features() -> None:
    rng = np.random.default_rng(0)

    def nuclei(n: int) -> NucleusSet:
        features = np.hstack([rng.normal(1000, 3, (n, 2)), np.full((n, 1), 0.1), np.zeros((n, 1))]).astype(np.float32)
        return NucleusSet("s", np.arange(n).astype(object), np.zeros((n, 2)), features, None, np.zeros(n), np.zeros(n))

    sets = [nuclei(5000), nuclei(10)]
    mean, spread = feature_moments(sets)
    stacked = np.vstack([part.features for part in sets]).astype(np.float64)
    np.testing.assert_allclose(mean, stacked.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(spread[:2], stacked[:, :2].std(axis=0), rtol=1e-6)
    assert spread[2:].tolist() == [1, 1]


def test_each_slide_is_matched_to_the_mean_and_spread_of_training(
    tissue: PreparedTissue, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert ready(tissue, scale="training").slide_scale is None
    raw = ready(tissue)
    monkeypatch.setattr(datamodule, "FEWEST", 30)
    module = ready(tissue, scale="slide")
    stacked = np.concatenate([nuclei.features for nuclei in raw.train_sets])
    for nuclei in (*module.train_sets, *module.val_sets):
        np.testing.assert_allclose(nuclei.features.mean(axis=0), stacked.mean(axis=0), rtol=1e-5)
        np.testing.assert_allclose(nuclei.features.std(axis=0)[:3], stacked.std(axis=0)[:3], rtol=1e-5)
    before, after = raw.val_sets[0].features[:, 0], module.val_sets[0].features[:, 0]
    np.testing.assert_allclose(np.corrcoef(before, after)[0, 1], 1.0)
    np.testing.assert_array_equal(module.test_sets[0].features, raw.test_sets[0].features)
    for mine, plain in zip(
        module.as_read([*module.train_sets, *module.val_sets, *module.test_sets]),
        [*raw.train_sets, *raw.val_sets, *raw.test_sets],
        strict=True,
    ):
        np.testing.assert_allclose(mine.features[:], plain.features, rtol=1e-5, atol=1e-6)
    assert "t: 20 nuclei are too few" in caplog.text


def test_an_input_of_polygons_joins_the_stored_blocks_in_the_order_asked(tissue: PreparedTissue) -> None:
    polygons = make_polygons([f"a{i}" for i in range(70)])
    prepared = tissue.sections["a"]
    with h5py.File(prepared.features) as store:
        known = store["cell_id"].asstr()[:]
    polygons["cell_id"] = [*known, *(f"failed-{i}" for i in range(70 - len(known)))][:70]
    asked = known[[3, 0, 2]]
    read = InputReader(prepared.features, ("global", "morphology", "local"), lambda: polygons, 0.5)
    assert read.widths == {"global": 3, "morphology": 21, "local": 2}
    expected = morphology(polygons, 0.5)[[3, 0, 2]]
    np.testing.assert_array_equal(read(asked)[:, 3:24], expected)
    np.testing.assert_array_equal(read(asked)[:, :3], read_features(prepared.features, asked, ("global",)))
    np.testing.assert_array_equal(read(asked)[:, 24:], read_features(prepared.features, asked, ("local",)))


@pytest.mark.parametrize(("use", "width"), [(("morphology",), 21), (("local", "morphology"), 23)])
def test_a_nucleus_without_a_polygon_is_refused_not_given_anothers(
    tissue: PreparedTissue, use: tuple[str, ...], width: int
) -> None:
    prepared = tissue.sections["a"]
    with h5py.File(prepared.features) as store:
        known = store["cell_id"].asstr()[:]
    read = InputReader(prepared.features, use, lambda: make_polygons(list(known[1:])), 0.5)
    assert read(known[1:3]).shape == (2, width)
    with pytest.raises(InputError, match=rf"polygons lack 1 of 2 nuclei \(cell_id '{known[0]}'"):
        read(known[:2])


def test_context_is_read_from_its_own_store_and_no_encoder_is_needed(tissue: PreparedTissue) -> None:
    path = tissue.sections["a"].context
    ids = [f"a-{i}" for i in range(65)]
    values = np.arange(65 * 5, dtype=np.float32).reshape(65, 5)
    write_store(path, ids, np.zeros((65, 2)), (3, 2), [Rows(values[:, 2:], values[:, :2])], {})
    alone = InputReader(None, ("context",), pytest.fail, 0.5, path)
    assert alone.widths == {"context": 5}
    np.testing.assert_array_equal(alone(["a-7", "a-3"]), values[[7, 3]])
    joined = InputReader(tissue.sections["a"].features, ("context", "local"), pytest.fail, 0.5, path)
    np.testing.assert_array_equal(joined(["a-7"]), [[*values[7], 7, 7]])
    with pytest.raises(InputError, match="local were not extracted"):
        InputReader(None, ("context", "local"), pytest.fail, 0.5, path)
    for name, n in {"a": 65, "b": 40, "v": 30, "t": 20}.items():
        store = tissue.sections[name].context
        write_store(
            store,
            [f"{name}-{i}" for i in range(n)],
            np.zeros((n, 2)),
            (3, 2),
            [Rows(values[:n, 2:], values[:n, :2])],
            {},
        )
    without = {name: replace(section, features=None) for name, section in tissue.sections.items()}
    module = ready(replace(tissue, sections=without), use=("context",))
    assert module.feature_widths == {"context": 5}
    row = int(module.val_sets[0].cell_id[0].removeprefix("v-"))
    np.testing.assert_array_equal(module.val_sets[0].features[0], values[row])


def test_the_tissue_is_prepared_once_in_a_process(tissue: PreparedTissue) -> None:
    calls = []
    module = PRTSDataModule(lambda: calls.append(1) or tissue, BySection())
    module.prepare_data()
    module.setup()
    module.prepare_data()  # Lightning's fit calls both again
    module.setup("fit")
    assert len(calls) == 1


def make_polygons(cell_ids: list[str]) -> GeoDataFrame:
    rng = np.random.default_rng(0)
    centres = shapely.points(rng.uniform(0, 300, (len(cell_ids), 2)))
    return GeoDataFrame({"cell_id": cell_ids}, geometry=shapely.buffer(centres, rng.uniform(3, 9, len(cell_ids))))


def test_permuted_features_train_alone_and_none_is_lost(tissue: PreparedTissue) -> None:
    plain, permuted = ready(tissue, batch_size=1000), ready(tissue, batch_size=1000, permute=True)
    (batch,), (other,) = list(plain.train_dataloader()), list(permuted.train_dataloader())
    assert torch.equal(batch.counts, other.counts) and not torch.equal(batch.features, other.features)
    assert sorted(map(tuple, batch.features.tolist())) == sorted(map(tuple, other.features.tolist()))
    np.testing.assert_array_equal(plain.train_sets[0].features, permuted.train_sets[0].features)
