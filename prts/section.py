"""A section: one piece of tissue with its image and everything that belongs to it. Every stage takes one as input."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from prts.errors import InputError, ParameterError
from prts.io.mpp import require_agreement
from prts.io.orientation import UPRIGHT, Orientation
from prts.io.slide import Look, Slide, StainTransform, open_slide, reopen_slide
from prts.io.slide_bounds import Bounds
from prts.io.spots import read_spots
from prts.platforms import DEFAULT_PLATFORM, platforms
from prts.platforms.base import HasImage, HasOutlines, HasUnits
from prts.platforms.spaceranger_outs import find_outs, has_spots
from prts.section_folder import NUCLEI, first_file, folder_name, only_image, section_folder

if TYPE_CHECKING:
    from prts.platforms.base import Measurement

logger = logging.getLogger(__name__)

# Spots at the edge may lie outside an image that is cropped to the tissue; with a larger share outside it is another image.
_MAX_OUTSIDE = 0.2


@dataclass(frozen=True)
class Section:
    """One piece of tissue, with all parts checked to belong together.

    Created by `read_visium_hd`, `read_section` and `open_section`.

    Attributes
    ----------
    name
        Name of the section in tables and folders.
    image
        The full-resolution H&E image.
    mpp, mpp_source
        um per full-resolution pixel, and the source of the value.
    width, height
        Size in full-resolution pixels, as the image is read.
    measurement
        The measured expression, if there is any.
    nuclei
        Nuclei from another tool, if there are any.
    spots
        Measured spots (.h5ad), if there are any.
    truth
        Ground truth (.h5ad) of a simulated section.
    recolour
        Color change applied as the image is read.
    look
        Change of pixels applied after that (`prts.features.views`).
    orientation
        Rotation and flip applied as the image is read.
    max_pixels
        Largest image that is decoded as a whole; None: 2^29 px.
    bounds
        The part of the image file that was scanned, if that is not all of it.
    """

    name: str
    image: Path
    mpp: float
    mpp_source: str
    width: int
    height: int
    measurement: Measurement | None = None
    nuclei: Path | None = None
    spots: Path | None = None
    truth: Path | None = None
    recolour: StainTransform | None = None
    look: Look | None = None
    orientation: Orientation = UPRIGHT
    max_pixels: int | None = None
    bounds: Bounds | None = None

    def open_slide(self) -> Slide:
        """The image, at the section's um/px."""
        slide = reopen_slide(
            self.image, (self.mpp_source, self.mpp), orientation=self.orientation, max_pixels=self.max_pixels
        )
        slide.name, slide.recolour, slide.look = self.name, self.recolour, self.look
        return slide

    def reoriented(self, orientation: Orientation) -> Section:
        """The same section with its image rotated or flipped; its other files keep the pixels of the image file."""
        width, height = orientation.size(*self.file_size)
        return replace(self, orientation=orientation, width=width, height=height)

    @property
    def file_size(self) -> tuple[int, int]:
        """Width and height in the image file, px."""
        return self.orientation.size(self.width, self.height)

    def reading(self) -> dict[str, Any]:
        """Everything except the file that affects the pixels, JSON-like: part of the fingerprint of everything computed from them."""
        found: dict[str, Any] = {}
        if self.recolour is not None:
            found["recolour"] = self.recolour.settings()
        if self.look is not None:
            found["look"] = self.look.settings()
        if self.orientation != UPRIGHT:
            found["orientation"] = self.orientation.settings()
        return found


def read_visium_hd(
    path: Path | str,
    image: Path | str | None = None,
    *,
    name: str | None = None,
    mpp: float | None = None,
    nuclei: Path | str | None = None,
    spots: Path | str | None = None,
    units: Literal["nuclei", "bins"] = "nuclei",
    bin_um: int | None = None,
    max_pixels: int | None = None,
) -> Section:
    """Read a Visium HD section.

    Parameters
    ----------
    path
        Space Ranger's `outs`, a folder that contains it, the section's folder, `binned_outputs`, `binned_outputs/square_NNNum` or
        `segmented_outputs`.
    image
        The full-resolution H&E image; if None, the only `tissue_image.*` in the section's folder.
    name
        Name of the section; by default the name of its folder.
    mpp
        um per full-resolution pixel, if the files do not state it or state a wrong value.
    nuclei
        Nuclei from another tool, in any format that `prts.io.nuclei` reads; if None, Space Ranger's segmentation if it is there.
    spots
        Measured spots (.h5ad); if None, `spots.h5ad` if it is there.
    units
        What is trained on and predicted: `"nuclei"`, in which 2 um bins are summed, or `"bins"`, with the counts of the matrix.
    bin_um
        Side of the bins with `units="bins"`, 8 by default.
    max_pixels
        Largest image that is decoded as a whole (PNG, JPEG, untiled TIFF); None: 2^29 px.

    Returns
    -------
    The section.

    Raises
    ------
    InputError
        If there are no bins, not exactly one image, or the parts do not belong together.

    Examples
    --------
    >>> section = read_visium_hd("sample/outs", "sample/slide.tif")  # doctest: +SKIP
    >>> section.mpp  # doctest: +SKIP
    0.2738
    """
    if units not in ("nuclei", "bins"):
        raise ParameterError("", "units", f"{units!r} is not known; choose nuclei or bins")
    if units == "nuclei" and bin_um is not None:
        raise ParameterError("", "bin_um", "belongs to units='bins'; omit it, or choose those units")
    path = Path(path)
    folder = section_folder(path)
    measurement = platforms["visium_hd"].find(path) or platforms["visium_hd"].find(folder)
    if measurement is None:
        what = "is Visium with spots of 55 um" if has_spots(path) else "contains no Visium HD bins"
        raise InputError(f"{path}: {what}; give Space Ranger's outs folder with binned_outputs/square_002um")
    if units == "bins" and isinstance(measurement, HasUnits):
        measurement = measurement.with_units(8 if bin_um is None else bin_um)
    return open_section(
        folder_name(folder) if name is None else name,
        only_image(folder) if image is None else image,
        measurement=measurement,
        mpp=mpp,
        nuclei=first_file(folder, *NUCLEI) if nuclei is None else nuclei,
        spots=first_file(folder, "spots.h5ad") if spots is None else spots,
        truth=first_file(folder, "truth.h5ad"),
        max_pixels=max_pixels,
    )


def read_section(
    image: Path | str | None = None,
    *,
    name: str | None = None,
    mpp: float | None = None,
    nuclei: Path | str | None = None,
    spots: Path | str | None = None,
    platform: str | None = None,
    max_pixels: int | None = None,
    **files: Any,
) -> Section:
    """Read a section: an image alone, or with the counts of any platform.

    Parameters
    ----------
    image
        The full-resolution H&E image; if None, that of a SpatialData store.
    name
        Name of the section; by default the name of the image file, or of the store.
    mpp
        um per full-resolution pixel, if the image does not state it.
    nuclei
        Nuclei from another tool, in any format that `prts.io.nuclei` reads.
    spots
        Measured spots (.h5ad).
    platform
        What measured the section: `"xenium"`, `"anndata"`, `"spatialdata"`, `"visium_hd"` or another name in
        `prts.platforms.platforms`; None if nothing did.
    max_pixels
        Largest image that is decoded as a whole (PNG, JPEG, untiled TIFF); None: 2^29 px.
    **files
        Arguments of the platform, such as `outs` of `prts.platforms.xenium.Xenium`.

    Returns
    -------
    The section.

    Raises
    ------
    InputError
        If a file is missing or damaged, or nothing states the um/px.

    Examples
    --------
    >>> section = read_section("slide.svs", mpp=0.5)  # doctest: +SKIP
    >>> section = read_section("he_image.ome.tif", platform="xenium", outs="sample/outs")  # doctest: +SKIP
    >>> section = read_section(platform="spatialdata", sdata="sample.zarr")  # doctest: +SKIP
    """
    if platform is None and files:
        raise ParameterError("", "platform", f"is missing; name the platform that {next(iter(files))} belongs to")
    measurement = None if platform is None else make_measurement(name or "", platform, files)
    if name is None:
        name = Path(image).stem if image is not None else measurement.path.stem if measurement is not None else ""
    return open_section(
        name,
        own_image(measurement) if image is None else image,
        measurement=measurement,
        mpp=mpp,
        nuclei=nuclei,
        spots=spots,
        max_pixels=max_pixels,
    )


def open_section(
    name: str,
    image: Path | str,
    *,
    measurement: Measurement | None = None,
    mpp: float | None = None,
    nuclei: Path | str | None = None,
    spots: Path | str | None = None,
    truth: Path | str | None = None,
    max_pixels: int | None = None,
) -> Section:
    """Check that the parts of a section belong together.

    `mpp` wins over metadata, with a warning; without it, the measurement's files and the image's metadata must agree. Measured
    positions and `uns["mpp"]` of the spots must always agree with the um/px, and the positions must be on the image.

    Parameters
    ----------
    name
        Name of the section, also of its folders.
    image
        The full-resolution H&E image.
    measurement
        The measured expression, such as `prts.platforms.visium_hd.VisiumHD`.
    mpp
        um per full-resolution pixel, if the files do not state it or state a wrong value.
    nuclei
        Nuclei from another tool, in any format that `prts.io.nuclei` reads.
    spots
        Measured spots (.h5ad).
    truth
        Ground truth of a simulated section (.h5ad).
    max_pixels
        Largest image that is decoded as a whole (PNG, JPEG, untiled TIFF); None: 2^29 px.

    Raises
    ------
    InputError
        If a part is missing, damaged or belongs to another section, or nothing states the um/px.
    """
    if not name or name in (".", "..") or "/" in name or "\\" in name:
        raise InputError(f"section name {name!r}: it names a folder; give a plain, non-empty name")
    nuclei, spots, truth = (None if part is None else Path(part) for part in (nuclei, spots, truth))
    for key, path in {"nuclei": nuclei, "truth": truth}.items():
        if path is not None and not path.exists():
            raise InputError(f"{path}: no such file; give the {key} of section {name}, or omit them")
    sources = [] if measurement is None else measurement.mpp_sources()
    # outlines were registered to the image, and `check` can say what is wrong with the registration
    registered = isinstance(measurement, HasOutlines)
    stated, fallback = ([], sources) if registered else (sources, [])
    image = Path(image)
    with open_slide(image, mpp=mpp, sources=stated, fallback=fallback, max_pixels=max_pixels) as slide:
        section = Section(
            name=name,
            image=image,
            mpp=slide.mpp,
            mpp_source=slide.mpp_source,
            width=slide.width,
            height=slide.height,
            measurement=measurement,
            nuclei=nuclei,
            spots=spots,
            truth=truth,
            max_pixels=max_pixels,
            bounds=slide.bounds,
        )
    if measurement is not None:
        measurement.check(image, section.width, section.height, (section.mpp_source, section.mpp))
        if (outs := find_outs(measurement.path)) is not None:
            logger.info("section %s: %s", name, outs.sentence())
    if section.spots is not None:
        _check_spots(section, section.spots)
    logger.info(
        "section %s: %d x %d px of %.4g um (%s)", name, section.width, section.height, section.mpp, section.mpp_source
    )
    return section


def own_image(measurement: Measurement | None) -> Path:
    """The image that comes with a measurement.

    Raises
    ------
    InputError
        If none does.
    """
    if measurement is None:
        raise InputError("image: is missing; give the H&E image of the section")
    if not isinstance(measurement, HasImage):
        raise InputError(f"{measurement.path}: comes without an H&E image; give it as `image`")
    return measurement.own_image()


def open_section_folder(folder: Path | str, name: str | None = None, *, max_pixels: int | None = None) -> Section:
    """Open a section's folder as 10x delivers it: `tissue_image.*`, measured counts, and optional files.

    Counts come from the first platform whose files are found, Visium HD first unless the folder is `segmented_outputs`. Nuclei are
    taken from `nucleus_segmentations.geojson[.gz]` (also in `segmented_outputs` and `outs/segmented_outputs`) or `nuclei.parquet`,
    spots from `spots.h5ad`, the truth of a simulated section from `truth.h5ad`.

    Parameters
    ----------
    folder
        The section's folder, or Space Ranger's `outs` in it or a folder in that.
    name
        Name of the section; by default the name of the section's folder.
    max_pixels
        Largest image that is decoded as a whole (PNG, JPEG, untiled TIFF); None: 2^29 px.

    Raises
    ------
    InputError
        If there is no such folder, or not exactly one image in it, or the parts do not belong together.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; give a section's folder with tissue_image.*")
    given, folder = folder, folder if find_outs(folder) is None else section_folder(folder)
    return open_section(
        folder_name(folder) if name is None else name,
        only_image(folder),
        measurement=_find_measurement(given),
        nuclei=first_file(folder, *NUCLEI),
        spots=first_file(folder, "spots.h5ad"),
        truth=first_file(folder, "truth.h5ad"),
        max_pixels=max_pixels,
    )


def make_measurement(section: str, platform: str, settings: dict[str, Any]) -> Measurement:
    """Create a measurement by the name of its platform.

    Parameters
    ----------
    section
        Name of the section, for messages.
    platform
        A name in `prts.platforms.platforms`.
    settings
        Arguments of the platform's constructor.

    Raises
    ------
    ParameterError
        If there is no such platform, or it does not accept these settings.
    """
    from prts.arguments import checked_call  # imports pydantic, which is not needed to open bins

    kind = platforms[platform]
    try:
        made: Measurement = checked_call(kind, settings, "section")
    except ParameterError as error:
        raise ParameterError("section", f"{section}.{error.name}", error.problem) from error
    return made


def _find_measurement(folder: Path) -> Measurement | None:
    for platform in sorted(platforms.names(), key=lambda name: (name != DEFAULT_PLATFORM, name)):
        found = platforms[platform].find(folder)
        if found is not None:
            return found
    return None


def _check_spots(section: Section, path: Path) -> None:
    spots = read_spots(path)
    if spots.mpp is not None:
        require_agreement(section.image, [(section.mpp_source, section.mpp), (f"uns['mpp'] of {path}", spots.mpp)])
    outside = ((spots.xy < 0) | (spots.xy > (section.width, section.height))).any(axis=1).mean()
    if outside > _MAX_OUTSIDE:
        raise InputError(
            f"{path}: spots do not belong to this image: {outside:.0%} are outside {section.image} "
            f"({section.width} x {section.height} px); give positions in its full-resolution pixels"
        )
