"""A cohort: its slides, the model, the settings for all, and the folder where results and states are."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prts.api.predict import SlideSettings
from prts.cohort.slides import CohortSlide, SlideSource, read_slides
from prts.cohort.states import SlideState, changes, read_state
from prts.data.prepare_input import STAGE_VERSION
from prts.errors import InputError
from prts.extras import require_extra
from prts.io.cache import fingerprint
from prts.io.outputs import check_out_folder
from prts.io.prediction import nuclei_path
from prts.provenance import identity
from prts.segmentation import segmenters

if TYPE_CHECKING:
    from prts.api.nuclei_source import NucleiSource
    from prts.models.bundle import Bundle

# Stages of a prediction whose version is part of its inputs.
_STAGES = ("nuclei", "artefacts", "features", "context")


@dataclass(frozen=True)
class Cohort:
    """Slides to predict with one model into one folder.

    Attributes
    ----------
    slides
        The slides.
    folder
        Where predictions, states and the summary are.
    bundle
        The model.
    nuclei
        Where the nuclei of slides come from that name no source of their own; None: as in training.
    settings
        How slides are read, where they do not say otherwise.
    page
        Whether each slide gets an interactive page.
    """

    slides: Sequence[CohortSlide]
    folder: Path
    bundle: Bundle
    nuclei: NucleiSource = None
    settings: SlideSettings = field(default_factory=SlideSettings)
    page: bool = True

    def out(self, slide: CohortSlide) -> Path:
        """The prediction of a slide."""
        return self.folder / f"{slide.name}.h5ad"

    def files(self, slide: CohortSlide) -> dict[str, Path]:
        """The files that make a slide done, by suffix."""
        out = self.out(slide)
        found = {".h5ad": out, ".nuclei.parquet": nuclei_path(out)}
        return {**found, ".html": out.with_suffix(".html")} if self.page else found

    def settings_of(self, slide: CohortSlide) -> SlideSettings:
        """How a slide is read."""
        return replace(self.settings, **slide.settings)

    def nuclei_of(self, slide: CohortSlide) -> NucleiSource:
        """Where the nuclei of a slide come from."""
        return self.nuclei if slide.nuclei is None else slide.nuclei

    def inputs(self, slide: CohortSlide) -> dict[str, Any]:
        """Everything that affects the prediction of a slide, the same on every machine."""
        settings = asdict(self.settings_of(slide))
        roi = settings["roi"]
        if isinstance(roi, str | Path) and Path(roi).is_file():
            settings["roi"] = _identity(Path(roi))
        nuclei: Any = self.nuclei_of(slide)
        if isinstance(nuclei, str) and nuclei in segmenters and not Path(nuclei).exists():
            nuclei = segmenters.build({"name": nuclei})
        if isinstance(nuclei, str | Path):
            nuclei = _identity(Path(nuclei))
        elif nuclei is not None:
            nuclei = nuclei.settings()
        inputs = {
            "image": _identity(slide.image),
            "bundle": self.bundle.sha256,
            "nuclei": nuclei,
            "stages": {name: STAGE_VERSION[name] for name in _STAGES},
            "settings": settings,
        }
        plain: dict[str, Any] = json.loads(json.dumps(inputs, default=str))  # as it will be read from the state
        return plain

    def is_done(self, slide: CohortSlide, state: SlideState | None, inputs: Mapping[str, Any]) -> bool:
        """Whether a slide needs no work: predicted from the same inputs, and its files are as they were written."""
        if state is None or state.status != "done" or state.fingerprint != fingerprint(inputs):
            return False
        return all(
            path.is_file() and path.stat().st_size == state.files.get(suffix)
            for suffix, path in self.files(slide).items()
        )

    def why(self, slide: CohortSlide, state: SlideState, inputs: Mapping[str, Any]) -> str:
        """Why a slide that was done is outdated, in words."""
        if changed := changes(state.inputs, inputs):
            return f"{', '.join(changed)} changed"
        gone = [path.name for suffix, path in self.files(slide).items() if not path.is_file()]
        return f"{gone[0]} is missing" if gone else "a file was changed"


def open_cohort(
    source: SlideSource,
    out: Path | str,
    bundle: Bundle,
    *,
    patterns: Sequence[str] | None = None,
    nuclei: NucleiSource = None,
    settings: SlideSettings | None = None,
    page: bool = True,
) -> Cohort:
    """List the slides of a cohort and check everything that can be checked before work starts.

    Parameters
    ----------
    source, patterns
        As for `prts.cohort.slides.read_slides`.
    out
        The cohort folder; made if needed.
    bundle
        The model.
    nuclei
        A segmenter or its name; None: as in training.
    settings
        How slides are read.
    page
        Whether each slide gets an interactive page.

    Raises
    ------
    InputError
        If the list of slides is wrong, the folder cannot be written, or a state in it was written by another version of prts.
    """
    if page:
        require_extra("report", "page")
    folder = check_out_folder(out, "the predictions of a cohort")
    slides = read_slides(source, patterns=patterns, leave_out=folder)
    if isinstance(nuclei, str) and nuclei in segmenters:
        nuclei = segmenters.build({"name": nuclei})
    if isinstance(nuclei, str | Path) or hasattr(nuclei, "geometry"):
        raise InputError(
            "nuclei: belong to one slide; name the file of each slide in a CSV with the columns image,nuclei"
        )
    _check_writable(folder)
    for slide in slides:
        read_state(folder, slide.name)
    return Cohort(slides, folder, bundle, nuclei, settings or SlideSettings(), page)


def _check_writable(folder: Path) -> None:
    """Refuse a folder that cannot be made, or in which nothing can be written; a new one is made only then."""
    probe = folder / f".writable-{os.getpid()}"
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink(missing_ok=True)  # another worker may have the same number
    except OSError as error:
        for path in made:
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()
        raise InputError(f"{folder}: cannot be written ({error.strerror}); give another `out` folder") from error


def _identity(path: Path) -> dict[str, Any] | None:
    """Identity of a file, None if it is missing: that is an error of its slide alone."""
    return identity(path) if path.is_file() else None
