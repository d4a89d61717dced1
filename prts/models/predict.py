"""From a bundle and features to a prediction file, chunk by chunk."""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from prts import __version__
from prts.data.slide_scale import FEWEST
from prts.errors import InputError
from prts.features.feature_reader import InputReader
from prts.features.store import read_store_attrs
from prts.io.prediction import SCALE, PredictionWriter, spatial_uns
from prts.io.unit_names import unit_name
from prts.models.ood import Verdict, verdict
from prts.models.predictor import CHUNK
from prts.preprocess.artefacts import is_artefact
from prts.progress import track
from prts.provenance import code, identity

if TYPE_CHECKING:
    from geopandas import GeoDataFrame

    from prts.models.bundle import Bundle
    from prts.section import Section

logger = logging.getLogger(__name__)

_THUMBNAIL_PX = 2000
# Features held in memory at a time. Each batch is one pass over the store, which may be in a different order than the file: with batches
# as small as a chunk, the work would grow with the square of the number of nuclei.
_HELD_BYTES = 512 << 20


class Chunk(NamedTuple):
    """Prediction of some nuclei.

    Attributes
    ----------
    umi, prob
        Expected UMI and P(expressed), (b, g).
    ood
        How unusual each nucleus is, (b,), if the bundle can tell.
    capped
        How many genes of each nucleus are at the bundle's limit, (b,), if the bundle has one.
    spread
        How much the expected UMI depends on the orientation of the slide, (b,), if it was read in several (`predict_views`).
    """

    umi: NDArray[np.float32]
    prob: NDArray[np.float32]
    ood: NDArray[np.float32] | None = None
    capped: NDArray[np.int32] | None = None
    spread: NDArray[np.float32] | None = None


class View(NamedTuple):
    """A slide as it is read in one orientation: its nuclei (n,) and all nuclei of the section in its pixels, and their input.

    `sample` is a view of nuclei from all over the slide, where `nuclei` are those of a region and the model matches slides.
    """

    nuclei: GeoDataFrame
    among: GeoDataFrame
    features: Path | None
    context: Path | None
    sample: View | None = None


def predict_store(
    bundle: Bundle,
    store: Path | None,
    nuclei: GeoDataFrame,
    mpp: float,
    chunk: int = CHUNK,
    *,
    among: GeoDataFrame | None = None,
    context: Path | None = None,
    sample: View | None = None,
) -> Iterator[Chunk]:
    """Predict nuclei from a feature store, holding at most half a gigabyte of features: 230,000 nuclei of 576 columns.

    Parameters
    ----------
    bundle
        The model.
    store
        Features of these nuclei and maybe others; None if the model needs no encoder.
    nuclei
        (n,) the nuclei, in the order of the output.
    mpp
        um per full-resolution pixel.
    chunk
        Nuclei at a time.
    among
        All nuclei of the section, where `nuclei` are only some: the others are neighbours.
    context
        Context statistics of these nuclei, if the model uses them.
    sample
        Nuclei from all over the slide, where `nuclei` are those of a region and the model matches slides.
    """
    view = View(nuclei, nuclei if among is None else among, store, context, sample)
    chunks = _predicted(bundle, view, mpp, chunk, _HELD_BYTES)
    yield from track(chunks, "predict", total=-(-len(nuclei) // chunk))


def predict_views(bundle: Bundle, views: Sequence[View], mpp: float, chunk: int = CHUNK) -> Iterator[Chunk]:
    """Average the predictions of a slide that was read in several orientations.

    Views are added up one after the other, so that memory does not grow with their number.

    Parameters
    ----------
    bundle
        The model.
    views
        The same nuclei in each orientation, in the same order.
    mpp
        um per full-resolution pixel.
    chunk
        Nuclei at a time.

    Yields
    ------
    Means of the expected UMI and of P(expressed). `spread` is the standard deviation of log1p(expected UMI) over the views, as the root
    mean square over the genes. `capped` is the most in any view, and `ood` that of the first, since its calibration is for a single one.
    """
    readings = [_predicted(bundle, view, mpp, chunk, _HELD_BYTES // len(views)) for view in views]
    chunks = (_averaged(parts) for parts in _in_step(readings))
    yield from track(chunks, "predict", total=-(-len(views[0].nuclei) // chunk))


def _in_step(readings: Sequence[Iterator[Chunk]]) -> Iterator[Iterator[Chunk]]:
    """For each chunk of nuclei its prediction in every view, made only when it is asked for."""
    for first in readings[0]:
        yield itertools.chain([first], (next(reading) for reading in readings[1:]))


def _averaged(parts: Iterator[Chunk]) -> Chunk:
    """The mean over views, with the running variance of Welford (1962)."""
    first = next(parts)
    umi, prob, mean, capped = first.umi.copy(), first.prob.copy(), np.log1p(first.umi), first.capped
    squares = np.zeros_like(mean)
    n = 1
    for n, part in enumerate(parts, start=2):
        umi += part.umi
        prob += part.prob
        level = np.log1p(part.umi)
        step = level - mean
        mean += step / n
        squares += step * (level - mean)
        if capped is not None and part.capped is not None:
            capped = np.maximum(capped, part.capped)
    umi /= n
    prob /= n
    return Chunk(umi, prob, first.ood, capped, np.sqrt((squares / n).mean(axis=1)))


def _predicted(bundle: Bundle, view: View, mpp: float, chunk: int, held_bytes: int) -> Iterator[Chunk]:
    read = InputReader(view.features, bundle.input_use, lambda: view.among, mpp, view.context)
    cell_ids = view.nuclei["cell_id"].to_numpy()
    held = max(1, held_bytes // (4 * sum(read.widths.values()) * chunk)) * chunk
    parts = [cell_ids[start : start + held] for start in range(0, len(cell_ids), held)]
    if view.sample is None:
        seen = by_slide(bundle, read, parts, whole=len(view.among) == len(view.nuclei))
    else:
        slide = view.sample
        everywhere = InputReader(slide.features, bundle.input_use, lambda: slide.among, mpp, slide.context)
        seen = by_slide(bundle, everywhere, [slide.nuclei["cell_id"].to_numpy()], whole=True)

    limit = None if bundle.limit is None else bundle.limit.float().cpu().numpy()

    def batch(features: NDArray[np.float32]) -> Iterator[Chunk]:
        # before the slide is matched, in place: one that has to be matched is unusual, too
        unusual = None if bundle.ood is None else bundle.ood.share(features)
        for i, (umi, prob) in enumerate(bundle.predict_chunks(seen(features), chunk)):
            yield Chunk(
                umi,
                prob,
                None if unusual is None else unusual[i * chunk : (i + 1) * chunk],
                None if limit is None else (umi >= limit).sum(axis=1, dtype=np.int32),
            )

    for part in parts:
        # unnamed, or one batch would be kept while the next is read
        yield from batch(read(part))


def by_slide(
    bundle: Bundle, read: Callable[[Any], NDArray[np.float32]], parts: Sequence[NDArray[Any]], *, whole: bool
) -> Callable[[NDArray[np.float32]], NDArray[np.float32]]:
    """What is done to the features (n, d) of a slide before they are predicted: nothing, or they are matched to training.

    Parameters
    ----------
    bundle
        The model.
    read
        Reads the features of a part.
    parts
        The nuclei of the slide, or a sample of them, in parts.
    whole
        Whether these stand for the slide, not for a region of it.
    """
    matching, n = bundle.slide_scale, sum(map(len, parts))
    if matching is None:
        return lambda features: features
    if not whole or n < FEWEST:
        logger.warning(
            "features are used as they are, although this model was trained on those of whole slides, each matched in mean and spread: %s",
            "only a region is predicted" if not whole else f"{n} nuclei are too few (at least {FEWEST})",
        )
        return lambda features: features
    slide = matching.moments(map(read, parts))
    return lambda features: matching.match(features, slide)


def _relative(image: Path, out: Path) -> str | None:
    """Path of the image from the folder of the prediction, so that both can be moved together; None on another drive."""
    try:
        return Path(os.path.relpath(image.resolve(), out.resolve().parent)).as_posix()
    except ValueError:
        return None


def write_prediction(
    out: Path,
    bundle: Bundle,
    section: Section,
    nuclei: GeoDataFrame,
    chunks: Iterable[Chunk],
    *,
    store: Path | None,
    intervals: bool | None = None,
    provenance: Mapping[str, Any] | None = None,
    strict: bool = False,
) -> Verdict | None:
    """Write `<out>.h5ad` and `<out>.nuclei.parquet`.

    Parameters
    ----------
    out
        The `.h5ad` file.
    bundle
        The model that was used.
    section
        The section that was predicted.
    nuclei
        (n,) the predicted nuclei, in pixels of the image file; columns such as `artefact` go into `obs`.
    chunks
        Their predictions in order, as `predict_store` or `predict_views` yields them.
    store
        The feature store, for provenance; None if the model needs no encoder.
    intervals
        Whether to write `layers["lower"]` and `layers["upper"]`, the intervals of counts; None writes them if the bundle has any.
    provenance
        Additional provenance, JSON-like.
    strict
        Write nothing if the prediction should not be believed.

    Returns
    -------
    The verdict on the slide (`prts.models.ood.verdict`), which is also in the file; None if the bundle cannot give one.

    Raises
    ------
    InputError
        If intervals are requested from a bundle that has none, the file cannot be written, or with `strict`.
    """
    ranges = None if intervals is False else bundle.intervals
    if intervals and ranges is None:
        raise InputError(
            "intervals: not available, since this bundle was trained with an older prts; omit the option, or train again"
        )
    table = None if ranges is None else ranges.table()
    genes = bundle.per_gene()
    meta = bundle.metadata
    encoder = meta["encoder"] if store is None else read_store_attrs(store)["settings"]
    diameter_um = 2 * float(np.sqrt(np.median(nuclei["area_um2"]) / np.pi))
    with section.open_slide() as slide:
        thumbnail = slide.thumbnail(_THUMBNAIL_PX)
    uns = {
        "prts": {
            "scale": SCALE,
            "version": __version__,
            "code": code(),
            "image_identity": identity(section.image),
            "section": section.name,
            "image": section.image.name,
            "image_path": _relative(section.image, out),
            "width": section.width,
            "height": section.height,
            "bounds": None if section.bounds is None else list(section.bounds),
            "mpp": section.mpp,
            "mpp_source": section.mpp_source,
            "species": meta["species"],
            "qc": meta["qc"],
            "register": meta.get("register", False),
            "counting": meta.get("counting", {}),
            "threshold": bundle.rule.threshold,
            "interval_level": None if ranges is None else ranges.level,
            "gate": bundle.rule.gate,
            "model": {key: meta[key] for key in ("tissue", "train_sections", "seed", "weights_sha256", "versions")},
            "features": {"encoder": encoder},
            **(provenance or {}),
        },
        "spatial": spatial_uns(section.name, thumbnail, section.width, diameter_um / section.mpp),
    }
    with PredictionWriter(out, genes, nuclei, uns, intervals=ranges is not None) as writer:
        start, strangeness, capped, spreads, said = 0, [], [], [], None
        for umi, prob, ood, cut, spread in chunks:
            writer.write(start, umi, prob, None if ranges is None else ranges.bounds(umi, table))
            start += len(umi)
            if ood is not None:
                strangeness.append(ood)
            if cut is not None:
                capped.append(cut)
            if spread is not None:
                spreads.append(spread)
        if spreads:
            writer.add(obs={"tta_sd": np.concatenate(spreads)})
        counted = np.concatenate(capped) if capped else None
        if counted is not None:
            writer.add(obs={"n_capped": counted})
        if strangeness:
            shares = np.concatenate(strangeness)
            said = verdict(shares, bundle.predictable, is_artefact(nuclei), counted)
            if strict and not said.believable:
                raise InputError(
                    f"{section.image}: {said.text}; train on slides like this one, or set strict=false to write it nevertheless"
                )
            writer.add(obs={"ood": shares}, prts={"verdict": said.text, "believable": said.believable})
    units = unit_name(nuclei["cell_id"].to_numpy())
    logger.info("wrote %s: %d %s x %d genes", out, len(nuclei), units, len(genes))
    return said
