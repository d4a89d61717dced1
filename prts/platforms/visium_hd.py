"""Visium HD: 2 um bins in a regular array, as Space Ranger writes them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from prts.errors import InputError
from prts.io.cache import file_identity
from prts.io.mpp import MppSource, require_agreement
from prts.platforms import platforms
from prts.platforms.base import Registration
from prts.platforms.bin_counts import count_bins
from prts.platforms.bin_matrix import BinMatrix
from prts.platforms.bin_positions import (
    BIN_SIZE_UM,
    MATRIX,
    POSITIONS,
    SCALEFACTORS,
    matrix_path,
    read_positions,
    read_scalefactors,
)
from prts.platforms.bin_registration import corrected, register_bins

if TYPE_CHECKING:
    import geopandas as gpd
    import pandas as pd
    from anndata import AnnData

# Bins at the edge may extend beyond an image that is cropped to the tissue; with a larger share outside it is another image.
_MAX_OUTSIDE = 0.2
_FOLDERS = ("square_002um", "binned_outputs/square_002um", "outs/binned_outputs/square_002um")


@platforms.register("visium_hd")
@dataclass(frozen=True)
class VisiumHD:
    """The 2 um bins of a Visium HD section.

    Parameters
    ----------
    bins
        Folder `binned_outputs/square_002um` of Space Ranger's output.
    """

    bins: Path | str
    name: ClassVar[str]

    @property
    def path(self) -> Path:
        """The folder of bins."""
        return Path(self.bins)

    @property
    def files(self) -> dict[str, Path]:
        """Matrix and positions."""
        return {"matrix": self.path / MATRIX, "positions": self.path / POSITIONS}

    @classmethod
    def find(cls, folder: Path) -> VisiumHD | None:
        """The bins in a section's folder, in Space Ranger's `outs` or `binned_outputs`, or the folder of bins itself."""
        if folder.resolve().name == _FOLDERS[0] or (folder / POSITIONS).is_file():
            return cls(folder)
        return next((cls(folder / inner) for inner in _FOLDERS if (folder / inner).exists()), None)

    def identity(self) -> dict[str, Any]:
        """Identities of matrix and positions."""
        return {name: file_identity(path) for name, path in self.files.items()}

    def mpp_sources(self) -> list[MppSource]:
        """`microns_per_pixel` of scalefactors_json.json."""
        factors = read_scalefactors(self.path)
        return [(Path(SCALEFACTORS).name, factors["microns_per_pixel"])] if "microns_per_pixel" in factors else []

    def genes(self) -> pd.DataFrame:
        """Genes of the matrix."""
        with BinMatrix(matrix_path(self.path)) as matrix:
            return matrix.var()

    def check(self, image: Path, width: int, height: int, mpp: MppSource) -> None:
        """Check that the matrix is there, and that spacing and positions of the bins fit the image."""
        matrix_path(self.path)
        grid = read_positions(self.path)
        spacing = [
            (f"the spacing of bins along {axis} of the array in {self.path / POSITIONS}", BIN_SIZE_UM / px)
            for axis, px in zip(("rows", "columns"), grid.pitch_px, strict=True)
        ]
        require_agreement(image, [mpp, *spacing])
        outside = grid.share_outside(width, height)
        if outside > _MAX_OUTSIDE:
            raise InputError(
                f"{self.path}: bins do not belong to this image: {outside:.0%} of those in tissue lie outside {image} "
                f"({width} x {height} px); give the section's full-resolution image"
            )

    def register(self, nuclei: gpd.GeoDataFrame, mpp: float) -> Registration:
        """Measure the shift of the bins by the density of UMIs in and around the nuclei."""
        return register_bins(self.path, nuclei, mpp)

    def counts(self, nuclei: gpd.GeoDataFrame, *, registration: Registration | None = None) -> AnnData:
        """Sum the bins whose center is within exactly one nucleus."""
        grid = None if registration is None else corrected(read_positions(self.path), registration)
        return count_bins(self.path, nuclei, grid)
