"""What a model loses on a section that is stained, scanned or placed otherwise, as the slides of other laboratories are.

usage: python -m benchmarks.travel bundle=DIR section=DIR [units=4000] [tta=4] [weights=FILE]

Prints a table of the mean PCC of log1p UMI over the genes of the bundle: on the section as it is and on each variant of its image
(benchmarks/variants.py), with the difference and its 95% interval over resampled blocks of tissue, and the mean over the variants.
Units (nuclei, or bins if the model was trained on bins) are those of the unchanged section, and at most `units=` of those that pass quality
control are scored, so that nothing changes but what the model reads. With `tta=4` or `tta=8`, predictions are averaged over orientations
as by `prts predict`. A model that was trained with `data.scale=slide` reads all units of the section, as in prediction.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks.harness import ROOT, Part, child

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from prts.models.bundle import Bundle
    from prts.section import Section

NEEDS_DATA = False
UNITS = 4000


class Row(NamedTuple):
    """The mean PCC on one variant, and what it differs by from that on the unchanged section, with its interval."""

    name: str
    pcc: float
    difference: float
    low: float
    high: float


def run(quick: bool) -> Part:
    """Train the demo and judge it on its test section."""
    part = Part()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "train.py", "tissue=demo", f"hydra.run.dir={folder}/run", "report=false"]
        command += ["trainer.max_epochs=2"] if quick else []
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed: {done.stderr[-2000:]}")
        rows = [Row(*row) for row in child(_test_section, run=f"{folder}/run", units=100 if quick else 1000).result]
    mean, lost = summary(rows)
    part.figures["travel/demo_lost"] = lost
    part.row(
        f"demo, test section: mean PCC over {len(rows) - 1} variants of its image (unchanged: {rows[0].pcc:.3f})",
        f"{mean:.3f}, {lost:.0%} lost",
        keys=["travel/demo_lost"],
    )
    return part


def measure(
    bundle: Bundle,
    section: Section,
    *,
    units: int = UNITS,
    tta: int = 1,
    weights: Path | None = None,
    images: Sequence[str] | None = None,
) -> list[Row]:
    """Score a section as it is, then each variant of its image.

    Parameters
    ----------
    bundle
        The model.
    section
        A section with measured counts, with bins as units if the model was trained on bins.
    units
        Nuclei or bins to score, chosen at random.
    tta
        Orientations over which predictions are averaged: 1, 4 or 8.
    weights
        The encoder's weights, if they are not where training read them.
    images
        Names of variants; None for all.
    """
    import numpy as np
    import pandas as pd

    from benchmarks.variants import NAMES, variant
    from prts.api.predict import EncoderRuntime, as_segmenter, build_encoder
    from prts.data.prepare import prepare_input, prepare_nuclei
    from prts.evaluation.bootstrap import block_sums, mean_pcc_difference, spatial_blocks
    from prts.evaluation.matching import align_genes
    from prts.io.nuclei import load_nuclei
    from prts.models.predict import View, predict_views
    from prts.preprocess.counts import QCSettings, measured_counts

    about = bundle.metadata
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        everywhere = load_nuclei(prepare_nuclei(folder, section, as_segmenter(None, bundle, section), False))
        counts = measured_counts(
            section,
            everywhere,
            species=about["species"],
            register=about["register"],
            qc=QCSettings.from_stored(about["qc"]),
        )
        rows = some(counts.n_obs, units)
        measured = align_genes(counts, bundle.genes, bundle.gene_ids, "section")[rows]
        chosen = everywhere.set_index("cell_id").loc[counts.obs_names[rows]].reset_index(names="cell_id")
        # the mean and spread of a slide are those of all its units
        read = chosen if bundle.slide_scale is None else everywhere
        source = "chosen" if bundle.slide_scale is None else "all"
        scored = pd.Index(read["cell_id"]).get_indexer(chosen["cell_id"])
        blocks, _ = spatial_blocks(counts.obsm["spatial"][rows] * section.mpp)
        encoder = build_encoder(bundle, EncoderRuntime(weights))

        def reading(seen: Section) -> View:
            moved, among = (seen.orientation.nuclei(part, seen.file_size) for part in (read, everywhere))
            stores = prepare_input(folder / "features", seen, moved, bundle.input_use, lambda: encoder, source)
            return View(moved, among, stores.features, stores.context)

        def sums(seen: Section) -> Any:
            views = [reading(seen.reoriented(turned)) for turned in seen.orientation.views(tta)]
            parts = predict_views(bundle, views, seen.mpp)
            return block_sums(measured, np.concatenate([part.umi for part in parts])[scored], blocks)

        unchanged = sums(section)
        every = np.ones((1, len(unchanged.n)))
        found = [Row("unchanged", float(unchanged.mean_pcc(every)[0]), 0.0, 0.0, 0.0)]
        for changed in NAMES if images is None else images:
            there = sums(variant(section, changed, folder))
            found.append(Row(changed, float(there.mean_pcc(every)[0]), *mean_pcc_difference(there, unchanged)))
    return found


def some(n: int, units: int) -> NDArray[np.intp]:
    """Which of n units are scored, in their order."""
    import numpy as np

    return np.sort(np.random.default_rng(0).permutation(n)[:units])


def summary(rows: list[Row]) -> tuple[float, float]:
    """The mean over the variants, and the share of the unchanged figure that it lacks."""
    mean = sum(row.pcc for row in rows[1:]) / len(rows[1:])
    return mean, 1 - mean / rows[0].pcc


def table(rows: list[Row]) -> str:
    """The table in Markdown."""
    mean, lost = summary(rows)
    lines = ["| image | mean PCC | difference |", "|---|---|---|", f"| unchanged | {rows[0].pcc:.3f} | |"]
    lines += [
        f"| {row.name} | {row.pcc:.3f} | {row.difference:+.3f} ({row.low:+.3f} to {row.high:+.3f}) |"
        for row in rows[1:]
    ]
    return "\n".join([*lines, f"| **mean of the variants** | **{mean:.3f}** | **{-lost:+.0%} of unchanged** |"])


def _test_section(run: str, units: int) -> list[Row]:
    """The test section of a run of the demo."""
    from omegaconf import OmegaConf

    from prts.cli.train import training_plan
    from prts.models.bundle import load_bundle
    from prts.stopwatch import Stopwatch

    tissue = training_plan(OmegaConf.load(Path(run, "config.yaml"))).prepare(Stopwatch())
    return measure(load_bundle(Path(run, "model")), tissue.sections[tissue.test[0]].section, units=units)


def main(arguments: list[str]) -> None:
    """Print the table of a bundle and a section."""
    given = dict(text.split("=", 1) for text in arguments if "=" in text)
    if not {"bundle", "section"} <= given.keys() <= {"bundle", "section", "units", "tta", "weights"}:
        sys.exit(__doc__)
    from prts.api.nuclei_source import uses_bins
    from prts.models.bundle import load_bundle
    from prts.section import open_section_folder, read_visium_hd

    bundle = load_bundle(given["bundle"])
    if uses_bins(bundle):
        bin_um = bundle.metadata["segmentation"]["arguments"]["bin_um"]
        section = read_visium_hd(given["section"], units="bins", bin_um=bin_um)
    else:
        section = open_section_folder(given["section"])
    weights = Path(given["weights"]) if "weights" in given else None
    units, tta = int(given.get("units", UNITS)), int(given.get("tta", 1))
    print(table(measure(bundle, section, units=units, tta=tta, weights=weights)))


if __name__ == "__main__":
    main(sys.argv[1:])
