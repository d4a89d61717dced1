"""Which nuclei train, which validate and which test.

Nuclei closer than a tile (128 um) share pixels, so a part of a section is only independent of another part beyond a guard band.
A splitter sees positions and the tissue's roles, nothing else, and so can be asked before any gene or feature is known: the gene
panel, too, is fitted on training nuclei only.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from prts.errors import InputError, ParameterError

logger = logging.getLogger(__name__)

TILE_UM = 128.0  # 256 px at 0.5 um/px

PARTS = ("train", "val", "test")
LEFT_OUT, TRAIN, VAL, TEST = -1, 0, 1, 2

Parts = dict[str, NDArray[np.int8]]


@dataclass(frozen=True)
class Roles:
    """The sections of a tissue by role, as its config gives them."""

    train: Sequence[str]
    val: Sequence[str]
    test: Sequence[str]

    @property
    def missing(self) -> list[int]:
        """The parts, of VAL and TEST, that no section has."""
        return [part for part, names in ((VAL, self.val), (TEST, self.test)) if not names]

    def by_section(self) -> dict[str, int]:
        """The part of every section that has a role."""
        given = ((TRAIN, self.train), (VAL, self.val), (TEST, self.test))
        return {name: part for part, names in given for name in names}


class Splitter(Protocol):
    """Assigns nuclei to parts by where they are."""

    def __call__(self, xy_um: Mapping[str, NDArray[np.float64]], roles: Roles) -> Parts:
        """The part of every nucleus: for each section an (n,) int8 array of LEFT_OUT, TRAIN, VAL or TEST."""
        ...

    def settings(self) -> dict[str, Any]:
        """Everything that changes the outcome, with the splitter's name."""
        ...


@dataclass(frozen=True)
class BySection:
    """Whole sections: each nucleus has the role of its section.

    Parameters
    ----------
    test_required
        Refuse a tissue without a test section, whose run would end without a test.
    """

    test_required: bool = True

    def settings(self) -> dict[str, Any]:
        """The name alone: the rest does not change who trains."""
        return {"name": "by_section"}

    def __call__(self, xy_um: Mapping[str, NDArray[np.float64]], roles: Roles) -> Parts:
        """Assign whole sections; see `Splitter`.

        Raises
        ------
        InputError
            If the tissue has no section for validation or for test.
        """
        for part in roles.missing:
            if part == TEST and not self.test_required:
                continue
            raise ParameterError(
                "split",
                "",
                f"by_section needs a section for {'validation' if part == VAL else 'test'}; name one, or use split=blocks, which "
                "holds out part of the training sections",
            )
        return _whole_sections(xy_um, roles)


@dataclass(frozen=True)
class Blocks:
    """Contiguous spatial blocks of the training sections for the roles that no section has.

    Every training section is cut into `folds * blocks_per_fold` rectangles of equally many nuclei (the longer side is halved again and
    again). Fold number `fold` becomes the first missing part, validation before test, the next fold the second; the rest trains. A training
    nucleus whose tile touches that of a validation or test nucleus is left out, as is a validation nucleus beside a test nucleus:
    nuclei of different parts are at least `guard_um` apart along x or along y, so their tiles share no pixel. Sections that the tissue
    gives to validation or test stay whole.

    Parameters
    ----------
    folds
        Into how many folds the nuclei are cut; the share of a carved part is 1 / folds.
    fold
        Which fold, from 0.
    blocks_per_fold
        Blocks of one fold in a section, spread over it. More represent the tissue better and lose more nuclei to guard bands.
    guard_um
        Width of the guard band, at least the tile's 128 um.

    Raises
    ------
    InputError
        For values outside these limits.
    """

    folds: int = 5
    fold: int = 0
    blocks_per_fold: int = 1
    guard_um: float = TILE_UM

    def __post_init__(self) -> None:
        if self.folds < 2:
            raise InputError(f"split.folds: {self.folds} is too few; use 2 or more")
        if not 0 <= self.fold < self.folds:
            raise InputError(f"split.fold: {self.fold} does not exist; folds are numbered 0 to {self.folds - 1}")
        if self.blocks_per_fold < 1:
            raise InputError(f"split.blocks_per_fold: {self.blocks_per_fold} is too few; use 1 or more")
        if self.guard_um < TILE_UM:
            raise InputError(f"split.guard_um: {self.guard_um:g} is less than the tile; use {TILE_UM:g} um or more")

    def settings(self) -> dict[str, Any]:
        """All parameters."""
        return {"name": "blocks", **asdict(self)}

    def __call__(self, xy_um: Mapping[str, NDArray[np.float64]], roles: Roles) -> Parts:
        """Carve the missing roles; see `Splitter`.

        Raises
        ------
        InputError
            If no role is missing, or two are with fewer than three folds.
        """
        missing = roles.missing
        _refuse_nothing_to_carve("blocks", missing)
        if len(missing) >= self.folds:
            raise InputError(
                f"split.folds: {self.folds} leave nothing to train on when validation and test are cut out; use 3 or more"
            )
        parts = _whole_sections(xy_um, roles)
        for name in roles.train:
            fold_of = block_labels(xy_um[name], self.folds * self.blocks_per_fold) % self.folds
            for offset, part in enumerate(missing):
                parts[name][fold_of == (self.fold + offset) % self.folds] = part
            _clear_guard_band(xy_um[name], parts[name], self.guard_um)
        return parts


@dataclass(frozen=True)
class Random:
    """Random nuclei of the training sections for the roles that no section has. Only to show how much this flatters.

    Neighbouring nuclei share most of their tile and, by spill, some of their transcripts, so figures from this split are too good.

    Parameters
    ----------
    fraction
        Share of nuclei for each missing part.
    seed
        Seed of the draw.

    Raises
    ------
    InputError
        If `fraction` leaves nothing to train on.
    """

    fraction: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.fraction < 0.5:
            raise InputError(f"split.fraction: {self.fraction:g} must lie between 0 and 0.5")

    def settings(self) -> dict[str, Any]:
        """All parameters."""
        return {"name": "random", **asdict(self)}

    def __call__(self, xy_um: Mapping[str, NDArray[np.float64]], roles: Roles) -> Parts:
        """Draw the missing roles; see `Splitter`.

        Raises
        ------
        InputError
            If no role is missing.
        """
        missing = roles.missing
        _refuse_nothing_to_carve("random", missing)
        logger.warning(
            "split=random: neighbouring nuclei share tiles between the parts, so every figure is too good; use split=blocks"
        )
        parts = _whole_sections(xy_um, roles)
        generator = np.random.default_rng(self.seed)
        for name in roles.train:
            order = generator.permutation(len(xy_um[name]))
            size = round(self.fraction * len(order))
            for offset, part in enumerate(missing):
                parts[name][order[offset * size : (offset + 1) * size]] = part
        return parts


def block_labels(xy: NDArray[np.float64], n_blocks: int) -> NDArray[np.int64]:
    """Cut points into rectangles of equally many points, by halving the longer side again and again.

    Parameters
    ----------
    xy
        (n, 2) positions.
    n_blocks
        How many rectangles.

    Returns
    -------
    (n,) block numbers; blocks of adjacent numbers tend to touch.
    """
    labels = np.zeros(len(xy), dtype=np.int64)
    todo = [(np.arange(len(xy)), 0, n_blocks)]
    while todo:
        rows, first, blocks = todo.pop()
        if blocks == 1 or len(rows) == 0:
            labels[rows] = first
            continue
        points = xy[rows]
        axis = int(np.argmax(np.ptp(points, axis=0)))
        rows = rows[np.argsort(points[:, axis], kind="stable")]
        left = blocks // 2
        cut = round(len(rows) * left / blocks)
        todo += [(rows[:cut], first, left), (rows[cut:], first + left, blocks - left)]
    return labels


def split_report(splitter: Splitter, parts: Parts) -> dict[str, Any]:
    """How many nuclei each part got, in all and by section, and how many were left out.

    Parameters
    ----------
    splitter
        What made the parts.
    parts
        Its result.

    Returns
    -------
    A JSON-like dict with `split` (settings), `n` (counts of train, val, test, left_out), `sections` (the same by section) and
    `warning` (None, or why figures of this split mislead).

    Raises
    ------
    InputError
        If a part is empty.
    """
    names = {TRAIN: "train", VAL: "val", TEST: "test", LEFT_OUT: "left_out"}
    sections = {
        section: {name: int(np.count_nonzero(labels == part)) for part, name in names.items()}
        for section, labels in parts.items()
    }
    n = {name: sum(counts[name] for counts in sections.values()) for name in names.values()}
    settings = splitter.settings()
    for name in PARTS:
        if n[name] == 0 and (name != "test" or getattr(splitter, "test_required", True)):
            raise InputError(
                f"split={settings['name']}: leaves no nucleus for {name} ({n['left_out']} fell to the guard band); "
                f"use a larger section, other folds or a section of its own in tissue.{name}"
            )
    warning = "neighbouring nuclei share tiles between parts" if settings["name"] == "random" else None
    logger.info(
        "split=%s: %s", settings["name"], ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in n.items())
    )
    return {"split": settings, "n": n, "sections": sections, "warning": warning}


def _whole_sections(xy_um: Mapping[str, NDArray[np.float64]], roles: Roles) -> Parts:
    return {name: np.full(len(xy_um[name]), part, dtype=np.int8) for name, part in roles.by_section().items()}


def _refuse_nothing_to_carve(name: str, missing: Sequence[int]) -> None:
    if not missing:
        raise InputError(
            f"split={name}: the tissue has sections for validation and for test already; use split=by_section"
        )


def _clear_guard_band(xy_um: NDArray[np.float64], parts: NDArray[np.int8], guard_um: float) -> None:
    """Leave out, in place, nuclei closer to a part that matters more: test is kept whole, then validation, then training."""
    for part, others in ((VAL, (TEST,)), (TRAIN, (VAL, TEST))):
        mine = np.flatnonzero(parts == part)
        theirs = np.isin(parts, others)
        if len(mine) == 0 or not theirs.any():
            continue
        # tiles are squares: they overlap where the larger of |dx| and |dy| is below the guard
        distance, _ = cKDTree(xy_um[theirs]).query(xy_um[mine], p=np.inf, distance_upper_bound=guard_um)
        parts[mine[distance < guard_um]] = LEFT_OUT
