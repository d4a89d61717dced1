"""The output folder of Space Ranger 3 and later, from any folder in it that a user may give."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import h5py

from prts.io.h5_checks import DAMAGED
from prts.platforms.barcode_mappings import MAPPINGS
from prts.platforms.bin_positions import MATRIX, bins_folders

SEGMENTED = "segmented_outputs"
CELL_MATRIX = "filtered_feature_cell_matrix.h5"
OUTLINES = {"cell": "cell_segmentations.geojson", "nucleus": "nucleus_segmentations.geojson"}
# Folders in `outs`, and in those.
_INNER = re.compile(r"square_\d{3}um|binned_outputs|segmented_outputs|spatial")
# Spots of Space Ranger 1 and 2.
_SPOTS = ("spatial/tissue_positions_list.csv", "spatial/tissue_positions.csv")


@dataclass(frozen=True)
class SpaceRangerOuts:
    """What is in an output folder.

    Attributes
    ----------
    path
        The folder with `binned_outputs` or `segmented_outputs`, usually `outs`.
    bins
        Folders of bins by their size (um), the smallest first.
    segmented
        The folder of cells; None if there is none.
    """

    path: Path
    bins: dict[int, Path]
    segmented: Path | None

    def version(self) -> str | None:
        """The version of Space Ranger as a matrix records it; None if it does not."""
        matrices = [folder / MATRIX for folder in self.bins.values()]
        if self.segmented is not None:
            matrices.insert(0, self.segmented / CELL_MATRIX)
        for matrix in filter(Path.is_file, matrices):
            try:
                with h5py.File(matrix) as file:
                    stated = file.attrs.get("software_version", "")
            except DAMAGED:  # reported by whoever reads its counts
                continue
            text = stated.decode(errors="replace") if isinstance(stated, bytes) else str(stated)
            if found := re.fullmatch(r"(?:spaceranger-)?(\d+(?:\.\d+)+)", text):
                return found[1]
        return None

    def sentence(self) -> str:
        """What was found, in words."""
        version = self.version() or ("4 or later" if self.segmented else "3 or later")
        sizes = ", ".join(map(str, self.bins))
        parts = [f"bins of {sizes} um" if sizes else "no bins"]
        if self.segmented is None:
            parts.append("no segmentation")
        else:
            outlined = [unit for unit, name in OUTLINES.items() if (self.segmented / name).is_file()]
            counted = "counts of cells" if (self.segmented / CELL_MATRIX).is_file() else "no counts of cells"
            parts += [f"outlines of {' and '.join(outlined) or 'nothing'}", counted]
        if (self.path / MAPPINGS).is_file():
            parts.append(MAPPINGS)
        return f"Space Ranger {version} in {self.path}: {'; '.join(parts)}"


def find_outs(path: Path) -> SpaceRangerOuts | None:
    """The output folder that is, contains or is directly in a folder.

    Parameters
    ----------
    path
        `outs`, the folder it is in, or `binned_outputs`, `square_NNNum`, `segmented_outputs` or `spatial` in it.

    Returns
    -------
    What is there; None if it is not the output of Space Ranger 3 or later.
    """
    while _INNER.fullmatch(path.absolute().name):
        path = path.parent if path.name else path.absolute().parent
    for folder in (path, path / "outs"):
        bins = bins_folders(folder / "binned_outputs")
        segmented = folder / SEGMENTED
        if bins or segmented.is_dir():
            return SpaceRangerOuts(folder, bins, segmented if segmented.is_dir() else None)
    return None


def has_spots(path: Path) -> bool:
    """Whether a folder, or `outs` in it, is the output for Visium slides with spots of 55 um."""
    return any((folder / name).is_file() for folder in (path, path.parent, path / "outs") for name in _SPOTS)
