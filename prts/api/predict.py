"""Predict a slide with a trained model: find nuclei, extract features, predict, write."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from prts.api.nuclei_source import NucleiSource, as_segmenter
from prts.data.prepare import prepare_artefacts, prepare_input, prepare_nuclei
from prts.data.slide_scale import SAMPLE, sample_of_slide
from prts.errors import ParameterError
from prts.features.encoders import encoder_from_settings, weights_status
from prts.features.feature_reader import STORED, InputReader
from prts.io.cache import default_cache, fingerprint, log_size, reading
from prts.io.nuclei import load_nuclei
from prts.io.orientation import Orientation
from prts.io.prediction import check_out
from prts.io.region import inside, read_region
from prts.models.predict import View, predict_store, predict_views, write_prediction
from prts.models.scale import check_scale
from prts.precision import torch_device
from prts.preprocess.artefacts import log_artefacts
from prts.preprocess.stains.base import match_stain
from prts.progress import of_section
from prts.section import Section, read_section
from prts.stopwatch import Stopwatch, peak_rss_mb

if TYPE_CHECKING:
    from geopandas import GeoDataFrame
    from numpy.typing import NDArray
    from shapely.geometry.base import BaseGeometry

    from prts.features.encoders import Encoder
    from prts.models.bundle import Bundle
    from prts.segmentation.segment import Segmenter


logger = logging.getLogger(__name__)


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
    """The nuclei to predict, in pixels of the slide as read and of the file, and all nuclei of the slide, with their names in the cache."""

    nuclei: GeoDataFrame
    in_file: GeoDataFrame
    everywhere: GeoDataFrame
    source: str
    slide: str
    scaling: dict[str, Any]
    region: BaseGeometry | None


class SegmentedSlide(NamedTuple):
    """A slide whose nuclei are known, as `SlidePredictor.segment` returns it."""

    section: Section
    seen: Section
    views: tuple[Orientation, ...]
    settings: SlideSettings
    folder: Path
    found: _Found
    watch: Stopwatch


class SlidePredictor:
    """Predicts slides with one model, whose encoder is loaded only once.

    `segment` and `predict` may run in different threads: the nuclei of the next slide can be found while the present one is encoded.

    Parameters
    ----------
    bundle
        The trained model.
    encoder
        Where the encoder runs, and the path of its weights.
    cache_dir
        Folder of the cache; None: `$PRTS_CACHE`, else `cache`.

    Raises
    ------
    InputError
        If the device is not there, or the encoder's weights are missing or differ from those used in training.
    """

    def __init__(
        self, bundle: Bundle, encoder: EncoderRuntime | None = None, cache_dir: Path | str | None = None
    ) -> None:
        runtime = encoder or EncoderRuntime()
        self.bundle, self._cache = bundle, default_cache(cache_dir)
        self._device = torch_device(runtime.device)
        self._encoder = build_encoder(bundle, runtime)

    def segment(
        self, image: Path | str | Section, nuclei: NucleiSource = None, settings: SlideSettings | None = None
    ) -> SegmentedSlide:
        """Open a slide and find its nuclei; parameters are those of `predict_slide`."""
        settings, watch = settings or SlideSettings(), Stopwatch()
        orientation = Orientation(settings.rotate, settings.flip)
        views = _views(self.bundle, orientation, settings.tta)
        with reading(self._cache):
            section = _open(image, settings)
            segmenter = as_segmenter(nuclei, self.bundle, section)
            seen = match_stain(section.reoriented(orientation), settings.stain, self.bundle.metadata.get("stain"))
            folder = self._cache / "predict" / section.name
            with of_section(section.name):
                found = _find_nuclei(self.bundle, section, seen, segmenter, settings, folder, watch)
        return SegmentedSlide(section, seen, views, settings, folder, found, watch)

    def features(self, slide: SegmentedSlide) -> NDArray[np.float32]:
        """What the model reads of a slide's nuclei, (n, d) in the order of its input."""
        with reading(self._cache), of_section(slide.section.name):
            view = _read(self.bundle, slide.seen, slide.views[0], slide.found, slide.folder, self._encoder)
            read = InputReader(
                view.features, self.bundle.input_use, lambda: view.among, slide.section.mpp, view.context
            )
            return read(view.nuclei["cell_id"].to_numpy())

    def predict(self, slide: SegmentedSlide, out: Path | str) -> PredictedSlide:
        """Extract the features of a slide's nuclei, predict them and write `out`."""
        out, bundle, found, watch = check_out(Path(out)), self.bundle, slide.found, slide.watch
        with reading(self._cache), of_section(slide.section.name):
            with watch("features"):
                readings = [_read(bundle, slide.seen, view, found, slide.folder, self._encoder) for view in slide.views]
            with watch("predict"):
                bundle.to(self._device)
                if len(readings) == 1:
                    (only,) = readings
                    chunks = predict_store(
                        bundle,
                        only.features,
                        only.nuclei,
                        slide.section.mpp,
                        among=only.among,
                        context=only.context,
                        sample=only.sample,
                    )
                else:
                    chunks = predict_views(bundle, readings, slide.section.mpp)
                verdict = write_prediction(
                    out,
                    bundle,
                    slide.section,
                    found.in_file,
                    chunks,
                    store=readings[0].features,
                    intervals=slide.settings.intervals,
                    provenance=_provenance(bundle, slide.settings, slide.seen.orientation, found),
                    strict=slide.settings.strict,
                )
        for stage, seconds in watch.seconds.items():
            logger.info("%-10s%8.1f s", stage, seconds)
        logger.info("peak memory %.0f MB", peak_rss_mb())
        log_size(slide.folder)
        if verdict is None:
            return PredictedSlide(out, None, dict(watch.seconds))
        logger.log(logging.INFO if verdict.believable else logging.WARNING, "verdict: %s", verdict.text)
        return PredictedSlide(out, verdict.text, dict(watch.seconds), verdict.believable)


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
    out = check_out(Path(out))
    predictor = SlidePredictor(bundle, encoder, cache_dir)
    return predictor.predict(predictor.segment(image, nuclei, settings), out)


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
    view = View(nuclei, among, stores.features, stores.context)
    if bundle.slide_scale is None or found.region is None:
        return view
    # a region is matched by the mean and spread of its slide
    sample = among.iloc[sample_of_slide(len(among))].reset_index(drop=True)
    stores = prepare_input(folder, seen, sample, bundle.input_use, lambda: reader, f"{found.slide}-{SAMPLE}")
    return view._replace(sample=View(sample, among, stores.features, stores.context))


def encoder_weights(bundle: Bundle, given: Path | str | None = None) -> Path | None:
    """The weights file of a bundle's encoder: the given one, else the one used in training; None if the encoder finds its own.

    Raises
    ------
    ParameterError
        If the weights are not on this machine, or some are given to an encoder without any.
    """
    settings, recorded = bundle.metadata["encoder"], bundle.metadata["encoder_weights"]
    if given is not None:
        if settings.get("weights_sha256") is None:
            raise ParameterError("encoder", "weights", f"the model's encoder, {settings['name']}, has none; omit it")
        return Path(given)
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
    adapter = {} if bundle.adapter is None else {"adapter": bundle.adapter}
    return encoder_from_settings(
        bundle.metadata["encoder"], weights, device=runtime.device, compile=runtime.compile, **adapter
    )


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
    return _Found(nuclei, in_file, everywhere, source, path.stem, scaling, region)


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
            "origin": bundle.origin,
            "format_version": about["format_version"],
            "code": made.get("code"),
            "config_fingerprint": made.get("config_fingerprint"),
            "data": made.get("data"),
        },
    }
