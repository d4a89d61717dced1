"""Train an encoder: low-rank updates of its last blocks, together with the network that reads it, on tiles read from the slides.

First the network is fitted on the features of the encoder as it is. Training both from there keeps the gradients of an untrained network
from spoiling the encoder (Kumar et al. 2022), and the network can keep its standardization and the statistics of its batch normalization,
which the few tiles of a batch would not give.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader

from prts.data.batches import Batch, OrderedBatches, Share, ShuffledBatches
from prts.data.tile_batches import OrderedTiles, Seen, ShuffledTiles, TileBatches, TiledNuclei
from prts.errors import ParameterError
from prts.features.adapter import add_adapter, save_adapter
from prts.io.cache import atomic
from prts.models.distributed import synchronize
from prts.models.fit import fit
from prts.models.module import EpochHistory, KeepBest, PRTSModule
from prts.models.slurm import own_processes
from prts.progress import working

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from prts.data.datamodule import PRTSDataModule
    from prts.data.nucleus_set import NucleusSet
    from prts.features.encoders.tokens import TokenEncoder
    from prts.features.token_network import TokenNetwork
    from prts.models.fit import Recipe
    from prts.models.network import PRTSNet

logger = logging.getLogger(__name__)

_TILES = {"grid": 4, "exact": 32}


@dataclass(frozen=True)
class FinetuneSettings:
    """How an encoder is trained.

    Parameters
    ----------
    rank, alpha
        Rank of the updates, and the factor `alpha / rank` that scales them.
    blocks
        Transformer blocks that are trained, counted from the last.
    epochs
        Passes over the training tiles.
    lr, weight_decay
        Of AdamW. The learning rate is the highest of a one-cycle schedule.
    tiles
        Tiles per batch; None for 4 of a grid, or 32 with a nucleus each.
    augment
        Whether tiles are turned, mirrored, restained, brighter or darker and blurred at random.
    validation
        Validation nuclei, at most about this many, on whose PCC the best epoch is chosen: those of every so many tiles.
    seed
        Seed of initial weights, order and augmentation.
    """

    rank: int = 8
    alpha: float = 16.0
    blocks: int = 4
    epochs: int = 6
    lr: float = 1e-4
    weight_decay: float = 0.05
    tiles: int | None = None
    augment: bool = True
    validation: int = 30_000
    seed: int = 0

    def settings(self) -> dict[str, Any]:
        """All of them, JSON-like."""
        return asdict(self)


class TunedNetwork(nn.Module):
    """An encoder and the network that reads its features, trained together.

    Parameters
    ----------
    encoder
        Says how features are pooled.
    tokens
        Its network, with an adapter.
    head
        The fitted network.
    widths
        Width of each block of the head's input, in its order. Blocks that do not come from the tile of the nucleus stay as they are: those
        that are not the encoder's, and on a grid the global vector, which comes from several tiles.
    """

    def __init__(self, encoder: TokenEncoder, tokens: TokenNetwork, head: PRTSNet, widths: Mapping[str, int]) -> None:
        super().__init__()
        self.tokens, self.head = tokens, head
        self._encoder, self._widths = encoder, dict(widths)
        self._stops = tuple(accumulate(widths.values()))[:-1]

    def train(self, mode: bool = True) -> TunedNetwork:
        """Train with dropout in the head only, and with the statistics that its batch normalization has."""
        super().train(mode)
        self.tokens.eval()
        for module in self.head.modules():
            if isinstance(module, nn.BatchNorm1d):
                module.eval()
        return self

    def forward(self, seen: Seen) -> tuple[Tensor, ...]:
        """The head's outputs, (b, g) each."""
        pooled, patches = self.tokens(seen.tiles)
        if self._encoder.sampling == "grid":
            made = {"local": self._encoder.local_vectors(patches, seen.polygons, seen.tile)}
        else:
            n = len(seen)
            made = {
                "local": self._encoder.local_vectors(patches[:n], seen.polygons, None),
                "global": pooled[:n].float(),
            }
        stored = zip(self._widths, torch.tensor_split(seen.features, self._stops, dim=1), strict=True)
        outputs: tuple[Tensor, ...] = self.head(torch.cat([made.get(block, values) for block, values in stored], dim=1))
        return outputs


def check_trainable(encoder: TokenEncoder, settings: FinetuneSettings) -> None:
    """Refuse an encoder without weights or enough transformer blocks, before any work.

    Raises
    ------
    ParameterError
        If the weights are missing, or the encoder cannot be trained so.
    """
    _with_adapter(encoder, settings)


def finetune(
    recipe: Recipe, settings: FinetuneSettings, datamodule: PRTSDataModule, encoder: TokenEncoder, out: Path
) -> None:
    """Train an encoder and write its adapter, and next to it the curve, a `.csv`.

    Parameters
    ----------
    recipe
        The network that reads the features, and Lightning's Trainer.
    settings
        How the encoder is trained.
    datamodule
        The data, set up with the features of the encoder as it is.
    encoder
        The encoder.
    out
        The `.safetensors` to write.

    Raises
    ------
    ParameterError
        If training diverged or ended before its first step.
    """
    fitted = fit(replace(recipe, callbacks=copy.deepcopy(recipe.callbacks)), datamodule)
    tokens = _with_adapter(encoder, settings)
    data = _TileData(datamodule, encoder, settings)
    net = TunedNetwork(encoder, tokens, fitted.net, datamodule.feature_widths)
    module = PRTSModule(net, fitted.likelihood, partial(_optimizer, settings), _schedule(settings))
    history, best = EpochHistory(), KeepBest("val/pcc", "max")
    trainer = recipe.trainer(
        max_epochs=settings.epochs,
        max_steps=-1,
        callbacks=[best, history, _Progress()],
        logger=False,
        use_distributed_sampler=False,
        **own_processes(recipe.trainer),
    )
    if trainer.world_size > 1:
        synchronize(net)
    n_tiles = [sum(len(part.used) for part in parts) for parts in (data.train, data.val)]
    n_weights = sum(weight.numel() for weight in tokens.parameters() if weight.requires_grad)
    logger.info("training the encoder: %d weights on %d tiles, validation on %d", n_weights, *n_tiles)
    with data.reading():
        (before,) = trainer.validate(module, datamodule=data, verbose=False)[:1]
        logger.info("the encoder as it is: val/loss %.4f, val/pcc %.4f", before["val/loss"], before["val/pcc"])
        trainer.fit(module, datamodule=data)
    if trainer.global_step == 0:
        raise ParameterError(
            "finetune", "epochs", "training ended before its first step; there are fewer than two tiles"
        )
    if trainer.is_global_zero:
        _write(out, tokens, _curve(before, history.table()))
    trainer.strategy.barrier()


def _with_adapter(encoder: TokenEncoder, settings: FinetuneSettings) -> TokenNetwork:
    tokens = encoder.network()
    add_adapter(tokens.network, rank=settings.rank, alpha=settings.alpha, blocks=settings.blocks)
    return tokens


def _optimizer(settings: FinetuneSettings, parameters: Any) -> torch.optim.Optimizer:
    trained = [weight for weight in parameters if weight.requires_grad]
    return torch.optim.AdamW(trained, lr=settings.lr, weight_decay=settings.weight_decay)


def _schedule(settings: FinetuneSettings) -> Callable[..., Any]:
    return partial(OneCycleLR, max_lr=settings.lr, pct_start=0.2)


def _curve(before: Mapping[str, float], epochs: pd.DataFrame) -> pd.DataFrame:
    """One row per epoch, counted from 1, after a row 0 for the encoder as it was; the best is marked."""
    start = {"epoch": 0, **{name: before[name] for name in ("val/loss", "val/pcc")}}
    rows = pd.concat([pd.DataFrame([start]), epochs.assign(epoch=epochs["epoch"] + 1)], ignore_index=True)
    rows = rows[["epoch", "train/loss", "val/loss", "val/pcc"]]
    return rows.assign(best=rows.index == rows["val/pcc"].idxmax())


def _write(out: Path, tokens: TokenNetwork, curve: pd.DataFrame) -> None:
    start, best = curve["val/pcc"].iloc[0], curve[curve["best"]].iloc[0]
    if best["epoch"] == 0:
        logger.warning(
            "training the encoder did not improve validation (PCC %.4f before, at best %.4f after an epoch): it stays as it was; try a "
            "smaller finetune.lr, or omit finetune",
            *(start, curve["val/pcc"].iloc[1:].max()),
        )
    else:
        logger.info(
            "trained the encoder: val/pcc %.4f before, %.4f after epoch %d", start, best["val/pcc"], best["epoch"]
        )
    with atomic(out.with_suffix(".csv")) as path:
        curve.to_csv(path, index=False)
    with atomic(out) as path:
        save_adapter(path, tokens.network)


class _TileData(pl.LightningDataModule):
    """Tiles of the training sections, and some of those of the validation sections."""

    def __init__(self, datamodule: PRTSDataModule, encoder: TokenEncoder, settings: FinetuneSettings) -> None:
        super().__init__()
        self._settings, self._mpp, self._num_workers = settings, encoder.mpp, datamodule.num_workers
        self._per_batch = settings.tiles or _TILES[encoder.sampling]

        def laid(sets: Sequence[NucleusSet]) -> list[TiledNuclei]:
            return [TiledNuclei.lay(datamodule.tissue.sections[part.section], part, encoder) for part in sets]

        self.train = laid(datamodule.train_sets)
        step = -(-sum(map(len, datamodule.val_sets)) // settings.validation)
        self.val = [part.thinned(step) for part in laid(datamodule.val_sets)]
        seed = settings.seed if settings.augment else None
        self._read = TileBatches(self.train, self._mpp, seed)
        self._read_val = [TileBatches([part], self._mpp, None) for part in self.val]

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Close the slides at the end."""
        with ExitStack() as stack:
            for batches in (self._read, *self._read_val):
                stack.callback(batches.close)
            yield

    def train_dataloader(self) -> DataLoader[Batch]:
        """Shuffled tiles of all training sections together."""
        order = ShuffledBatches(
            len(self._read), self._per_batch * self._share.processes, self._settings.seed, 0, self._share
        )
        return self._loader(self._read, ShuffledTiles(order))

    def val_dataloader(self) -> list[DataLoader[Batch]]:
        """One loader per section."""
        size = self._per_batch * self._share.processes
        return [
            self._loader(read, OrderedTiles(OrderedBatches(len(read), size, self._share))) for read in self._read_val
        ]

    @property
    def _share(self) -> Share:
        return Share() if self.trainer is None else Share(self.trainer.global_rank, self.trainer.world_size)

    def _loader(self, read: TileBatches, sampler: ShuffledTiles | OrderedTiles) -> DataLoader[Batch]:
        return DataLoader(
            read,
            batch_size=None,  # the sampler's items are batches already
            sampler=sampler,
            generator=torch.Generator().manual_seed(self._settings.seed),
            num_workers=self._num_workers,
            persistent_workers=self._num_workers > 0,
        )


class _Progress(pl.Callback):
    """Shows how far training is."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._advance: Callable[[], None] = lambda: None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin."""
        if trainer.is_global_zero:
            total = trainer.num_training_batches * (trainer.max_epochs or 1)
            self._advance = self._stack.enter_context(working("training the encoder", total))

    def on_train_batch_end(self, trainer: pl.Trainer, *given: Any) -> None:
        """Advance."""
        self._advance()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Finish."""
        self._stack.close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Finish."""
        self._stack.close()
