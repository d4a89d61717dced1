"""A trained model as a per-cell model of LazySlide, for slides that are open there."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from prts.api.predict import EncoderRuntime, SlidePredictor, SlideSettings
from prts.errors import InputError, ParameterError
from prts.extras import require_extra
from prts.models.bundle import Bundle, load_bundle
from prts.models.ood import verdict
from prts.models.predict import by_slide
from prts.preprocess.artefacts import is_artefact

if TYPE_CHECKING:
    from geopandas import GeoDataFrame
    from numpy.typing import NDArray

logger = logging.getLogger(__name__)

_FEATURES = "{}-features"


def register_model(
    bundle: Path | str, name: str, *, encoder_weights: Path | str | None = None, device: str = "auto"
) -> type[Any]:
    """Register a trained model, so that `zs.tl.feature_prediction(wsi, name, tile_key="cells")` predicts cells.

    Parameters
    ----------
    bundle
        The folder `model` of a training run, one written by `prts.Model.save`, or `hf://owner/name[@revision]`.
    name
        Key in LazySlide's registry. Tables in a slide are named after it, so only letters, digits, `_`, `-` and `.` are allowed.
    encoder_weights
        The encoder's weights file, if it is not where training read it.
    device
        Where `extract_features` runs the encoder: `auto` (a GPU if there is one), or a torch device.

    Returns
    -------
    The registered class, a `lazyslide_models.FeaturePredictionModel`. `predict` turns features (n, d) into the expected UMI of each gene.

    Raises
    ------
    InputError
        If LazySlide is not installed, the folder is not a model, or the name cannot be used.

    Examples
    --------
    >>> from prts.api.lazyslide import register_model
    >>> register_model("outputs/demo/make/model", "prts-demo")  # doctest: +SKIP
    """
    require_extra("lazyslide", "register_model")
    if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name) is None:
        raise ParameterError("", "name", f"{name!r} cannot name a table; use letters, digits, '_', '-' and '.'")
    loaded = load_bundle(bundle)
    from lazyslide_models import FeaturePredictionModel, ModelTask, register

    key = name

    class PRTS(FeaturePredictionModel):  # type: ignore[misc]
        """A prts model: expected UMI of every gene in a cell, from what `prts.api.lazyslide.extract_features` read of it."""

        name = key
        features_model_name = _FEATURES.format(key)
        # features may be matched to training by the mean and spread of the slide
        whole_slide = True
        prts_bundle = loaded
        prts_runtime = EncoderRuntime(weights=encoder_weights, device=device)

        def __init__(self, model_path: Path | str | None = None, token: str | None = None) -> None:
            self.model = loaded.net

        def to(self, device: Any) -> PRTS:
            loaded.to(device)
            return self

        def predict(self, features: Any, coords: Any = None) -> dict[str, NDArray[np.float32]]:
            umi, _ = loaded.predict_all(_matched(loaded, np.asarray(features, dtype=np.float32)))
            return dict(zip(loaded.genes, umi.T, strict=True))

    encoder = loaded.metadata["encoder"]["name"]
    register(
        key=name,
        task=ModelTask.feature_prediction,
        description=f"Expected UMI of {len(loaded.genes)} genes in each cell, by prts.",
        vision_encoder=encoder,
        encode_dim=sum(loaded.input_widths.values()),
    )(PRTS)
    return PRTS


def extract_features(
    wsi: Any,
    name: str,
    *,
    tile_key: str = "cells",
    stain: str = "none",
    rotate: Literal[0, 90, 180, 270] = 0,
    flip: Literal["none", "horizontal", "vertical"] = "none",
    check_image: bool = True,
    check_scale: bool = True,
    cache_dir: Path | str | None = None,
) -> None:
    """Read from a slide what a registered model needs to know about each cell.

    `zs.tl.feature_extraction` cannot do this: a model reads the image around each cell as in its training, at its own um/px, and may
    also read shape and crowding.

    Parameters
    ----------
    wsi
        The slide, a `wsidata.WSIData`. Features are added to `wsi.tables["<name>-features_<tile_key>"]`, and the columns `ood` and
        `artefact` to the cells.
    name
        Name of the model, as given to `register_model`.
    tile_key
        The cells in `wsi.shapes`: polygons in full-resolution pixels, as `zs.seg.cells` adds them.
    stain, rotate, flip, check_image, check_scale
        See `prts.api.predict.SlideSettings`.
    cache_dir
        Folder of the cache; None: `$PRTS_CACHE`, else `cache`.

    Raises
    ------
    InputError
        If there is no such model or there are no such cells, or the slide or a setting is wrong.

    Examples
    --------
    >>> from prts.api.lazyslide import extract_features
    >>> extract_features(wsi, "prts-demo", tile_key="cells")  # doctest: +SKIP
    """
    require_extra("lazyslide", "extract_features")
    from wsidata.io import add_features, update_shapes_data

    model = _registered(name)
    bundle: Bundle = model.prts_bundle
    cells = _cells(wsi, tile_key)
    settings = SlideSettings(wsi.properties.mpp, stain, rotate, flip, check_image=check_image, check_scale=check_scale)
    predictor = SlidePredictor(bundle, model.prts_runtime, cache_dir)
    slide = predictor.segment(Path(wsi.reader.file), cells, settings)
    _require_all(slide.found.in_file["cell_id"].to_numpy(), cells, tile_key)
    features = predictor.features(slide)
    key = _FEATURES.format(name)
    add_features(wsi, key=f"{key}_{tile_key}", tile_key=tile_key, features=features)
    columns: dict[str, Any] = {"artefact": slide.found.in_file["artefact"].astype(str).to_numpy()}
    if bundle.ood is not None:
        columns["ood"] = bundle.ood.share(features)
        said = verdict(columns["ood"], bundle.predictable, is_artefact(slide.found.in_file))
        logger.log(logging.INFO if said.believable else logging.WARNING, "verdict: %s", said.text)
    update_shapes_data(wsi, tile_key, columns)


def _matched(bundle: Bundle, features: NDArray[np.float32]) -> NDArray[np.float32]:
    """Features of all cells of a slide as the network takes them."""
    return by_slide(bundle, lambda part: part, [features], whole=True)(features)


def _registered(name: str) -> Any:
    from lazyslide_models import MODEL_REGISTRY

    model = MODEL_REGISTRY.get(name)
    if not hasattr(model, "prts_bundle"):
        raise ParameterError("", "name", f"{name!r} is no prts model; call register_model(bundle, {name!r}) first")
    return model


def _cells(wsi: Any, tile_key: str) -> GeoDataFrame:
    """The cells of a slide in their order, with row numbers as ids."""
    if tile_key not in wsi.shapes:
        there = ", ".join(wsi.shapes) or "none"
        raise ParameterError("", "tile_key", f"{tile_key!r} is not in wsi.shapes ({there}); run zs.seg.cells first")
    if wsi.properties.mpp is None:
        raise InputError(f"{wsi.reader.file}: does not state its um/px; set it with wsi.set_mpp")
    cells = wsi.shapes[tile_key].reset_index(drop=True)[["geometry"]]
    return cells.assign(cell_id=np.arange(len(cells)).astype(str))


def _require_all(found: NDArray[np.object_], cells: GeoDataFrame, tile_key: str) -> None:
    """Refuse cells without area and duplicates, since each row of a feature table belongs to a shape."""
    left_out = np.setdiff1d(np.arange(len(cells)), found.astype(int))
    if len(left_out):
        raise InputError(
            f"{tile_key}: {len(left_out)} of {len(cells)} cells are duplicates or have no area, the first in row {left_out[0]}; "
            f"remove them from wsi.shapes[{tile_key!r}]"
        )
