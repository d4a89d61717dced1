"""Turn arguments of the Python API into a training plan, with the defaults of `experiment=best`."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from prts.errors import InputError, ParameterError, did_you_mean

if TYPE_CHECKING:
    from prts.api.training_plan import TrainingPlan
    from prts.data.prepare import PanelBuilder, PreparedTissue
    from prts.data.splits import Roles, Splitter
    from prts.features.encoders import Encoder
    from prts.models.finetune import FinetuneSettings
    from prts.models.fit import Recipe
    from prts.models.likelihoods import Likelihood
    from prts.platforms.bin_owners import CountSettings
    from prts.preprocess.counts import QCSettings
    from prts.section import Section
    from prts.segmentation.segment import Segmenter
    from prts.stopwatch import Stopwatch

logger = logging.getLogger(__name__)

# The values of configs/experiment/best.yaml; a test compares them.
NETWORK: dict[str, Any] = {
    "hidden": (256, 256, 256),
    "order": "released",
    "dropout": 0.5,
    "heads": "single",
    "standardize": True,
}
FEATURES = ("local", "global", "morphology")
"""Blocks that a model uses by default; `prts.features.feature_reader.BLOCKS` are all that there are."""


@dataclass(frozen=True)
class FitSettings:
    """How a network is fitted.

    Parameters
    ----------
    max_epochs
        Maximum number of passes over the training nuclei.
    patience
        Stop after this many epochs without a better validation PCC; the weights of the best epoch are kept.
    learning_rate, weight_decay
        Of AdamW.
    batch_size
        Nuclei per batch.
    memory
        `whole`: load features and counts. `stream`: leave them on disk, for more nuclei than memory. `auto`: decide by size.
    scale
        `slide`: the features of each slide are shifted and scaled, so that their mean and spread over the slide are those of training, here
        and in `predict`. `training`: features as they are.
    seed
        Seed of initial weights, order of nuclei and dropout.
    finetune
        Train the encoder, too, before its features are extracted (`prts.models.finetune.FinetuneSettings`); None: use it as it is.
    trainer
        Further arguments of Lightning's Trainer, such as `{"accelerator": "gpu", "devices": 2}`.
    """

    max_epochs: int = 40
    patience: int = 10
    learning_rate: float = 0.003
    weight_decay: float = 0.05
    batch_size: int = 256
    memory: Literal["auto", "whole", "stream"] = "auto"
    scale: Literal["training", "slide"] = "slide"
    seed: int = 0
    finetune: FinetuneSettings | None = None
    trainer: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class SectionSettings:
    """How sections are prepared.

    Parameters
    ----------
    nuclei
        A segmenter or its name; None: bins if the sections were read with `units="bins"`, else a section's own nuclei if it has some,
        else StarDist.
    genes
        The panel: a number (the most variable genes), a list of genes, a file with one, or a panel builder.
    qc
        Limits of quality control; None: the paper's, or `QCSettings.for_bins`.
    register
        Correct the shift between bins and nuclei. It is measured and reported either way.
    artefacts
        Leave out nuclei on glass, in folds, under bubbles or pen, out of focus or merged.
    counting
        Which bins are counted for a nucleus (`prts.platforms.bin_owners.CountSettings`), such as those of Space Ranger 4's cells;
        None: those in the nucleus.
    exposure
        Model rows and columns of the array that capture more or fewer UMIs as an offset of the Poisson likelihood.
    check_image
        Refuse images that cannot be H&E.
    augment
        Views of each training image to read besides it (`prts.features.views`); each epoch draws one for each nucleus. N views take N + 1
        times the extraction and the disk space.
    """

    nuclei: Segmenter | str | None = None
    genes: int | Sequence[str] | Path | str | PanelBuilder = 1000
    qc: QCSettings | None = None
    register: bool = False
    artefacts: bool = False
    counting: CountSettings | None = None
    exposure: bool = False
    check_image: bool = True
    augment: int = 0


def check_features(features: Sequence[str]) -> tuple[str, ...]:
    """Check that feature blocks are known and not repeated.

    Raises
    ------
    ParameterError
        If a name is unknown or repeated.
    """
    from prts.features.feature_reader import BLOCKS

    unknown = [name for name in features if name not in BLOCKS]
    if isinstance(features, str) or unknown or not features or len(set(features)) < len(features):
        hint = did_you_mean(unknown[0], BLOCKS) if unknown and not isinstance(features, str) else ""
        raise ParameterError("", "features", f"{features!r} must list some of {', '.join(BLOCKS)}, each once{hint}")
    return tuple(features)


def usable_features(features: Sequence[str], segmenter: Segmenter) -> tuple[str, ...]:
    """The blocks of features that tell units apart: not the morphology of bins.

    Parameters
    ----------
    features
        Some of `FEATURES`.
    segmenter
        What finds the units.

    Raises
    ------
    ParameterError
        If nothing is left.
    """
    from prts.segmentation.bins import Bins

    if not isinstance(segmenter, Bins) or "morphology" not in features:
        return tuple(features)
    kept = tuple(name for name in features if name != "morphology")
    if not kept:
        raise ParameterError(
            "data", "use", "morphology alone does not tell bins apart, which are equal squares; add local or global"
        )
    logger.info("bins are equal squares: without the features of morphology")
    return kept


def split_settings(given: Mapping[str, Any]) -> tuple[FitSettings, SectionSettings]:
    """Split keyword arguments into the two groups of settings.

    Raises
    ------
    ParameterError
        If an argument belongs to neither.
    """
    fit, section = ({field.name for field in fields(kind)} for kind in (FitSettings, SectionSettings))
    for name in given:
        if name not in fit | section:
            raise ParameterError(
                "", name, f"no such setting{did_you_mean(name, fit | section)}; see `help(prts.Model.train)`"
            )
    return (
        FitSettings(**{name: value for name, value in given.items() if name in fit}),
        SectionSettings(**{name: value for name, value in given.items() if name in section}),
    )


def common_species(sections: Iterable[Section]) -> str:
    """Infer the species from the gene names of all sections.

    Gene ids start with ENSG (human), ENSMUSG (mouse) and so on, mitochondrial genes with MT- or mt-.

    Raises
    ------
    ParameterError
        If the names are inconclusive or contradict each other.
    """
    found = {section.name: _species(section) for section in sections}
    if len(set(found.values())) == 1 and None not in found.values():
        return str(next(iter(found.values())))
    said = ", ".join(f"{name}: {species or 'unclear'}" for name, species in found.items())
    raise ParameterError(
        "", "species", f"the gene names are inconclusive ({said}); give species='human', 'mouse' or another"
    )


def _species(section: Section) -> str | None:
    """The species according to the section's gene ids or mitochondrial genes; None if unclear."""
    from prts.preprocess.species import species_of

    assert section.measurement is not None
    return species_of(section.measurement.genes())


def assign_roles(
    sections: Sequence[Section], validation: Sequence[Section], test: Sequence[Section], split: Splitter | str | None
) -> tuple[dict[str, Section], Roles, Splitter]:
    """Sections by name, their roles, and the splitter that fills missing roles.

    Raises
    ------
    InputError
        If a section has no measured counts, two have the same name, or the splitter cannot fill the roles.
    """
    from prts.data.splits import Blocks, BySection, Random, Roles

    by_name: dict[str, Section] = {}
    for section in (*sections, *validation, *test):
        if section.name in by_name:
            raise InputError(
                f"section {section.name}: is given twice; give each section one role and a unique name (read_visium_hd(..., name=))"
            )
        if section.measurement is None:
            raise InputError(f"section {section.name}: has no measured counts; open it with prts.read_visium_hd")
        by_name[section.name] = section
    roles = Roles(*([section.name for section in part] for part in (sections, validation, test)))
    if not roles.train:
        raise InputError("sections: none to train on; give at least one")
    if isinstance(split, str):
        kinds: dict[str, Splitter] = {
            "by_section": BySection(test_required=False),
            "blocks": Blocks(),
            "random": Random(),
        }
        if split not in kinds:
            raise ParameterError("", "split", f"{split!r} is not one of {', '.join(kinds)}{did_you_mean(split, kinds)}")
        return by_name, roles, kinds[split]
    if split is None:
        split = BySection(test_required=False) if validation else Blocks()
    return by_name, roles, split


def panel_builder(genes: int | Sequence[str] | Path | str | PanelBuilder) -> PanelBuilder:
    """The panel builder for the user's choice of genes.

    Raises
    ------
    InputError
        If it is not a panel.
    """
    from prts.preprocess.panel import FilePanel, ListPanel, TopPanel

    if isinstance(genes, bool) or (isinstance(genes, int) and genes < 1):
        raise ParameterError("", "genes", f"{genes!r} is not a panel; give a number of genes, a list or a file")
    if isinstance(genes, int):
        return TopPanel(n_genes=genes)
    if isinstance(genes, str | Path):
        return FilePanel(genes)
    return genes if callable(genes) else ListPanel(genes)


def make_recipe(likelihood: Likelihood, network: Mapping[str, Any], settings: FitSettings) -> Recipe:
    """Build and check network, optimizer and trainer.

    Raises
    ------
    InputError
        If a setting is wrong.
    """
    import pytorch_lightning as pl
    import torch

    from prts.models.fit import Recipe
    from prts.models.module import KeepBest, quiet_lightning
    from prts.models.network import PRTSNet
    from prts.models.slurm import own_processes
    from prts.precision import training_precision

    quiet_lightning()
    options = {
        "max_epochs": settings.max_epochs,
        "deterministic": True,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "devices": 1,
        **settings.trainer,
    }
    if "precision" not in options:
        trainer = partial(pl.Trainer, **{**options, "logger": False})
        device = trainer(**own_processes(trainer)).strategy.root_device
        options["precision"] = training_precision("auto", device)
    known = [
        name for name in inspect.signature(PRTSNet).parameters if name not in ("in_features", "n_genes", "outputs")
    ]
    for name in network:
        if name not in known:
            hint = did_you_mean(name, known)
            raise ParameterError("network", name, f"no such setting{hint}; choose from {', '.join(known)}")
    return Recipe(
        network=partial(PRTSNet, **network),
        likelihood=likelihood,
        optimizer=partial(torch.optim.AdamW, lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True),
        trainer=partial(pl.Trainer, **options),
        callbacks=[
            pl.callbacks.EarlyStopping(monitor="val/pcc", mode="max", patience=settings.patience),
            KeepBest(monitor="val/pcc", mode="max"),
        ],
        seed=settings.seed,
    )


def make_plan(
    sections: Mapping[str, Section],
    roles: Roles,
    splitter: Splitter,
    species: str,
    *,
    encoder: Encoder,
    features: Sequence[str],
    recipe: Recipe,
    preparation: SectionSettings,
    settings: FitSettings,
    cache_dir: Path,
) -> TrainingPlan:
    """Everything a run needs."""
    from prts.api.training_plan import DataSettings, TrainingPlan
    from prts.data.prepare import PrepareSettings, prepare_sections
    from prts.features.no_encoder import needed_encoder
    from prts.platforms.bin_owners import CountSettings
    from prts.preprocess.counts import QCSettings
    from prts.segmentation.bins import Bins

    segmenter = _segmenter(preparation.nuclei, sections.values())
    bins = isinstance(segmenter, Bins)
    prepare = PrepareSettings(
        segmenter=segmenter,
        prefer_given=preparation.nuclei is None and not bins,
        qc=preparation.qc or (QCSettings.for_bins() if bins else QCSettings()),
        register=preparation.register,
        artefacts=preparation.artefacts,
        counting=preparation.counting or CountSettings(),
        exposure=preparation.exposure,
        splitter=splitter,
        panel=panel_builder(preparation.genes),
        encoder=needed_encoder(encoder, features),
        cache_dir=cache_dir,
        check_image=preparation.check_image,
        augment=preparation.augment,
        seed=settings.seed,
        use=features,
    )

    def prepared(stopwatch: Stopwatch, settings: PrepareSettings | None = None) -> PreparedTissue:
        return prepare_sections("+".join(roles.train), species, sections, roles, settings or prepare, stopwatch)

    return TrainingPlan(
        prepare=prepared,
        preparation=prepare,
        data=DataSettings(
            use=usable_features(features, segmenter),
            scale=settings.scale,
            batch_size=settings.batch_size,
            memory=settings.memory,
        ),
        recipe=recipe,
        finetune=settings.finetune,
    )


def _segmenter(nuclei: Segmenter | str | None, sections: Iterable[Section]) -> Segmenter:
    """The segmenter that a user means; None: the sections' bins if they were read as units, else StarDist."""
    from prts.platforms.base import HasUnits
    from prts.segmentation import segmenters

    if nuclei is not None and not isinstance(nuclei, str):
        return nuclei
    sizes = {part.bin_um if isinstance(part := section.measurement, HasUnits) else None for section in sections}
    if nuclei == "bins" or (nuclei is None and sizes != {None}):
        if len(sizes) > 1:
            raise InputError("sections: their units differ; read all of them with the same `units` and `bin_um`")
        (bin_um,) = sizes
        return segmenters.build({"name": "bins"} if bin_um is None else {"name": "bins", "bin_um": bin_um})
    return segmenters.build({"name": nuclei or "stardist"})
