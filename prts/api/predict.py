"""Predict a slide with a trained model: find nuclei, extract features, predict, write."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, TypeAlias

import numpy as np
import shapely

from prts.data.prepare import prepare_artefacts, prepare_input, prepare_nuclei
from prts.errors import InputError, ParameterError
from prts.features.encoders import encoder_from_settings, weights_status
from prts.features.encoders.tokens import torch_device
from prts.features.feature_reader import STORED
from prts.io.cache import default_cache, fingerprint, reading
from prts.io.nuclei import load_nuclei, make_nuclei
from prts.io.orientation import Orientation
from prts.io.prediction import check_out
from prts.io.region import inside, read_region
from prts.models.predict import View, predict_store, predict_views, write_prediction
from prts.models.scale import check_scale
from prts.preprocess.artefacts import log_artefacts
from prts.preprocess.stains.base import match_stain
from prts.section import Section, read_section
from prts.segmentation import segmenters
from prts.segmentation.bins import Bins
from prts.segmentation.measured import measured_outlines
from prts.segmentation.polygons import Polygons
from prts.segmentation.segment import recorded_segmenter
from prts.stopwatch import Stopwatch, peak_rss_mb

if TYPE_CHECKING:
    import pandas as pd
    from geopandas import GeoDataFrame
    from shapely.geometry.base import BaseGeometry

    from prts.features.encoders import Encoder
    from prts.io.slide import Slide
    from prts.models.bundle import Bundle
    from prts.segmentation.segment import Segmenter


logger = logging.getLogger(__name__)

NucleiSource: TypeAlias = "str | Path | GeoDataFrame | Segmenter | None"


@dataclass(frozen=True)
class SlideSettings:
    """How a slide is read, and what is checked and written.

    Parameters
    ----------
    mpp
        um per pixel of the image; None: from its metadata.
    stain
        `none`, or the stain method that matches the slide's colors to the training section.
    rotate, flip
        How to rotate the slide (degrees counterclockwise), then mirror it, so that the tissue is oriented as in training. Coordinates
        still refer to the image file.
    roi
        Predict only nuclei whose centroid is in this region: `[x0, y0, x1, y1]`, the corners of a polygon, or a GeoJSON file, in
        full-resolution pixels.
    intervals
        Whether to write `layers["lower"]` and `layers["upper"]`; None: if the model has intervals.
    artefacts
        Whether to flag nuclei on glass, in folds, under bubbles or pen, out of focus or merged, in `obs["artefact"]`.
    check_image
        Refuse images that cannot be H&E.
    check_scale
        Refuse slides whose nuclei are more than 2.5 times as large, or as small, as in training.
    max_pixels
        Largest image that is decoded as a whole (PNG, JPEG, untiled TIFF); None: 2^29.
    tta
        Average the predictions of the slide as read in 4 rotations, or in these and their mirror images (8); features take 4 or 8 times as
        long. `obs["tta_sd"]` is then the spread over the views.
    strict
        Refuse a slide whose prediction should not be believed, and write nothing.
    """

    mpp: float | None = None
    stain: str = "none"
    rotate: Literal[0, 90, 180, 270] = 0
    flip: Literal["none", "horizontal", "vertical"] = "none"
    roi: str | Path | Sequence[Any] | None = None
    intervals: bool | None = None
    artefacts: bool = True
    check_image: bool = True
    check_scale: bool = True
    max_pixels: int | None = None
    tta: Literal[1, 4, 8] = 1
    strict: bool = False


@dataclass(frozen=True)
class EncoderRuntime:
    """Where and how the encoder runs; nothing here changes its results.

    Parameters
    ----------
    weights
        The encoder's weights file, if it is not where training read it.
    device
        `auto` (a GPU if there is one), or a torch device.
    compile
        Whether torch compiles the encoder: `auto`, True or False.
    """

    weights: Path | str | None = None
    device: str = "auto"
    compile: Literal["auto"] | bool = "auto"


@dataclass(frozen=True)
class PredictedSlide:
    """Result of `predict_slide`.

    Attributes
    ----------
    out
        The prediction file.
    verdict
        Whether the slide looks like the training slides, in words; None if the model cannot tell.
    seconds
        By stage.
    believable
        False if the slide is so unlike the training slides that its prediction should not be believed; None if the model cannot tell.
    """

    out: Path
    verdict: str | None
    seconds: dict[str, float] = field(default_factory=dict)
    believable: bool | None = None


class _Found(NamedTuple):
    """The nuclei to predict, in pixels of the slide as read and of the file, and all nuclei of the slide."""

    nuclei: GeoDataFrame
    in_file: GeoDataFrame
    everywhere: GeoDataFrame
    source: str
    scaling: dict[str, Any]
    region: BaseGeometry | None


def predict_slide(
    bundle: Bundle,
    image: Path | str | Section,
    out: Path | str,
    *,
    nuclei: NucleiSource = None,
    settings: SlideSettings | None = None,
    encoder: EncoderRuntime | None = None,
    cache_dir: Path | str | None = None,
) -> PredictedSlide:
    """Predict the expression of every nucleus of an H&E image and write `<out>.h5ad` and `<out>.nuclei.parquet`.

    Memory does not grow with the number of nuclei. Nuclei, features and artifacts are cached, so that a second call with other settings
    repeats only the steps they affect.

    Parameters
    ----------
    bundle
        The trained model (`prts.models.bundle.load_bundle`).
    image
        The full-resolution H&E image, or an open section.
    out
        The `.h5ad` file to write.
    nuclei
        A file or a GeoDataFrame of polygons in full-resolution pixels, the name of a segmenter, or a segmenter; None: the segmenter
        that training used.
    settings
        How the slide is read.
    encoder
        Where the encoder runs, and the path of its weights.
    cache_dir
        Folder of the cache; None: `$PRTS_CACHE`, else `cache`.

    Returns
    -------
    The path of the prediction, and the verdict on the slide.

    Raises
    ------
    InputError
        If the image, the nuclei or a setting is wrong; no partial output is left.
    """
    settings, runtime = settings or SlideSettings(), encoder or EncoderRuntime()
    out, cache = check_out(Path(out)), default_cache(cache_dir)
    with reading(cache):
        return _predict(bundle, image, out, nuclei, settings, runtime, cache)


def _predict(
    bundle: Bundle,
    image: Path | str | Section,
    out: Path,
    nuclei: NucleiSource,
    settings: SlideSettings,
    runtime: EncoderRuntime,
    cache: Path,
) -> PredictedSlide:
    watch = Stopwatch()
    orientation, device = Orientation(settings.rotate, settings.flip), torch_device(runtime.device)
    views = _views(bundle, orientation, settings.tta)
    section = _open(image, settings)
    reader, segmenter = build_encoder(bundle, runtime), as_segmenter(nuclei, bundle, section)
    seen = match_stain(section.reoriented(orientation), settings.stain, bundle.metadata.get("stain"))
    folder = cache / "predict" / section.name
    found = _find_nuclei(bundle, section, seen, segmenter, settings, folder, watch)
    with watch("features"):
        readings = [_read(bundle, seen, view, found, folder, reader) for view in views]
    with watch("predict"):
        bundle.to(device)
        if len(readings) == 1:
            (only,) = readings
            chunks = predict_store(
                bundle, only.features, only.nuclei, section.mpp, among=only.among, context=only.context
            )
        else:
            chunks = predict_views(bundle, readings, section.mpp)
        verdict = write_prediction(
            out,
            bundle,
            section,
            found.in_file,
            chunks,
            store=readings[0].features,
            intervals=settings.intervals,
            provenance=_provenance(bundle, settings, orientation, found),
            strict=settings.strict,
        )
    for stage, seconds in watch.seconds.items():
        logger.info("%-10s%8.1f s", stage, seconds)
    logger.info("peak memory %.0f MB", peak_rss_mb())
    if verdict is None:
        return PredictedSlide(out, None, dict(watch.seconds))
    logger.log(logging.INFO if verdict.believable else logging.WARNING, "verdict: %s", verdict.text)
    return PredictedSlide(out, verdict.text, dict(watch.seconds), verdict.believable)


def _views(bundle: Bundle, orientation: Orientation, tta: int) -> tuple[Orientation, ...]:
    """The orientations in which the slide is read."""
    views = orientation.views(tta)
    if len(views) > 1 and not any(block in STORED for block in bundle.input_use):
        raise ParameterError(
            "",
            "tta",
            f"{tta}, but this model has no encoder and reads {' and '.join(bundle.input_use)}, which have no direction; omit it",
        )
    return views


def _read(
    bundle: Bundle, seen: Section, orientation: Orientation, found: _Found, folder: Path, reader: Encoder
) -> View:
    """What the model reads of the nuclei in one orientation."""
    if orientation == seen.orientation:
        nuclei, among = found.nuclei, found.everywhere
    else:
        back, size = seen.orientation, seen.file_size
        nuclei, among = (
            orientation.nuclei(back.nuclei_in_file(table, size), size) for table in (found.nuclei, found.everywhere)
        )
        seen = seen.reoriented(orientation)
    stores = prepare_input(folder, seen, nuclei, bundle.input_use, lambda: reader, found.source)
    return View(nuclei, among, stores.features, stores.context)


class _GivenNuclei:
    """Polygons in memory, used like a segmenter."""

    name: ClassVar[str] = "polygons"
    extra: ClassVar[str | None] = None
    hint: ClassVar[str] = "give other polygons"

    def __init__(self, nuclei: GeoDataFrame) -> None:
        self._nuclei = nuclei

    def __call__(self, slide: Slide) -> GeoDataFrame:
        nuclei = make_nuclei(self._nuclei.geometry, slide.mpp, cell_id=self._ids(), source="nuclei")
        return slide.orientation.nuclei(nuclei, slide.file_size)

    def settings(self) -> dict[str, Any]:
        digest = hashlib.sha256("\n".join(map(str, self._ids())).encode())
        digest.update(b"".join(shapely.to_wkb(self._nuclei.geometry.to_numpy())))
        return {"name": self.name, "sha256": digest.hexdigest()}

    def _ids(self) -> pd.Series[Any]:
        ids: pd.Series[Any] = self._nuclei.get("cell_id", self._nuclei.index.to_series())
        return ids


def uses_bins(bundle: Bundle) -> bool:
    """Whether a model was trained on bins."""
    return bool(bundle.metadata["segmentation"]["name"] == Bins.name)


def as_segmenter(nuclei: NucleiSource, bundle: Bundle, section: Section) -> Segmenter:
    """The segmenter for a slide, from the user's choice.

    Parameters
    ----------
    nuclei
        As for `predict_slide`.
    bundle
        The model, which names the segmenter used in training.
    section
        The section, whose own nuclei are used if training used nuclei from a file.

    Raises
    ------
    InputError
        If there is no such segmenter or file, training used nuclei from a file and this section has none, or the bins have another size.
    """
    chosen = _chosen_segmenter(nuclei, bundle, section)
    if isinstance(chosen, Bins) and uses_bins(bundle):
        trained_on = bundle.metadata["segmentation"]["arguments"]["bin_um"]
        if chosen.bin_um != trained_on:
            raise ParameterError(
                "",
                "bin_um",
                f"{chosen.bin_um} is not the size of the bins that this model was trained on, and counts grow with it; give {trained_on}",
            )
    return chosen


def _chosen_segmenter(nuclei: NucleiSource, bundle: Bundle, section: Section) -> Segmenter:
    if nuclei is None:
        try:
            trained = recorded_segmenter(bundle.metadata["segmentation"])
        except ParameterError as error:
            raise InputError(
                f"{bundle.folder}: its segmenter cannot be built by this version of prts ({error}); choose another one"
            ) from error
        if trained is not None:
            return trained
        if section.nuclei is not None:
            return Polygons(section.nuclei)
        if (outlined := measured_outlines(section)) is not None:
            return outlined
        raise ParameterError(
            "",
            "nuclei",
            f"not given, and this model was trained on nuclei from a file; name a file or a segmenter "
            f"({', '.join(name for name in segmenters.names() if name != Polygons.name)})",
        )
    if isinstance(nuclei, str) and nuclei in segmenters and not Path(nuclei).exists():
        return segmenters.build({"name": nuclei})
    if isinstance(nuclei, str | Path):
        return Polygons(nuclei)
    if hasattr(nuclei, "geometry"):
        return _GivenNuclei(nuclei)
    return nuclei


def encoder_weights(bundle: Bundle, given: Path | str | None = None) -> Path | None:
    """The weights file of a bundle's encoder: the given one, else the one used in training; None if the encoder finds its own.

    Raises
    ------
    ParameterError
        If the weights are not on this machine.
    """
    if given is not None:
        return Path(given)
    settings, recorded = bundle.metadata["encoder"], bundle.metadata["encoder_weights"]
    if recorded is None or Path(recorded).is_file():
        return None if recorded is None else Path(recorded)
    if weights_status(settings).found:
        return None
    raise ParameterError(
        "encoder",
        "weights",
        f"not given, and {recorded} of training is not on this machine; give {Path(recorded).name} with SHA-256 "
        f"{settings['weights_sha256']}",
    )


def build_encoder(bundle: Bundle, runtime: EncoderRuntime) -> Encoder:
    """The encoder of a bundle.

    Raises
    ------
    InputError
        If its weights are missing or differ from those used in training.
    """
    weights = encoder_weights(bundle, runtime.weights)
    return encoder_from_settings(bundle.metadata["encoder"], weights, device=runtime.device, compile=runtime.compile)


def _open(image: Path | str | Section, settings: SlideSettings) -> Section:
    if not isinstance(image, Section):
        return read_section(image, mpp=settings.mpp, max_pixels=settings.max_pixels)
    if settings.mpp is not None and settings.mpp != image.mpp:
        raise ParameterError("", "mpp", f"{settings.mpp:g} contradicts the section's {image.mpp:g} um/px; omit it")
    return image


def _text(roi: str | Path | Sequence[Any]) -> str:
    """A region as written on the command line."""
    return str(roi) if isinstance(roi, str | Path) else json.dumps(np.asarray(roi, dtype=float).tolist())


def _find_nuclei(
    bundle: Bundle,
    section: Section,
    seen: Section,
    segmenter: Segmenter,
    settings: SlideSettings,
    folder: Path,
    watch: Stopwatch,
) -> _Found:
    """Nuclei of the slide as read (`seen`), checked against training, and the ones in the region."""
    region = None
    if settings.roi is not None:
        region = read_region(_text(settings.roi), section.width, section.height, section.bounds)
    with watch("segment"):
        path = prepare_nuclei(folder, seen, segmenter, False, check_image=settings.check_image)
    everywhere = load_nuclei(path)
    about = bundle.metadata
    scaling = check_scale(everywhere, section, about["mpp"], about.get("nuclei"), refuse=settings.check_scale)
    in_file = seen.orientation.nuclei_in_file(everywhere, section.file_size)
    if settings.artefacts:
        with watch("artefacts"):
            in_file = in_file.assign(artefact=prepare_artefacts(folder, seen, path))
    nuclei, source = everywhere, path.stem
    if region is not None:
        chosen = inside(region, in_file)
        if not chosen.any():
            raise ParameterError(
                "", "roi", f"{settings.roi} contains none of the slide's {len(everywhere)} nuclei; give a larger region"
            )
        nuclei, in_file = (table[chosen].reset_index(drop=True) for table in (everywhere, in_file))
        source += f"-{fingerprint({'roi': region.wkt})}"
    if settings.artefacts:
        log_artefacts(section.name, in_file["artefact"])
    return _Found(nuclei, in_file, everywhere, source, scaling, region)


def _provenance(bundle: Bundle, settings: SlideSettings, orientation: Orientation, found: _Found) -> dict[str, Any]:
    about = bundle.metadata
    made = about.get("provenance", {})
    return {
        "stain": settings.stain,
        "orientation": orientation.settings(),
        "tta": settings.tta,
        "scaling": found.scaling,
        "roi": None if found.region is None else found.region.wkt,
        "bundle": {
            "sha256": bundle.sha256,
            "format_version": about["format_version"],
            "code": made.get("code"),
            "config_fingerprint": made.get("config_fingerprint"),
            "data": made.get("data"),
        },
    }
