"""How often the network runs: once for each batch of an epoch, once for each nucleus of a prediction."""

from __future__ import annotations

from functools import partial

import numpy as np
import scipy.sparse as sp
import torch

from prts.data.datamodule import PRTSDataModule
from prts.data.nucleus_set import NucleusSet
from prts.models.likelihoods.paper import Paper
from prts.models.module import PRTSModule
from prts.models.network import PRTSNet
from prts.models.output import OutputRule
from prts.models.predictor import Predictor


def _nuclei(n: int, genes: int) -> NucleusSet:
    rng = np.random.default_rng(n)
    return NucleusSet(
        section=str(n),
        cell_id=np.arange(n).astype(str).astype(object),
        xy_um=np.zeros((n, 2)),
        features=rng.standard_normal((n, 8), dtype=np.float32),
        counts=sp.csr_matrix(rng.poisson(0.3, (n, genes)).astype(np.int32)),
        total_counts=np.full(n, 10),
        area_um2=np.full(n, 50.0),
    )


def test_work_an_epoch_passes_each_batch_once() -> None:
    import pytorch_lightning as pl  # not before prts, which mends a torchvision that does not match torch

    data = PRTSDataModule(lambda: None, lambda *_: {}, batch_size=64)
    data.train_sets, data.val_sets = [_nuclei(300, 5)], [_nuclei(100, 5)]
    passed: list[int] = []
    net = PRTSNet(8, 5, hidden=(4,))
    net.register_forward_hook(lambda _net, given, _made: passed.append(len(given[0])))
    module = PRTSModule(net, Paper(target="counts"), partial(torch.optim.AdamW, lr=0.01))
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = pl.Trainer(max_epochs=1, accelerator="cpu", num_sanity_val_steps=0, log_every_n_steps=1, **quiet)

    trainer.fit(module, data.train_dataloader(), data.val_dataloader())

    assert passed == [64, 64, 64, 64, 44, 64, 36]  # training, then validation


def test_work_a_prediction_passes_each_nucleus_once() -> None:
    net, passed = PRTSNet(8, 5, hidden=(4,)), []
    net.register_forward_hook(lambda _net, given, _made: passed.append(len(given[0])))
    predictor = Predictor(net, Paper(target="counts"), OutputRule("none", 0.5))

    chunks = list(predictor.predict_chunks(np.zeros((1000, 8), np.float32), chunk=400))

    assert passed == [len(umi) for umi, _ in chunks] == [400, 400, 200]
