"""F1 of the segmenters on nuclei_dsb2018: `PRTS_DATA=<folder> python benchmarks/segmentation.py`.

The 78 images have no um/px: they are taken as 0.5, and as some show nuclei at several times that magnification the watershed's
largest area is raised to 1,000 um2. The watershed's defaults were chosen while looking at these images, and the StarDist model
was trained on most of them, so neither score is one on unseen images; they show that the code finds what it should.
"""

import logging
import os
import time
from pathlib import Path

import numpy as np
from PIL import Image

from prts.evaluation.segmentation import Matching, match_nuclei
from prts.io.outlines import labels_to_polygons
from prts.io.slide import open_slide
from prts.segmentation.stardist import StarDist
from prts.segmentation.watershed import Watershed

IOUS = (0.5, 0.6, 0.7)
MPP = 0.5


def main() -> None:
    logging.getLogger("prts").setLevel(logging.ERROR)
    data = Path(os.environ["PRTS_DATA"])
    model = str(data / "stardist/he_dsb2018")
    segmenters = {
        "watershed": Watershed(),
        "watershed, max_area_um2=1000": Watershed(max_area_um2=1000),
        "stardist he_dsb2018, released thresholds (.01, .001)": StarDist(model=model),
        "stardist he_dsb2018, the model's own thresholds": StarDist(model=model, prob_thresh=None, nms_thresh=None),
        "the same, percentiles (1, 99.8) as StarDist's examples": StarDist(
            model=model, prob_thresh=None, nms_thresh=None, percentiles=(1, 99.8)
        ),
    }
    print("| segmenter | " + " | ".join(f"F1@IoU {iou}" for iou in IOUS) + " | precision, recall@.5 | nuclei | Mpx/s |")
    print("|---|" + "---|" * (len(IOUS) + 3))
    images = sorted((data / "nuclei_dsb2018/images").glob("*.png"))
    truth = [labels_to_polygons(np.asarray(Image.open(data / "nuclei_dsb2018/labels" / p.name)))[1] for p in images]
    for name, segmenter in segmenters.items():
        total = dict.fromkeys(IOUS, Matching(0, 0, 0))
        pixels, seconds = 0, 0.0
        for path, true in zip(images, truth, strict=True):
            with open_slide(path, mpp=MPP) as slide:
                start = time.perf_counter()
                found = segmenter(slide).geometry.to_numpy()
                seconds += time.perf_counter() - start
                pixels += slide.width * slide.height
            for iou in IOUS:
                total[iou] += match_nuclei(true, found, iou)
        half = total[0.5]
        print(
            f"| {name} | "
            + " | ".join(f"{total[iou].f1:.3f}" for iou in IOUS)
            + f" | {half.precision:.2f}, {half.recall:.2f} | {half.n_predicted} of {half.n_true} | {pixels / seconds / 1e6:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
