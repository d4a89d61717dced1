"""Run every stage from files to features for each section of a tissue, skipping what is cached.

Each product is a cache file named by a fingerprint of its inputs and settings. One process builds it under a file lock while others wait
for it; a build that is killed leaves nothing behind except, for features, finished chunks from which the next run resumes.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py
import pandas as pd

from prts.data.prepare_input import (
    STAGE_VERSION,
    build,
    prepare_colour,
    prepare_context,
    prepare_features,
    prepare_input,
)
from prts.data.prepared import PanelBuilder, PreparedSection, PreparedTissue, PrepareSettings
from prts.data.resolve import resolve_section
from prts.data.splits import TRAIN, Roles
from prts.errors import InputError
from prts.features.colour import colour_tile
from prts.features.no_encoder import NoEncoder
from prts.io.cache import file_identity, fingerprint
from prts.io.hdf5 import write_h5ad
from prts.io.nuclei import load_nuclei, write_nuclei
from prts.platforms.base import WARN_UM, CountsBins, HasUnits, Registration
from prts.preprocess.artefacts import KINDS, find_artefacts, is_artefact, log_artefacts
from prts.preprocess.counts import counted_in_bins, measured_counts, required_measurement
from prts.preprocess.image_check import require_h_and_e
from prts.preprocess.species import mitochondrial_prefix
from prts.segmentation.bins import Bins, measured_bins
from prts.segmentation.measured import measured_outlines
from prts.segmentation.polygons import Polygons
from prts.segmentation.segment import segment
from prts.stopwatch import Stopwatch

if TYPE_CHECKING:
    from anndata import AnnData
    from geopandas import GeoDataFrame

    from prts.data.tissue import Tissue
    from prts.section import Section
    from prts.segmentation.segment import Segmenter

logger = logging.getLogger(__name__)

__all__ = [
    "STAGE_VERSION",
    "PanelBuilder",
    "PrepareSettings",
    "PreparedSection",
    "PreparedTissue",
    "prepare_artefacts",
    "prepare_colour",
    "prepare_context",
    "prepare_features",
    "prepare_input",
    "prepare_nuclei",
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
    watch = stopwatch or Stopwatch()
    mitochondrial_prefix(tissue.species, settings.qc.mt_prefix, owner="tissue")
    specs = [tissue.sections[name] for name in tissue.used]
    with watch("simulate" if any(spec.simulate for spec in specs) else "open"):
        sections = {
            spec.name: resolve_section(spec, tissue.name, settings.cache_dir, settings.max_pixels) for spec in specs
        }
    roles = Roles(tissue.train, tissue.val, tissue.test)
    return prepare_sections(tissue.name, tissue.species, sections, roles, settings, watch)


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
    watch = stopwatch or Stopwatch()
    root = settings.cache_dir / name
    # both read the files they use, so a missing one is reported before minutes of segmentation
    settings.encoder.settings()
    if not settings.prefer_given:
        settings.segmenter.settings()

    bins = isinstance(settings.segmenter, Bins)
    if isinstance(settings.segmenter, Bins):
        sections = {key: _with_units(section, settings.segmenter.bin_um) for key, section in sections.items()}
    nuclei: dict[str, Path] = {}
    counts: dict[str, Path] = {}
    passing: dict[str, str] = {}
    registration: dict[str, Registration | None] = {}
    tables: dict[str, Path | None] = {}
    for key, section in sections.items():
        with watch("segment"):
            nuclei[key] = prepare_nuclei(
                root / key, section, settings.segmenter, settings.prefer_given, check_image=settings.check_image
            )
        with watch("counts"):
            decides = _passing_settings(section, nuclei[key], species, settings)
            passing[key] = f"counts-{fingerprint(decides)}"
            counts[key] = _counts(root / key, section, nuclei[key], species, settings, decides)
            registration[key] = _registration(counts[key], section, settings.register)
            tables[key] = None if bins else _bin_table(counts[key], section, nuclei[key], settings)
    with watch("panel"):
        panel = _panel(root, roles, sections, counts, settings)
    prepared = {}
    for key, section in sections.items():
        with watch("features"):
            kept = _passing(load_nuclei(nuclei[key]), counts[key])
            features = None
            if not isinstance(settings.encoder, NoEncoder):
                features = prepare_features(root / key, section, kept, settings.encoder, passing[key])
        with watch("colour"):
            colour = prepare_colour(root / key, section, kept, colour_tile(bins=bins), passing[key])
        with watch("context"):
            around = prepare_context(root / key, section, kept, passing[key])
        prepared[key] = PreparedSection(
            section, nuclei[key], counts[key], features, colour, around, registration[key], tables[key]
        )
    return PreparedTissue(
        name=name,
        species=species,
        sections=prepared,
        train=list(roles.train),
        val=list(roles.val),
        test=list(roles.test),
        panel=panel,
        register=settings.register,
        bins=bins,
    )


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


def prepare_nuclei(
    folder: Path, section: Section, segmenter: Segmenter | None, prefer_given: bool, *, check_image: bool = True
) -> Path:
    """The cache file with a section's nuclei, made if needed.

    Parameters
    ----------
    folder
        The section's cache folder.
    section
        The section.
    segmenter
        Finds nuclei in an image; None if the section's own nuclei are the only source.
    prefer_given
        Use the section's own nuclei file, if it has one.
    check_image
        Refuse an image that cannot be H&E.

    Raises
    ------
    InputError
        If the image is not H&E, no nucleus is found, or the nuclei file does not fit the image.
    """
    used: Segmenter
    outlined = measured_outlines(section)
    given = prefer_given or segmenter is None
    if given and (section.nuclei is not None or outlined is not None):
        used = Polygons(section.nuclei) if section.nuclei is not None or outlined is None else outlined
    else:
        used = measured_bins(section, segmenter) or segmenter or Polygons(None)
    settings = {
        "version": STAGE_VERSION["nuclei"],
        "image": file_identity(section.image),
        "mpp": section.mpp,
        "segmenter": used.settings(),
        **section.reading(),
    }

    def make(path: Path) -> None:
        with section.open_slide() as slide:
            if check_image:
                require_h_and_e(slide)
            write_nuclei(segment(slide, used), path)

    name = used.settings()["name"]
    return build(folder / f"nuclei-{fingerprint(settings)}.parquet", make, what=f"{section.name}: nuclei by {name}")


def _passing_settings(section: Section, nuclei: Path, species: str, settings: PrepareSettings) -> dict[str, Any]:
    """Everything that determines which nuclei pass QC, the only aspect of the counts that features depend on."""
    return {
        **required_measurement(section).identity(),
        "version": STAGE_VERSION["counts"],
        "nuclei": nuclei.stem,
        "qc": settings.qc.settings(),
        "species": species,
        **({"registered": STAGE_VERSION["registration"]} if settings.register else {}),
        **({"counting": settings.counting.settings()} if settings.counting.settings() else {}),
    }


def _counts(
    folder: Path,
    section: Section,
    nuclei: Path,
    species: str,
    settings: PrepareSettings,
    decides: Mapping[str, Any],
) -> Path:
    def make(path: Path) -> None:
        polygons = load_nuclei(nuclei)
        kept = measured_counts(
            section,
            polygons,
            species=species,
            register=settings.register,
            qc=settings.qc,
            report_shift=True,
            counting=settings.counting,
        )
        kept.uns["prts"].update(section=section.name, species=species, nuclei=nuclei.name, mpp=section.mpp)
        if settings.exposure:
            _add_exposure(kept, section, polygons, settings)
        if settings.artefacts:
            with section.open_slide() as slide:
                kind = pd.Series(find_artefacts(slide, polygons), index=polygons["cell_id"])
            kept.obs["artefact"] = pd.Categorical(kind.loc[kept.obs_names], categories=list(KINDS))
            kept.uns["prts"]["artefacts"] = log_artefacts(section.name, kept.obs["artefact"])
        write_h5ad(kept, path, compression="gzip")

    decides = {**decides, "registration": STAGE_VERSION["registration"]}
    if settings.artefacts:
        decides["artefacts"] = STAGE_VERSION["artefacts"]
    if settings.exposure:
        decides["exposure"] = STAGE_VERSION["exposure"]
    return build(folder / f"counts-{fingerprint(decides)}.h5ad", make, what=f"{section.name}: counts of nuclei")


def _add_exposure(kept: AnnData, section: Section, nuclei: GeoDataFrame, settings: PrepareSettings) -> None:
    """Add `exposure` to the nuclei that passed quality control."""
    measurement = counted_in_bins(required_measurement(section))
    report = kept.uns["prts"].get("registration")
    shift = Registration.from_report(report) if settings.register and report is not None else None
    exposure, effects = measurement.exposure(nuclei, settings.counting, registration=shift)
    kept.obs["exposure"] = pd.Series(exposure, index=nuclei["cell_id"]).loc[kept.obs_names].to_numpy()
    kept.uns["prts"]["array_effects"] = {**effects.report(), "used": effects.helps}


def _bin_table(counts: Path, section: Section, nuclei: Path, settings: PrepareSettings) -> Path | None:
    """The table of the bins that were counted, made if needed."""
    measurement = required_measurement(section)
    if not isinstance(measurement, CountsBins):
        return None

    def make(path: Path) -> None:
        shift = _stored_registration(counts, section) if settings.register else None
        measurement.write_bin_table(path, load_nuclei(nuclei), settings.counting, registration=shift)

    path = counts.with_name(f"{counts.stem.replace('counts', 'barcode_mappings')}.parquet")
    return build(path, make, what=f"{section.name}: table of bins and nuclei")


def _registration(counts: Path, section: Section, register: bool) -> Registration | None:
    """The displacement measured when the counts were made, logged in every run that uses them."""
    found = _stored_registration(counts, section)
    if found is None:
        return None
    if not found.measured or found.displacement_um <= WARN_UM:
        logger.info("%s: %s", section.name, found.sentence())
    elif register:
        logger.info("%s: %s; corrected", section.name, found.sentence())
    else:
        logger.warning("%s: %s; set the `register` option to correct them", section.name, found.sentence())
    return found


def _stored_registration(counts: Path, section: Section) -> Registration | None:
    """The displacement measured when the counts were made."""
    from anndata.io import read_elem

    with h5py.File(counts) as file:
        if "registration" not in file["uns/prts"]:
            return None
        # counts of older versions do not store the um/px here
        return Registration.from_report({"mpp": section.mpp, **read_elem(file["uns/prts/registration"])})


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
        import anndata as ad

        measured = {name: ad.read_h5ad(file) for name, file in counts.items()}
        xy_um = {name: data.obsm["spatial"] * sections[name].mpp for name, data in measured.items()}
        parts = settings.splitter(xy_um, roles)
        trains = {name: (parts[name] == TRAIN) & ~is_artefact(measured[name].obs) for name in roles.train}
        settings.panel([measured[name][rows].copy() for name, rows in trains.items()]).to_json(path)

    return build(root / f"panel-{fingerprint(decides)}.json", make, what="gene panel from the training nuclei")


def prepare_artefacts(folder: Path, section: Section, nuclei: Path) -> pd.Categorical:
    """The kind of artifact at each nucleus of a section, in the order of the nuclei; computed and cached if needed.

    The slide is read in its own colors, as in training: the rules compare a nucleus with the others of its slide, so matched colors would
    add nothing, and they would make pen and folds look more like tissue.

    Parameters
    ----------
    folder
        The section's cache folder.
    section
        The section.
    nuclei
        The cache file with its nuclei.
    """
    own = replace(section, recolour=None)
    settings = {
        "version": STAGE_VERSION["artefacts"],
        "nuclei": nuclei.stem,
        "image": file_identity(own.image),
        "mpp": own.mpp,
        **own.reading(),
    }

    def make(path: Path) -> None:
        polygons = load_nuclei(nuclei)
        with own.open_slide() as slide:
            kinds = find_artefacts(slide, polygons)
        pd.DataFrame({"cell_id": polygons["cell_id"], "artefact": kinds}).to_parquet(path, index=False)

    path = folder / f"artefacts-{fingerprint(settings)}.parquet"
    found = pd.read_parquet(build(path, make, what=f"{section.name}: artefacts"))
    kinds: pd.Categorical = pd.Categorical(found["artefact"].astype(str).to_numpy(object), categories=list(KINDS))
    return kinds


def _passing(nuclei: GeoDataFrame, counts: Path) -> GeoDataFrame:
    """The nuclei whose counts passed QC, in the order of the counts."""
    from anndata.io import read_elem

    with h5py.File(counts) as file:
        names = read_elem(file["obs"]).index
    return nuclei.set_index("cell_id").loc[names].reset_index(names="cell_id")
