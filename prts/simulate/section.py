"""Simulate a section with known truth, in the layout of Space Ranger or of another platform."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import tifffile

from prts.errors import ParameterError, did_you_mean
from prts.io.cache import atomic
from prts.io.hdf5 import write_h5ad
from prts.io.nuclei import make_nuclei, write_nuclei
from prts.io.outputs import check_out_folder
from prts.progress import track
from prts.simulate.artefacts import ARTEFACT_KINDS, draw_artefacts
from prts.simulate.bins import BINS
from prts.simulate.draw_counts import BinCounts, draw_counts
from prts.simulate.gene_programs import DENSE_ENTRIES, GenePrograms, draw_gene_programs, make_truth, true_rates
from prts.simulate.lattice import make_lattice
from prts.simulate.layouts import DEFAULT_LAYOUT, layouts
from prts.simulate.layouts.base import Preview, SimulatedSection
from prts.simulate.nuclei import SimulatedNuclei, place_nuclei
from prts.simulate.stain import BAND_ROWS, render, shifted_stain
from prts.simulate.tissue import Layout, build_layout

if TYPE_CHECKING:
    import anndata as ad
    from numpy.typing import NDArray

logger = logging.getLogger(__name__)

__all__ = ["BINS", "SimulationSettings", "simulate_section"]

# Written in every layout.
_OWN = {"tissue_image.tif", "truth.h5ad", "truth_nuclei.parquet"}


@dataclass(frozen=True)
class SimulationSettings:
    """Settings of a simulated section.

    Parameters
    ----------
    cells
        Number of nuclei, at least 50; it determines the area of the tissue (about 270 um2 per nucleus).
    genes
        Number of genes, at least 50. A different number is a different tissue, even with the same `program_seed`.
    seed
        Seed of geometry, nuclei, counts and image.
    mpp
        um per pixel of the image, 0.1 to 1.
    stain
        Shift of stain and scanner from the reference (0), -2 to 2: see `prts.simulate.stain.shifted_stain`.
    tilt_deg
        Angle between rows of bins and rows of pixels, -20 to 20.
    shift_um
        Error (x, y) of the reported positions of the bins.
    diffusion_um
        Standard deviation, per direction, of the distance between origin and capture of a UMI, 0 to 20.
    program_seed
        Seed of the genes and their effects; sections of one tissue share it.
    species
        `human` or `mouse`; decides how mitochondrial genes are spelled.
    name
        Name of the section in `truth.h5ad`; the name of its folder by default.
    artefacts
        Number of folds, and as many blurred patches, bubbles and pen strokes, 0 to 100. `truth.obs["artefact"]` marks affected nuclei.
    stripes
        Standard deviation of the log of what rows and columns of bins capture, 0 to 1: an effect of the array, drawn from `seed`.
    layout
        Platform whose files are written: `visium_hd` (Space Ranger 3), `spaceranger4`, `xenium`, or another name in
        `prts.simulate.layouts.layouts`. Image and truth do not depend on it.

    Raises
    ------
    ParameterError
        If a value is out of range.
    """

    cells: int = 2000
    genes: int = 1000
    seed: int = 0
    mpp: float = 0.5
    stain: float = 0.0
    tilt_deg: float = 1.3
    shift_um: tuple[float, float] = (0.0, 0.0)
    diffusion_um: float = 1.0
    program_seed: int = 0
    species: str = "human"
    name: str | None = None
    artefacts: int = 0
    stripes: float = 0.0
    layout: str = DEFAULT_LAYOUT

    def __post_init__(self) -> None:
        whole = {"cells": (50, 10**7), "genes": (50, 10**6), "artefacts": (0, 100)}
        whole |= dict.fromkeys(("seed", "program_seed"), (0, 2**63))
        real = {"mpp": (0.1, 1.0), "stain": (-2.0, 2.0), "tilt_deg": (-20.0, 20.0), "diffusion_um": (0.0, 20.0)}
        real["stripes"] = (0.0, 1.0)
        for key, (low, high) in whole.items():
            value = getattr(self, key)
            if isinstance(value, bool) or not isinstance(value, Integral) or not low <= int(value) <= high:
                raise ParameterError("", key, f"{value!r} is not valid; give a whole number of at least {low}")
            object.__setattr__(self, key, int(value))
        for key, limits in real.items():
            object.__setattr__(self, key, _real(key, getattr(self, key), *limits))
        if not isinstance(self.shift_um, list | tuple) or len(self.shift_um) != 2:
            raise ParameterError("", "shift_um", f"{self.shift_um!r} is not valid; give [x, y] in um")
        object.__setattr__(self, "shift_um", tuple(_real("shift_um", value, -1000, 1000) for value in self.shift_um))
        if self.species not in ("human", "mouse"):
            raise ParameterError("", "species", f"{self.species!r} is not supported; choose human or mouse")
        if self.layout not in layouts:
            known = layouts.names()
            hint = did_you_mean(str(self.layout), known)
            raise ParameterError("", "layout", f"{self.layout!r} is not known{hint}; choose {' or '.join(known)}")


def _real(name: str, value: object, low: float, high: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise ParameterError("", name, f"{value!r} is not valid; give a number from {low:g} to {high:g}")
    return float(value)


def simulate_section(out: Path, settings: SimulationSettings | None = None, **keywords: Any) -> Path:
    """Simulate a section of a tissue; the same settings give the same bytes.

    `truth.h5ad` contains the nuclei (type, domain, depth, area, position), the genes, and the factors of their rates, which
    `prts.simulate.gene_programs.true_rates` multiplies. Up to 20 million nuclei x genes it also contains the rates (X) and what a
    perfect reader of the image would expect (`layers["image_rate"]`). `truth_nuclei.parquet` contains the outlines.

    Parameters
    ----------
    out
        Folder to write; an earlier simulated section there is replaced.
    settings
        Settings of the section; the defaults if omitted.
    **keywords
        Fields of `SimulationSettings`, instead of `settings`.

    Returns
    -------
    `out`.

    Raises
    ------
    InputError
        If a value is out of range, or `out` contains files that do not belong to a simulated section.

    Examples
    --------
    >>> import tempfile
    >>> folder = simulate_section(Path(tempfile.mkdtemp()) / "section", cells=50, genes=50)
    >>> sorted(path.name for path in folder.iterdir())
    ['binned_outputs', 'tissue_image.tif', 'truth.h5ad', 'truth_nuclei.parquet']
    """
    if settings is not None and keywords:
        raise TypeError("settings and keywords are mutually exclusive")
    given = settings or SimulationSettings(**keywords)
    folder = Path(out).resolve()
    _refuse_foreign(folder)

    rngs = [np.random.default_rng([given.seed, stream]) for stream in range(5)]
    tissue = build_layout(given.cells, rngs[0])
    nuclei = place_nuclei(tissue, given.cells, rngs[1])
    outlines = make_nuclei(
        nuclei.polygons(given.mpp),
        given.mpp,
        cell_id=_cell_ids(given.cells),
        score=np.ones(given.cells),
        source="simulated nuclei",
    )
    programs = draw_gene_programs(given.genes, species=given.species, program_seed=given.program_seed)
    truth = make_truth(nuclei, outlines, programs, rngs[2])
    lattice = make_lattice(tissue, given.tilt_deg, given.shift_um)
    capture = _capture(lattice.n_rows, lattice.n_cols, given)
    counts = draw_counts(tissue, nuclei, truth, lattice, given.diffusion_um, rngs[3], capture)
    shape = (math.ceil(tissue.height_um / given.mpp), math.ceil(tissue.width_um / given.mpp))
    _annotate(truth, nuclei, programs, counts, _parameters(given, folder))

    layout = layouts[given.layout]()
    with atomic(folder) as temporary:
        temporary.mkdir()
        bands = _render(tissue, nuclei, truth, shape, given, rngs[4])
        previews = _write_image(temporary / "tissue_image.tif", bands, shape, given.mpp, layout.previews)
        layout.write(
            temporary,
            SimulatedSection(truth, outlines, lattice, counts, given.mpp, shape, previews, given.seed),
        )
        write_nuclei(outlines, temporary / "truth_nuclei.parquet")
        write_h5ad(truth, temporary / "truth.h5ad")
    logger.info(
        "%s: %s nuclei, %s genes, %s UMIs in %s bins, image of %d x %d px at %g um/px",
        *(out, f"{given.cells:,}", f"{given.genes:,}", f"{counts.umi_drawn - counts.umi_lost:,}"),
        *(f"{counts.counts.shape[0]:,}", shape[1], shape[0], given.mpp),
    )
    return Path(out)


def _parameters(settings: SimulationSettings, folder: Path) -> dict[str, Any]:
    """The settings as `truth.h5ad` records them."""
    parameters = asdict(settings)
    parameters["name"] = folder.name if settings.name is None else str(settings.name)
    del parameters["layout"]  # the truth is the same in all
    if not settings.artefacts:  # sections without artifacts keep the bytes they had before artifacts existed
        del parameters["artefacts"]
    if not settings.stripes:
        del parameters["stripes"]
    return parameters


def _capture(
    n_rows: int, n_cols: int, settings: SimulationSettings
) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
    """Relative capture of rows and columns; None if all are alike."""
    if not settings.stripes:
        return None
    rng = np.random.default_rng([settings.seed, 6])
    row, col = (np.exp(settings.stripes * rng.standard_normal(n)) for n in (n_rows, n_cols))
    return row / row.max(), col / col.max()


def _refuse_foreign(out: Path) -> None:
    """Replace only simulated sections, never files of the user."""
    check_out_folder(out, "the section")
    if out == Path.cwd():
        raise ParameterError("", "out", f"{out} is the current folder; give a new folder")
    held = {path.name for path in out.iterdir()} if out.is_dir() else set()
    own = _OWN.union(*(layouts[name].entries for name in layouts.names()))
    if held and ("truth.h5ad" not in held or held - own):
        foreign = min(held - own, default=min(held))
        raise ParameterError(
            "", "out", f"{out} contains {foreign}, which is not part of a simulated section; choose another folder"
        )


def _render(
    layout: Layout,
    nuclei: SimulatedNuclei,
    truth: ad.AnnData,
    shape: tuple[int, int],
    settings: SimulationSettings,
    rng: np.random.Generator,
) -> Iterable[NDArray[np.uint8]]:
    """Bands of the image; artifacts are drawn onto the whole image and noted in `truth`."""
    bands = render(layout, nuclei, shape, settings.mpp, shifted_stain(settings.stain), rng)
    if not settings.artefacts:
        return bands
    whole = np.concatenate(list(bands))
    kind = draw_artefacts(whole, settings.mpp, settings.artefacts, np.random.default_rng([settings.seed, 5]))
    col, row = (truth.obsm["spatial"].astype(int) - (truth.obsm["spatial"] == shape[::-1])).T
    truth.obs["artefact"] = pd.Categorical(np.array(ARTEFACT_KINDS)[kind[row, col]], categories=list(ARTEFACT_KINDS))
    return (whole[top : top + BAND_ROWS] for top in range(0, shape[0], BAND_ROWS))


def _cell_ids(n: int) -> NDArray[np.object_]:
    return np.char.mod("nucleus_%06d", np.arange(1, n + 1)).astype(object)


def _annotate(
    truth: ad.AnnData, nuclei: SimulatedNuclei, programs: GenePrograms, counts: BinCounts, parameters: dict[str, Any]
) -> None:
    """Add positions, markers and parameters, and the rates unless there are too many."""
    mpp = parameters["mpp"]
    truth.obsm["spatial"] = nuclei.xy_um / mpp
    truth.uns["markers"] = {kind: np.array(names, dtype=object) for kind, names in programs.markers().items()}
    truth.uns["prts"] = {
        "parameters": {
            key: np.array(value) if isinstance(value, tuple) else value for key, value in parameters.items()
        },
        "umi_drawn": counts.umi_drawn,
        "umi_lost": counts.umi_lost,
    }
    if truth.n_obs * truth.n_vars <= DENSE_ENTRIES:
        truth.X = true_rates(truth)
        truth.layers["image_rate"] = true_rates(truth, image=True)


def _write_image(
    path: Path, bands: Iterable[NDArray[np.uint8]], shape: tuple[int, int], mpp: float, sides: Mapping[str, int]
) -> dict[str, Preview]:
    """Write the full-resolution TIFF tile by tile as it is rendered, and return small copies of these largest sides (px)."""
    scales = {name: min(1.0, side / max(shape)) for name, side in sides.items()}
    sums = {
        # as many rows and columns as the centers of pixels fall into
        name: np.zeros((*(int((side - 0.5) * scale) + 1 for side in shape), 4), np.float64 if scale < 1 else np.float32)
        for name, scale in scales.items()
    }

    def tiles() -> Iterator[NDArray[np.uint8]]:
        for number, band in enumerate(track(bands, "image", total=math.ceil(shape[0] / BAND_ROWS))):
            for name, scale in scales.items():
                _add_small(sums[name], band, number * BAND_ROWS, scale)
            whole = np.pad(band, ((0, BAND_ROWS - band.shape[0]), (0, -band.shape[1] % BAND_ROWS), (0, 0)), mode="edge")
            yield from (np.ascontiguousarray(whole[:, x : x + BAND_ROWS]) for x in range(0, whole.shape[1], BAND_ROWS))

    per_cm = (10_000 / mpp, 10_000 / mpp)
    with tifffile.TiffWriter(path, bigtiff=shape[0] * shape[1] > 10**9) as tif:
        tif.write(
            tiles(),
            shape=(*shape, 3),
            dtype=np.uint8,
            tile=(BAND_ROWS, BAND_ROWS),
            photometric="rgb",
            compression="jpeg",
            compressionargs={"level": 90},
            resolution=per_cm,
            resolutionunit="CENTIMETER",
            metadata=None,
            software="prts",
        )
    return {
        name: Preview(np.rint(total[..., :3] / total[..., 3:]).astype(np.uint8), scales[name])
        for name, total in sums.items()
    }


def _add_small(total: NDArray[np.floating[Any]], band: NDArray[np.uint8], top: int, scale: float) -> None:
    """Add a band to the pixel sums of a small image; the last channel counts pixels."""
    rows = ((np.arange(band.shape[0]) + top + 0.5) * scale).astype(np.intp)
    cols = ((np.arange(band.shape[1]) + 0.5) * scale).astype(np.intp)
    row_at, col_at = (np.flatnonzero(np.diff(a, prepend=-1)) for a in (rows, cols))
    part = slice(rows[0], rows[0] + len(row_at))
    total[part, :, :3] += np.add.reduceat(np.add.reduceat(band, row_at, axis=0, dtype=np.float64), col_at, axis=1)
    total[part, :, 3] += np.outer(np.diff(row_at, append=len(rows)), np.diff(col_at, append=len(cols)))
