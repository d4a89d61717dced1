"""Rank encoders on one's own section: ridge on the features of some of its units, with what each costs."""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from prts.api.plan import common_species
from prts.data.nucleus_set import NucleusSet
from prts.data.prepare import prepare_nuclei
from prts.data.splits import TRAIN, VAL, Blocks, Roles
from prts.errors import InputError
from prts.evaluation.bootstrap import block_sums, mean_pcc_interval, spatial_blocks
from prts.io.cache import default_cache
from prts.io.nuclei import load_nuclei
from prts.models.ridge import ridge
from prts.preprocess.counts import QCSettings, measured_counts
from prts.preprocess.panel import TopPanel
from prts.stopwatch import peak_rss_mb

if TYPE_CHECKING:
    import pandas as pd
    from geopandas import GeoDataFrame

    from prts.features.encoders import Encoder
    from prts.section import Section
    from prts.segmentation.segment import Segmenter

logger = logging.getLogger(__name__)

_FEWEST = 50


@dataclass(frozen=True)
class BenchSettings:
    """What encoders are compared on.

    Parameters
    ----------
    units
        Nuclei or bins to read, chosen at random among those that pass quality control.
    genes
        Number of most variable genes.
    qc
        Limits of quality control; the paper's if None.
    seed
        Seed of the choice of units.
    """

    units: int = 1000
    genes: int = 300
    qc: QCSettings | None = None
    seed: int = 0


class _Read(NamedTuple):
    """Features of the units, and what they cost."""

    features: Path
    cpu_seconds: float
    peak_mb: float


def bench_encoders(
    encoders: Mapping[str, Encoder],
    section: Section,
    segmenter: Segmenter | None = None,
    *,
    prefer_given: bool = True,
    settings: BenchSettings | None = None,
    cache_dir: Path | str | None = None,
) -> pd.DataFrame:
    """Compare encoders by ridge regression on one section.

    A fifth of the section, apart from the rest by a guard band, is for validation. The same units, genes and split serve all encoders, and
    each runs in a process of its own. The penalty of ridge is the best of 13 on validation, so figures are slightly high, for all alike.

    Parameters
    ----------
    encoders
        Encoders by the name of their row.
    section
        A section with measured counts.
    segmenter
        Finds nuclei, or takes bins; None for the section's own nuclei.
    prefer_given
        Use the section's own nuclei, if it has some.
    settings
        Units and genes.
    cache_dir
        Folder of the cache, where nuclei are kept; None: `$PRTS_CACHE`, else `cache`. Features are extracted anew, to time them.

    Returns
    -------
    One row per encoder, the best first: `encoder`, `pcc` (mean validation PCC of log1p UMI), `low` and `high` (95% interval over resampled
    blocks of tissue), `width` of the features, `cpu_seconds` per 1,000 units, `peak_mb`.

    Raises
    ------
    InputError
        If the section has no counts or too few units, or an encoder's weights are missing.

    Examples
    --------
    >>> import prts
    >>> from prts.api.bench import BenchSettings, bench_encoders
    >>> section = prts.read_visium_hd(demo_section)
    >>> found = bench_encoders({"classical": prts.encoders.classical()}, section, settings=BenchSettings(units=100))  # doctest: +SKIP
    """
    settings = settings or BenchSettings()
    for encoder in encoders.values():
        encoder.settings()  # reads its weights, so that a missing file is reported before any work
    species = common_species([section])
    everywhere = load_nuclei(
        prepare_nuclei(default_cache(cache_dir) / "bench" / section.name, section, segmenter, prefer_given)
    )
    counts = measured_counts(section, everywhere, species=species, qc=settings.qc)
    some = np.sort(np.random.default_rng(settings.seed).permutation(counts.n_obs)[: settings.units])
    counts = counts[some].copy()
    xy_um = counts.obsm["spatial"] * section.mpp
    # nothing is held out for testing: an empty section has that role
    parts = Blocks()({section.name: xy_um, "": np.empty((0, 2))}, Roles([section.name], [], [""]))[section.name]
    train, val = parts == TRAIN, parts == VAL
    if min(train.sum(), val.sum()) < _FEWEST:
        raise InputError(
            f"section {section.name}: {train.sum()} units for training and {val.sum()} for validation are too few to compare encoders; "
            "read more units, or give a larger section"
        )
    panel = TopPanel(n_genes=settings.genes)([counts[train].copy()])
    measured = panel.align(counts)
    units = everywhere.set_index("cell_id").loc[counts.obs_names].reset_index(names="cell_id")
    blocks, _ = spatial_blocks(xy_um[val])
    rows = []
    for name, encoder in encoders.items():
        read = _in_own_process(encoder, section, units)
        features = np.load(read.features)
        read.features.unlink()
        nuclei = NucleusSet(
            section.name,
            counts.obs_names.to_numpy(object),
            xy_um,
            features,
            measured,
            counts.obs["total_counts"].to_numpy(),
            counts.obs["area_um2"].to_numpy(),
        )
        training, validation = nuclei.take(train), nuclei.take(val)
        fitted = ridge([training], [validation], name=name)
        sums = block_sums(validation.counts, fitted.predict(validation.features), blocks)
        low, high = mean_pcc_interval(sums)
        pcc = float(sums.mean_pcc(np.ones((1, len(sums.n))))[0])
        rows.append((name, pcc, low, high, features.shape[1], 1000 * read.cpu_seconds / len(units), read.peak_mb))
        logger.info("%s: validation PCC %.4f", name, pcc)
    return _ranked(rows)


def _ranked(rows: list[tuple[Any, ...]]) -> pd.DataFrame:
    import pandas as pd

    table = pd.DataFrame(rows, columns=["encoder", "pcc", "low", "high", "width", "cpu_seconds", "peak_mb"])
    return table.sort_values("pcc", ascending=False, kind="stable", ignore_index=True)


def _in_own_process(encoder: Encoder, section: Section, units: GeoDataFrame) -> _Read:
    """Extract in a new process, whose memory is the encoder's alone."""
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_extract, encoder, section, units).result()


def _extract(encoder: Encoder, section: Section, units: GeoDataFrame) -> _Read:
    from prts.features.extract import extract
    from prts.features.store import read_features

    encoder.load()
    start = time.process_time()
    with tempfile.TemporaryDirectory(prefix="prts-") as folder:
        path = Path(folder) / "features.h5"
        with section.open_slide() as slide:
            extract(slide, units, encoder, path)
        seconds = time.process_time() - start
        features = read_features(path, units["cell_id"].to_numpy())
    with tempfile.NamedTemporaryFile(suffix=".npy", delete=False) as file:
        np.save(file, features)
    return _Read(Path(file.name), seconds, _peak_mb())


def _peak_mb() -> float:
    """Peak memory since this program started; on Linux, getrusage also counts what the parent held when it forked."""
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1e3
    return peak_rss_mb()
