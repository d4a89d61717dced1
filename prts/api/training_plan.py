"""All that decides what a training run learns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from prts.errors import ParameterError
from prts.evaluation.settings import EvaluationSettings

if TYPE_CHECKING:
    from prts.data.memory import Memory
    from prts.data.prepare import PreparedTissue, PrepareSettings
    from prts.models.finetune import FinetuneSettings
    from prts.models.fit import Recipe
    from prts.stopwatch import Stopwatch


class Prepare(Protocol):
    """Prepares the sections of a plan, or finds them prepared."""

    def __call__(self, stopwatch: Stopwatch, settings: PrepareSettings | None = None) -> PreparedTissue:
        """Prepare as the plan says, or with other settings."""
        ...


@dataclass(frozen=True)
class DataSettings:
    """What the network sees of a nucleus, and in what portions.

    Parameters
    ----------
    use
        Blocks of features in the order of the network's input: `local`, `global`, `morphology` and `context`.
    scale
        `training`: features as they are; `slide`: those of each slide shifted and scaled to the mean and spread of training.
    permute
        Shuffle features among training nuclei: what remains is knowledge of no image.
    batch_size
        Nuclei per batch.
    num_workers
        Processes that gather batches.
    memory
        Whether features and counts are loaded (`whole`), stay on disk (`stream`), or whichever the available memory allows (`auto`).
    chunk, buffer
        Consecutive nuclei that are read together from disk, and nuclei that are shuffled together.
    """

    use: tuple[str, ...] = ("local", "global", "morphology")
    scale: Literal["training", "slide"] = "training"
    permute: bool = False
    batch_size: int = 256
    num_workers: int = 0
    memory: Memory = "auto"
    chunk: int = 128
    buffer: int = 16_384


@dataclass(frozen=True)
class TrainingPlan:
    """All that decides what a run learns.

    Parameters
    ----------
    prepare
        Prepares the sections, or finds them prepared.
    preparation
        How they are prepared.
    data
        What the network sees.
    recipe
        Network, likelihood, optimizer and trainer.
    evaluation
        How validation and test are scored.
    markers
        Genes whose mean PCC is reported separately.
    finetune
        How the encoder is trained before its features are extracted; None: it is used as it is.
    config
        The settings as the user wrote them, for config.yaml and provenance; JSON-like.

    Raises
    ------
    ParameterError
        If nuclei are to have exposures, which the likelihood cannot take, or views, which nothing would read, or the encoder cannot be
        trained.
    """

    prepare: Prepare
    preparation: PrepareSettings
    data: DataSettings
    recipe: Recipe
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    markers: tuple[str, ...] = ()
    finetune: FinetuneSettings | None = None
    config: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        likelihood = self.recipe.likelihood
        if self.preparation.exposure and not (likelihood.takes_exposure and self.recipe.baseline is None):
            raise ParameterError(
                "counts",
                "exposure",
                "needs a network with the Poisson likelihood; use loss=poisson without an offset, or leave counts.exposure=false",
            )
        if self.preparation.augment and self.recipe.baseline is not None:
            problem = f"has no effect on {self.recipe.baseline}, which is fitted without epochs; leave it at 0"
            raise ParameterError("encoder", "augment", problem)
        if self.preparation.augment and self.data.permute:
            problem = "shuffles the features of the unchanged image only; leave encoder.augment at 0"
            raise ParameterError("data", "permute", problem)
        if self.finetune is not None:
            from prts.api.finetune import check_finetune

            check_finetune(self)
