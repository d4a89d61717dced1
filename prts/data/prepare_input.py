"""What a model reads of the nuclei of a section, kept in the cache."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import shapely
import torch

from prts.features import context
from prts.features.colour import ColourTile, colour
from prts.features.extract import extract
from prts.features.feature_reader import STORED
from prts.features.store import Rows, join_stores, write_store
from prts.io.cache import atomic, file_identity, fingerprint, lock

if TYPE_CHECKING:
    from geopandas import GeoDataFrame
    from numpy.typing import NDArray

    from prts.features.encoders import Encoder
    from prts.io.slide import Slide
    from prts.section import Section

logger = logging.getLogger(__name__)

# Raised when a stage's code changes what it writes for the same inputs.
STAGE_VERSION = {
    "nuclei": 2,
    "counts": 1,
    "registration": 1,
    "artefacts": 1,
    "exposure": 2,
    "panel": 1,
    "features": 2,
    "context": 2,
    "colour": 2,
}


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


def prepare_features(folder: Path, section: Section, nuclei: GeoDataFrame, encoder: Encoder, source: str) -> Path:
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
    path = folder / f"features-{encoder.name}-{fingerprint({**settings, 'encoder': named})}.h5"
    if not path.exists():
        with lock(path):
            if not path.exists():
                # not through `build`: extract keeps its own finished chunks, so that a killed run resumes
                if encoder.scales:
                    encoder.load()
                    alone = [encoder.at(mpp) for mpp in encoder.scales]
                    join_stores(
                        [prepare_features(folder, section, nuclei, each, source) for each in alone], path, settings
                    )
                    return path
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

    def columns(slide: Slide, polygons: NDArray[np.object_]) -> Rows:
        values = context.context(slide, shapely.get_coordinates(shapely.centroid(polygons)))
        fine = len(context.COLUMNS) // len(context.SIGMAS_UM) * context.FINE
        return Rows(values[:, fine:], values[:, :fine])

    return _prepare_statistics("context", context.settings(), columns, folder, section, nuclei, source)


def prepare_colour(folder: Path, section: Section, nuclei: GeoDataFrame, tile: ColourTile, source: str) -> Path:
    """The color statistics of some nuclei of a section, computed if needed.

    The file is a feature store with the tile as `global` and the nucleus as `local`.

    Parameters
    ----------
    folder, section, nuclei, source
        As for `prepare_context`.
    tile
        The tile around each nucleus.
    """

    def columns(slide: Slide, polygons: NDArray[np.object_]) -> Rows:
        return Rows(*colour(slide, polygons, tile))

    return _prepare_statistics("colour", tile.settings(), columns, folder, section, nuclei, source)


def _prepare_statistics(
    kind: Literal["context", "colour"],
    described: Mapping[str, Any],
    columns: Callable[[Slide, NDArray[np.object_]], Rows],
    folder: Path,
    section: Section,
    nuclei: GeoDataFrame,
    source: str,
) -> Path:
    """The store `<kind>-<fingerprint>.h5` of statistics that are computed for all nuclei at once."""
    settings = {
        "version": STAGE_VERSION[kind],
        "nuclei": source,
        "image": file_identity(section.image),
        "mpp": section.mpp,
        kind: described,
        **section.reading(),
    }

    def make(path: Path) -> None:
        polygons = np.asarray(nuclei.geometry.array, dtype=object)
        with section.open_slide() as slide:
            rows = columns(slide, polygons)
        xy = shapely.get_coordinates(shapely.centroid(polygons))
        attrs = {"mpp": described["mpp"], "settings": described, "provenance": settings}
        widths = rows.global_.shape[1], rows.local.shape[1]
        write_store(path, nuclei["cell_id"].to_numpy(), xy, widths, [rows], attrs)

    return build(folder / f"{kind}-{fingerprint(settings)}.h5", make, what=f"{section.name}: {kind}")


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
