"""A plain training loop for tries that `prts train` has no options for: neighbours, auxiliary targets, sums over spots."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import NDArray
from scipy.spatial import cKDTree
from torch import Tensor, nn

from prts.models.likelihoods import likelihoods
from prts.models.likelihoods.base import MAX_LOG_UMI, Likelihood
from prts.models.network import PRTSNet

Floats = NDArray[np.float32]

_RANK = 20
_NEIGHBOURS = 10
_SPOTS_A_STEP = 10
_HEADS, _WIDTH = 4, 16


@dataclass(frozen=True)
class Spotted:
    """Measured spots: which units lie in each, (s, n), and the UMI of each, (s, g)."""

    member: sp.csr_matrix
    umi: Floats


@dataclass(frozen=True)
class Units:
    """Nuclei or bins of a section, all in memory.

    Attributes
    ----------
    blocks
        Feature blocks, (n, d) each.
    umi
        Counts, (n, g).
    xy_um
        Centers, (n, 2).
    near, distance_um
        The nearest units of the section, (n, k), as rows of `pool`, and how far they are.
    pool
        Feature blocks of all units of the section, of which these may be some.
    spots
        None if none were measured.
    """

    blocks: dict[str, Floats]
    umi: Floats
    xy_um: NDArray[np.float64]
    near: NDArray[np.intp]
    distance_um: Floats
    pool: dict[str, Floats]
    spots: Spotted | None

    def features(self, use: Sequence[str]) -> Floats:
        """The input of a network, (n, d)."""
        return np.hstack([self.blocks[name] for name in use])


@dataclass(frozen=True)
class Setting:
    """How a network is trained."""

    use: tuple[str, ...]
    hidden: tuple[int, ...]
    dropout: float
    rank: int | None
    lr: float
    weight_decay: float
    lambda_2: float
    batch_size: int
    epochs: int
    patience: int
    one_cycle: bool
    offset: str = "none"
    near: int = 0
    spots: float = 0.0
    auxiliary: Callable[[Units], Floats] | None = None

    @classmethod
    def of(cls, cfg: Any) -> Setting:
        """The settings of a `train` config."""
        net, optimizer = cfg.model.net, cfg.model.optimizer
        return cls(
            *(tuple(cfg.data.use), tuple(net.hidden), net.dropout, net.rank, optimizer.lr, optimizer.weight_decay),
            *(cfg.loss.lambda_2, cfg.data.batch_size, cfg.trainer.max_epochs, cfg.callbacks.early_stopping.patience),
            cfg.model.scheduler is not None,
        )


class Attending(nn.Module):
    """A network that also sees an average over the nearest units, weighted by likeness and by exp(-distance / a learned length).

    Parameters
    ----------
    net
        Takes the features of a unit and, behind them, what `_HEADS` heads of `_WIDTH` numbers found around it.
    mean, scale
        Of the features, (d,).
    """

    def __init__(self, net: PRTSNet, mean: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.net, self.mean, self.scale = net, nn.Buffer(mean), nn.Buffer(scale)
        self.query, self.key, self.value = (nn.Linear(len(mean), _HEADS * _WIDTH) for _ in range(3))
        self.log_length = nn.Parameter(torch.log(torch.tensor([10.0, 30.0, 100.0, 300.0])))

    def forward(self, own: Tensor, around: Tensor, distance: Tensor) -> tuple[Tensor, ...]:
        """Outputs for units (b, d) with k neighbours (b, k, d) at distances (b, k) in um."""
        own, around = (own - self.mean) / self.scale, (around - self.mean) / self.scale
        b, k, _ = around.shape
        query = self.query(own).view(b, 1, _HEADS, _WIDTH)
        key, value = (layer(around).view(b, k, _HEADS, _WIDTH) for layer in (self.key, self.value))
        score = (query * key).sum(-1) / _WIDTH**0.5 - distance[..., None] / self.log_length.exp()
        seen = (score.softmax(dim=1)[..., None] * value).sum(dim=1).flatten(1)
        found: tuple[Tensor, ...] = self.net(torch.cat([own, seen], dim=1))
        return found


class Fitted:
    """A network and the setting it was trained with."""

    def __init__(self, net: nn.Module, likelihood: Likelihood, setting: Setting) -> None:
        self.net, self.likelihood, self.setting, self.seconds = net, likelihood, setting, 0.0

    def outputs(self, units: Units, rows: NDArray[np.intp]) -> tuple[Tensor, ...]:
        """The network's outputs for some units."""
        use, k = self.setting.use, self.setting.near
        own = torch.from_numpy(np.hstack([units.blocks[name][rows] for name in use]))
        if k == 0:
            return self.net(own)  # type: ignore[no-any-return]
        around = np.concatenate([units.pool[name][units.near[rows, :k]] for name in use], axis=2)
        return self.net(own, torch.from_numpy(around), torch.from_numpy(units.distance_um[rows, :k]))  # type: ignore[no-any-return]

    @torch.inference_mode()
    def predict(self, units: Units) -> Floats:
        """Expected UMI, (n, g)."""
        self.net.eval()
        parts = np.array_split(np.arange(len(units.umi)), -(-len(units.umi) // 2048))
        return np.concatenate([self.likelihood.mean(self.outputs(units, rows)).numpy() for rows in parts])


def untrained(train: Units, setting: Setting) -> Fitted:
    """A network that starts at the gene means."""
    likelihood = likelihoods["poisson"](lambda_2=setting.lambda_2, offset=setting.offset)
    likelihood.fit([sp.csr_matrix(train.umi)])
    features, n_genes = train.features(setting.use), train.umi.shape[1]
    mean, scale = (torch.from_numpy(part) for part in (features.mean(axis=0), features.std(axis=0).clip(1e-6)))
    wider = _HEADS * _WIDTH if setting.near else 0
    net = PRTSNet(
        *(len(mean) + wider, n_genes, setting.hidden, "released", setting.dropout, "single"),
        standardize=not setting.near,
        rank=setting.rank,
    )
    assert likelihood.start is not None
    net.start_at(likelihood.start)
    if setting.near:
        return Fitted(Attending(net, mean, scale), likelihood, setting)
    net.set_input_scaling(mean, scale)
    return Fitted(net, likelihood, setting)


def fit(train: Units, val: Units, setting: Setting, seed: int) -> Fitted:
    """Train, and keep the epoch of the best validation PCC."""
    started = time.process_time()
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    model = untrained(train, setting)
    optimizer = torch.optim.AdamW(model.net.parameters(), lr=setting.lr, weight_decay=setting.weight_decay, fused=True)
    steps = -(-len(train.umi) // setting.batch_size)
    schedule = (
        torch.optim.lr_scheduler.OneCycleLR(optimizer, setting.lr, total_steps=steps * setting.epochs)
        if setting.one_cycle
        else None
    )
    helping = None if setting.auxiliary is None else setting.auxiliary(train)
    best, since, kept = -1.0, 0, copy.deepcopy(model.net.state_dict())
    for _ in range(setting.epochs):
        model.net.train()
        for rows in np.array_split(rng.permutation(len(train.umi)), steps):
            loss = _loss(model, train, rows, helping)
            if setting.spots:
                loss = loss + setting.spots * _spot_loss(model, train, rng)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if schedule is not None:
                schedule.step()
        found = pcc(val.umi, model.predict(val))
        since += 1
        if found > best:
            best, since, kept = found, 0, copy.deepcopy(model.net.state_dict())
        if since >= setting.patience:
            break
    model.net.load_state_dict(kept)
    model.seconds = time.process_time() - started
    return model


def _loss(model: Fitted, train: Units, rows: NDArray[np.intp], helping: Floats | None) -> Tensor:
    outputs = model.outputs(train, rows)
    loss = model.likelihood.loss(outputs, torch.from_numpy(train.umi[rows]))["loss"]
    if helping is None:
        return loss
    level = outputs[0].clamp(max=MAX_LOG_UMI)
    return loss + (level.exp() - torch.from_numpy(helping[rows]) * level).mean()


def _spot_loss(model: Fitted, train: Units, rng: np.random.Generator) -> Tensor:
    """Poisson loss of some spots, whose rate is the sum of their nuclei, for each nucleus and gene."""
    assert train.spots is not None
    member, measured = train.spots.member, train.spots.umi
    in_nuclei = (member @ train.umi).sum() / measured.sum()  # UMI between nuclei are in no nucleus
    chosen = rng.choice(len(measured), min(_SPOTS_A_STEP, len(measured)), replace=False)
    rows = np.unique(member[chosen].indices)
    rate = model.outputs(train, rows)[0].clamp(max=MAX_LOG_UMI).exp()
    summed = torch.from_numpy(member[chosen][:, rows].toarray()) @ rate
    counts = torch.from_numpy(measured[chosen] * in_nuclei)
    return (summed - counts * torch.log(summed + 1e-6)).mean() * (len(chosen) / len(rows))


def pcc(measured: Floats, predicted: Floats) -> float:
    """Mean per-gene PCC of log1p over genes that vary."""
    x, y = np.log1p(measured), np.log1p(predicted)
    x, y = x - x.mean(axis=0), y - y.mean(axis=0)
    norm = np.sqrt((x * x).sum(axis=0) * (y * y).sum(axis=0))
    varies = (x * x).sum(axis=0) > 0
    return float(np.divide((x * y).sum(axis=0), norm, out=np.zeros_like(norm), where=norm > 0)[varies].mean())


def of_neighbours(train: Units) -> Floats:
    """Mean counts of a unit and the nearest ones among the training units."""
    near = cKDTree(train.xy_um).query(train.xy_um, _NEIGHBOURS + 1)[1]
    return np.mean([train.umi[near[:, k]] for k in range(_NEIGHBOURS + 1)], axis=0, dtype=np.float32)


def of_low_rank(train: Units) -> Floats:
    """Counts whose log1p is of low rank, with the gene means of the measured ones."""
    log = torch.from_numpy(np.log1p(train.umi))
    mean = log.mean(dim=0)
    torch.manual_seed(0)
    u, s, v = torch.pca_lowrank(log, _RANK)
    smooth = torch.expm1((u * s @ v.T + mean).clamp(min=0)).numpy()
    return smooth * (train.umi.mean(axis=0) / smooth.mean(axis=0).clip(1e-6))


def matched(units: Units, train: Units, *, spread: bool) -> Units:
    """Units whose features have the mean, or mean and spread, of training."""
    blocks = {}
    for name, own in units.blocks.items():
        reference = train.blocks[name]
        ratio = reference.std(axis=0) / own.std(axis=0).clip(1e-6) if spread else np.float32(1)
        blocks[name] = (own - own.mean(axis=0)) * ratio + reference.mean(axis=0)
    return replace(units, blocks=blocks)


@torch.inference_mode()
def with_own_batch_statistics(model: Fitted, units: Units) -> Fitted:
    """The model with the batch normalization statistics of these units."""
    adapted = copy.deepcopy(model)
    for layer in adapted.net.modules():
        if isinstance(layer, nn.BatchNorm1d):
            layer.reset_running_stats()
            layer.momentum = None
            layer.train()
    adapted.outputs(units, np.arange(len(units.umi)))
    return adapted
