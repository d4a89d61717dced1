"""Training reads each nucleus in one of its views; nothing else reads them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from prts.data import datamodule
from prts.data.batches import DeviceBatches, NucleusBatches, ShuffledBatches, draw_views
from prts.data.datamodule import PRTSDataModule
from prts.data.prepare import PreparedSection, PreparedTissue
from prts.data.prepare_input import InputStores
from prts.data.splits import Blocks, BySection
from prts.models.checkpoint import cache_files

STEP = 1000


def with_views(tissue: PreparedTissue, folder: Path, n: int = 2) -> PreparedTissue:
    """The training sections with views whose features are those of the image + 1000 k, in an order of their own."""

    def add(name: str, prepared: PreparedSection) -> PreparedSection:
        views = []
        for k in range(1, n + 1):
            path = folder / f"{name}-view{k}.h5"
            with h5py.File(prepared.features) as image, h5py.File(path, "w") as store:
                order = np.random.default_rng(k).permutation(len(image["cell_id"]))
                store.create_dataset("cell_id", data=image["cell_id"].asstr()[:][order], dtype=h5py.string_dtype())
                for key in ("local", "global"):
                    store[key] = image[key][:][order] + STEP * k
                store["spatial"] = image["spatial"][:][order]
            views.append(InputStores(path, None))
        return replace(prepared, views=tuple(views))

    sections = {name: add(name, part) if name in tissue.train else part for name, part in tissue.sections.items()}
    return replace(tissue, sections=sections, bins=True)  # bins have no shape, so that they can stay on disk


def ready(tissue: PreparedTissue, **arguments: object) -> PRTSDataModule:
    module = PRTSDataModule(lambda: tissue, BySection(), batch_size=32, seed=3, **arguments)
    module.setup()
    return module


def epochs(module: PRTSDataModule, n: int) -> list[torch.Tensor]:
    loader = module.train_dataloader()
    return [torch.cat([batch.features for batch in loader]) for _ in range(n)]


@pytest.mark.parametrize("memory", ["whole", "stream"])
def test_each_epoch_draws_a_view_for_each_nucleus(tissue: PreparedTissue, tmp_path: Path, memory: str) -> None:
    module = ready(with_views(tissue, tmp_path), memory=memory)
    image = np.concatenate([nuclei.features[:] for nuclei in module.train_sets])
    seen = []
    for number, features in enumerate(epochs(module, 3)):
        view = features[:, 3].numpy().astype(int) // STEP  # the fourth feature of the image is 0
        plain = features.numpy() - STEP * view[:, None]
        np.testing.assert_array_equal(plain[np.lexsort(plain.T)], image[np.lexsort(image.T)])
        drawn = draw_views(105, 3, 3, number)
        assert np.bincount(view, minlength=3).tolist() == np.bincount(drawn, minlength=3).tolist()
        assert np.bincount(view, minlength=3).min() > 20
        seen.append(view[np.argsort(plain[:, 0], kind="stable")])
    assert not np.array_equal(seen[0], seen[1])
    for nuclei in (*module.val_sets, *module.test_sets):
        assert nuclei.views == () and (nuclei.features[:, 3] == 0).all()
    (val,) = module.val_dataloader()
    assert all((batch.features[:, 3] == 0).all() for batch in val)


def test_memory_disk_and_device_read_the_same_views_of_a_nucleus(tissue: PreparedTissue, tmp_path: Path) -> None:
    augmented = with_views(tissue, tmp_path)
    here, there = (ready(augmented, memory=memory).train_sets for memory in ("whole", "stream"))
    for mine, theirs in zip(here, there, strict=True):
        for one, other in zip(mine.views, theirs.views, strict=True):
            np.testing.assert_array_equal(one, other[:])
    batches, device = NucleusBatches(here), DeviceBatches(here, torch.device("cpu"))
    indices = np.random.default_rng(0).permutation(3 * 105)[:90]
    by_view = [np.concatenate([(nuclei.features, *nuclei.views)[k] for nuclei in here]) for k in range(3)]
    counts = np.concatenate([nuclei.counts.toarray() for nuclei in here])
    for made in (batches[indices], device[indices]):
        np.testing.assert_array_equal(made.features, np.stack([by_view[i // 105][i % 105] for i in indices]))
        np.testing.assert_array_equal(made.counts, counts[indices % 105])
    stored = sum(nuclei.counts.nnz for nuclei in here)
    assert DeviceBatches.n_bytes(here) == 3 * 105 * 5 * 4 + stored * 8


def test_the_order_of_nuclei_is_that_without_views() -> None:
    plain = np.concatenate(list(ShuffledBatches(50, 8, 1)))
    drawn = np.concatenate(list(ShuffledBatches(50, 8, 1, views=4)))
    np.testing.assert_array_equal(drawn % 50, plain)
    np.testing.assert_array_equal(drawn // 50, draw_views(50, 4, 1, 0)[plain])


@pytest.mark.slow
@pytest.mark.parametrize("memory", ["whole", "stream"])
def test_workers_change_no_view(tissue: PreparedTissue, tmp_path: Path, memory: str) -> None:
    augmented = with_views(tissue, tmp_path)
    alone, two = (epochs(ready(augmented, memory=memory, num_workers=n), 2) for n in (0, 2))
    for mine, theirs in zip(alone, two, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("memory", ["whole", "stream"])
def test_a_view_is_matched_to_training_as_another_slide_would_be(
    tissue: PreparedTissue, tmp_path: Path, memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datamodule, "FEWEST", 30)
    module = ready(with_views(tissue, tmp_path), memory=memory, scale="slide")
    for nuclei in module.train_sets:
        for view in nuclei.views:  # they differ from the image by a shift alone
            np.testing.assert_allclose(view[:][:, :3], nuclei.features[:][:, :3], rtol=1e-3, atol=1e-3)


def test_views_are_part_of_what_a_run_resumes_from(tissue: PreparedTissue, tmp_path: Path) -> None:
    files = cache_files(ready(with_views(tissue, tmp_path)))
    assert files["features of a in view 2"] == "a-view2.h5" and "features of v in view 1" not in files
    assert files["features of a"] == "a.h5"


def test_blocks_leave_the_views_of_validation_alone(tissue: PreparedTissue, tmp_path: Path) -> None:
    one = replace(with_views(tissue, tmp_path), train=["a"], val=[])
    module = PRTSDataModule(lambda: one, Blocks())
    module.setup()
    assert len(module.train_sets[0].views) == 2 and module.val_sets[0].views == ()
    assert len(module.train_sets[0].views[0]) == len(module.train_sets[0])
