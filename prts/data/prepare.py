"""Run every stage from files to features for each section of a tissue, skipping what is cached.

Each product is a cache file named by a fingerprint of its inputs and settings. One process builds it under a file lock while others wait
for it; a build that is killed leaves nothing behind except, for features, finished chunks from which the next run resumes.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import h5py

from prts.data.bad_sections import BadSections, in_turn
from prts.data.counts_in_turn import CountsInTurn
from prts.data.prepare_counts import measured_registration, passing_settings, prepare_bin_table, prepare_counts
from prts.data.prepare_input import (
    STAGE_VERSION,
    InputStores,
    build,
    prepare_colour,
    prepare_context,
    prepare_features,
    prepare_input,
)
from prts.data.prepare_nuclei import prepare_artefacts, prepare_nuclei
from prts.data.prepared import PanelBuilder, PreparedSection, PreparedTissue, PrepareSettings
from prts.data.resolve import resolve_section
from prts.data.splits import TRAIN, Roles
from prts.errors import InputError
from prts.features.colour import colour_tile
from prts.features.no_encoder import NoEncoder
from prts.features.views import View
from prts.io.cache import fingerprint
from prts.io.nuclei import load_nuclei
from prts.platforms.base import HasUnits, Registration
from prts.preprocess.artefacts import is_artefact
from prts.preprocess.counts import required_measurement
from prts.preprocess.image_check import require_h_and_e
from prts.preprocess.panel import Panel, warn_of_small
from prts.preprocess.species import mitochondrial_prefix
from prts.progress import of_section, working
from prts.segmentation.bins import Bins
from prts.stopwatch import Stopwatch

if TYPE_CHECKING:
    from geopandas import GeoDataFrame

    from prts.data.tissue import Tissue
    from prts.section import Section

logger = logging.getLogger(__name__)

__all__ = [
    "STAGE_VERSION",
    "PanelBuilder",
    "PrepareSettings",
    "PreparedSection",
    "PreparedTissue",
    "check_sections",
    "prepare_artefacts",
    "prepare_colour",
    "prepare_context",
    "prepare_features",
    "prepare_input",
    "prepare_nuclei",
    "prepare_section",
    "prepare_sections",
    "prepare_tissue",
]


def prepare_tissue(tissue: Tissue, settings: PrepareSettings, stopwatch: Stopwatch | None = None) -> PreparedTissue:
    """Open the sections of a tissue config that have a role, and prepare them.

    Parameters
    ----------
    tissue
        The sections and their roles.
    settings
        How they are prepared.
    stopwatch
        Adds up the seconds of each stage.

    Raises
    ------
    InputError
        From any stage whose input is wrong. Finished stages stay in the cache.
    """
    mitochondrial_prefix(tissue.species, settings.qc.mt_prefix, owner="tissue")
    watch, bad = stopwatch or Stopwatch(), BadSections(skip=settings.skip_bad)
    sections, roles = _opened(tissue, settings, watch, bad)
    return _prepared(tissue.name, tissue.species, sections, roles, settings, watch, bad)


def prepare_section(
    tissue: Tissue, name: str, settings: PrepareSettings, stopwatch: Stopwatch | None = None
) -> PreparedSection:
    """Prepare one section of a tissue config: everything but the panel, which depends on the others.

    Parameters
    ----------
    tissue
        The sections and their roles.
    name
        The section.
    settings
        How it is prepared.
    stopwatch
        Adds up the seconds of each stage.

    Raises
    ------
    InputError
        If the section cannot be used.
    """
    watch = stopwatch or Stopwatch()
    if name not in tissue.used:
        raise InputError(
            f"section: {name!r} is not a section of tissue {tissue.name} with a role; choose from {', '.join(tissue.used)}"
        )
    with watch("open"):
        section = resolve_section(tissue.sections[name], tissue.name, settings.cache_dir, settings.max_pixels)
    stages = _Stages(tissue.name, tissue.species, {name: section}, settings, watch)
    with of_section(name):
        stages.count(name)
        return stages.read_image(name, trains=name in tissue.train)


def check_sections(tissue: Tissue, settings: PrepareSettings) -> list[str]:
    """Open every section that is not simulated, and return the names of those that can be used.

    Parameters
    ----------
    tissue
        The sections and their roles.
    settings
        How they are to be prepared.

    Raises
    ------
    InputError
        If one cannot be used and none may be left out; it names all of them.
    """
    real = {name: spec for name, spec in tissue.sections.items() if spec.simulate is None}
    bad = BadSections(skip=settings.skip_bad)
    _opened(replace(tissue, sections=real), settings, Stopwatch(), bad)
    return [name for name in tissue.used if name not in bad.reasons]


def prepare_sections(
    name: str,
    species: str,
    sections: Mapping[str, Section],
    roles: Roles,
    settings: PrepareSettings,
    stopwatch: Stopwatch | None = None,
) -> PreparedTissue:
    """Prepare nuclei, counts, panel and features of open sections.

    Parameters
    ----------
    name
        Name of the tissue, a folder in the cache.
    species
        Name of the species; see `prts.preprocess.species`.
    sections
        The sections by name.
    roles
        Which of them train, validate and test.
    settings
        How they are prepared.
    stopwatch
        Adds up the seconds of each stage.

    Raises
    ------
    InputError
        From any stage whose input is wrong. Finished stages stay in the cache.
    """
    watch, bad = stopwatch or Stopwatch(), BadSections(skip=settings.skip_bad)
    return _prepared(name, species, sections, roles, settings, watch, bad)


def _opened(
    tissue: Tissue, settings: PrepareSettings, watch: Stopwatch, bad: BadSections
) -> tuple[dict[str, Section], Roles]:
    """The sections that can be opened and whose image is H&E, before any of them is worked on."""
    found: dict[str, Section] = {}
    used = [name for name in tissue.used if name in tissue.sections]

    def take(name: str) -> None:
        spec = tissue.sections[name]
        with bad.noting(name):
            section = resolve_section(spec, tissue.name, settings.cache_dir, settings.max_pixels)
            if settings.check_image and spec.simulate is None and len(used) > 1:
                with section.open_slide() as slide:
                    require_h_and_e(slide)
            found[name] = section

    with watch("simulate" if any(tissue.sections[name].simulate for name in used) else "open"):
        in_turn(used, take)
    roles = bad.settle(Roles(tissue.train, tissue.val, tissue.test))
    return {name: found[name] for name in used if name in found}, roles


def _prepared(
    name: str,
    species: str,
    sections: Mapping[str, Section],
    roles: Roles,
    settings: PrepareSettings,
    watch: Stopwatch,
    bad: BadSections,
) -> PreparedTissue:
    """The stages of all sections; the panel in between, so that what is wrong with it is found before the features are computed."""
    stages = _Stages(name, species, sections, settings, watch)
    prepared: dict[str, PreparedSection] = {}

    def count(key: str) -> None:
        with bad.noting(key), of_section(key):
            stages.count(key)

    def read_image(key: str) -> None:
        with bad.noting(key), of_section(key):
            prepared[key] = stages.read_image(key, trains=key in roles.train)

    in_turn(sections, count)
    roles = bad.settle(roles)
    panel = stages.panel(roles, bad.reasons)
    in_turn([key for key in sections if key not in bad.reasons], read_image)
    if (left := bad.settle(roles)) != roles:
        roles, panel = left, stages.panel(left, bad.reasons)
    return PreparedTissue(
        name=name,
        species=species,
        sections={key: prepared[key] for key in sections if key not in bad.reasons},
        train=list(roles.train),
        val=list(roles.val),
        test=list(roles.test),
        panel=panel,
        register=settings.register,
        bins=stages.bins,
        skipped=bad.reasons,
    )


class _Stages:
    """The stages of preparation, and what earlier ones left for later ones."""

    def __init__(
        self, name: str, species: str, sections: Mapping[str, Section], settings: PrepareSettings, watch: Stopwatch
    ) -> None:
        # both read the files they use, so a missing one is reported before minutes of segmentation
        settings.encoder.settings()
        if not settings.prefer_given:
            settings.segmenter.settings()
        self.bins = isinstance(settings.segmenter, Bins)
        self._root = settings.cache_dir / name
        self._species, self._sections, self._settings, self._watch = species, dict(sections), settings, watch
        self._nuclei: dict[str, Path] = {}
        self._counts: dict[str, Path] = {}
        self._passing: dict[str, str] = {}
        self._registration: dict[str, Registration | None] = {}
        self._tables: dict[str, Path | None] = {}

    def count(self, key: str) -> None:
        """Find the nuclei of a section, and count their transcripts."""
        settings, folder = self._settings, self._root / key
        if isinstance(settings.segmenter, Bins):
            self._sections[key] = _with_units(self._sections[key], settings.segmenter.bin_um)
        section = self._sections[key]
        with self._watch("segment"):
            nuclei = prepare_nuclei(
                folder, section, settings.segmenter, settings.prefer_given, check_image=settings.check_image
            )
        with self._watch("counts"):
            decides = passing_settings(section, nuclei, self._species, settings)
            counts = prepare_counts(folder, section, nuclei, self._species, settings, decides)
            self._registration[key] = measured_registration(counts, section, settings.register)
            self._tables[key] = None if self.bins else prepare_bin_table(counts, section, nuclei, settings)
        self._nuclei[key], self._counts[key], self._passing[key] = nuclei, counts, f"counts-{fingerprint(decides)}"

    def panel(self, roles: Roles, without: Mapping[str, str]) -> Path:
        """Choose the genes from the training sections."""
        counts = {key: self._counts[key] for key in self._sections if key not in without}
        with self._watch("panel"), working("gene panel"):
            return _panel(self._root, roles, self._sections, counts, self._settings)

    def read_image(self, key: str, *, trains: bool) -> PreparedSection:
        """Compute what a model reads of the nuclei that pass quality control, for training also in views of the image."""
        section, folder, passing = self._sections[key], self._root / key, self._passing[key]
        with self._watch("features"):
            kept = _passing(load_nuclei(self._nuclei[key]), self._counts[key])
            features = None
            if not isinstance(self._settings.encoder, NoEncoder):
                features = prepare_features(folder, section, kept, self._settings.encoder, passing)
        with self._watch("colour"):
            colour = prepare_colour(folder, section, kept, colour_tile(bins=self.bins), passing)
        with self._watch("context"):
            around = prepare_context(folder, section, kept, passing)
        views: tuple[InputStores, ...] = ()
        if trains and self._settings.augment:
            with self._watch("views"):
                views = self._views(key, kept)
        return PreparedSection(
            section,
            self._nuclei[key],
            self._counts[key],
            features,
            colour,
            around,
            self._registration[key],
            self._tables[key],
            views,
        )

    def _views(self, key: str, kept: GeoDataFrame) -> tuple[InputStores, ...]:
        """What a model reads in each view of a training section, and the cost in the log."""
        section, settings, found = self._sections[key], self._settings, []
        for number in range(settings.augment):
            view = View.draw(settings.seed, section.name, number)
            logger.info("%s, view %d of %d: %s", section.name, number + 1, settings.augment, view)
            moved = view.orientation.nuclei(kept, section.file_size)
            place = self._root / key, view.of(section), moved
            found.append(prepare_input(*place, settings.use, lambda: settings.encoder, self._passing[key]))
        size = sum(path.stat().st_size for stores in found for path in stores if path is not None)
        logger.info(
            "%s: read %d times for training, the image and %d views, which take %.1f MB of the cache",
            *(section.name, 1 + len(found), len(found), size / 1e6),
        )
        return tuple(found)


def _with_units(section: Section, bin_um: int) -> Section:
    """The section with its bins of this size as units, checked against its image."""
    measurement = required_measurement(section)
    if not isinstance(measurement, HasUnits):
        raise InputError(
            f"{measurement.path}: {measurement.name} has no bins that could be units; predict nuclei, or give Visium HD"
        )
    measurement = measurement.with_units(bin_um)
    measurement.check(section.image, section.width, section.height, (section.mpp_source, section.mpp))
    return replace(section, measurement=measurement)


def _panel(
    root: Path, roles: Roles, sections: Mapping[str, Section], counts: Mapping[str, Path], settings: PrepareSettings
) -> Path:
    decides = {
        "version": STAGE_VERSION["panel"],
        "counts": {name: path.stem for name, path in counts.items()},
        "roles": [list(names) for names in (roles.train, roles.val, roles.test)],
        "split": settings.splitter.settings(),
        "panel": settings.panel.settings(),
    }

    def make(path: Path) -> None:
        from anndata.io import read_elem

        xy_um, flagged = {}, {}
        for name, measured in counts.items():
            with h5py.File(measured) as file:
                xy_um[name] = read_elem(file["obsm/spatial"]) * sections[name].mpp
                flagged[name] = is_artefact(read_elem(file["obs"]))
        parts = settings.splitter(xy_um, roles)
        trains = {counts[name]: (parts[name] == TRAIN) & ~flagged[name] for name in roles.train}
        settings.panel(CountsInTurn(trains)).to_json(path)

    path = build(root / f"panel-{fingerprint(decides)}.json", make, what="gene panel from the training nuclei")
    warn_of_small(Panel.from_json(path))
    return path


def _passing(nuclei: GeoDataFrame, counts: Path) -> GeoDataFrame:
    """The nuclei whose counts passed QC, in the order of the counts."""
    from anndata.io import read_elem

    with h5py.File(counts) as file:
        names = read_elem(file["obs"]).index
    return nuclei.set_index("cell_id").loc[names].reset_index(names="cell_id")
