"""Train the encoder of a training plan before its features are extracted, or find it trained in the cache."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytorch_lightning.utilities import rank_zero_only

from prts.errors import ParameterError
from prts.features.encoders import TokenEncoder
from prts.io.cache import atomic, fingerprint, lock
from prts.models.checkpoint import cache_files
from prts.models.finetune import check_trainable, finetune
from prts.models.module import seed_everything

if TYPE_CHECKING:
    from prts.api.training_plan import TrainingPlan
    from prts.data.datamodule import PRTSDataModule
    from prts.features.encoders import Encoder
    from prts.models.fit import Recipe

logger = logging.getLogger(__name__)

CURVE = "finetune.csv"
_VERSION = 1
_WATCHED = ("monitor", "mode", "patience")


def with_trained_encoder(
    plan: TrainingPlan, load: Callable[[TrainingPlan], PRTSDataModule], folder: Path
) -> TrainingPlan:
    """The plan with the encoder trained as its `finetune` says, and nothing left to train of it.

    The adapter is in the cache under a fingerprint of all that decides it; the seed of the run does not, `finetune.seed` does.

    Parameters
    ----------
    plan
        The plan.
    load
        Prepares and loads the data of a plan.
    folder
        The run folder, which gets the curve, `finetune.csv`.

    Raises
    ------
    ParameterError
        If the encoder cannot be trained, or training fails.
    """
    assert plan.finetune is not None
    encoder = trainable_encoder(plan.preparation.encoder)
    check_trainable(encoder, plan.finetune)
    seed_everything(plan.finetune.seed)
    # features that change with every step have no mean over a slide: slides are matched once the encoder is trained
    datamodule = load(replace(plan, data=replace(plan.data, scale="training")))
    decides = {
        "version": _VERSION,
        "encoder": encoder.settings(),
        "finetune": plan.finetune.settings(),
        "data": {"use": datamodule.use, "batch_size": datamodule.batch_size},
        "split": plan.preparation.splitter.settings(),
        "recipe": _described(plan.recipe),
        "cache": cache_files(datamodule),
    }
    root = plan.preparation.cache_dir / datamodule.tissue.name
    path = root / f"adapter-{encoder.name}-{fingerprint(decides)}.safetensors"
    is_first = getattr(rank_zero_only, "rank", 0) == 0
    # the other processes of a DDP job take part in the training
    with lock(path) if is_first else nullcontext():
        if path.exists():
            logger.info("the encoder is trained already: %s", path)
        else:
            finetune(plan.recipe, plan.finetune, datamodule, encoder, path)
    if is_first:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic(folder / CURVE) as temporary:
            shutil.copyfile(path.with_suffix(".csv"), temporary)
    seed_everything(plan.recipe.seed)
    preparation = replace(plan.preparation, encoder=encoder.adapted(path))
    prepare = partial(plan.prepare, settings=preparation)
    return replace(plan, preparation=preparation, prepare=prepare, finetune=None)


def _described(recipe: Recipe) -> dict[str, Any]:
    """What decides how the network is fitted, as text; not the seed, in place of which there is that of `finetune`."""
    made = {
        "network": recipe.network,
        "optimizer": recipe.optimizer,
        "scheduler": recipe.scheduler,
        "trainer": recipe.trainer,
    }
    return {
        **{
            name: {key: str(value) for key, value in getattr(make, "keywords", {}).items()}
            for name, make in made.items()
        },
        "likelihood": recipe.likelihood.settings(),
        "callbacks": [
            (type(each).__name__, *(str(getattr(each, key, None)) for key in _WATCHED)) for each in recipe.callbacks
        ],
    }


def check_finetune(plan: TrainingPlan) -> None:
    """Refuse a plan whose encoder cannot be trained, before any work.

    Raises
    ------
    ParameterError
        If the model is a baseline, no features of the input come from the encoder's tile, or they are changed before they are used.
    """
    if plan.recipe.baseline is not None:
        problem = (
            f"needs a network to train the encoder with, not {plan.recipe.baseline}; use model=mlp, or omit finetune"
        )
        raise ParameterError("finetune", "", problem)
    if not {"local", "global"} & {*plan.data.use}:
        problem = f"{list(plan.data.use)} reads nothing from the encoder; add local, or omit finetune"
        raise ParameterError("data", "use", problem)
    encoder = trainable_encoder(plan.preparation.encoder)
    if "local" not in plan.data.use and encoder.sampling == "grid":
        problem = "has only global, which on a grid comes from several tiles; add local, or use encoder.sampling=exact"
        raise ParameterError("data", "use", problem)
    if plan.data.permute:
        raise ParameterError("data", "permute", "shuffles features, which finetune computes; omit one of them")


def trainable_encoder(encoder: Encoder) -> TokenEncoder:
    """The encoder, if it can have an adapter.

    Raises
    ------
    ParameterError
        If it has no tokens, has an adapter already, or reads tiles at several um/px.
    """
    if not isinstance(encoder, TokenEncoder):
        raise ParameterError(
            "finetune",
            "",
            f"the encoder {encoder.name} has no weights to train; choose one with a ViT, or omit finetune",
        )
    if encoder.adapter is not None:
        raise ParameterError("encoder", "adapter", "cannot be trained further; omit it, or omit finetune")
    if encoder.scales:
        raise ParameterError("encoder", "scales", "cannot be trained; give one um/px as encoder.mpp, or omit finetune")
    return encoder
