"""Split nuclei into training, validation and test.

Nuclei closer than a tile (128 um) share pixels, so two parts of a section are independent only if a guard band separates them.
A splitter sees only positions and the tissue's roles. It can therefore run before genes and features are computed, and the gene
panel is fitted on training nuclei only.
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
    """The sections of a tissue by role, as in its config."""

    train: Sequence[str]
    val: Sequence[str]
    test: Sequence[str]

    @property
    def missing(self) -> list[int]:
        """VAL and TEST, if no section has that role."""
        return [part for part, names in ((VAL, self.val), (TEST, self.test)) if not names]

    def by_section(self) -> dict[str, int]:
        """The part of every section that has a role."""
        given = ((TRAIN, self.train), (VAL, self.val), (TEST, self.test))
        return {name: part for part, names in given for name in names}


class Splitter(Protocol):
    """Assigns nuclei to parts by position."""

    def __call__(self, xy_um: Mapping[str, NDArray[np.float64]], roles: Roles) -> Parts:
        """Return the part of every nucleus: for each section, an (n,) int8 array of LEFT_OUT, TRAIN, VAL or TEST."""
        ...

    def settings(self) -> dict[str, Any]:
        """Everything that affects the result, with the splitter's name."""
        ...


@dataclass(frozen=True)
class BySection:
    """Whole sections: each nucleus has the role of its section.

    Parameters
    ----------
    test_required
        Refuse a tissue without a test section.
    """

    test_required: bool = True

    def settings(self) -> dict[str, Any]:
        """Only the name: the rest does not affect which nuclei train."""
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

    Every training section is cut into `folds * blocks_per_fold` rectangles with equal numbers of nuclei, by halving the longer side
    repeatedly. Fold number `fold` becomes the first missing part (validation before test), the next fold the second; the rest trains.
    Training nuclei whose tile overlaps the tile of a validation or test nucleus are left out, as are validation nuclei next to test
    nuclei: nuclei of different parts are at least `guard_um` apart along x or y, so their tiles share no pixels. Sections with the role
    validation or test are kept whole.

    Parameters
    ----------
    folds
        Number of folds; each held-out part gets 1 / folds of the nuclei.
    fold
        Index of the fold, from 0.
    blocks_per_fold
        Blocks per fold in a section. More blocks represent the tissue better but lose more nuclei to guard bands.
    guard_um
        Width of the guard band, at least the tile's 128 um.

    Raises
    ------
    InputError
        If a value is outside these limits.
    """

    folds: int = 5
    fold: int = 0
    blocks_per_fold: int = 1
    guard_um: float = TILE_UM

    def __post_init__(self) -> None:
        if self.folds < 2:
            raise ParameterError("split", "folds", f"{self.folds} is too few; use 2 or more")
        if not 0 <= self.fold < self.folds:
            raise ParameterError(
                "split", "fold", f"{self.fold} does not exist; folds are numbered 0 to {self.folds - 1}"
            )
        if self.blocks_per_fold < 1:
            raise ParameterError("split", "blocks_per_fold", f"{self.blocks_per_fold} is too few; use 1 or more")
        if self.guard_um < TILE_UM:
            raise ParameterError(
                "split", "guard_um", f"{self.guard_um:g} is less than the tile; use {TILE_UM:g} um or more"
            )

    def settings(self) -> dict[str, Any]:
        """All parameters."""
        return {"name": "blocks", **asdict(self)}

    def __call__(self, xy_um: Mapping[str, NDArray[np.float64]], roles: Roles) -> Parts:
        """Hold out nuclei for the missing roles; see `Splitter`.

        Raises
        ------
        InputError
            If no role is missing, or two are missing and there are fewer than three folds.
        """
        missing = roles.missing
        _refuse_nothing_to_carve("blocks", missing)
        if len(missing) >= self.folds:
            raise ParameterError(
                "split",
                "folds",
                f"{self.folds} leave nothing to train on once validation and test are held out; use 3 or more",
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
    """Random nuclei of the training sections for the roles that no section has. Only to show how much this inflates scores.

    Neighboring nuclei share most of their tile and, by diffusion, some of their transcripts, so scores from this split are too good.

    Parameters
    ----------
    fraction
        Share of nuclei for each missing part.
    seed
        Random seed.

    Raises
    ------
    InputError
        If `fraction` leaves nothing to train on.
    """

    fraction: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.fraction < 0.5:
            raise ParameterError(
                "split", "fraction", f"{self.fraction:g} is out of range; use a value between 0 and 0.5"
            )

    def settings(self) -> dict[str, Any]:
        """All parameters."""
        return {"name": "random", **asdict(self)}

    def __call__(self, xy_um: Mapping[str, NDArray[np.float64]], roles: Roles) -> Parts:
        """Draw nuclei for the missing roles; see `Splitter`.

        Raises
        ------
        InputError
            If no role is missing.
        """
        missing = roles.missing
        _refuse_nothing_to_carve("random", missing)
        logger.warning(
            "split=random: neighboring nuclei in different parts share tiles, so all scores are too good; use split=blocks"
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
    """Cut points into rectangles with equal numbers of points, by halving the longer side repeatedly.

    Parameters
    ----------
    xy
        (n, 2) positions.
    n_blocks
        Number of rectangles.

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
    """Count the nuclei of each part, and those left out, in total and by section.

    Parameters
    ----------
    splitter
        The splitter that was used.
    parts
        Its result.

    Returns
    -------
    A JSON-like dict with `split` (settings), `n` (counts of train, val, test, left_out), `sections` (the same by section) and
    `warning` (None, or why scores from this split are misleading).

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
                f"split={settings['name']}: leaves no nuclei for {name} ({n['left_out']} are in the guard band); "
                f"use a larger section, other folds or a separate section in tissue.{name}"
            )
    warning = "neighboring nuclei in different parts share tiles" if settings["name"] == "random" else None
    logger.info(
        "split=%s: %s", settings["name"], ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in n.items())
    )
    return {"split": settings, "n": n, "sections": sections, "warning": warning}


def _whole_sections(xy_um: Mapping[str, NDArray[np.float64]], roles: Roles) -> Parts:
    return {name: np.full(len(xy_um[name]), part, dtype=np.int8) for name, part in roles.by_section().items()}


def _refuse_nothing_to_carve(name: str, missing: Sequence[int]) -> None:
    if not missing:
        raise InputError(f"split={name}: the tissue already has sections for validation and test; use split=by_section")


def _clear_guard_band(xy_um: NDArray[np.float64], parts: NDArray[np.int8], guard_um: float) -> None:
    """Leave out, in place, nuclei too close to a part with priority: test, then validation, then training."""
    for part, others in ((VAL, (TEST,)), (TRAIN, (VAL, TEST))):
        mine = np.flatnonzero(parts == part)
        theirs = np.isin(parts, others)
        if len(mine) == 0 or not theirs.any():
            continue
        # tiles are squares: they overlap where the larger of |dx| and |dy| is below the guard
        distance, _ = cKDTree(xy_um[theirs]).query(xy_um[mine], p=np.inf, distance_upper_bound=guard_um)
        parts[mine[distance < guard_um]] = LEFT_OUT
