"""The keys of every command with their types, ranges and choices.

Each command has one dataclass. Hydra composes against its keys (`prts.cli.config_keys`), which refuses unknown ones, and then
`prts.cli.check` checks the values against the annotations. Defaults are in configs/*.yaml; a default here marks an optional key.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field


@dataclass(frozen=True)
class Built:
    """Marks a mapping that describes an object by its `name:` in a registry or its `_target_:`; other keys are constructor arguments."""

    owner: str  # owner of its parameters in errors
    several: bool = False  # whether it is a mapping of such mappings
    limits: type | None = None  # a dataclass with ranges missing from the constructor's annotations


Mapping = dict[str, Any]
FilePath = Annotated[str, Field(min_length=1, description="a path")]
Name = Annotated[str, Field(min_length=1)]
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]
Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
Whole = Annotated[int, Field(ge=0, le=2**31 - 1)]
Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0, le=1e9)]
NotNegative = Annotated[float, Field(ge=0, le=1e9)]
Mpp = Annotated[float, Field(ge=0.05, le=5)]
Units = Literal["nuclei", "bins"]
BinUm = Annotated[int, Field(ge=2, le=512)]
Species = Literal["human", "mouse"]
Device = Annotated[str, Field(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$", description="auto, cpu, mps, cuda or cuda:1")]


@dataclass
class Paths:
    """`configs/paths`."""

    data_dir: FilePath
    cache_dir: FilePath


@dataclass
class Evaluation:
    """`configs/evaluation`."""

    block_um: Positive
    bootstrap: Annotated[int, Field(ge=2, le=1_000_000)]


@dataclass
class QualityControl:
    """`configs/qc`."""

    min_umi: NotNegative | None
    max_area_um2: Positive | None
    max_pct_mt: Positive | None
    mt_prefix: Name | None
    max_area_px: Positive | None = None


@dataclass
class Preprocess:
    """`preprocess` of `prepare` and `train`."""

    artefacts: bool
    register: bool


@dataclass
class Counts:
    """`counts` of `prepare` and `train`."""

    expand_um: Annotated[float, Field(ge=0, le=100)]
    shared: Literal["drop", "nearest", "split"]
    sigma_um: Annotated[float, Field(gt=0, le=100)]
    exposure: bool


@dataclass
class Simulation:
    """The arguments of a simulated section."""

    cells: Annotated[int, Field(ge=50, le=10**7)]
    genes: Annotated[int, Field(ge=50, le=10**6)]
    seed: Annotated[int, Field(ge=0, lt=2**63)]
    mpp: Annotated[float, Field(ge=0.1, le=1)]
    name: Name | None
    stain: Annotated[float, Field(ge=-2, le=2)]
    tilt_deg: Annotated[float, Field(ge=-20, le=20)]
    shift_um: tuple[float, float]
    diffusion_um: Annotated[float, Field(ge=0, le=20)]
    species: Species
    artefacts: Annotated[int, Field(ge=0, le=100)]
    program_seed: Annotated[int, Field(ge=0, lt=2**63)]
    stripes: Annotated[float, Field(ge=0, le=1)]
    layout: Name


@dataclass
class DownloadedFiles:
    """`download` of a section."""

    folder: FilePath
    urls: Annotated[list[Name], Field(min_length=1)]
    md5: dict[str, str] | None = None


@dataclass
class SectionFiles:
    """Known keys of a section; `prts.data.tissue` refuses others."""

    image: FilePath | None
    bins: FilePath | None
    nuclei: FilePath | None
    spots: FilePath | None
    mpp: Mpp | None
    platform: Name | None
    simulate: Mapping | None
    download: DownloadedFiles | None


@dataclass
class Tissue:
    """`configs/tissue`."""

    name: Name
    species: Name
    sections: Annotated[Mapping, Field(min_length=1, description="a mapping of section names to their files")]
    train: Annotated[list[str], Field(min_length=1)]
    val: list[str] | None = None
    test: list[str] | None = None
    markers: list[str] | None = None
    license: Name | None = None
    cite: Name | None = None


@dataclass
class SegmentationLimits:
    """Keys of any segmenter: whether to prefer a section's own nuclei."""

    prefer_given: bool


@dataclass
class EncoderLimits:
    """Keys of any encoder of `prepare` and `train`: how many views of the image training reads besides the image."""

    augment: Annotated[int, Field(ge=0, le=64)]


@dataclass
class SeedLimits:
    """Keys of anything random."""

    seed: Seed


@dataclass
class NetworkLimits:
    """Ranges of `model.net`."""

    hidden: list[Annotated[int, Field(ge=1, le=65_536)]]
    rank: Annotated[int, Field(ge=1, le=65_536)] | None
    dropout: Annotated[float, Field(ge=0, lt=1)]


@dataclass
class OptimizerLimits:
    """Ranges of `model.optimizer`; other settings are checked by constructing it."""

    lr: Annotated[float, Field(gt=0, le=1e3)]
    weight_decay: Annotated[float, Field(ge=0, le=1e3)]


@dataclass
class SchedulerLimits:
    """Ranges of `model.scheduler`; other settings are checked by constructing it."""

    factor: Annotated[float, Field(gt=0, lt=1)]
    patience: Whole
    max_lr: Annotated[float, Field(gt=0, le=1e3)]


@dataclass
class OutputSettings:
    """`model.output`."""

    gate: Literal["auto", "none", "soft", "hard"]
    threshold: Share | Literal["auto"]
    min_umi: NotNegative


@dataclass
class Model:
    """`configs/model`."""

    net: Annotated[Mapping, Built("network", limits=NetworkLimits)]
    optimizer: Annotated[Mapping, Built("optimizer", limits=OptimizerLimits)]
    output: OutputSettings
    scheduler: Annotated[Mapping, Built("scheduler", limits=SchedulerLimits)] | None = None
    baseline: Literal["gene_mean", "position", "colour", "context", "morphology", "ridge", "permuted"] | None = None


@dataclass
class TrainerLimits:
    """Ranges of `trainer`: settings that prts reads, and limits that rule out an untrained network."""

    max_epochs: Annotated[int, Field(ge=1, le=10**6)]
    min_epochs: Annotated[int, Field(ge=0, le=10**6)] | None
    max_steps: Annotated[int, Field(ge=1)] | Literal[-1]
    precision: Annotated[str, Field(min_length=1)] | Literal[16, 32, 64]
    limit_train_batches: Annotated[float, Field(gt=0)] | None
    limit_val_batches: Annotated[float, Field(gt=0)] | None
    gradient_clip_val: NotNegative | None
    log_every_n_steps: Count
    num_sanity_val_steps: Annotated[int, Field(ge=-1)]


@dataclass
class CallbackLimits:
    """Keys of any callback."""

    monitor: Name
    mode: Literal["min", "max"]
    patience: Whole


@dataclass
class Data:
    """`data` of `train`."""

    use: Annotated[list[Literal["local", "global", "morphology", "context"]], Field(min_length=1)]
    target: Name
    scale: Literal["training", "slide"]
    permute: bool
    batch_size: Count
    num_workers: Annotated[int, Field(ge=0, le=1024)]
    memory: Literal["auto", "whole", "stream"]
    chunk: Count
    buffer: Count


@dataclass
class Finetune:
    """`configs/finetune`."""

    rank: Annotated[int, Field(ge=1, le=1024)]
    alpha: Annotated[float, Field(gt=0, le=1e4)]
    blocks: Annotated[int, Field(ge=1, le=1000)]
    epochs: Annotated[int, Field(ge=1, le=10**4)]
    lr: Annotated[float, Field(gt=0, le=1)]
    weight_decay: Annotated[float, Field(ge=0, le=1e3)]
    tiles: Annotated[int, Field(ge=2, le=65_536)] | None
    augment: bool
    validation: Annotated[int, Field(ge=2)]
    seed: Seed


@dataclass
class Prepare:
    """What `prts prepare` and `prts train` share."""

    paths: Paths
    segmentation: Annotated[Mapping, Built("segmenter", limits=SegmentationLimits)]
    qc: QualityControl
    panel: Annotated[Mapping, Built("panel", limits=SeedLimits)]
    encoder: Annotated[Mapping, Built("encoder", limits=EncoderLimits)]
    split: Annotated[Mapping, Built("split", limits=SeedLimits)]
    tissue: Tissue
    preprocess: Preprocess
    counts: Counts
    check_image: bool
    max_pixels: Annotated[int, Field(ge=1)] | None
    skip_bad: bool
    units: Units
    bin_um: BinUm


@dataclass
class PrepareCommand(Prepare):
    """`prts prepare`."""

    section: Name | None


@dataclass
class Train(Prepare):
    """`prts train`."""

    model: Model
    loss: Annotated[Mapping, Built("likelihood")]
    evaluation: Evaluation
    trainer: Annotated[Mapping, Built("trainer", limits=TrainerLimits)]
    data: Data
    callbacks: Annotated[Mapping, Built("callbacks", several=True, limits=CallbackLimits)]
    seed: Seed
    report: bool
    resume: bool
    patch_pooling: Literal["nucleus", "center2x2", "bilinear"]
    logger: Annotated[Mapping, Built("logger", several=True)] | None = None
    finetune: Finetune | None = None


@dataclass
class Simulate(Simulation):
    """`prts simulate`."""

    out: FilePath


@dataclass
class EncoderRuntime:
    """`encoder` of `predict`: where its weights are and how it runs; the rest is the bundle's."""

    weights: FilePath | None
    device: Device
    compile: bool | Literal["auto"]


@dataclass
class Predict:
    """`prts predict`."""

    paths: Paths
    bundle: FilePath
    image: FilePath | None
    slides: FilePath | None
    out: FilePath
    bin_um: BinUm | None
    nuclei: FilePath | None
    mpp: Mpp | None
    stain: Name
    rotate: Literal[0, 90, 180, 270]
    flip: Literal["none", "horizontal", "vertical"]
    tta: Literal[1, 4, 8]
    roi: (
        Annotated[
            Annotated[str, Field(pattern=r"[^-+.\deE]")]  # text that is not a plain number: a file, or a list as typed
            | Annotated[list[float], Field(min_length=4, max_length=4)]
            | Annotated[list[tuple[float, float]], Field(min_length=3)],
            Field(description="[x0,y0,x1,y1], a polygon [[x,y],[x,y],[x,y]] or a GeoJSON file"),
        ]
        | None
    )
    check_scale: bool
    intervals: bool | None
    artefacts: bool
    check_image: bool
    max_pixels: Annotated[int, Field(ge=1)] | None
    strict: bool
    page: bool | None
    patterns: Annotated[list[Name], Field(min_length=1)] | None
    worker: Whole | None
    slides_per_job: Count | None
    encoder: EncoderRuntime
    segmentation: Annotated[Mapping, Built("segmenter", limits=SegmentationLimits)] | None = None
    units: Units | None = None
    qc: QualityControl | None = None


@dataclass
class Registration:
    """`preprocess` of `evaluate`."""

    register: bool | None


@dataclass
class Evaluate:
    """`prts evaluate`."""

    prediction: FilePath
    section: FilePath
    out: FilePath
    bundle: FilePath | None
    evaluation: Evaluation
    preprocess: Registration
    max_pixels: Annotated[int, Field(ge=1)] | None
    qc: QualityControl | None = None


@dataclass
class Clusters:
    """`clusters` of `analyze`."""

    n_top_genes: Annotated[int, Field(ge=2, le=2**31 - 1)]
    n_pcs: Count
    n_neighbors: Annotated[int, Field(ge=2, le=2**31 - 1)]
    resolution: Positive
    min_share: Annotated[float, Field(ge=0, lt=1)]
    min_cells: Annotated[int, Field(ge=2, le=2**31 - 1)] | None
    seed: Seed


@dataclass
class Annotate:
    """`annotate` of `analyze`."""

    tissues: list[str]
    min_log2fc: NotNegative
    max_p: Share
    n_markers: Count
    min_genes: Count


@dataclass
class Enrich:
    """`enrich` of `analyze`."""

    gmt: str | list[str]
    obo: FilePath | None
    annotations: FilePath | None
    max_p: Share
    n_markers: Count


@dataclass
class Spots:
    """`spots` of `analyze`."""

    min_counts: NotNegative
    max_counts: Positive
    min_genes: Whole
    max_genes: Count
    n_top_genes: Annotated[int, Field(ge=2, le=2**31 - 1)]
    n_pcs: Count
    resolution: Positive


@dataclass
class Analyze:
    """`prts analyze`."""

    prediction: FilePath
    out: FilePath
    section: FilePath | None
    train_section: FilePath | None
    train_nuclei: FilePath | None
    markers: FilePath | None
    orthologs: FilePath | None
    visium: FilePath | None
    max_pixels: Annotated[int, Field(ge=1)] | None
    clusters: Clusters
    annotate: Annotate
    enrich: Enrich
    spots: Spots
    figures: list[Literal["png", "pdf", "svg"]]
    broad: dict[str, list[str]] | None = None
    segmentation: Annotated[Mapping, Built("segmenter", limits=SegmentationLimits)] | None = None


@dataclass
class Report:
    """`prts report`."""

    evaluation: Evaluation
    run: FilePath | None
    prediction: FilePath | None
    image: FilePath | None
    section: FilePath | None
    analysis: FilePath | None
    genes: Annotated[Count | str | list[str], Field(description="a number of genes or their names, as [A,B]")] | None
    region: (
        Annotated[tuple[float, float, float, float], Field(description="[x0,y0,x1,y1] in full-resolution px")] | None
    )
    second: FilePath | None
    out: FilePath | None
    max_pixels: Annotated[int, Field(ge=1)] | None


@dataclass
class Bench:
    """`prts bench`."""

    paths: Paths
    segmentation: Annotated[Mapping, Built("segmenter", limits=SegmentationLimits)]
    qc: QualityControl
    units: Units
    section: FilePath
    encoders: Annotated[list[Name], Field(min_length=1)]
    weights: dict[str, FilePath] | None
    n: Annotated[int, Field(ge=100, le=2**31 - 1)]
    genes: Count
    seed: Seed
    bin_um: BinUm
    out: FilePath | None


@dataclass
class Export:
    """`prts export`."""

    prediction: FilePath
    format: Literal["spatialdata", "geojson", "parquet", "csv"]
    out: FilePath
    genes: Annotated[str | Annotated[list[str], Field(min_length=1)], Field(description="gene names, as [A,B]")] | None
    image: FilePath | None
    analysis: FilePath | None
    classification: Name | None
    overwrite: bool
    max_pixels: Annotated[int, Field(ge=1)] | None


@dataclass
class Push:
    """`prts push`."""

    bundle: FilePath
    repo: Annotated[str, Field(pattern=r"^[^/\s]+/[^/\s]+$", description="owner/name")]
    private: bool
    revision: Annotated[str, Field(pattern=r"^[^\s@]+$", description="the name of a branch")] | None
    message: Name | None
    license: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9.-]*$", description="such as cc-by-4.0")] | None
    datasets: list[Annotated[str, Field(pattern=r"^[^/\s]+/[^/\s]+$", description="owner/name")]] | None
    dry_run: bool


@dataclass
class Download:
    """`prts download`."""

    paths: Paths
    tissue: Tissue
    segmentation: Any = None
    panel: Any = None
    encoder: Any = None
    split: Any = None
    qc: Any = None
    units: Any = None
    bin_um: Any = None


@dataclass
class Doctor:
    """`prts doctor`."""

    paths: Paths
    bundle: FilePath | None


# By command, in the order of `prts.cli.app.COMMANDS`, which is separate so that it imports nothing.
SCHEMAS: dict[str, type] = {
    "simulate": Simulate,
    "prepare": PrepareCommand,
    "train": Train,
    "predict": Predict,
    "evaluate": Evaluate,
    "analyze": Analyze,
    "report": Report,
    "export": Export,
    "push": Push,
    "download": Download,
    "bench": Bench,
    "doctor": Doctor,
}
