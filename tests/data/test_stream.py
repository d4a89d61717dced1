"""Nuclei on disk: the same values, fits and quality as in memory, and an order that depends on seed and epoch alone."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pytest
import pytorch_lightning as pl
import scipy.sparse as sp
import torch

from prts.data import memory
from prts.data.batches import Share
from prts.data.counts_in_turn import CountsInTurn
from prts.data.datamodule import PRTSDataModule
from prts.data.nucleus_set import CountBlocks, NucleusSet, feature_moments
from prts.data.on_disk import StoredFeatures, on_disk, scratch, section_counts, section_features
from prts.data.prepare import PreparedTissue
from prts.data.splits import Blocks, BySection
from prts.data.stream import Buffers, StreamedBatches, Streaming
from prts.errors import InputError
from prts.evaluation.baselines import Position
from prts.evaluation.gene_sets import variable_genes
from prts.models.fit import Recipe, fit
from prts.models.likelihoods.paper import Paper
from prts.models.likelihoods.poisson import Poisson
from prts.models.linear import fit_linear
from prts.models.network import PRTSNet
from prts.models.ood import MahalanobisOOD
from prts.models.ridge import gene_mean, permuted, ridge
from prts.preprocess.panel import TopPanel

Draw = Callable[..., NucleusSet]


def stored(nuclei: NucleusSet, folder: Path) -> NucleusSet:
    """The same nuclei on disk, whose features are in another order than their counts."""
    n, name = len(nuclei), nuclei.section
    order = np.random.default_rng(n).permutation(n)
    half = nuclei.features.shape[1] // 2
    with h5py.File(folder / f"{name}.h5", "w") as store:
        store.create_dataset("cell_id", data=nuclei.cell_id[order], dtype=h5py.string_dtype())
        store["local"], store["global"] = nuclei.features[order, :half], nuclei.features[order, half:]
        store["spatial"] = nuclei.xy_um[order]
    inputs = folder / f"inputs-{name}.h5"
    with h5py.File(inputs, "w") as file:
        file.create_dataset("cell_id", data=nuclei.cell_id, dtype=h5py.string_dtype())
        for key in ("data", "indices", "indptr"):
            file[key] = getattr(nuclei.counts, key)
    prepared = type("Prepared", (), {"features": folder / f"{name}.h5", "context": None, "colour": None})
    features, widths = section_features(prepared, inputs, ("local", "global"))
    assert widths == {"local": half, "global": nuclei.features.shape[1] - half}
    return replace(nuclei, features=features, counts=section_counts(inputs, nuclei.counts.shape[1]))


def pairs(draw: Draw, folder: Path, *sizes: int) -> tuple[list[NucleusSet], list[NucleusSet]]:
    """Sets in memory, and the same on disk."""
    here = [
        replace(draw(n, seed), xy_um=np.random.default_rng(seed).uniform(0, 900, (n, 2)))
        for seed, n in enumerate(sizes)
    ]
    return here, [stored(nuclei, folder) for nuclei in here]


@pytest.mark.parametrize("scale", ["training", "slide"])
@pytest.mark.parametrize("split", [BySection(), Blocks()])
def test_a_tissue_on_disk_has_the_sets_of_one_in_memory(
    tissue: PreparedTissue,
    split: object,
    scale: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("prts.data.datamodule.FEWEST", 30)  # so that slides are matched
    one = replace(tissue, bins=True)  # whose units have no shape
    if isinstance(split, Blocks):
        one = replace(one, train=["a"], val=[])
    here, there = (
        PRTSDataModule(lambda: one, split, memory=kind, scale=scale)  # type: ignore[arg-type]
        for kind in ("whole", "stream")
    )
    for module in (here, there):
        module.setup()
    assert there.streams and not here.streams and here.feature_widths == there.feature_widths
    for mine, theirs in zip(
        (*here.train_sets, *here.val_sets, *here.test_sets),
        (*there.train_sets, *there.val_sets, *there.test_sets),
        strict=True,
    ):
        assert on_disk(theirs) and not on_disk(mine)
        np.testing.assert_allclose(theirs.features[:], mine.features, rtol=1e-6)
        (as_read,), (as_read_here,) = there.as_read([theirs]), here.as_read([mine])
        np.testing.assert_allclose(as_read.features[:], as_read_here.features[:], rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(theirs.counts[:].toarray(), mine.counts.toarray())
        np.testing.assert_array_equal(np.asarray(theirs.cell_id, dtype=object), mine.cell_id)
        np.testing.assert_array_equal(theirs.total_counts, mine.total_counts)
        assert theirs.counts.nnz == mine.counts.nnz and theirs.counts.shape == mine.counts.shape


def test_any_rows_can_be_read(poisson_nuclei: Draw, tmp_path: Path) -> None:
    (here,), (there,) = pairs(poisson_nuclei, tmp_path, 500)
    rng = np.random.default_rng(0)
    some: list[object] = [
        slice(3, 40), slice(490, 900), slice(0, 0), rng.permutation(500)[:77], np.array([9, 3, 3, 400]),
        rng.random(500) < 0.1, np.arange(0, 500, 100),
    ]  # fmt: skip
    for rows in some:
        np.testing.assert_array_equal(there.features[rows], here.features[rows])
        np.testing.assert_array_equal(there.counts[rows].toarray(), here.counts[rows].toarray())
        again = there.take(np.arange(500)[rows]).take(np.arange(len(here.features[rows]))[::-1])
        np.testing.assert_array_equal(again.features[:], here.features[rows][::-1])
        np.testing.assert_array_equal(again.counts[:].toarray(), here.counts[rows].toarray()[::-1])


def test_an_epoch_has_every_nucleus_once_in_chunks_and_follows_from_seed_and_epoch() -> None:
    sizes, how = [100, 37, 3], Streaming(chunk=8, buffer=32)

    def flat(buffers: Buffers) -> list[np.ndarray]:
        return [batch for buffer in buffers for batch in buffer]

    def epoch(seed: int, number: int) -> list[np.ndarray]:
        return flat(Buffers(sizes, 16, how, seed, number))

    batches = epoch(1, 0)
    assert [len(batch) for batch in batches] == [16] * 8 + [12]
    assert Buffers(sizes, 16, how, 1).n_batches == 9
    np.testing.assert_array_equal(np.sort(np.concatenate(batches)), np.arange(140))
    for other in (epoch(1, 1), epoch(2, 0)):
        assert not np.array_equal(np.concatenate(other), np.concatenate(batches))
    moved = Buffers(sizes, 16, how, 1)
    list(moved)  # the next epoch follows by itself, and Lightning may set it
    np.testing.assert_array_equal(np.concatenate(flat(moved)), np.concatenate(epoch(1, 1)))
    moved.set_epoch(0)
    for mine, again in zip(flat(moved), batches, strict=True):
        np.testing.assert_array_equal(mine, again)
    # a buffer of 32 holds no more chunks than 32 / 8, and one that was cut
    touched = [{index // 8 for index in np.concatenate(buffer) if index < 96} for buffer in Buffers(sizes, 16, how, 1)]
    assert max(map(len, touched)) <= 6
    # within a buffer they are mixed
    assert any(np.abs(np.diff(batch)).max() > 8 for batch in batches)


def test_processes_share_the_batches_on_disk() -> None:
    alone = [batch for buffer in Buffers([50, 9], 16, Streaming(4, 32), 3) for batch in buffer]
    shares = [
        [batch for buffer in Buffers([50, 9], 16, Streaming(4, 32), 3, 0, Share(rank, 2)) for batch in buffer]
        for rank in range(2)
    ]
    for whole, *parts in zip(alone, *shares, strict=True):
        np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.sort(whole))
    single = Buffers([33], 16, Streaming(4, 32), 3)
    assert [len(batch) for buffer in single for batch in buffer] == [16, 16] and single.n_batches == 2


def test_batches_hold_the_features_and_counts_of_their_nuclei(poisson_nuclei: Draw, tmp_path: Path) -> None:
    here, there = pairs(poisson_nuclei, tmp_path, 150, 60)
    features = np.vstack([nuclei.features for nuclei in here])
    counts = sp.vstack([nuclei.counts for nuclei in here]).toarray()
    how = Streaming(chunk=8, buffer=64)
    order = [batch for buffer in Buffers([150, 60], 16, how, 5) for batch in buffer]
    exposure = np.linspace(0.5, 2, 150, dtype=np.float32)
    exposed = [replace(there[0], exposure=exposure), there[1]]
    batches = StreamedBatches(exposed, Buffers([150, 60], 16, how, 5))
    assert len(batches) == len(order)
    for batch, indices in zip(batches, order, strict=True):
        np.testing.assert_array_equal(batch.features, features[indices])
        np.testing.assert_array_equal(batch.counts, counts[indices])
        np.testing.assert_array_equal(batch.exposure[:, 0], np.append(exposure, np.ones(60))[indices])
        assert batch.counts.dtype == batch.features.dtype == torch.float32
    whole = list(StreamedBatches(there[:1], Buffers([150], 16, how, None)))
    np.testing.assert_array_equal(torch.cat([batch.features for batch in whole]), here[0].features)


@pytest.mark.slow
def test_readers_change_nothing(poisson_nuclei: Draw, tmp_path: Path) -> None:
    _, there = pairs(poisson_nuclei, tmp_path, 150, 60)

    def epochs(num_workers: int) -> list[torch.Tensor]:
        order = Buffers([150, 60], 16, Streaming(8, 64), 5)
        batches = StreamedBatches(there, order, num_workers=num_workers)
        return [torch.cat([batch.features for batch in batches]) for _ in range(2)]

    for mine, theirs in zip(epochs(0), epochs(2), strict=True):
        assert torch.equal(mine, theirs)


def test_fits_on_disk_are_those_in_memory(poisson_nuclei: Draw, tmp_path: Path) -> None:
    here, there = pairs(poisson_nuclei, tmp_path, 700, 300, 200)
    assert len(CountBlocks(there, size=128)) == 6 + 3 + 2
    for mine, theirs in zip(feature_moments(here), feature_moments(there), strict=True):
        np.testing.assert_allclose(theirs, mine, rtol=1e-12)
    np.testing.assert_allclose(gene_mean(there).intercept, gene_mean(here).intercept, rtol=1e-6)
    penalised = [ridge(sets[:2], sets[2:]) for sets in (here, there)]
    assert penalised[0].penalty == penalised[1].penalty
    np.testing.assert_allclose(penalised[1].weights, penalised[0].weights, rtol=1e-4, atol=1e-7)
    for target in ("minmax", "log1p"):
        scalers = [Paper(target=target).fit(CountBlocks(sets, size=128)).scaler.state_dict() for sets in (here, there)]
        for name, value in scalers[0].items():
            assert torch.equal(scalers[1][name], value)
    starts = [Poisson().fit(CountBlocks(sets, size=128)).start for sets in (here, there)]
    torch.testing.assert_close(*starts)
    for name, genes in variable_genes(here).items():
        np.testing.assert_array_equal(variable_genes(there)[name], genes)
    odd = [MahalanobisOOD.fit(sets[:2], sets[2:]) for sets in (here, there)]
    np.testing.assert_allclose(odd[1].distance(there[2].features), odd[0].distance(here[2].features), rtol=1e-4)
    for mine, theirs in zip(permuted(here), permuted(there), strict=True):
        np.testing.assert_array_equal(theirs.counts.toarray(), mine.counts.toarray())
    nets = [fit_linear("ridge", sets[:2], sets[2:]) for sets in (here, there)]
    for name, tensor in nets[0].state_dict().items():
        torch.testing.assert_close(nets[1].state_dict()[name], tensor, rtol=1e-3, atol=1e-5)
    near = [Position(sets[0], 10)(sets[1]) for sets in (here, there)]
    np.testing.assert_allclose(near[1], near[0], rtol=1e-6)
    predicted = penalised[1].predict(there[0].features, scratch(there[0]))
    np.testing.assert_allclose(predicted, penalised[0].predict(here[0].features), rtol=1e-4, atol=1e-6)


def test_the_permuted_baseline_takes_no_more_nuclei_than_it_says(
    poisson_nuclei: Draw, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prts.models.ridge._MOST_PERMUTED", 100)
    _, there = pairs(poisson_nuclei, tmp_path, 300, 100)
    assert [len(nuclei) for nuclei in permuted(there)] == [75, 25]


@pytest.mark.filterwarnings("ignore")
def test_training_from_disk_is_as_good_as_from_memory(poisson_nuclei: Draw, tmp_path: Path) -> None:
    """Nuclei lie in the order of a feature, as neighbors in tissue are alike: in that order, chunks without a buffer would teach less."""
    train = poisson_nuclei(3000, 1)
    train = train.take(np.argsort(train.features[:, 0]))
    val = poisson_nuclei(600, 2)

    def pcc(sets: list[NucleusSet], streams: bool) -> float:
        module = PRTSDataModule(
            lambda: None,  # type: ignore[arg-type, return-value]
            lambda *_: {},  # type: ignore[arg-type]
            batch_size=64,
            streaming=Streaming(chunk=32, buffer=1024),
        )
        module.train_sets, module.val_sets, module._is_set_up = sets[:1], sets[1:], True
        module.streams, module.feature_widths = streams, {"local": 8}
        module.panel = type("Panel", (), {"genes": [str(gene) for gene in range(20)]})()

        class Last(pl.Callback):
            value = 0.0

            def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
                self.value = float(trainer.callback_metrics["val/pcc"])

        pl.seed_everything(0, verbose=False)
        last = Last()
        trainer = partial(
            pl.Trainer,
            accelerator="cpu",
            max_epochs=4,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        net, optimizer = partial(PRTSNet, hidden=(8,)), partial(torch.optim.AdamW, lr=0.01)
        fit(Recipe(net, Poisson(), optimizer, trainer, callbacks=[last]), module)
        return last.value

    whole, streamed = pcc([train, val], False), pcc([stored(train, tmp_path), stored(val, tmp_path)], True)
    assert whole > 0.25
    assert streamed == pytest.approx(whole, abs=0.01)


def test_auto_compares_the_size_with_the_memory(
    tissue: PreparedTissue,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda: 1 << 40)
    with caplog.at_level(logging.INFO):
        assert not memory.streams("auto", tissue, ("local", "global"), 4)
        monkeypatch.setattr(memory, "available_bytes", lambda: 1000)
        assert memory.streams("auto", tissue, ("local", "global"), 4)
    assert "they are loaded" in caplog.text and "they stay on disk" in caplog.text
    with h5py.File(tissue.sections["t"].counts) as file:
        stored_counts = len(file["X/data"])
    assert (
        memory._bytes(tissue.sections["t"], ("local", "global"), 4, scored=True)
        == 20 * 20 + 16 * stored_counts + 20 * 32
    )


def test_a_panel_from_sections_in_turn_is_that_of_all(tissue: PreparedTissue, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {tissue.sections[name].counts: np.arange(n) % 3 > 0 for name, n in (("a", 65), ("b", 40))}
    loaded = [ad.read_h5ad(path)[mask].copy() for path, mask in rows.items()]
    choose = TopPanel(n_genes=4, min_nuclei=1, min_share=0.0)
    read: list[Path] = []
    real = ad.read_h5ad
    monkeypatch.setattr(ad, "read_h5ad", lambda path: read.append(path) or real(path))
    assert choose(CountsInTurn(rows)) == choose(loaded)
    assert set(read) == set(rows)
    stacked = sp.vstack([section.X for section in loaded]).toarray().astype(float)
    total = stacked.sum(axis=1, keepdims=True)
    variance = np.log1p(stacked / np.maximum(total, 1) * np.median(total[total > 0])).var(axis=0)
    assert choose(loaded).genes == tuple(np.array(list("XABCDY"))[np.argsort(-variance)[:4]])


def test_what_needs_memory_is_refused(tissue: PreparedTissue) -> None:
    with pytest.raises(InputError, match=r"data permute: needs all features in memory; use memory=whole"):
        PRTSDataModule(lambda: tissue, BySection(), permute=True, memory="stream")


def test_scratch_leaves_no_file(poisson_nuclei: Draw, tmp_path: Path) -> None:
    (here,), (there,) = pairs(poisson_nuclei, tmp_path, 50)
    files = sorted(tmp_path.iterdir())
    values = scratch(there)
    values[:] = 2.0
    assert sorted(tmp_path.iterdir()) == files and values.shape == (50, 20) and float(values.sum()) == 2000
    assert type(scratch(here)) is np.ndarray and isinstance(there.features, StoredFeatures)
