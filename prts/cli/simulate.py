"""Simulate a section with known truth.

usage: prts simulate out=DIR [cells=2000] [genes=1000] [seed=0] [stain=0.0] [layout=visium_hd|spaceranger4|xenium]

Writes a section to DIR in the layout of Space Ranger 3 (image, 2 um bins, positions, scale factors) or of another platform, along with
truth.h5ad and truth_nuclei.parquet. The same arguments give the same bytes. Sections share genes and cell types across seeds, so a model
trained on one can predict another.

example: prts simulate out=data/sim1 cells=5000 genes=2000 seed=1
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from prts.cli.app import plain

if TYPE_CHECKING:
    from omegaconf import DictConfig

logger = logging.getLogger(__name__)


def main(cfg: DictConfig) -> None:
    """Simulate one section."""
    from prts.simulate.section import simulate_section

    arguments = plain(cfg)
    folder = simulate_section(Path(arguments.pop("out")), **arguments)
    logger.info("wrote %s", folder)
