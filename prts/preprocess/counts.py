"""Counts per nucleus for training and evaluation: from any platform, registered on request, after quality control."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from pydantic import Field

from prts.errors import InputError, ParameterError
from prts.io.unit_names import unit_name
from prts.platforms.base import CountsBins, Registrable
from prts.platforms.bin_units import bin_um_of
from prts.preprocess.species import mitochondrial_genes, mitochondrial_prefix

if TYPE_CHECKING:
    from pathlib import Path

    import geopandas as gpd
    from anndata import AnnData

    from prts.platforms.base import Measurement, Registration
    from prts.platforms.bin_owners import CountSettings
    from prts.section import Section

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class QCSettings:
    """Limits of quality control; the defaults are the paper's. None means no limit, and every limit is strict.

    Parameters
    ----------
    min_umi
        Nuclei need more UMIs than this over all genes.
    max_area_um2
        Nuclei must be smaller than this. 150 um2 is the paper's 2,000 px^2 at its 0.2738 um/px.
    max_area_px
        The paper's own rule, in full-resolution px^2; replaces `max_area_um2`.
    max_pct_mt
        The mitochondrial share of the UMIs must be below this percentage.
    mt_prefix
        How the names of mitochondrial genes begin, such as `"MT-"`; None: by the species.
    """

    min_umi: Annotated[int, Field(ge=0)] | None = 20
    max_area_um2: Annotated[float, Field(gt=0)] | None = 150.0
    max_area_px: Annotated[float, Field(gt=0)] | None = None
    max_pct_mt: Annotated[float, Field(gt=0)] | None = 15.0
    mt_prefix: Annotated[str, Field(min_length=1)] | None = None

    @classmethod
    def for_bins(cls) -> QCSettings:
        """Limits for bins: their size is given, and their mitochondrial share depends on the tissue (kidney: 16 % in the median)."""
        return cls(min_umi=10, max_area_um2=None, max_pct_mt=None)

    @classmethod
    def from_stored(cls, stored: Mapping[str, Any]) -> QCSettings:
        """Settings from a prediction or a bundle, whose files omit limits that are None."""
        return cls(
            **{**dict.fromkeys(asdict(cls())), **{key: np.asarray(value).item() for key, value in stored.items()}}
        )

    def settings(self) -> dict[str, Any]:
        """All limits, whole numbers as int so that 150 and 150.0 have one fingerprint, and the prefix if there is one."""
        limits = asdict(self)
        prefix = limits.pop("mt_prefix")
        whole = {
            key: int(value) if value is not None and value == int(value) else value for key, value in limits.items()
        }
        return whole if prefix is None else {**whole, "mt_prefix": prefix}


def measured_counts(
    section: Section,
    nuclei: gpd.GeoDataFrame,
    *,
    species: str,
    register: bool = False,
    qc: QCSettings | None = None,
    report_shift: bool = False,
    counting: CountSettings | None = None,
) -> AnnData:
    """Sum a section's measured counts in nuclei; preparation, evaluation, analysis and reports all use this function.

    Parameters
    ----------
    section
        The section, with a measurement.
    nuclei
        Nuclei with `cell_id`, `geometry` in full-resolution pixels and `area_um2`, (n_nuclei,).
    species
        Name of the species; see `prts.preprocess.species`.
    register
        Measure and correct the shift between counts and nuclei. If the platform cannot measure it, nothing is corrected.
    qc
        Limits of quality control; the paper's if None.
    report_shift
        Measure the shift even if it is not corrected, which takes one pass over all counts.
    counting
        Which bins are counted for a nucleus; the paper's rule if None.

    Returns
    -------
    Nuclei that pass quality control x all genes, as `count_nuclei` and `quality_control` return them, with a measured shift in
    `uns["prts"]["registration"]`.

    Raises
    ------
    InputError
        If the section has no measurement, a file is damaged, the species is not the section's, or no nucleus passes.

    Examples
    --------
    >>> measured_counts(section, nuclei, species="human", register=True)  # doctest: +SKIP
    """
    measurement = required_measurement(section)
    registration: Registration | None = None
    if register or report_shift:
        if bin_um_of(nuclei) is not None:
            if register:
                logger.warning(
                    "%s: the shift of bins that are units cannot be measured; they are counted as they are",
                    section.name,
                )
        elif isinstance(measurement, Registrable):
            registration = measurement.register(nuclei, section.mpp)
        elif register:
            logger.warning(
                "%s: the shift of %s counts cannot be measured; nothing is corrected",
                section.name,
                measurement.name,
            )
    qc = QCSettings() if qc is None else qc
    counts = count_nuclei(
        measurement,
        nuclei,
        species=species,
        registration=registration if register else None,
        counting=counting,
        mt_prefix=qc.mt_prefix,
    )
    if registration is not None:
        counts.uns["prts"]["registration"] = {**registration.report(), "corrected": register and registration.measured}
    return quality_control(counts, qc, mpp=section.mpp)


def required_measurement(section: Section) -> Measurement:
    """The measurement of a section that must have one.

    Raises
    ------
    InputError
        If it has none.
    """
    if section.measurement is None:
        raise InputError(
            f"section {section.name}: has no measured counts; give its binned_outputs/square_002um, or the files of another platform"
        )
    return section.measurement


def count_nuclei(
    measurement: Measurement,
    nuclei: gpd.GeoDataFrame,
    *,
    species: str,
    registration: Registration | None = None,
    counting: CountSettings | None = None,
    mt_prefix: str | None = None,
) -> AnnData:
    """Count all genes in all nuclei, with the statistics that quality control needs.

    Parameters
    ----------
    measurement
        The section's measurement.
    nuclei
        Nuclei with `cell_id`, `geometry` in full-resolution pixels and `area_um2`, (n_nuclei,).
    species
        Which genes are mitochondrial; see `prts.preprocess.species`.
    registration
        Shift to correct.
    counting
        Which bins are counted for a nucleus; the paper's rule if None.
    mt_prefix
        How the names of mitochondrial genes begin, instead.

    Returns
    -------
    (n_nuclei, n_genes) with `X` CSR int32; `obs_names` = cell_id; obs `area_um2`, `total_counts`, `n_genes_by_counts`,
    `pct_counts_mt` (percent; 0 without counts); `var` with `gene_id` and `symbol`; `obsm["spatial"]` centroids in full-resolution
    pixels; statistics of the counting in `uns["prts"]`.

    Raises
    ------
    InputError
        If the species is unknown or not the section's, or the platform cannot count.
    """
    mitochondrial_prefix(species, mt_prefix)  # before the counting, which takes minutes
    if counting is None or not counting.settings():
        counts = measurement.counts(nuclei, registration=registration)
    else:
        counts = counted_in_bins(measurement).counts_by(nuclei, counting, registration=registration)
    add_quality_figures(counts, species, measurement.path, mt_prefix)
    return counts


def counted_in_bins(measurement: Measurement) -> CountsBins:
    """A measurement that is counted bin by bin.

    Raises
    ------
    ParameterError
        If it is counted in another way.
    """
    if not isinstance(measurement, CountsBins):
        raise ParameterError(
            "",
            "counts",
            f"{measurement.name} delivers counts of whole units, to which no bins can be added; leave counts.expand_um=0 and "
            "counts.shared=drop, or give Visium HD with bins of 2 um",
        )
    return measurement


def add_quality_figures(counts: AnnData, species: str, source: Path, mt_prefix: str | None = None) -> None:
    """Add total counts, genes and the mitochondrial share of each nucleus to `obs`.

    Parameters
    ----------
    counts
        From `Measurement.counts`, (n_nuclei, n_genes).
    species, mt_prefix
        As for `count_nuclei`.
    source
        The file or folder that messages name.

    Raises
    ------
    ParameterError
        If the mitochondrial genes are from another species.
    """
    mitochondrial = mitochondrial_genes(counts.var, species, source, mt_prefix)
    X = counts.X
    total = np.asarray(X.sum(axis=1), dtype=np.int64).ravel()
    in_mitochondria = np.asarray(X[:, mitochondrial].sum(axis=1), dtype=np.int64).ravel()
    counts.obs["total_counts"] = total
    counts.obs["n_genes_by_counts"] = np.diff(X.indptr).astype(np.int64)
    counts.obs["pct_counts_mt"] = 100.0 * in_mitochondria / np.maximum(total, 1)
    counts.uns["prts"]["species"] = species


def quality_control(counts: AnnData, settings: QCSettings, *, mpp: float) -> AnnData:
    """Keep nuclei within the limits of area, UMIs and mitochondrial share.

    Parameters
    ----------
    counts
        From `count_nuclei`, (n_nuclei, n_genes).
    settings
        The limits.
    mpp
        um per full-resolution pixel, for `max_area_px`.

    Returns
    -------
    The nuclei kept, (n_kept, n_genes); limits and the number of nuclei that each rule alone removes in `uns["prts"]["qc"]`.

    Raises
    ------
    InputError
        If no nucleus is left.
    """
    area = counts.obs["area_um2"].to_numpy()
    area_limit, areas = ("max_area_um2", area) if settings.max_area_px is None else ("max_area_px", area / mpp**2)
    rules = {
        "area": (area_limit, areas),
        "umi": ("min_umi", counts.obs["total_counts"].to_numpy()),
        "mt": ("max_pct_mt", counts.obs["pct_counts_mt"].to_numpy()),
    }
    keep = np.ones(counts.n_obs, dtype=bool)
    removed, limits, reasons = {}, {}, []
    for rule, (name, values) in rules.items():
        limit = getattr(settings, name)
        if limit is None:
            removed[f"n_failed_{rule}"] = 0
            continue
        passes = values > limit if name.startswith("min") else values < limit
        keep &= passes
        limits[name] = limit
        removed[f"n_failed_{rule}"] = n = int((~passes).sum())
        reasons.append(f"{n} for {name}={limit:g}")
    units = unit_name(counts.obs_names)
    why = f"{', '.join(reasons) or 'no limit is set'} ({'a bin' if units == 'bins' else 'a nucleus'} may fail several)"
    if not keep.any():
        raise InputError(f"quality control keeps none of {len(keep)} {units}: {why}; relax the limit that removes most")
    logger.info("quality control keeps %d of %d %s; failed: %s", keep.sum(), len(keep), units, why)
    kept = counts[keep].copy()
    report = {"n_nuclei": len(keep), "n_kept": int(keep.sum()), **removed, **limits}
    kept.uns["prts"] = {**kept.uns.get("prts", {}), "qc": report}
    return kept
