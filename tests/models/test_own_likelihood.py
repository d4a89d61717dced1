"""A likelihood from outside the package is one class: registered by the decorator or by an entry point."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch

from prts.data.datamodule import PRTSDataModule
from prts.data.nucleus_set import NucleusSet
from prts.errors import InputError, ParameterError
from prts.models.bundle import Bundle, load_bundle, save_bundle
from prts.models.fit import Recipe, fit
from prts.models.likelihoods import likelihoods
from prts.models.module import KeepBest
from prts.models.network import PRTSNet
from prts.models.output import choose_output

SOURCE = '''
"""Negative binomial counts with a dispersion for each gene and nucleus: three outputs."""
import torch

from prts.arguments import checked
from prts.models.likelihoods import likelihoods
from prts.models.likelihoods.base import Likelihood, PositiveWeight, Weight, cross_entropy


@likelihoods.register("negative_binomial")
class NegativeBinomial(Likelihood):
    outputs = ("level", "logit", "dispersion")
    allowed_heads = ("dual",)
    allowed_gates = ("none",)

    @checked("likelihood")
    def __init__(self, lambda_1: PositiveWeight = 1.0, lambda_2: Weight = 1.0) -> None:
        super().__init__(lambda_1, lambda_2)

    def loss(self, outputs, counts):
        level, logit, dispersion = outputs
        size = torch.nn.functional.softplus(dispersion) + 1e-3
        total = torch.log(size + level.exp())
        terms = torch.lgamma(counts + size) - torch.lgamma(size) - torch.lgamma(counts + 1)
        terms = terms + size * (size.log() - total) + counts * (level - total)
        return self.weighted_sum(-terms.mean(), cross_entropy(logit, counts))

    def mean(self, outputs):
        return outputs[0].clamp(max=15).exp()
'''


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A package with the likelihood, as pip would leave it: a module and its dist-info."""
    site = tmp_path / "site"
    info = site / "counts_plugin-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "counts_plugin.py").write_text(SOURCE)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: counts-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[prts.likelihoods]\nnegative_binomial = counts_plugin:NegativeBinomial\n")
    monkeypatch.syspath_prepend(str(site))
    yield "negative_binomial"
    sys.modules.pop("counts_plugin", None)
    likelihoods._members.pop("negative_binomial", None)


def data(train: NucleusSet, val: NucleusSet) -> PRTSDataModule:
    """Set up without a prepared tissue."""
    module = PRTSDataModule(lambda: None, lambda *_: {}, batch_size=64)
    module.train_sets, module.val_sets, module._is_set_up = [train], [val], True
    module.feature_widths = {"local": train.features.shape[1]}
    module.panel = type("Panel", (), {"genes": [str(gene) for gene in range(train.counts.shape[1])]})()
    return module


def trained(folder: Path, train: NucleusSet, val: NucleusSet, name: str) -> tuple[Bundle, np.ndarray]:
    """A saved and loaded model, and what it predicted of the validation nuclei before."""
    pl.seed_everything(0, verbose=False)
    quiet = dict.fromkeys(("enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    recipe = Recipe(
        network=partial(PRTSNet, hidden=(32,), dropout=0.0),
        likelihood=likelihoods[name](),
        optimizer=partial(torch.optim.AdamW, lr=0.01),
        trainer=partial(pl.Trainer, accelerator="cpu", max_epochs=8, **quiet),
        callbacks=[KeepBest()],
    )
    fitted = fit(recipe, data(train, val))
    rule = choose_output(fitted.net, fitted.likelihood, [val], fitted.output)
    n = train.counts.shape[1]
    save_bundle(
        folder,
        net=fitted.net,
        likelihood=fitted.likelihood,
        rule=rule,
        genes=[(f"g{gene}", f"id{gene}") for gene in range(n)],
        metadata={
            **{key: {} for key in ("encoder", "segmentation", "qc", "split", "validation")},
            **dict.fromkeys(("tissue", "species", "pooling"), "demo"),
            "encoder_weights": None,
            "mpp": 0.5,
            "tile": 256,
            "seed": 0,
            "train_sections": ["s1"],
            "input": {"use": ["local"], "widths": {"local": train.features.shape[1]}},
        },
    )
    with torch.no_grad():
        outputs = fitted.net.eval()(torch.from_numpy(val.features))
    assert len(outputs) == fitted.likelihood.n_outputs == 3
    return load_bundle(folder), fitted.likelihood.mean(outputs).numpy()


def test_an_installed_likelihood_trains_is_shipped_and_predicts(
    installed: str, tmp_path: Path, poisson_nuclei: Callable[..., NucleusSet]
) -> None:
    assert installed in likelihoods
    train, val = poisson_nuclei(800, 1, mean=2.0), poisson_nuclei(200, 2, mean=2.0)
    bundle, before = trained(tmp_path / "model", train, val, installed)
    umi, prob = bundle.predict_all(val.features)
    np.testing.assert_allclose(umi, before, rtol=1e-4)
    assert bundle.rule.gate == "none" and prob.shape == umi.shape
    pcc = [
        np.corrcoef(np.log1p(umi[:, gene]), np.log1p(val.counts[:, [gene]].toarray().ravel()))[0, 1]
        for gene in range(20)
    ]
    assert np.mean(pcc) > 0.3
    assert bundle.metadata["likelihood"] == {"name": installed, "lambda_1": 1.0, "lambda_2": 1.0}


def test_a_bundle_whose_likelihood_is_not_installed_names_it(
    installed: str, tmp_path: Path, poisson_nuclei: Callable[..., NucleusSet], monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(tmp_path / "model", poisson_nuclei(100, 1), poisson_nuclei(50, 2), installed)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != str(tmp_path / "site")])
    likelihoods._members.pop(installed)
    with pytest.raises(
        InputError, match=r"model\.json: likelihood 'negative_binomial' is not one of .*install the package"
    ):
        load_bundle(tmp_path / "model")


def test_a_likelihood_of_a_notebook_is_registered_by_the_decorator() -> None:
    namespace: dict[str, object] = {"__name__": "notebook"}
    exec(compile(SOURCE, "a cell", "exec", dont_inherit=True), namespace)
    try:
        assert likelihoods["negative_binomial"] is namespace["NegativeBinomial"]
        with pytest.raises(ParameterError, match="likelihood lambda_1: -1"):
            likelihoods["negative_binomial"](lambda_1=-1)
        with pytest.raises(ParameterError, match="network heads: 'single' does not go with the negative_binomial"):
            likelihoods["negative_binomial"]().require(heads="single")
    finally:
        likelihoods._members.pop("negative_binomial")
