"""What the summary says of a predicted slide, read from its file: figures, and a thumbnail with its nuclei."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
from anndata.io import read_elem
from numpy.typing import NDArray

from prts.io.cache import atomic
from prts.models.ood import STRANGE
from prts.preprocess.artefacts import is_artefact

_SIDE_PX = 320
_QUALITY = 85
_GAP, _MOST_RADIUS = 0.2, 3
# Nuclei on the thumbnail: as in training, unlike training, on an artifact.
USUAL, STRANGE_COLOUR, SPOILT_COLOUR = (0, 84, 166), (213, 94, 0), (20, 20, 20)
_OPACITY = 0.8
_ROWS = 4096


def read_facts(out: Path) -> dict[str, Any]:
    """The figures of a prediction.

    Parameters
    ----------
    out
        The `.h5ad` file.

    Returns
    -------
    JSON-like: `nuclei`, `genes`, `umi_per_nucleus` (the median), the shares `ood` and `artefacts` of the nuclei (None where unknown), the
    nuclei by kind of artifact, `mpp`, `width`, `height` and `verdict`.
    """
    with h5py.File(out) as file:
        obs, about = read_elem(file["obs"]), read_elem(file["uns/prts"])
        n_genes = int(file["X"].attrs["shape"][1])
        umi = _row_sums(file["X"])
    kinds = obs["artefact"].value_counts() if "artefact" in obs else None
    return {
        "nuclei": len(obs),
        "genes": n_genes,
        "umi_per_nucleus": float(np.median(umi)),
        "ood": float((obs["ood"] > STRANGE).mean()) if "ood" in obs else None,
        "artefacts": None if kinds is None else float(is_artefact(obs).mean()),
        "artefact_kinds": {} if kinds is None else {str(k): int(n) for k, n in kinds.items() if n and k != "none"},
        "mpp": float(about["mpp"]),
        "width": int(about["width"]),
        "height": int(about["height"]),
        "verdict": str(about.get("verdict", "")),
    }


def _row_sums(matrix: h5py.Group) -> NDArray[np.float64]:
    """Sums of the rows of a stored CSR matrix, some thousand rows at a time."""
    starts = matrix["indptr"][:]
    sums = np.empty(len(starts) - 1)
    for first in range(0, len(sums), _ROWS):
        part = starts[first : first + _ROWS + 1]
        row = np.repeat(np.arange(len(part) - 1), np.diff(part))
        values = matrix["data"][part[0] : part[-1]]
        sums[first : first + _ROWS] = np.bincount(row, values, minlength=len(part) - 1)
    return sums


def write_thumbnail(out: Path, picture: Path) -> None:
    """Draw a slide with its nuclei: blue, orange where they are unlike the training nuclei, black on artifacts.

    Parameters
    ----------
    out
        The prediction, whose small image is used.
    picture
        The JPEG file to write.
    """
    from PIL import Image

    with h5py.File(out) as file:
        section = next(iter(file["uns/spatial"].values()))
        image = Image.fromarray(np.asarray(section["images/lowres"][:], np.uint8))
        scale = float(section["scalefactors/tissue_lowres_scalef"][()])
        xy, obs = file["obsm/spatial"][:], read_elem(file["obs"])
    factor = min(1.0, _SIDE_PX / max(image.size))
    size = [max(1, round(side * factor)) for side in image.size]
    pixels = np.asarray(image.resize((size[0], size[1]), Image.Resampling.LANCZOS)).astype(np.float32)
    # discs that leave gaps: a pixel in a whole section, a few in a biopsy
    radius = min(_MOST_RADIUS, int(_GAP * np.sqrt(size[0] * size[1] / max(len(xy), 1))))
    around = np.argwhere(np.hypot(*np.indices((2 * radius + 1,) * 2) - radius) <= radius + 0.3) - radius
    places = (xy[:, None] * scale * factor + around).astype(int).clip(0, [size[0] - 1, size[1] - 1])
    for rows, colour in _kinds(obs):
        column, row = places[rows].reshape(-1, 2).T
        pixels[row, column] = (1 - _OPACITY) * pixels[row, column] + _OPACITY * np.array(colour)
    with atomic(picture) as temporary:
        Image.fromarray(pixels.astype(np.uint8)).save(temporary, "JPEG", quality=_QUALITY)


def _kinds(obs: Any) -> list[tuple[Any, tuple[int, int, int]]]:
    spoilt = is_artefact(obs) if "artefact" in obs else np.zeros(len(obs), bool)
    strange = (obs["ood"] > STRANGE).to_numpy() & ~spoilt if "ood" in obs else np.zeros(len(obs), bool)
    return [(~spoilt & ~strange, USUAL), (strange, STRANGE_COLOUR), (spoilt, SPOILT_COLOUR)]
