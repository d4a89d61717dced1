"""A section: one piece of tissue, its image, and what belongs to it; the noun that every stage takes."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from prts.errors import InputError
from prts.io.mpp import MppSource, require_agreement
from prts.io.orientation import UPRIGHT, Orientation
from prts.io.slide import Slide, StainTransform, open_slide
from prts.io.spots import read_spots
from prts.platforms.bin_positions import matrix_path, read_positions, read_scalefactors

logger = logging.getLogger(__name__)

# Bins at the rim may reach over the image, which is often cropped to the tissue; with more of them outside it is another image.
_MAX_OUTSIDE = 0.2

_IMAGE_SUFFIXES = (
    *(".tif", ".tiff", ".btf", ".svs", ".ndpi", ".mrxs", ".scn", ".bif", ".vms", ".vmu", ".svslide", ".dcm"),
    *(".png", ".jpg", ".jpeg"),
)
# Where 10x puts a segmentation, and what prts writes.
_NUCLEI = (
    *("nucleus_segmentations.geojson", "nucleus_segmentations.geojson.gz"),
    *("segmented_outputs/nucleus_segmentations.geojson", "segmented_outputs/nucleus_segmentations.geojson.gz"),
    *("nuclei.parquet", "nuclei.geojson", "nuclei.geojson.gz"),
)
_BINS = ("binned_outputs/square_002um", "outs/binned_outputs/square_002um")


@dataclass(frozen=True)
class Section:
    """One piece of tissue whose parts have been found to belong together; made by `open_section`.

    Attributes
    ----------
    name
        What the section is called in tables and folders.
    image
        The full-resolution H&E image.
    mpp, mpp_source
        um per full-resolution pixel, and where that stands.
    width, height
        Full-resolution pixels, as the image is read.
    bins
        Folder `square_002um`, if there are bins.
    nuclei
        A segmentation made elsewhere, if there is one.
    spots
        Measured spots (.h5ad), if there are any.
    truth
        What the simulation knows (.h5ad), if the section is simulated.
    recolour
        What the image's colours are changed by, if they are.
    orientation
        How the image is read, if not as it lies in its file.
    """

    name: str
    image: Path
    mpp: float
    mpp_source: str
    width: int
    height: int
    bins: Path | None
    nuclei: Path | None
    spots: Path | None
    truth: Path | None = None
    recolour: StainTransform | None = None
    orientation: Orientation = UPRIGHT

    def open_slide(self) -> Slide:
        """The image, at the section's um/px."""
        slide = open_slide(self.image, mpp=self.mpp, orientation=self.orientation)
        slide.recolour = self.recolour
        return slide

    def reoriented(self, orientation: Orientation) -> Section:
        """The same section, whose image is read turned. Its files still hold pixels of the image as it lies in its file."""
        width, height = orientation.size(*self.file_size)
        return replace(self, orientation=orientation, width=width, height=height)

    @property
    def file_size(self) -> tuple[int, int]:
        """Width and height of the image as it lies in its file, px."""
        return self.orientation.size(self.width, self.height)

    def reading(self) -> dict[str, Any]:
        """What else than the file decides on the pixels that are read, JSON-like: part of the fingerprint of all that is made from them."""
        found: dict[str, Any] = {}
        if self.recolour is not None:
            found["recolour"] = self.recolour.settings()
        if self.orientation != UPRIGHT:
            found["orientation"] = self.orientation.settings()
        return found


def open_section(
    name: str,
    image: Path | str,
    *,
    bins: Path | str | None = None,
    mpp: float | None = None,
    nuclei: Path | str | None = None,
    spots: Path | str | None = None,
    truth: Path | str | None = None,
) -> Section:
    """Check that the parts of a section belong together.

    Every source of um/px is held against every other: `mpp`, scalefactors_json.json, the image's metadata, the distance
    between bins, and `uns["mpp"]` of the spots. Bins and spots must lie on the image.

    Parameters
    ----------
    name
        What to call the section; it names folders.
    image
        The full-resolution H&E image.
    bins
        Folder `binned_outputs/square_002um` of Space Ranger's output.
    mpp
        um per full-resolution pixel, if the files do not say it.
    nuclei
        Nuclei segmented elsewhere, in any format that `prts.io.nuclei` reads.
    spots
        Measured spots (.h5ad).
    truth
        What the simulation knows (.h5ad).

    Raises
    ------
    InputError
        If a part is missing, damaged or belongs to another section, or nothing says the um/px.
    """
    if not name or name in (".", "..") or "/" in name or "\\" in name:
        raise InputError(f"section name {name!r}: it names a folder, so it must be a plain, non-empty name")
    bins, nuclei, spots, truth = (None if part is None else Path(part) for part in (bins, nuclei, spots, truth))
    for key, path in {"nuclei": nuclei, "truth": truth}.items():
        if path is not None and not path.exists():
            raise InputError(f"{path}: no such file; {key} of section {name} must exist or be left out")
    factors = {} if bins is None else read_scalefactors(bins)
    image = Path(image)
    stated = [("scalefactors_json.json", factors["microns_per_pixel"])] if "microns_per_pixel" in factors else []
    with open_slide(image, mpp=mpp, sources=stated) as slide:
        section = Section(
            name=name,
            image=image,
            mpp=slide.mpp,
            mpp_source=slide.mpp_source,
            width=slide.width,
            height=slide.height,
            bins=bins,
            nuclei=nuclei,
            spots=spots,
            truth=truth,
        )
    if section.bins is not None:
        _check_bins(section, section.bins, factors["bin_size_um"])
    if section.spots is not None:
        _check_spots(section, section.spots)
    logger.info(
        "section %s: %d x %d px of %.4g um (%s)", name, section.width, section.height, section.mpp, section.mpp_source
    )
    return section


def open_section_folder(folder: Path | str, name: str | None = None) -> Section:
    """Open a folder as 10x delivers it: `tissue_image.*`, `binned_outputs/square_002um`, and what else is there.

    Nuclei are taken from `nucleus_segmentations.geojson[.gz]` (also below `segmented_outputs`) or `nuclei.parquet`, spots
    from `spots.h5ad`, a simulated section's truth from `truth.h5ad`.

    Parameters
    ----------
    folder
        The section's folder.
    name
        What to call the section; the folder's name if left out.

    Raises
    ------
    InputError
        If there is no such folder, or not exactly one image in it, and whatever `open_section` raises.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; a section's folder with tissue_image.* is needed")
    found = (p for pattern in ("tissue_image.*", "*_tissue_image.*") for p in folder.glob(pattern))
    images = sorted(p for p in found if p.suffix.lower() in _IMAGE_SUFFIXES and p.is_file())
    if len(images) != 1:
        what = ", ".join(p.name for p in images) or "no tissue_image.tif, .btf, .svs, ..."
        raise InputError(f"{folder}: holds {what}; exactly one tissue_image.* is needed")

    def first(*names: str) -> Path | None:
        return next((folder / n for n in names if (folder / n).exists()), None)

    return open_section(
        folder.resolve().name if name is None else name,
        images[0],
        bins=first(*_BINS),
        nuclei=first(*_NUCLEI),
        spots=first("spots.h5ad"),
        truth=first("truth.h5ad"),
    )


def _check_bins(section: Section, bins: Path, bin_size_um: float) -> None:
    matrix_path(bins)
    grid = read_positions(bins)
    sources: list[MppSource] = [
        (
            f"the distance of bins along {axis} of the array in {bins / 'spatial/tissue_positions.parquet'}",
            bin_size_um / px,
        )
        for axis, px in zip(("rows", "columns"), grid.pitch_px, strict=True)
    ]
    require_agreement(section.image, [(section.mpp_source, section.mpp), *sources])
    outside = grid.share_outside(section.width, section.height)
    if outside > _MAX_OUTSIDE:
        raise InputError(
            f"{bins}: bins do not belong to this image: {outside:.0%} of those in tissue lie outside {section.image} "
            f"({section.width} x {section.height} px); its full-resolution image is needed"
        )


def _check_spots(section: Section, path: Path) -> None:
    spots = read_spots(path)
    if spots.mpp is not None:
        require_agreement(section.image, [(section.mpp_source, section.mpp), (f"uns['mpp'] of {path}", spots.mpp)])
    outside = ((spots.xy < 0) | (spots.xy > (section.width, section.height))).any(axis=1).mean()
    if outside > _MAX_OUTSIDE:
        raise InputError(
            f"{path}: spots do not belong to this image: {outside:.0%} lie outside {section.image} "
            f"({section.width} x {section.height} px); positions in its full-resolution pixels are needed"
        )
