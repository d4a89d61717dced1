"""What lies where in a section's folder as 10x delivers it: its image, nuclei and other files."""

from __future__ import annotations

import re
from pathlib import Path

from prts.errors import InputError
from prts.platforms.spaceranger_outs import find_outs

IMAGE_SUFFIXES = (
    *(".tif", ".tiff", ".btf", ".svs", ".ndpi", ".mrxs", ".scn", ".bif", ".vms", ".vmu", ".svslide", ".dcm"),
    *(".png", ".jpg", ".jpeg"),
)
# As Space Ranger and Xenium name the H&E image.
_IMAGES = ("tissue_image.*", "*_tissue_image.*", "he_image.ome.tif", "*_he_image.ome.tif")
# Where Space Ranger and prts write nuclei.
NUCLEI = (
    *("nucleus_segmentations.geojson", "nucleus_segmentations.geojson.gz"),
    *("segmented_outputs/nucleus_segmentations.geojson", "segmented_outputs/nucleus_segmentations.geojson.gz"),
    *(
        "outs/segmented_outputs/nucleus_segmentations.geojson",
        "outs/segmented_outputs/nucleus_segmentations.geojson.gz",
    ),
    *("nuclei.parquet", "nuclei.geojson", "nuclei.geojson.gz"),
)


def section_folder(path: Path) -> Path:
    """The folder of the section that a folder of bins, `binned_outputs` or `outs` is part of."""
    if not path.is_dir():
        raise InputError(f"{path}: no such folder; give Space Ranger's outs, or its binned_outputs/square_002um")
    folder = path.resolve()
    for inner in (r"square_\d{3}um", r"(binned|segmented)_outputs", "outs"):
        if re.fullmatch(inner, folder.name):
            folder = folder.parent
    return folder


def folder_name(folder: Path) -> str:
    """The name of a folder, also of `.` and links."""
    return folder.resolve().name


def only_image(folder: Path) -> Path:
    """The only full-resolution image in a section's folder."""
    found = (path for pattern in _IMAGES for place in (folder, folder / "outs") for path in place.glob(pattern))
    found = (path for path in found if not path.name.startswith("._"))  # macOS keeps attributes of files in these
    images = sorted({path for path in found if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()})
    if len(images) != 1:
        what = ", ".join(path.name for path in images) or "no tissue_image.tif, .btf, .svs, ..."
        hint = " (or *_he_image.ome.tif)"
        if not images and find_outs(folder) is not None:
            hint = " (the microscope image that Space Ranger was run with as --image, which it does not copy)"
        raise InputError(f"{folder}: contains {what}; expected exactly one tissue_image.*{hint}")
    return images[0]


def first_file(folder: Path, *names: str) -> Path | None:
    """The first of these files that the folder contains."""
    return next((folder / name for name in names if (folder / name).exists()), None)
