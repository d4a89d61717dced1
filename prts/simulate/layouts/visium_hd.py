"""The 2 um bins of Visium HD, as Space Ranger 3 delivers them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from prts.simulate.bins import BINS, write_bins, write_previews
from prts.simulate.layouts import layouts

if TYPE_CHECKING:
    from pathlib import Path

    from prts.simulate.layouts.base import SimulatedSection


@layouts.register("visium_hd")
class VisiumHDLayout:
    """`binned_outputs/square_002um` beside the image."""

    name: ClassVar[str]
    entries: ClassVar[frozenset[str]] = frozenset({"binned_outputs"})
    previews: ClassVar[Mapping[str, int]] = {"lowres": 600}

    def write(self, folder: Path, section: SimulatedSection) -> None:
        """Write matrix, positions, scale factors and the small image."""
        lowres = section.previews["lowres"].scale
        bins = folder / BINS
        write_bins(bins, section.lattice, section.counts, section.truth, section.mpp, section.shape, lowres)
        write_previews(bins / "spatial", section.previews)
