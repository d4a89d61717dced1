"""Paths that are not a slide themselves: folders, and files whose pixels are elsewhere."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prts.errors import InputError

if TYPE_CHECKING:
    from pathlib import Path

_NOT_READ = {
    ".vsi": "Olympus VSI, whose pixels are in a folder next to it,",
    ".ets": "Olympus ETS",
    ".czi": "Zeiss CZI",
    ".lif": "Leica LIF",
    ".nd2": "Nikon ND2",
    ".isyntax": "Philips iSyntax",
}
_LOOKED_AT = 100


def slide_of(folder: Path) -> str:
    """What to open instead of a folder."""
    if (folder / "Slidedat.ini").is_file():
        return f"the file {folder.name}.mrxs next to it"
    if (folder / "images").is_dir():  # of a SpatialData store
        image = next((path for path in sorted((folder / "images").iterdir()) if path.is_dir()), None)
        if image is not None:
            return f"one of its images, such as {image}"
    for path in sorted(folder.iterdir())[:_LOOKED_AT]:
        if path.is_file() and not path.name.startswith("."):
            with path.open("rb") as file:
                if path.suffix.lower() == ".dcm" or file.read(132).endswith(b"DICM"):
                    return f"one of its DICOM files, such as {path.name}, from which the others are found"
    return "the image file"


def refuse_thumbnail(path: Path) -> None:
    """Refuse a file that holds only a picture of the slide, whose pixels are in a folder next to it or that prts cannot read.

    Raises
    ------
    InputError
        If it is one.
    """
    suffix = path.suffix.lower()
    if suffix == ".mrxs" and not path.with_suffix("").joinpath("Slidedat.ini").is_file():
        raise InputError(
            f"holds only a thumbnail; put the slide's folder {path.stem}, with Slidedat.ini, next to it, or give an OME-TIFF"
        )
    if suffix in _NOT_READ:
        raise InputError(
            f"{_NOT_READ[suffix]} cannot be read; convert the slide to OME-TIFF, such as with QuPath (Export images)"
        )
