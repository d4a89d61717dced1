"""What a layout has to offer: the files of one platform, written from a simulated section."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

if TYPE_CHECKING:
    from pathlib import Path

    import anndata as ad
    import geopandas as gpd
    import numpy as np
    from numpy.typing import NDArray

    from prts.simulate.draw_counts import BinCounts
    from prts.simulate.lattice import BinLattice


@dataclass(frozen=True)
class Preview:
    """A small copy of the image: RGB pixels (rows, columns, 3), and its size over that of the full-resolution image."""

    pixels: NDArray[np.uint8]
    scale: float


@dataclass(frozen=True)
class SimulatedSection:
    """A simulated section before it is written.

    Attributes
    ----------
    truth
        Nuclei x genes, as `truth.h5ad`: `gene_id`, `obsm["spatial"]` in full-resolution pixels.
    outlines
        The nuclei in full-resolution pixels, in the order of `truth`.
    lattice, counts
        Positions and counts of the 2 um bins.
    mpp
        um per full-resolution pixel.
    shape
        Rows and columns of the full-resolution image.
    previews
        Small copies of the image, by the names that the layout asks for.
    seed
        Seed for what a layout draws itself.
    """

    truth: ad.AnnData
    outlines: gpd.GeoDataFrame
    lattice: BinLattice
    counts: BinCounts
    mpp: float
    shape: tuple[int, int]
    previews: Mapping[str, Preview]
    seed: int


class SectionLayout(Protocol):
    """The files of one platform. Image and truth are the same in every layout and are written by `simulate_section`."""

    name: ClassVar[str]
    """Name of the layout; set by `layouts.register`."""
    entries: ClassVar[frozenset[str]]
    """Names of the files and folders that `write` creates in the section's folder."""
    previews: ClassVar[Mapping[str, int]]
    """Small copies of the image that `write` needs: their largest side (px), by name."""

    def write(self, folder: Path, section: SimulatedSection) -> None:
        """Write the measurement.

        Parameters
        ----------
        folder
            The section's folder, which holds the image.
        section
            What was simulated.
        """
        ...
