"""What a platform has to offer: counts per nucleus, the identity of its files, and checks against the image.

To add a platform, write one module with a class that follows `Measurement` and register it:

    @platforms.register("my_platform")
    class MyPlatform:
        def __init__(self, cells: Path | str) -> None: ...

and a tissue config whose sections say `platform: my_platform` and give the constructor's arguments (`cells: ...`). Abilities that
only some platforms have are protocols of their own, such as `Registrable`, and are looked for with `isinstance`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self, runtime_checkable

import numpy as np
import pandas as pd
import shapely

if TYPE_CHECKING:
    import geopandas as gpd
    import scipy.sparse as sp
    from anndata import AnnData
    from numpy.typing import NDArray

    from prts.io.mpp import MppSource
    from prts.platforms.array_effects import ArrayEffects
    from prts.platforms.bin_owners import CountSettings

WARN_UM = 2.0
"""Displacement beyond which transcripts of one nucleus are counted for its neighbor or for none."""

CONFIDENT = 8.0
"""Height of the registration peak, in spreads of its background, from which it is trusted: peaks of pure noise reach 4 to 5."""


class Measurement(Protocol):
    """The expression that one platform measured in one section.

    Creating a measurement must not read files: a missing file is reported when the section is opened.
    """

    name: ClassVar[str]
    """Name of the platform; set by `platforms.register`."""

    @property
    def path(self) -> Path:
        """The file or folder that messages name."""
        ...

    @property
    def files(self) -> Mapping[str, Path]:
        """The files that are read, by a short name; recorded in the provenance of models."""
        ...

    @classmethod
    def find(cls, folder: Path) -> Self | None:
        """The measurement in a section's folder, or None if the platform's files are not there."""
        ...

    def identity(self) -> dict[str, Any]:
        """Everything that decides the counts apart from the nuclei, JSON-like: file identities and settings.

        Part of the fingerprint of cached counts, so the keys must not be `version`, `nuclei`, `qc`, `species`, `registered` or
        `counting`.
        """
        ...

    def mpp_sources(self) -> list[MppSource]:
        """What the files say about the um/px of the full-resolution image; may be empty."""
        ...

    def genes(self) -> pd.DataFrame:
        """The measured genes without their counts: `gene_id` (unique) and `symbol`, indexed by a unique name, (n_genes,)."""
        ...

    def check(self, image: Path, width: int, height: int, mpp: MppSource) -> None:
        """Check that the measurement belongs to an image.

        Parameters
        ----------
        image
            The image file, for messages.
        width, height
            Its size in full-resolution pixels.
        mpp
            Its um/px, and the source of the value.

        Raises
        ------
        InputError
            If a file is missing or damaged, or belongs to another image.
        """
        ...

    def counts(self, nuclei: gpd.GeoDataFrame, *, registration: Registration | None = None) -> AnnData:
        """Count the transcripts of each nucleus.

        Parameters
        ----------
        nuclei
            Nuclei with `cell_id`, `geometry` in full-resolution pixels and `area_um2`, (n_nuclei,).
        registration
            Shift and rotation to take back before counting, from `Registrable.register`.

        Returns
        -------
        Raw counts of all nuclei and all genes, as `counts_table` returns them.

        Raises
        ------
        InputError
            If a file is damaged or no nucleus receives a transcript.
        """
        ...


@runtime_checkable
class Registrable(Protocol):
    """A measurement whose shift against the nuclei can be measured."""

    def register(self, nuclei: gpd.GeoDataFrame, mpp: float) -> Registration:
        """Measure the shift between the measured positions and the nuclei.

        Parameters
        ----------
        nuclei
            Nuclei in full-resolution pixels, (n_nuclei,).
        mpp
            um per full-resolution pixel.
        """
        ...


@runtime_checkable
class HasUnits(Protocol):
    """A measurement in regular bins, which can be the units in place of nuclei."""

    @property
    def bin_um(self) -> int | None:
        """Side of the bins that are the units, um; None if the measurement counts nuclei."""
        ...

    def with_units(self, bin_um: int) -> Self:
        """The same measurement with its bins of this size as units.

        Raises
        ------
        InputError
            If it has none of this size.
        """
        ...

    def units(self, mpp: float) -> gpd.GeoDataFrame:
        """All measured bins as squares, in the columns of nuclei: `cell_id` is the barcode, `geometry` in full-resolution pixels.

        Parameters
        ----------
        mpp
            um per full-resolution pixel.
        """
        ...


@runtime_checkable
class CountsBins(Protocol):
    """A measurement in bins so small that it is a matter of choice which of them are counted for a nucleus."""

    def counts_by(
        self, nuclei: gpd.GeoDataFrame, counting: CountSettings, *, registration: Registration | None = None
    ) -> AnnData:
        """Count the transcripts of each nucleus as in `Measurement.counts`, with another choice of bins.

        Parameters
        ----------
        nuclei, registration
            As for `Measurement.counts`.
        counting
            How far nuclei grow, and what happens to bins in several.
        """
        ...

    def exposure(
        self, nuclei: gpd.GeoDataFrame, counting: CountSettings, *, registration: Registration | None = None
    ) -> tuple[NDArray[np.float64], ArrayEffects]:
        """How much the bins of each nucleus capture relative to the others of the array.

        Parameters
        ----------
        nuclei, counting, registration
            As for `counts_by`.

        Returns
        -------
        exposure
            (n_nuclei,), around 1; all 1 if the effects of rows and columns do not explain bins that they were not fitted on.
        effects
            These effects.
        """
        ...

    def write_bin_table(
        self,
        path: Path,
        nuclei: gpd.GeoDataFrame,
        counting: CountSettings,
        *,
        registration: Registration | None = None,
    ) -> None:
        """Write which bins are counted for which nucleus, in the columns of Space Ranger's `barcode_mappings.parquet`.

        Parameters
        ----------
        path
            The file.
        nuclei, counting, registration
            As for `counts_by`.
        """
        ...


@runtime_checkable
class HasOutlines(Protocol):
    """A measurement of cells or nuclei that its files outline: these are a section's nuclei unless others are given.

    Its `mpp_sources` are used only if nothing else states the um/px; `check` compares them, and says what is wrong with a registration.
    """

    def outlines(self, mpp: float) -> gpd.GeoDataFrame:
        """The cells or nuclei that were counted, in the columns of nuclei: `geometry` in full-resolution pixels.

        Parameters
        ----------
        mpp
            um per full-resolution pixel.

        Raises
        ------
        InputError
            If a file is damaged.
        """
        ...


@runtime_checkable
class HasImage(Protocol):
    """A measurement whose files may include the H&E image, which is the section's unless another is given."""

    def own_image(self) -> Path:
        """The image.

        Raises
        ------
        InputError
            If there is none.
        """
        ...


@dataclass(frozen=True)
class Registration:
    """The displacement of the measured positions against the nuclei.

    Attributes
    ----------
    measured
        Whether the correlation has a clear peak; the next four are 0 if not.
    shift_x_um, shift_y_um
        Error of the measured positions in the middle of the tissue: to the right, and down.
    rotation_deg
        Their rotation about it, clockwise as the image is displayed.
    displacement_um
        Root mean square distance between recorded and true positions over the tissue.
    confidence
        Height of the peak over the spread of the background.
    peak
        Height of the peak, the correlation of UMIs and nuclei.
    centre_x_px, centre_y_px
        Recorded position of the middle of the tissue, in full-resolution pixels.
    mpp
        um per full-resolution pixel.
    """

    measured: bool
    shift_x_um: float
    shift_y_um: float
    rotation_deg: float
    displacement_um: float
    confidence: float
    peak: float
    centre_x_px: float
    centre_y_px: float
    mpp: float

    @classmethod
    def from_report(cls, report: Mapping[str, Any]) -> Registration:
        """The registration that `report` described, also after it was read from a file."""
        return cls(**{key.name: np.asarray(report[key.name]).item() for key in fields(cls)})

    @property
    def shift_um(self) -> float:
        """Length of the shift."""
        return math.hypot(self.shift_x_um, self.shift_y_um)

    def report(self) -> dict[str, Any]:
        """All figures, for `uns` and metrics."""
        return {**asdict(self), "shift_um": self.shift_um}

    def sentence(self) -> str:
        """The result in words."""
        if not self.measured:
            return (
                "the shift between counts and nuclei cannot be measured: UMIs are not denser in nuclei than around them "
                f"(peak {self.confidence:.1f} spreads over the background, {CONFIDENT:g} are needed)"
            )
        return (
            f"counts are {self.shift_um:.2f} um off the nuclei (x {self.shift_x_um:+.2f}, y {self.shift_y_um:+.2f}, rotated "
            f"{self.rotation_deg:+.3f} degrees; {self.displacement_um:.2f} um over the tissue; confidence {self.confidence:.0f})"
        )


def counts_table(
    X: sp.csr_matrix, nuclei: gpd.GeoDataFrame, var: pd.DataFrame, report: Mapping[str, Any] | None = None
) -> AnnData:
    """Counts per nucleus in the form that `Measurement.counts` returns.

    Parameters
    ----------
    X
        UMI counts without explicit zeros, CSR int32 (n_nuclei, n_genes).
    nuclei
        The nuclei, in the order of the rows.
    var
        Genes with `gene_id` (unique) and `symbol`, indexed by a unique name, (n_genes,).
    report
        Figures of the counting, such as how many UMIs were outside all nuclei.

    Returns
    -------
    `obs_names` = cell_id; obs `area_um2`; `obsm["spatial"]` centroids in full-resolution pixels; `report` in `uns["prts"]`.
    """
    from anndata import AnnData

    obs = pd.DataFrame(
        {"area_um2": nuclei["area_um2"].to_numpy(dtype=np.float64)},
        index=pd.Index(nuclei["cell_id"].to_numpy(dtype=object), name="cell_id"),
    )
    centroids = shapely.get_coordinates(shapely.centroid(np.asarray(nuclei.geometry.array, dtype=object)))
    return AnnData(
        X, obs=obs, var=var, obsm={"spatial": centroids}, uns={"prts": {"n_nuclei": len(obs), **(report or {})}}
    )
