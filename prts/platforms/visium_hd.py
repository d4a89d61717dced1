"""Visium HD: square bins in a regular array, as Space Ranger writes them."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from prts.errors import InputError
from prts.io.cache import file_identity
from prts.io.mpp import MppSource, require_agreement
from prts.platforms import platforms
from prts.platforms.base import Registration
from prts.platforms.bin_counts import count_bins, exposure_of_nuclei, write_bin_table
from prts.platforms.bin_matrix import BinMatrix
from prts.platforms.bin_owners import CountSettings
from prts.platforms.bin_positions import (
    BIN_SIZE_UM,
    SCALEFACTORS,
    BinGrid,
    bin_files,
    bin_size,
    bins_folder,
    bins_folders,
    is_raw,
    matrix_path,
    read_positions,
    read_scalefactors,
)
from prts.platforms.bin_registration import corrected, register_bins
from prts.platforms.bin_units import bin_um_of, count_squares, measured_squares
from prts.platforms.spaceranger_outs import SEGMENTED, find_outs

if TYPE_CHECKING:
    import geopandas as gpd
    import numpy as np
    import pandas as pd
    from anndata import AnnData
    from numpy.typing import NDArray

    from prts.platforms.array_effects import ArrayEffects

logger = logging.getLogger(__name__)

# Bins at the edge may extend beyond an image that is cropped to the tissue; with a larger share outside it is another image.
_MAX_OUTSIDE = 0.2
_PARENTS = ("", "binned_outputs", "outs/binned_outputs")

BinUm = Annotated[int, Field(ge=1, le=999)]


# A nucleus of 6 um has 3 px at this um/px: the images of a CytAssist (about 4.6 um/px) and of previews show none. Larger bins may be the
# units of a coarser image, as long as they have 3 px, too.
_COARSEST_MPP = 2.0
_PX_PER_BIN = 3


@platforms.register("visium_hd")
@dataclass(frozen=True)
class VisiumHD:
    """The bins of a Visium HD section.

    Parameters
    ----------
    bins
        Folder `binned_outputs/square_NNNum` of Space Ranger's output, or `outs`, or the folder that it is in.
    bin_um
        Side of the bins that are the units, from the folder of their size next to `bins`; None: the 2 um bins are summed in nuclei.
    """

    bins: Path | str
    bin_um: BinUm | None = None
    name: ClassVar[str]

    @property
    def path(self) -> Path:
        """The folder of bins."""
        return self._bins if self.bin_um is None else _of_size(self._bins, self.bin_um)

    @property
    def _bins(self) -> Path:
        """The folder of bins, also from another folder of the same output."""
        given = Path(self.bins)
        if bins_folder(bin_size(given)) == given.absolute().name or bin_files(given)["positions"].is_file():
            return given
        outs = find_outs(given)
        sizes = {} if outs is None else outs.bins
        return sizes.get(int(BIN_SIZE_UM), next(iter(sizes.values()), given))

    @property
    def files(self) -> dict[str, Path]:
        """Matrix and positions."""
        return bin_files(self.path)

    @classmethod
    def find(cls, folder: Path) -> VisiumHD | None:
        """The bins in a section's folder or in Space Ranger's `outs`, from any folder in it, or the folder of bins itself.

        Of several sizes, the smallest; bins that are larger than 2 um are units themselves.
        """
        positions = bin_files(folder)["positions"]
        # positions as CSV may be those of Visium's spots, unless the folder is called like one of bins
        if bins_folder(bin_size(folder)) == folder.absolute().name or (
            positions.is_file() and positions.suffix == ".parquet"
        ):
            found: Path | None = folder
        else:
            found = next((path for inner in _PARENTS for path in bins_folders(folder / inner).values()), None)
        if found is None:
            # from other folders in it, but whoever names the folder of cells means these
            outs = None if folder.absolute().name == SEGMENTED else find_outs(folder)
            if outs is None or not outs.bins:
                return None
            found = next(iter(outs.bins.values()))
        size = bin_size(found)
        return cls(found, None if size == BIN_SIZE_UM else size)

    def with_units(self, bin_um: int) -> VisiumHD:
        """The same section with its bins of this size as units."""
        if not _of_size(self._bins, bin_um).exists():
            there = ", ".join(map(str, bins_folders(self._bins.parent))) or "none"
            raise InputError(
                f"{self.bins}: {bins_folder(bin_um)} is not next to it; set `bin_um` to a size that is there ({there})"
            )
        return VisiumHD(self._bins, bin_um)

    def units(self, mpp: float) -> gpd.GeoDataFrame:
        """The bins of the matrix as squares."""
        return measured_squares(self.path, mpp)

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
        """Check that the matrix is there, that the image is fine enough, and that spacing and positions of the bins fit it."""
        if is_raw(matrix := matrix_path(self.path)):
            logger.warning(
                "%s: the filtered matrix is not there; bins of this one are used where they are in tissue", matrix
            )
        if mpp[1] > max(_COARSEST_MPP, bin_size(self.path) / _PX_PER_BIN):
            raise InputError(
                f"{image}: {mpp[1]:.4g} um/px is too coarse to show nuclei, like the image of a CytAssist; give the microscope "
                "image that Space Ranger was run with as `--image`, or run it again with that option"
            )
        grid = read_positions(self.path)
        spacing = [
            (f"the spacing of bins along {axis} of the array in {self.files['positions']}", bin_size(self.path) / px)
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
        self._require_small()
        return register_bins(self.path, nuclei, mpp)

    def counts(self, nuclei: gpd.GeoDataFrame, *, registration: Registration | None = None) -> AnnData:
        """Sum the bins whose center is within exactly one nucleus."""
        return self.counts_by(nuclei, CountSettings(), registration=registration)

    def counts_by(
        self, nuclei: gpd.GeoDataFrame, counting: CountSettings, *, registration: Registration | None = None
    ) -> AnnData:
        """Sum the bins of each nucleus; bins that are the units themselves keep their counts."""
        bin_um = bin_um_of(nuclei)
        if bin_um is None:
            self._require_small()
        elif _of_size(self._bins, bin_um).is_dir():
            exact = count_squares(_of_size(self._bins, bin_um), nuclei)
            if exact is not None:
                return exact
        return count_bins(self.path, nuclei, self._grid(registration), counting if bin_um is None else None)

    def exposure(
        self, nuclei: gpd.GeoDataFrame, counting: CountSettings, *, registration: Registration | None = None
    ) -> tuple[NDArray[np.float64], ArrayEffects]:
        """The mean effect of rows and columns over the bins of each nucleus."""
        return exposure_of_nuclei(self.path, nuclei, self._grid(registration), counting)

    def write_bin_table(
        self,
        path: Path,
        nuclei: gpd.GeoDataFrame,
        counting: CountSettings,
        *,
        registration: Registration | None = None,
    ) -> None:
        """Write which bins are summed in which nucleus."""
        write_bin_table(path, self.path, nuclei, self._grid(registration), counting)

    def _grid(self, registration: Registration | None) -> BinGrid | None:
        """The corrected positions of the bins; None: those of the files."""
        return None if registration is None else corrected(read_positions(self.path), registration)

    def _require_small(self) -> None:
        """Refuse to sum bins in nuclei that are hardly larger."""
        if (size := bin_size(self.path)) != BIN_SIZE_UM:
            raise InputError(
                f"{self.path}: bins of {size} um are too large to be summed in nuclei; give those of 2 um, or take the bins as units"
            )


def _of_size(bins: Path, bin_um: int) -> Path:
    """The folder of bins of another size, next to a folder of bins."""
    return bins if bin_size(bins) == bin_um else bins.parent / bins_folder(bin_um)
