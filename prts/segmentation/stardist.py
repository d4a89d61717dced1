"""Segment nuclei with StarDist, in slides of any size."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import numpy as np
import shapely
from pydantic import Field

from prts.errors import InputError, ParameterError
from prts.extras import install_command
from prts.io.cache import file_identity
from prts.io.nuclei import make_nuclei
from prts.io.optical_density import without_black
from prts.progress import working
from prts.segmentation import segmenters
from prts.segmentation.segment import sample

if TYPE_CHECKING:
    import geopandas as gpd
    from numpy.typing import NDArray

    from prts.io.slide import Slide

logger = logging.getLogger(__name__)

# um/px at which a pretrained model works best. QuPath's documentation states 0.5 for the H&E model; StarDist's own
# names its training images (MoNuSeg 2018, TNBC) but not their um/px.
PRETRAINED_MPP = {"2D_versatile_he": 0.5}
# The network processes a block in tiles of about this side, which bounds the memory of its full-resolution layers.
_TILE_PX = 1024


@segmenters.register("stardist")
@dataclass(frozen=True, kw_only=True)
class StarDist:
    """StarDist 2D (Schmidt et al. 2018), by default as the paper's released code and 10x's guide to custom binning run it.

    The image is normalized between two percentiles over all channels, computed once per slide, and read lazily by
    `predict_instances_big`, block by block: memory depends on the block, not on the slide. If the um/px that the
    model was trained at is known, the slide is rescaled to it (the released code uses the slide's own).

    Parameters
    ----------
    model
        Name of a pretrained model, downloaded by StarDist on first use, or a model folder (config.json, weights_best.h5,
        thresholds.json).
    prob_thresh, nms_thresh
        Minimum object probability, and the overlap above which two outlines are one nucleus; None uses the model's own.
    percentiles
        Gray levels at these percentiles become 0 and 1.
    block_size
        Side of a block, px at the model's um/px.
    min_overlap
        Overlap of blocks, px; outlines as large as this are not nuclei and are dropped.
    context
        Margin of a block that is read but not used, px.
    model_mpp
        um/px that the model was trained at; None uses the known value of a pretrained model, and the slide's for a folder.
    """

    model: str = "2D_versatile_he"
    prob_thresh: Annotated[float, Field(ge=0, le=1)] | None = 0.01
    nms_thresh: Annotated[float, Field(ge=0, le=1)] | None = 0.001
    percentiles: tuple[Annotated[float, Field(ge=0, le=100)], Annotated[float, Field(ge=0, le=100)]] = (5.0, 95.0)
    block_size: Annotated[int, Field(ge=1)] = 4096
    min_overlap: Annotated[int, Field(ge=0)] = 128
    context: Annotated[int, Field(ge=0)] = 128
    model_mpp: Annotated[float, Field(gt=0)] | None = None
    name: ClassVar[str]
    extra: ClassVar[str | None] = "stardist"
    hint: ClassVar[str] = "lower `prob_thresh` or set `model_mpp` of the segmenter"

    def __post_init__(self) -> None:
        if not self.percentiles[0] < self.percentiles[1]:
            raise ParameterError("segmenter", "percentiles", f"{list(self.percentiles)} must ascend; swap them")
        if not self.min_overlap + 2 * self.context < self.block_size:
            least = self.min_overlap + 2 * self.context
            raise ParameterError(
                "segmenter", "block_size", f"{self.block_size} must exceed min_overlap + 2 context = {least}"
            )

    def settings(self) -> dict[str, Any]:
        """All parameters, and of a model folder the identity of its files."""
        settings = {"name": self.name, **asdict(self), "percentiles": [float(p) for p in self.percentiles]}
        if Path(self.model).is_dir():
            settings["model"] = file_identity(Path(self.model))
        return settings

    def __call__(self, slide: Slide) -> gpd.GeoDataFrame:
        """Nuclei of the slide; `score` is the object probability.

        Raises
        ------
        InputError
            If StarDist is not installed, the model is not there or not one for RGB images.
        """
        mpp = self.model_mpp or PRETRAINED_MPP.get(self.model) or slide.mpp
        low, high = _percentiles(slide, mpp, self.percentiles)
        if high - low < 1:
            logger.info("%s: has a single gray level, so there is nothing to segment", slide.path)
            return make_nuclei([], slide.mpp, source=str(slide.path))
        model = _load(self.model)
        image = _LazyImage(slide, mpp, low, high, multiple=model._axes_div_by("YXC")[0])
        # a block as large as the image needs neither overlap nor context
        block = [min(self.block_size, side) for side in image.shape[:2]]
        whole = [size == side for size, side in zip(block, image.shape, strict=False)]
        predict, limit = partial(type(model).predict_instances, model), self.min_overlap
        n_giants = 0

        def without_giants(*args: Any, **kwargs: Any) -> tuple[NDArray[Any], dict[str, NDArray[Any]]]:
            """Drop outlines larger than the overlap of blocks, for which `predict_instances_big` raises an error."""
            nonlocal n_giants
            labels, found = predict(*args, **kwargs)
            fits = np.ptp(found["coord"], axis=2).max(axis=1, initial=0) < limit - 2
            n_giants += int((~fits).sum())
            renumbered = np.r_[0, np.where(fits, np.cumsum(fits), 0)].astype(labels.dtype)
            advance()
            return renumbered[labels], {key: value[fits] for key, value in found.items()}

        model.predict_instances = without_giants
        with _silence(), working("stardist") as advance:
            _, found = model.predict_instances_big(
                image,
                axes="YXC",
                block_size=[*block, 3],
                min_overlap=[0 if one else self.min_overlap for one in whole] + [0],
                context=[0 if one else self.context for one in whole] + [0],
                labels_out=False,
                show_progress=False,
                show_tile_progress=False,
                prob_thresh=self.prob_thresh,
                nms_thresh=self.nms_thresh,
                n_tiles=(-(-block[0] // _TILE_PX), -(-block[1] // _TILE_PX), 1),
            )
        if n_giants:
            logger.warning(
                "%s: %d outlines of %d px or more dropped; if they are nuclei, raise `min_overlap` or set `model_mpp` of the segmenter",
                slide.path, n_giants, limit,
            )  # fmt: skip
        return _nuclei(found, slide, mpp)


@lru_cache(maxsize=1)
def _load(name: str) -> Any:
    """The model, cached because the next section uses the same."""
    folder = Path(name)
    if folder.is_dir():
        _check_folder(folder)
        folder = folder.resolve()
    elif name not in PRETRAINED_MPP:
        raise ParameterError(
            "segmenter",
            "model",
            f"{name} is neither a model folder nor a pretrained H&E model; give a folder or {', '.join(PRETRAINED_MPP)}",
        )
    # TensorFlow's log contains nothing that users could act on, and torch needs memory on the same GPU
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")
    logging.getLogger("tensorflow").setLevel(logging.ERROR)
    try:
        with _silence(), _silent_libraries():
            from stardist.models import StarDist2D
    except ImportError as error:
        raise ParameterError(
            "segmenter",
            "",
            f"stardist needs StarDist and TensorFlow ({error}); run {install_command('stardist')}, or choose watershed",
        ) from error
    try:
        with _silence():
            if folder.is_dir():
                return StarDist2D(None, name=folder.name, basedir=str(folder.parent))
            return StarDist2D.from_pretrained(name)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        if folder.is_dir():
            raise InputError(
                f"{name}: not a StarDist model folder that can be loaded ({reason}); get a complete copy"
            ) from error
        raise ParameterError(
            "segmenter",
            "model",
            f"{name} cannot be downloaded ({reason}); without a network give a model folder, or choose the segmenter watershed",
        ) from error


@dataclass(frozen=True)
class _LazyImage:
    """The normalized slide as StarDist slices it, (height, width, 3) float32, padded with white to a whole multiple."""

    slide: Slide
    mpp: float
    low: float
    high: float
    multiple: int
    ndim: ClassVar[int] = 3

    @property
    def shape(self) -> tuple[int, int, int]:
        width, height = self.slide.size_at(self.mpp)
        return -(-height // self.multiple) * self.multiple, -(-width // self.multiple) * self.multiple, 3

    def __getitem__(self, key: tuple[slice, slice, slice]) -> NDArray[np.float32]:
        rows, columns = (part.indices(side) for part, side in zip(key[:2], self.shape, strict=False))
        region = self.slide.read_region(columns[0], rows[0], columns[1] - columns[0], rows[1] - rows[0], self.mpp)
        table = (np.arange(256, dtype=np.float32) - self.low) / (self.high - self.low)
        return np.asarray(table.astype(np.float32)[without_black(region)])


def _percentiles(slide: Slide, mpp: float, percentiles: tuple[float, float]) -> tuple[float, float]:
    """Gray levels at the percentiles over all channels of the slide's sample."""
    count = np.zeros(256, np.int64)
    for window in map(without_black, sample(slide, mpp)):
        count += np.bincount(window.ravel(), minlength=256)
    low, high = np.searchsorted(np.cumsum(count), np.asarray(list(percentiles), dtype=float) / 100 * count.sum())
    return float(low), float(high)


def _nuclei(found: Mapping[str, NDArray[Any]], slide: Slide, mpp: float) -> gpd.GeoDataFrame:
    """Outlines from StarDist's (n, 2, rays) y and x at the centers of pixels to full-resolution px."""
    ring = (np.moveaxis(found["coord"], 1, 2)[..., ::-1] + 0.5) * (mpp / slide.mpp)
    polygons = shapely.polygons(ring) if len(ring) else np.empty(0, object)
    xy = shapely.get_coordinates(shapely.centroid(polygons))
    inside = ((xy >= 0) & (xy < [slide.width, slide.height])).all(axis=1)
    return make_nuclei(polygons[inside], slide.mpp, score=found["prob"][inside], source=str(slide.path))


def _check_folder(folder: Path) -> None:
    """Refuse folders without weights, which StarDist would replace by random ones."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        axes, channels = config["axes"], config["n_channel_in"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{folder}: not a StarDist model folder (config.json: {error}); give a folder with config.json and weights_best.h5"
        ) from error
    if (axes, channels) != ("YXC", 3):
        raise InputError(f"{folder}: a model for {channels} channel(s), axes {axes}; give one for RGB images (YXC)")
    if not list(folder.glob("*.h5")):
        raise InputError(f"{folder}: has no weights; put weights_best.h5 next to config.json")


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Suppress what StarDist, csbdeep and Keras print about block sizes and thresholds."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


@contextlib.contextmanager
def _silent_libraries() -> Iterator[None]:
    """Suppress what TensorFlow's libraries write to stderr while they load, regardless of TF_CPP_MIN_LOG_LEVEL."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with Path(os.devnull).open("w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
