"""What a model reads of the nuclei of a section, kept in the cache."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import shapely
import torch

from prts.features import context
from prts.features.extract import extract
from prts.features.feature_reader import STORED
from prts.features.store import Rows, write_store
from prts.io.cache import atomic, file_identity, fingerprint, lock

if TYPE_CHECKING:
    from geopandas import GeoDataFrame

    from prts.features.encoders import Encoder
    from prts.section import Section

logger = logging.getLogger(__name__)

# Raised when a stage's code changes what it writes for the same inputs.
STAGE_VERSION = {"nuclei": 2, "counts": 1, "registration": 1, "artefacts": 1, "panel": 1, "features": 2, "context": 2}


def build(path: Path, make: Callable[[Path], None], *, what: str) -> Path:
    """Make a cache file unless it is there, one process at a time."""
    if path.exists():
        return path
    with lock(path):
        if not path.exists():
            logger.info("%s", what)
            with _own_threads(), atomic(path) as temporary:
                make(temporary)
    return path


@contextmanager
def _own_threads() -> Iterator[None]:
    """Keep torch's number of threads, so that features and weights do not depend on whether this stage was in the cache.

    numba, with which scanpy chooses genes, changes the number in the OpenMP library that both share.
    """
    n_threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(n_threads)


def prepare_features(
    folder: Path, section: Section, nuclei: GeoDataFrame, encoder: Encoder, source: str, *, kind: str | None = None
) -> Path:
    """The feature store of some nuclei of a section, extracted if needed; resumes where a killed run stopped.

    Parameters
    ----------
    folder
        The section's cache folder.
    section
        The section.
    nuclei
        The nuclei.
    encoder
        Reads features from the image.
    source
        Stem of the cache file that says which nuclei these are.
    kind
        First part of the file's name; `features-<encoder>` by default.

    Raises
    ------
    InputError
        If the encoder's weights are wrong.
    """
    settings = {
        "version": STAGE_VERSION["features"],
        "nuclei": source,
        "image": file_identity(section.image),
        "mpp": section.mpp,
        "encoder": encoder.settings(),
        **section.reading(),
    }
    # `exact` is omitted from the name, so that stores from before the option existed keep theirs
    named = {key: value for key, value in encoder.settings().items() if (key, value) != ("sampling", "exact")}
    path = folder / f"{kind or f'features-{encoder.name}'}-{fingerprint({**settings, 'encoder': named})}.h5"
    if not path.exists():
        with lock(path):
            if not path.exists():
                # not through `_build`: extract keeps its own finished chunks, so that a killed run resumes
                with section.open_slide() as slide:
                    extract(slide, nuclei, encoder, path, provenance=settings)
    return path


def prepare_context(folder: Path, section: Section, nuclei: GeoDataFrame, source: str) -> Path:
    """The context statistics of some nuclei of a section, computed if needed.

    The file is a feature store with the scales up to 12 um as `local` and the others as `global`.

    Parameters
    ----------
    folder
        The section's cache folder.
    section
        The section.
    nuclei
        The nuclei.
    source
        Stem of the cache file that says which nuclei these are.
    """
    settings = {
        "version": STAGE_VERSION["context"],
        "nuclei": source,
        "image": file_identity(section.image),
        "mpp": section.mpp,
        "context": context.settings(),
        **section.reading(),
    }

    def make(path: Path) -> None:
        xy = shapely.get_coordinates(shapely.centroid(np.asarray(nuclei.geometry.array, dtype=object)))
        with section.open_slide() as slide:
            columns = context.context(slide, xy)
        fine = len(context.COLUMNS) // len(context.SIGMAS_UM) * context.FINE
        rows = Rows(columns[:, fine:], columns[:, :fine])
        attrs = {"mpp": context.MPP, "settings": context.settings(), "provenance": settings}
        write_store(path, nuclei["cell_id"].to_numpy(), xy, (rows.global_.shape[1], fine), [rows], attrs)

    return build(folder / f"context-{fingerprint(settings)}.h5", make, what=f"{section.name}: context")


class InputStores(NamedTuple):
    """The stores that a model's input is read from; None where it needs none."""

    features: Path | None
    context: Path | None


def prepare_input(
    folder: Path,
    section: Section,
    nuclei: GeoDataFrame,
    use: Sequence[str],
    encoder: Callable[[], Encoder],
    source: str,
) -> InputStores:
    """What a model reads of some nuclei of a section, made if needed.

    Parameters
    ----------
    folder, section, nuclei, source
        As for `prepare_features`.
    use
        Blocks of the model's input.
    encoder
        Makes the encoder; only called if a block comes from it.

    Raises
    ------
    InputError
        If the encoder's weights are missing or wrong.
    """
    needs_encoder = any(block in STORED for block in use)
    return InputStores(
        prepare_features(folder, section, nuclei, encoder(), source) if needs_encoder else None,
        prepare_context(folder, section, nuclei, source) if "context" in use else None,
    )
