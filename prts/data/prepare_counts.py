"""The counts of a section's nuclei, and what is measured with them, kept in the cache."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py
import pandas as pd

from prts.data.prepare_input import STAGE_VERSION, build
from prts.io.cache import fingerprint
from prts.io.hdf5 import write_h5ad
from prts.io.nuclei import load_nuclei
from prts.platforms.base import WARN_UM, CountsBins, Registration
from prts.preprocess.artefacts import KINDS, find_artefacts, log_artefacts
from prts.preprocess.counts import counted_in_bins, measured_counts, required_measurement

if TYPE_CHECKING:
    from anndata import AnnData
    from geopandas import GeoDataFrame

    from prts.data.prepared import PrepareSettings
    from prts.section import Section

logger = logging.getLogger(__name__)


def passing_settings(section: Section, nuclei: Path, species: str, settings: PrepareSettings) -> dict[str, Any]:
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


def prepare_counts(
    folder: Path,
    section: Section,
    nuclei: Path,
    species: str,
    settings: PrepareSettings,
    decides: Mapping[str, Any],
) -> Path:
    """The cache file with the counts of the nuclei that pass quality control, made if needed; `decides` is from `passing_settings`."""

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


def prepare_bin_table(counts: Path, section: Section, nuclei: Path, settings: PrepareSettings) -> Path | None:
    """The table of the bins that were counted, made if needed."""
    measurement = required_measurement(section)
    if not isinstance(measurement, CountsBins):
        return None

    def make(path: Path) -> None:
        shift = _stored_registration(counts, section) if settings.register else None
        measurement.write_bin_table(path, load_nuclei(nuclei), settings.counting, registration=shift)

    path = counts.with_name(f"{counts.stem.replace('counts', 'barcode_mappings')}.parquet")
    return build(path, make, what=f"{section.name}: table of bins and nuclei")


def measured_registration(counts: Path, section: Section, register: bool) -> Registration | None:
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
