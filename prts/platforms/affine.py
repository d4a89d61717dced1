"""Affine maps between the coordinates of a platform and the pixels of an image, as 3 x 3 matrices."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import shapely
from numpy.typing import NDArray

from prts.errors import InputError

Floats = NDArray[np.float64]
Matrix = NDArray[np.float64]
"""(3, 3): [x', y', 1] = matrix @ [x, y, 1]."""

_SHAPE = "give 3 x 3 numbers with the last row 0, 0, 1, or its first two rows"


def scaling(factor: float) -> Matrix:
    """The map that multiplies both coordinates."""
    return np.diag([factor, factor, 1.0])


def as_matrix(rows: Sequence[Sequence[float]] | Floats, source: object) -> Matrix:
    """Check an affine matrix.

    Parameters
    ----------
    rows
        3 x 3 numbers, or the first two rows of these.
    source
        Where it is from, for messages.

    Raises
    ------
    InputError
        If it is not an invertible affine matrix.
    """
    try:
        matrix = np.array(rows, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"{source}: not a matrix of numbers; {_SHAPE}") from error
    if matrix.shape == (2, 3):
        matrix = np.vstack([matrix, [0.0, 0.0, 1.0]])
    if matrix.shape != (3, 3) or not np.isfinite(matrix).all() or not np.allclose(matrix[2], [0, 0, 1]):
        raise InputError(f"{source}: not an affine matrix; {_SHAPE}")
    if abs(np.linalg.det(matrix[:2, :2])) <= 1e-9 * max(np.abs(matrix[:2, :2]).max() ** 2, 1e-12):
        raise InputError(f"{source}: maps the plane to a line; give the matrix that was exported, complete")
    return matrix


def read_matrix(path: Path) -> Matrix:
    """Read an affine matrix from a CSV file without a header.

    Raises
    ------
    InputError
        If the file is missing or holds no affine matrix.
    """
    try:
        rows = [line.replace(",", " ").split() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error}); give a CSV file of an affine matrix") from error
    try:
        numbers = [[float(each) for each in row] for row in rows if row]
    except ValueError as error:
        raise InputError(f"{path}: not a matrix of numbers; {_SHAPE}") from error
    return as_matrix(numbers, path)


def scale_of(matrix: Matrix) -> float:
    """The factor by which lengths grow: the root of the factor of areas."""
    return math.sqrt(abs(float(np.linalg.det(matrix[:2, :2]))))


def move(matrix: Matrix, xy: Floats) -> Floats:
    """Map points, (n, 2)."""
    return np.asarray(xy @ matrix[:2, :2].T + matrix[:2, 2])


def move_shapes(matrix: Matrix, shapes: NDArray[np.object_]) -> NDArray[np.object_]:
    """Map shapely geometries, (n,)."""
    return np.asarray(shapely.transform(shapes, lambda xy: move(matrix, xy)), dtype=object)


def fit_similarity(source: Floats, target: Floats) -> tuple[Matrix, float]:
    """Rotation, uniform scale, shift and possibly reflection that take points closest to others.

    Parameters
    ----------
    source, target
        (n, 2) corresponding points, n at least 2.

    Returns
    -------
    matrix
        The map with the least squared distance (Umeyama 1991); reflected if that fits better, for which three points are needed.
    rms
        Root mean square distance that is left, in units of `target`.

    Examples
    --------
    >>> matrix, rms = fit_similarity(np.array([[0.0, 0], [1, 0], [0, 1]]), np.array([[5.0, 5], [5, 7], [3, 5]]))
    >>> matrix.round(6).tolist(), round(rms, 6)
    ([[0.0, -2.0, 5.0], [2.0, 0.0, 5.0], [0.0, 0.0, 1.0]], 0.0)
    """
    centre, goal = source.mean(axis=0), target.mean(axis=0)
    a, b = (source - centre) @ [1, 1j], (target - goal) @ [1, 1j]
    found = []
    for turned in (a, a.conj())[: 1 + (len(a) > 2)]:
        factor = np.vdot(turned, b) / np.vdot(turned, turned).real
        found.append((float(np.sqrt(np.mean(np.abs(factor * turned - b) ** 2))), factor, turned is not a))
    rms, factor, reflected = min(found, key=lambda each: each[0])
    linear = np.array([[factor.real, -factor.imag], [factor.imag, factor.real]])
    if reflected:
        linear = linear @ np.diag([1.0, -1.0])
    matrix = np.eye(3)
    matrix[:2, :2], matrix[:2, 2] = linear, goal - linear @ centre
    return matrix, rms
