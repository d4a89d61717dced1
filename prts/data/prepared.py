"""Settings of the preparation of sections, and its result, a prepared tissue."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from prts.errors import ParameterError
from prts.features.feature_reader import STORED
from prts.platforms.bin_owners import CountSettings
from prts.preprocess.counts import QCSettings

if TYPE_CHECKING:
    from anndata import AnnData

    from prts.data.prepare_input import InputStores
    from prts.data.splits import Splitter
    from prts.features.encoders import Encoder
    from prts.platforms.base import Registration
    from prts.preprocess.panel import Panel
    from prts.section import Section
    from prts.segmentation.segment import Segmenter


MOST_VIEWS = 64
"""Views that `augment` allows; the disk holds one more copy of the training features for each."""


class PanelBuilder(Protocol):
    """Chooses the genes, such as `prts.preprocess.panel.PaperPanel`."""

    def __call__(self, counts: Sequence[AnnData]) -> Panel:
        """Choose from the training sections' counts."""
        ...

    def settings(self) -> dict[str, Any]:
        """Everything that decides the panel apart from the counts."""
        ...


@dataclass(frozen=True, kw_only=True)
class PrepareSettings:
    """How sections are prepared.

    Parameters
    ----------
    segmenter
        Finds nuclei in an image.
    splitter
        Decides which nuclei train; the panel is fitted on these only.
    panel
        Chooses the genes.
    encoder
        Reads features from the image; `prts.features.no_encoder.NoEncoder` if the model's input needs none.
    cache_dir
        Folder for `<tissue>/<section>/...`.
    prefer_given
        Use a section's own nuclei, if it has any, instead of segmenting: a file, or the outlines of its platform.
    qc
        Limits of quality control.
    register
        Correct the shift between counts and nuclei. If the platform allows, it is measured either way.
    artefacts
        Find artifacts among the nuclei, and choose genes and train without them.
    counting
        Which bins are counted for a nucleus, on platforms that measure in bins.
    exposure
        Model rows and columns of the array that capture more or fewer UMIs as exposure of the nuclei.
    check_image
        Refuse images that cannot be H&E.
    max_pixels
        Largest image that is decoded as a whole; None: 2^29 px.
    skip_bad
        Leave sections out that cannot be used, instead of raising an error that names them all.
    augment
        Views of the image of each training section to read besides the image itself (`prts.features.views`).
    seed
        Seed of the views.
    use
        Blocks of the model's input, of which views are read.

    Raises
    ------
    ParameterError
        If `augment` is out of range, or no block is read from the image.
    """

    segmenter: Segmenter
    splitter: Splitter
    panel: PanelBuilder
    encoder: Encoder
    cache_dir: Path
    prefer_given: bool = True
    qc: QCSettings = field(default_factory=QCSettings)
    register: bool = False
    artefacts: bool = False
    counting: CountSettings = field(default_factory=CountSettings)
    exposure: bool = False
    check_image: bool = True
    max_pixels: int | None = None
    skip_bad: bool = False
    augment: int = 0
    seed: int = 0
    use: Sequence[str] = STORED

    def __post_init__(self) -> None:
        if isinstance(self.augment, bool) or self.augment not in range(MOST_VIEWS + 1):
            problem = f"{self.augment!r} is not a number of views; give 0 to {MOST_VIEWS}"
            raise ParameterError("encoder", "augment", problem)
        if self.augment and not {*STORED, "context"} & {*self.use}:
            problem = f"has no effect on {', '.join(self.use)}, which no image is read for; leave it at 0, or add context to data.use"
            raise ParameterError("encoder", "augment", problem)


@dataclass(frozen=True)
class PreparedSection:
    """A section and its cache files.

    Attributes
    ----------
    section
        The section.
    nuclei
        All nuclei.
    counts
        Nuclei that pass quality control x all genes.
    features
        Features of these nuclei; None if the model's input needs no encoder.
    colour, context
        Color statistics of these nuclei: of tile and nucleus, and at several scales.
    registration
        Displacement of the counts before any correction; None if the platform cannot measure it.
    bin_table
        Which bins were counted for which nucleus (`barcode_mappings-*.parquet`); None if counts are not sums of bins.
    views
        Features and context of the same nuclei in each view of a training section.
    """

    section: Section
    nuclei: Path
    counts: Path
    features: Path | None
    colour: Path
    context: Path
    registration: Registration | None
    bin_table: Path | None = None
    views: tuple[InputStores, ...] = ()

    def seen(self, view: InputStores) -> PreparedSection:
        """The section with the features and the context of a view."""
        return replace(self, features=view.features, context=view.context or self.context)


@dataclass(frozen=True)
class PreparedTissue:
    """A tissue whose sections are ready.

    `register` says whether their counts were corrected, `bins` whether bins are the units, and `skipped` why sections were left out.
    """

    name: str
    species: str
    sections: dict[str, PreparedSection]
    train: list[str]
    val: list[str]
    test: list[str]
    panel: Path
    register: bool = False
    bins: bool = False
    skipped: Mapping[str, str] = field(default_factory=dict)
