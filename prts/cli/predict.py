"""Predict the expression of every nucleus, or square bin, in one or many H&E images with a trained model.

usage: prts predict bundle=DIR image=FILE out=FILE.h5ad [nuclei=FILE] [mpp=0.5] [segmentation=stardist|watershed]
                    [units=nuclei|bins] [bin_um=8]
                    [encoder.weights=FILE] [stain=none|histogram|reinhard|macenko] [rotate=0|90|180|270]
                    [flip=none|horizontal|vertical] [tta=1|4|8] [roi=[x0,y0,x1,y1]|[[x,y],[x,y],[x,y],...]|FILE.geojson]
                    [page=true]
       prts predict bundle=DIR slides=FOLDER|FILE.csv out=FOLDER [patterns=[*.svs]] [page=false] [slides_per_job=N]
       prts predict -m bundle=DIR slides=FOLDER|FILE.csv out=FOLDER worker=0,1,2,3 hydra/launcher=joblib|submitit_slurm

The model is a folder, or `bundle=hf://owner/name[@revision]` on the Hugging Face hub, which is downloaded once.

Nuclei are read from `nuclei=` (GeoJSON, GeoParquet, shapefile, CSV with WKT, label image) or found with `segmentation=`, by default the
segmenter used in training. `units=bins`, the default of a model trained on bins, tiles the tissue with squares of `bin_um=` um instead;
glass is left out, and ids are written like 10x's barcodes. um/px comes from `mpp=` or the image's metadata and is never guessed. The
encoder's weights are read from `encoder.weights=`, by default from the path used in training. Encoder and network run on
`encoder.device=`, by default a GPU if there is one. `stain=` matches the slide's colors to the training section. `rotate=` (degrees
counterclockwise), then `flip=`, match its orientation to the training tissue; coordinates in input and output still refer to the image
file. `tta=4` averages the predictions of the slide in its four rotations, `tta=8` also of their mirror images: features take 4 or 8 times
as long, and obs["tta_sd"] says how much the prediction of a nucleus depends on its orientation. `roi=` predicts only nuclei centered in a
region. If nuclei are more than 2.5 times larger or smaller than in training, um/px is probably wrong and the command stops;
check_scale=false continues anyway. With strict=true, a slide that is unlike the training slides is refused, too; otherwise a warning says
that its prediction should not be believed.

Writes FILE.h5ad (nuclei x genes) and FILE.nuclei.parquet (polygons). X is the expected UMI, layers["prob"] is P(expressed), layers["lower"]
and layers["upper"] are the 90% interval of the count (omitted with intervals=false), and obs["artefact"] flags nuclei on glass, in a fold,
under a bubble or pen, out of focus or merged (omitted with artefacts=false). Flagged nuclei are kept. page=true adds FILE.html, an
interactive page.

With `slides=`, the columns of a CSV (image, and optionally out, mpp, nuclei, segmentation, roi, rotate, flip, stain, ...) override the
options for single slides. Each slide gets FOLDER/<slide>.h5ad with polygons, page and state, and FOLDER/summary.csv and summary.html list
them all. A bad slide does not stop the others, and the same command again predicts only what is missing or outdated. Several workers, also
on other machines, can share a folder: with -m, there is one per value of `worker`. Exit status: 0 all done, 2 some slides are wrong, 1
something crashed or is left.

example: prts predict bundle=outputs/demo/make/model image=slide.svs out=slide.h5ad segmentation=stardist
example: prts predict bundle=outputs/demo/make/model slides=slides out=predictions segmentation=stardist
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prts.cli.app import plain, require
from prts.errors import ParameterError
from prts.extras import require_extra

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from prts.api.nuclei_source import NucleiSource
    from prts.api.predict import SlideSettings
    from prts.models.bundle import Bundle


def main(cfg: DictConfig) -> None:
    """Predict one slide, or many."""
    require(cfg, "bundle", "out")
    if cfg.slides is not None:
        from prts.cli.cohort import predict_slides

        predict_slides(cfg)
        return
    require(cfg, "image")
    for key in ("patterns", "worker", "slides_per_job"):
        if cfg[key] is not None:
            raise ParameterError(
                "", key, "applies to many slides; omit it, or give slides=FOLDER|FILE.csv instead of image"
            )
    if cfg.page:
        require_extra("report", "page")
    from prts.api.predict import EncoderRuntime, predict_slide
    from prts.models.bundle import load_bundle

    given, bundle = plain(cfg), load_bundle(cfg.bundle)
    predicted = predict_slide(
        bundle,
        cfg.image,
        cfg.out,
        nuclei=nuclei_source(given, bundle),
        settings=slide_settings(given),
        encoder=EncoderRuntime(**given["encoder"]),
        cache_dir=cfg.paths.cache_dir,
    )
    if cfg.page:
        from prts.report.pipeline import page_of_prediction

        page_of_prediction(predicted.out, Path(cfg.image), predicted.out.with_suffix(".html"))


def slide_settings(given: Mapping[str, Any]) -> SlideSettings:
    """The settings of a slide in a plain config."""
    from prts.api.predict import SlideSettings

    return SlideSettings(**{item.name: given[item.name] for item in fields(SlideSettings)})


def nuclei_source(given: dict[str, Any], bundle: Bundle) -> NucleiSource:
    """The nuclei file, the requested segmenter, or bins; None means the segmenter of training."""
    from prts.api.nuclei_source import uses_bins
    from prts.segmentation import segmenters

    node, file, units = given.get("segmentation"), given["nuclei"], given.get("units")
    if units == "bins":
        for key, value in (("nuclei", file), ("segmentation", node)):
            if value is not None:
                raise ParameterError("", key, "says where nuclei are, and the units are bins; omit one of them")
    if units == "bins" or given["bin_um"] is not None:
        recorded = bundle.metadata["segmentation"]["arguments"] if uses_bins(bundle) else {}
        if units == "nuclei" or (units is None and not recorded):
            raise ParameterError("", "bin_um", "is the size of bins; give units=bins, too")
        asked = {} if given["bin_um"] is None else {"bin_um": given["bin_um"]}
        return segmenters.build({"name": "bins", **recorded, **asked})
    if units == "nuclei" and uses_bins(bundle) and node is None and file is None:
        raise ParameterError(
            "", "units", "nuclei, but this model was trained on bins; give nuclei=FILE or segmentation=NAME, too"
        )
    if node is None:
        return None if file is None else Path(str(file))
    assert isinstance(node, dict)
    prefer_given = node.pop("prefer_given")
    if file is None:
        return segmenters.build(node)
    if not prefer_given:
        raise ParameterError("", "nuclei", "and segmentation are mutually exclusive; omit one of them")
    return Path(str(file))
