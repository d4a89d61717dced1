"""Predict the expression of every nucleus in an H&E image from a trained bundle; needs no bins.

usage: prts predict bundle=DIR image=FILE out=FILE.h5ad [nuclei=FILE] [mpp=0.5] [segmentation=stardist|watershed]
                    [encoder.weights=FILE] [stain=none|histogram|reinhard|macenko] [rotate=0|90|180|270]
                    [flip=none|horizontal|vertical] [roi=[x0,y0,x1,y1]|[[x,y],[x,y],[x,y],...]|FILE.geojson]

Nuclei come from `nuclei=` (GeoJSON, GeoParquet, shapefile, CSV with WKT, label image), else from the segmenter given, else from
the one used in training. The image's um/px comes from `mpp=` or its own metadata and is never guessed. The encoder's weights come
from `encoder.weights=`, else from where training read them; encoder and network run on the GPU if there is one, or where
`encoder.device=` says. `stain=` reads the slide in the colours of the training section. `rotate=` (degrees counter-clockwise), then
`flip=`, read it as the tissue of training lay; coordinates, given and written, stay pixels of the image as it lies in its file.
Nuclei more than 2.5 times as large, or as small, as in training stop the command, since um/px is then hardly right;
check_scale=false goes on. With `roi=` only nuclei whose centre lies in the region are predicted, to the same values (but for rounding).

Writes FILE.h5ad (nuclei x genes: expected UMI in X, P(expressed) in layers["prob"], the counts that 90 % of such nuclei have in
layers["lower"] and layers["upper"] unless intervals=false; obs["artefact"] says which nuclei lie on glass, in a fold, under a bubble or
pen, out of focus or merged, unless artefacts=false: none is left out) and FILE.nuclei.parquet (the polygons).

example: prts predict bundle=outputs/demo/make/model image=slide.svs out=slide.h5ad segmentation=stardist
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from prts.cli.app import plain, require
from prts.errors import InputError, ParameterError

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from prts.models.bundle import Bundle
    from prts.segmentation.segment import Segmenter

logger = logging.getLogger(__name__)


def main(cfg: DictConfig) -> None:
    """Segment, extract features, predict, write."""
    from prts.io.cache import reading

    require(cfg, "bundle", "image", "out")
    with reading(Path(cfg.paths.cache_dir)):
        _predict(cfg)


def _predict(cfg: DictConfig) -> None:
    from prts.data.prepare import prepare_artefacts, prepare_features, prepare_nuclei
    from prts.features.encoders import encoder_from_settings
    from prts.features.encoders.tokens import torch_device
    from prts.io.cache import fingerprint, sha256_file
    from prts.io.limits import allow_pixels
    from prts.io.nuclei import load_nuclei
    from prts.io.orientation import Orientation
    from prts.io.prediction import check_out
    from prts.io.region import inside, read_region
    from prts.models.bundle import load_bundle
    from prts.models.predict import predict_store, write_prediction
    from prts.models.scale import check_scale
    from prts.preprocess.artefacts import log_artefacts
    from prts.preprocess.stains.base import match_stain
    from prts.section import open_section
    from prts.stopwatch import Stopwatch, peak_rss_mb

    watch = Stopwatch()
    out = check_out(Path(cfg.out))
    allow_pixels(cfg.max_pixels)
    orientation = Orientation(cfg.rotate, cfg.flip)
    device = torch_device(cfg.encoder.device)
    bundle = load_bundle(Path(cfg.bundle))
    image = Path(cfg.image)
    section = open_section(image.stem, image, mpp=cfg.mpp, nuclei=None if cfg.nuclei is None else Path(cfg.nuclei))
    region = None if cfg.roi is None else read_region(cfg.roi, section.width, section.height)
    seen = match_stain(section.reoriented(orientation), str(cfg.stain), bundle.metadata.get("stain"))
    encoder = encoder_from_settings(
        bundle.metadata["encoder"], _weights(cfg, bundle), device=cfg.encoder.device, compile=cfg.encoder.compile
    )
    segmenter, prefer_given = _segmenter(cfg, bundle)

    cache = Path(cfg.paths.cache_dir) / "predict" / section.name
    with watch("segment"):
        nuclei_path = prepare_nuclei(cache, seen, segmenter, prefer_given, check_image=cfg.check_image)
    everywhere = load_nuclei(nuclei_path)  # in pixels of the slide as it is read
    about = bundle.metadata
    scaling = check_scale(everywhere, section, about["mpp"], about.get("nuclei"), refuse=cfg.check_scale)
    in_file = orientation.nuclei_in_file(everywhere, section.file_size)
    if cfg.artefacts:
        with watch("artefacts"):
            in_file = in_file.assign(artefact=prepare_artefacts(cache, seen, nuclei_path))
    nuclei, source = everywhere, nuclei_path.stem
    if region is not None:
        chosen = inside(region, in_file)
        nuclei, in_file = (table[chosen].reset_index(drop=True) for table in (everywhere, in_file))
        if len(nuclei) == 0:
            raise InputError(
                f"roi={cfg.roi}: none of the slide's {len(everywhere)} nuclei lies there; give a larger region"
            )
        source += f"-{fingerprint({'roi': region.wkt})}"
    if cfg.artefacts:
        log_artefacts(section.name, in_file["artefact"])
    with watch("features"):
        store = prepare_features(cache, seen, nuclei, encoder, source)
    with watch("predict"):
        bundle.to(device)
        chunks = predict_store(bundle, store, nuclei, section.mpp, among=everywhere)
        made = about.get("provenance", {})
        provenance = {
            "stain": str(cfg.stain),
            "orientation": orientation.settings(),
            "scaling": scaling,
            "roi": None if region is None else region.wkt,
            "bundle": {
                "sha256": sha256_file(Path(cfg.bundle) / "model.json"),
                "format_version": about["format_version"],
                "code": made.get("code"),
                "config_fingerprint": made.get("config_fingerprint"),
                "data": made.get("data"),
            },
        }
        said = write_prediction(
            out, bundle, section, in_file, chunks, store=store, intervals=cfg.intervals, provenance=provenance
        )
    for stage, seconds in watch.seconds.items():
        logger.info("%-10s%8.1f s", stage, seconds)
    logger.info("peak memory %.0f MB", peak_rss_mb())
    if said is not None:
        logger.info("verdict: %s", said)


def _weights(cfg: DictConfig, bundle: Bundle) -> Path | None:
    """The encoder's weights file: the one given, else the one that training read; None where the encoder finds its own or needs none."""
    from prts.features.encoders import weights_status

    if cfg.encoder.weights is not None:
        return Path(cfg.encoder.weights)
    settings, recorded = bundle.metadata["encoder"], bundle.metadata["encoder_weights"]
    if recorded is None or Path(recorded).is_file():
        return None if recorded is None else Path(recorded)
    if weights_status(settings).found:
        return None
    raise InputError(
        f"encoder.weights: is required, since {recorded} of training is not on this machine; give {Path(recorded).name} with sha256 "
        f"{settings['weights_sha256']} as encoder.weights=FILE"
    )


def _segmenter(cfg: DictConfig, bundle: Bundle) -> tuple[Segmenter | None, bool]:
    """The segmenter given, or that of training; and whether given nuclei are preferred."""
    from prts.cli.prepare import chosen_segmenter
    from prts.segmentation.segment import recorded_segmenter

    if cfg.get("segmentation") is not None:
        segmenter, prefer_given = chosen_segmenter(plain(cfg.segmentation))
        if cfg.nuclei is not None and not prefer_given:
            raise InputError("nuclei, segmentation: are mutually exclusive; omit one")
        return segmenter, prefer_given
    if cfg.nuclei is not None:
        return None, True
    try:
        segmenter_of_training = recorded_segmenter(bundle.metadata["segmentation"])
    except ParameterError as error:
        raise InputError(
            f"{cfg.bundle}: its segmenter cannot be built by this version of prts ({error}); choose one with segmentation=stardist or "
            "segmentation=watershed, or give nuclei=FILE"
        ) from error
    if segmenter_of_training is None:
        raise InputError(
            "nuclei: is required because this bundle was trained on given nuclei; give their file, or segment with segmentation=stardist "
            "or segmentation=watershed"
        )
    return segmenter_of_training, False
