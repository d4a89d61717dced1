"""Whether the nuclei of a run fit in memory."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import h5py

if TYPE_CHECKING:
    from prts.data.prepared import PreparedSection, PreparedTissue

logger = logging.getLogger(__name__)

Memory = Literal["auto", "whole", "stream"]

# The share of the available memory that nuclei may take; the rest is for the network, baselines and scores.
_SHARE = 0.5
_STATISTICS = {"morphology": 21, "context": 42}


def streams(memory: Memory, tissue: PreparedTissue, use: Sequence[str], n_genes: int) -> bool:
    """Whether features and counts stay on disk.

    Parameters
    ----------
    memory
        `whole` and `stream` decide; `auto` compares the estimated size of a run with the available memory.
    tissue
        The prepared sections.
    use
        Blocks of the network's input.
    n_genes
        Genes of the panel.
    """
    if memory != "auto":
        return memory == "stream"
    held_out = {*tissue.val, *tissue.test} or set(tissue.train)
    needed = sum(
        _bytes(section, use, n_genes, scored=name in held_out)
        for name, section in tissue.sections.items()
        if name in {*tissue.train, *tissue.val, *tissue.test}
    )
    available = available_bytes()
    chosen = needed > _SHARE * available
    logger.info(
        "data.memory=auto: about %.1f GB for all nuclei, %.1f GB available: %s",
        needed / 1e9,
        available / 1e9,
        "they stay on disk" if chosen else "they are loaded",
    )
    return chosen


def _bytes(section: PreparedSection, use: Sequence[str], n_genes: int, *, scored: bool) -> int:
    """Memory of a section's nuclei as arrays: features, counts and, if it is scored, UMI and P(expressed) of all genes."""
    width = sum(_STATISTICS.get(block, 0) for block in use)
    if section.features is not None:
        with h5py.File(section.features) as file:
            width += sum(file[block].shape[1] for block in use if block not in _STATISTICS)
    with h5py.File(section.counts) as file:
        n, stored = len(file["X/indptr"]) - 1, len(file["X/data"])
    # counts once as integers and once in the network's dtype; the panel has at most all of them
    return n * 4 * width * (1 + len(section.views)) + 2 * 8 * stored + scored * n * 8 * n_genes


def available_bytes() -> int:
    """Memory that this process can still take: that of the machine, or less in a container or a job with a limit."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    return min(free, _left_in_group())


def _left_in_group() -> int:
    """Memory left in this process's control group (version 2), which SLURM and containers use."""
    left = 1 << 62
    try:
        own = Path("/proc/self/cgroup").read_text(encoding="ascii").strip().rpartition("::")[2]
        folder = Path("/sys/fs/cgroup") / own.lstrip("/")
        for group in (folder, *folder.parents):
            limit = (group / "memory.max").read_text(encoding="ascii").strip()
            if limit != "max":
                left = min(left, int(limit) - int((group / "memory.current").read_text(encoding="ascii")))
    except (OSError, ValueError):
        return left
    return left
