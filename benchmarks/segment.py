"""Segmentation: pixels a second on a real section, and StarDist through prts against StarDist's own call."""

from __future__ import annotations

import logging
from typing import Any

from benchmarks.harness import Part, child, data_folder, interleave

NEEDS_DATA = True


def run(quick: bool) -> Part:
    part = Part()
    data = str(data_folder())
    side, rounds = (400, 1) if quick else (2048, 3)
    alone = child(watershed, data=data, side=side, rounds=1, ways=["ours"])
    ours = child(watershed, data=data, side=side, rounds=rounds, ways=["ours", "skimage"])
    stardist = child(compare_stardist, data=data, side=side // 2, rounds=rounds)
    seconds = stardist.result["seconds"]
    rates = {name: (side // 2) ** 2 / 1e6 / value for name, value in seconds.items()}
    rate = side**2 / 1e6 / ours.result["seconds"]["ours"]
    plain = side**2 / 1e6 / ours.result["seconds"]["skimage"]
    part.figures = {"segment/mpx_per_second": rate}
    part.row(
        f"watershed, {side} x {side} px of her2st C2 at 0.5 um/px ({ours.result['nuclei']:,} nuclei)",
        f"{rate:.2f} Mpx/s, {alone.peak_gb:.1f} GB",
        f"{plain:.2f} Mpx/s: scikit-image's calls on the whole image, {ours.result['plain']:,} nuclei",
        keys=["segment/mpx_per_second"],
    )
    part.row(
        f"StarDist (the small model, the released thresholds), {side // 2} x {side // 2} px; nuclei {stardist.result['nuclei']:,}",
        f"{rates['ours']:.2f} Mpx/s, {stardist.peak_gb:.1f} GB",
        "",
        f"{rates['library']:.2f} Mpx/s: `predict_instances` alone",
    )
    return part


def watershed(data: str, side: int, rounds: int, ways: list[str]) -> dict[str, Any]:
    """Seconds of prts' watershed, from slide to polygons, and of the plain chain of library calls, from pixels to polygons."""
    import tempfile
    from pathlib import Path

    from prts.io.slide import open_slide
    from prts.segmentation.watershed import Watershed

    found: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder:
        pixels, image = _crop(data, side, Path(folder))

        def ours() -> None:
            with open_slide(image, mpp=0.5) as slide:
                found["nuclei"] = len(Watershed()(slide))

        def plain() -> None:
            found["plain"] = _skimage_watershed(pixels)

        known = {"ours": ours, "skimage": plain}
        return {"seconds": interleave({name: known[name] for name in ways}, rounds), **found}


def compare_stardist(data: str, side: int, rounds: int) -> dict[str, Any]:
    """Seconds of StarDist through prts and of its own call on the same normalised pixels."""
    import tempfile
    from pathlib import Path

    import numpy as np

    from prts.io.slide import open_slide
    from prts.segmentation.stardist import StarDist, _load, _silence

    model = str(Path(data) / "stardist/he_dsb2018")
    found: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder:
        pixels, image = _crop(data, side, Path(folder))

        def ours() -> None:
            with open_slide(image, mpp=0.5) as slide:
                found["nuclei"] = len(StarDist(model=model)(slide))

        def library() -> None:
            low, high = np.percentile(pixels, (5, 95))
            scaled = ((pixels - low) / (high - low)).astype(np.float32)
            with _silence():
                _load(model).predict_instances(scaled, axes="YXC", prob_thresh=0.01, nms_thresh=0.001)

        ours()  # loads the model, compiles the network for this shape
        library()
        return {"seconds": interleave({"ours": ours, "library": library}, rounds), **found}


def _crop(data: str, side: int, folder: Any) -> tuple[Any, Any]:
    """The middle of her2st C2 at 0.5 um/px, in memory and as a tiled TIFF."""
    from pathlib import Path

    import tifffile

    from prts.io.slide import open_slide
    from prts.platforms.bin_positions import read_scalefactors

    logging.getLogger("prts").setLevel(logging.ERROR)
    where = Path(data) / "her2st_hd/C2"
    mpp = read_scalefactors(where / "binned_outputs/square_002um")["microns_per_pixel"]
    with open_slide(where / "tissue_image.tif", mpp=mpp) as slide:
        width, height = slide.size_at(0.5)
        pixels = slide.read_region((width - side) // 2, (height - side) // 2, side, side, 0.5)
    image = folder / "crop.tif"
    tifffile.imwrite(image, pixels, tile=(256, 256), compression="jpeg", compressionargs={"level": 90})
    return pixels, image


def _skimage_watershed(pixels: Any) -> int:
    """What scikit-image's gallery does: haematoxylin, Otsu, distance transform, peaks, watershed, contours."""
    import numpy as np
    from scipy import ndimage
    from skimage.color import rgb2hed
    from skimage.feature import peak_local_max
    from skimage.filters import gaussian, threshold_otsu
    from skimage.measure import find_contours, regionprops
    from skimage.segmentation import watershed as flood

    haematoxylin = gaussian(rgb2hed(pixels)[..., 0], 1)
    mask = haematoxylin > threshold_otsu(haematoxylin)
    distance = ndimage.distance_transform_edt(mask)
    peaks = peak_local_max(distance, min_distance=5, labels=ndimage.label(mask)[0])
    seeds = np.zeros(mask.shape, dtype=int)
    seeds[tuple(peaks.T)] = np.arange(1, len(peaks) + 1)
    labels = flood(-distance, seeds, mask=mask)
    return len([find_contours(np.pad(region.image, 1).astype(float), 0.5) for region in regionprops(labels)])
