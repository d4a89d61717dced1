"""Open the sections of a tissue config, simulating those with `simulate`."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prts.errors import InputError, ParameterError
from prts.io.cache import fingerprint, lock
from prts.section import Section, make_measurement, open_section, open_section_folder, own_image
from prts.simulate.section import simulate_section

if TYPE_CHECKING:
    from prts.data.tissue import SectionSpec

logger = logging.getLogger(__name__)

# Increased when the simulation changes what it writes for the same settings.
_VERSION = 2


def resolve_section(spec: SectionSpec, tissue: str, cache_dir: Path, max_pixels: int | None = None) -> Section:
    """Open a section of a tissue; one with `simulate` is simulated into the cache first.

    Parameters
    ----------
    spec
        The section as its config describes it.
    tissue
        Name of the tissue.
    cache_dir
        Folder for simulated sections, `<tissue>/<section>/section-<fingerprint>`.
    max_pixels
        Largest image that is decoded as a whole; None: 2^29 px.

    Raises
    ------
    InputError
        If a file is missing (naming `prts download` if the tissue can be downloaded), or the parts do not belong together.
    """
    if spec.simulate is not None:
        return open_section_folder(_simulated(spec.name, spec.simulate, tissue, cache_dir), name=spec.name)
    measurement = make_measurement(spec.name, spec.platform, dict(spec.measurement))
    missing = [path for path in (spec.image, measurement.path) if path is not None and not path.exists()]
    if missing:
        cure = (
            f"`prts download tissue={tissue}` fetches it"
            if spec.download
            else f"set the data folder (PRTS_DATA), or the paths of section {spec.name}"
        )
        raise InputError(f"{missing[0]}: no such file; {cure}")
    return open_section(
        spec.name,
        own_image(measurement) if spec.image is None else spec.image,
        measurement=measurement,
        mpp=spec.mpp,
        nuclei=spec.nuclei,
        spots=spec.spots,
        max_pixels=max_pixels,
    )


def _simulated(name: str, simulate: Mapping[str, Any], tissue: str, cache_dir: Path) -> Path:
    """The folder of a simulated section, made if needed."""
    settings = dict(simulate)
    folder = cache_dir / tissue / name / f"section-{fingerprint({'version': _VERSION, **settings})}"
    if folder.is_dir():
        return folder
    with lock(folder):
        if not folder.is_dir():
            logger.info("%s/%s: simulating the section", tissue, name)
            try:
                inspect.signature(simulate_section).bind(folder, name=name, **settings)
            except TypeError as error:
                raise ParameterError("section", f"{name}.simulate", str(error)) from error
            simulate_section(folder, name=name, **settings)
    return folder
