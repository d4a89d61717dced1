"""One simulated section, written as 10x lays out a real one, with its truth beside it."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import tifffile
from PIL import Image

from prts.errors import InputError
from prts.io.cache import atomic
from prts.io.hdf5 import write_h5ad
from prts.io.nuclei import make_nuclei, write_nuclei
from prts.progress import track
from prts.simulate.artefacts import KINDS as PLANTED
from prts.simulate.artefacts import plant
from prts.simulate.bins import make_lattice, write_bins
from prts.simulate.draw_counts import BinCounts, draw_counts
from prts.simulate.gene_programs import DENSE_ENTRIES, Programme, make_programme, make_truth, true_rates
from prts.simulate.nuclei import Nuclei, place_nuclei
from prts.simulate.stain import BAND, render, shifted_stain
from prts.simulate.tissue import build_layout

if TYPE_CHECKING:
    import anndata as ad
    from numpy.typing import NDArray

logger = logging.getLogger(__name__)

BINS = Path("binned_outputs/square_002um")
_OWN = {"tissue_image.tif", "binned_outputs", "truth.h5ad", "truth_nuclei.parquet"}
_LOWRES_PX = 600


def simulate_section(
    out: Path,
    *,
    cells: int = 2000,
    genes: int = 1000,
    seed: int = 0,
    mpp: float = 0.5,
    name: str | None = None,
    stain: float = 0.0,
    tilt_deg: float = 1.3,
    shift_um: Sequence[float] = (0.0, 0.0),
    diffusion_um: float = 1.0,
    species: str = "human",
    program_seed: int = 0,
    artefacts: int = 0,
) -> Path:
    """Simulate a section of a tissue; the same arguments give the same bytes.

    `truth.h5ad` holds the nuclei (type, domain, depth, area, position) and genes with the factors of their rates, which
    `prts.simulate.gene_programs.true_rates` multiplies out; in a section of up to 20 million nuclei x genes also the rates
    themselves: X, and `layers["image_rate"]`, what a perfect reader of the image expects. `truth_nuclei.parquet` holds the outlines.

    Parameters
    ----------
    out
        The folder to write; an earlier simulated section there is replaced.
    cells
        Number of nuclei, at least 50; the tissue's area follows (about 270 um2 a nucleus).
    genes
        Number of genes, at least 50. Another number is another tissue, also for the same `program_seed`.
    seed
        Of geometry, nuclei, counts and image.
    mpp
        um per pixel of the image, 0.1 to 1.
    name
        Of the section, kept in `truth.h5ad`; the folder's name if left out.
    stain
        Shift of the stain and the scanner from the reference (0), from -2 to 2: see `prts.simulate.stain.shifted_stain`.
    tilt_deg
        Angle between the bins' rows and the image's, -20 to 20.
    shift_um
        x and y by which the bins' reported positions are off.
    diffusion_um
        Standard deviation of a UMI's way to its bin, per direction, 0 to 20.
    species
        `human` or `mouse`: spelling of the mitochondrial genes.
    program_seed
        Of the genes and what drives them: sections that are to be one tissue share it.
    artefacts
        Number of folds, blurred patches, bubbles and pen strokes each, 0 to 100; the nuclei in them are marked in `truth.obs["artefact"]`.

    Returns
    -------
    `out`.

    Raises
    ------
    InputError
        If an argument makes no sense, or `out` holds anything but a simulated section.
    """
    folder = Path(out).resolve()
    parameters: dict[str, Any] = {
        "cells": _whole("cells", cells, 50, 10**7),
        "genes": _whole("genes", genes, 50, 10**6),
        "seed": _whole("seed", seed, 0, 2**63),
        "mpp": _real("mpp", mpp, 0.1, 1.0),
        "stain": _real("stain", stain, -2.0, 2.0),
        "tilt_deg": _real("tilt_deg", tilt_deg, -20.0, 20.0),
        "shift_um": _pair("shift_um", shift_um),
        "diffusion_um": _real("diffusion_um", diffusion_um, 0.0, 20.0),
        "program_seed": _whole("program_seed", program_seed, 0, 2**63),
        "species": species,
        "name": folder.name if name is None else str(name),
    }
    if _whole("artefacts", artefacts, 0, 100):
        parameters["artefacts"] = (
            artefacts  # left out of a section without, whose bytes stay what they were before there were any
        )
    if species not in ("human", "mouse"):
        raise InputError(f"species: {species!r} is neither human nor mouse")
    _refuse_foreign(folder)

    layout_rng, nuclei_rng, cells_rng, umi_rng, image_rng = (
        np.random.default_rng([seed, stream]) for stream in range(5)
    )
    layout = build_layout(cells, layout_rng)
    nuclei = place_nuclei(layout, cells, nuclei_rng)
    outlines = make_nuclei(
        nuclei.polygons(mpp), mpp, cell_id=_cell_ids(cells), score=np.ones(cells), source="simulated nuclei"
    )
    programme = make_programme(genes, species=species, program_seed=program_seed)
    truth = make_truth(nuclei, outlines, programme, cells_rng)
    lattice = make_lattice(layout, tilt_deg, parameters["shift_um"])
    counts = draw_counts(layout, nuclei, truth, lattice, diffusion_um, umi_rng)
    shape = (math.ceil(layout.height_um / mpp), math.ceil(layout.width_um / mpp))
    _annotate(truth, nuclei, programme, counts, parameters)

    with atomic(folder) as temporary:
        lowres = min(1.0, _LOWRES_PX / max(shape))
        write_bins(temporary / BINS, lattice, counts, truth, mpp, shape, lowres)
        bands = render(layout, nuclei, shape, mpp, shifted_stain(stain), image_rng)
        if artefacts:
            whole = np.concatenate(list(bands))
            kind = plant(whole, mpp, artefacts, np.random.default_rng([seed, 5]))
            col, row = (truth.obsm["spatial"].astype(int) - (truth.obsm["spatial"] == shape[::-1])).T
            truth.obs["artefact"] = pd.Categorical(np.array(PLANTED)[kind[row, col]], categories=list(PLANTED))
            bands = (whole[top : top + BAND] for top in range(0, shape[0], BAND))
        _write_image(temporary, bands, shape, mpp, lowres)
        write_nuclei(outlines, temporary / "truth_nuclei.parquet")
        write_h5ad(truth, temporary / "truth.h5ad")
    logger.info(
        "%s: %s nuclei, %s genes, %s UMIs in %s bins, image %d x %d px of %g um",
        *(out, f"{cells:,}", f"{genes:,}", f"{counts.umi_drawn - counts.umi_lost:,}", f"{counts.counts.shape[0]:,}"),
        *(shape[1], shape[0], mpp),
    )
    return Path(out)


def _whole(name: str, value: object, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral) or not low <= int(value) <= high:
        raise InputError(f"{name}: {value!r} is no whole number of at least {low}")
    return int(value)


def _real(name: str, value: object, low: float, high: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise InputError(f"{name}: {value!r} is no number from {low:g} to {high:g}")
    return float(value)


def _pair(name: str, value: object) -> tuple[float, float]:
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise InputError(f"{name}: {value!r} is not [x, y] in um")
    return _real(name, value[0], -1000, 1000), _real(name, value[1], -1000, 1000)


def _refuse_foreign(out: Path) -> None:
    """Only a simulated section may be replaced: nothing that somebody put there himself."""
    if out.exists() and not out.is_dir():
        raise InputError(f"out: {out} is a file; a folder is written: choose another name")
    if out == Path.cwd():
        raise InputError(f"out: {out} is the current folder; name a folder to make")
    held = {path.name for path in out.iterdir()} if out.is_dir() else set()
    if held and ("truth.h5ad" not in held or held - _OWN):
        foreign = min(held - _OWN, default=min(held))
        raise InputError(
            f"out: {out} holds {foreign}, which is not of a simulated section: choose another folder or empty it"
        )


def _cell_ids(n: int) -> NDArray[np.object_]:
    return np.char.mod("nucleus_%06d", np.arange(1, n + 1)).astype(object)


def _annotate(
    truth: ad.AnnData, nuclei: Nuclei, programme: Programme, counts: BinCounts, parameters: dict[str, Any]
) -> None:
    """Positions, markers, parameters; the rates where they are not too many."""
    mpp = parameters["mpp"]
    truth.obsm["spatial"] = nuclei.xy_um / mpp
    truth.uns["markers"] = {kind: np.array(names, dtype=object) for kind, names in programme.markers().items()}
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
    folder: Path, bands: Iterable[NDArray[np.uint8]], shape: tuple[int, int], mpp: float, lowres: float
) -> None:
    """The full-resolution TIFF, tile by tile as it is rendered, and the small PNG."""
    small = np.zeros((*(math.ceil(side * lowres) for side in shape), 3))
    weight = np.zeros((*small.shape[:2], 1))

    def tiles() -> Iterator[NDArray[np.uint8]]:
        for number, band in enumerate(track(bands, "image", total=math.ceil(shape[0] / BAND))):
            _add_small(small, weight, band, number * BAND, lowres)
            whole = np.pad(band, ((0, BAND - band.shape[0]), (0, -band.shape[1] % BAND), (0, 0)), mode="edge")
            yield from (np.ascontiguousarray(whole[:, x : x + BAND]) for x in range(0, whole.shape[1], BAND))

    per_cm = (10_000 / mpp, 10_000 / mpp)
    with tifffile.TiffWriter(folder / "tissue_image.tif", bigtiff=shape[0] * shape[1] > 10**9) as tif:
        tif.write(
            tiles(),
            shape=(*shape, 3),
            dtype=np.uint8,
            tile=(BAND, BAND),
            photometric="rgb",
            compression="jpeg",
            compressionargs={"level": 90},
            resolution=per_cm,
            resolutionunit="CENTIMETER",
            metadata=None,
            software="prts",
        )
    Image.fromarray(np.rint(small / weight).astype(np.uint8)).save(folder / BINS / "spatial/tissue_lowres_image.png")


def _add_small(
    small: NDArray[np.float64], weight: NDArray[np.float64], band: NDArray[np.uint8], top: int, scale: float
) -> None:
    """Add a band to the sums of the pixels of the small image."""
    rows = ((np.arange(band.shape[0]) + top + 0.5) * scale).astype(np.intp)
    cols = ((np.arange(band.shape[1]) + 0.5) * scale).astype(np.intp)
    row_at, col_at = (np.flatnonzero(np.diff(a, prepend=-1)) for a in (rows, cols))
    sums = np.add.reduceat(np.add.reduceat(band, row_at, axis=0, dtype=np.float64), col_at, axis=1)
    size = np.outer(np.diff(row_at, append=len(rows)), np.diff(col_at, append=len(cols)))
    first = rows[0]
    small[first : first + len(row_at)] += sums
    weight[first : first + len(row_at)] += size[..., None]
