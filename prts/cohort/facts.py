"""What the summary says of a predicted slide, read from its file: figures, and a thumbnail with its nuclei."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
from anndata.io import read_elem

from prts.io.cache import atomic
from prts.models.ood import STRANGE
from prts.preprocess.artefacts import is_artefact

_SIDE_PX = 320
_QUALITY = 85
# Nuclei on the thumbnail: as in training, unlike training, on an artifact.
USUAL, STRANGE_COLOUR, SPOILT_COLOUR = (0, 84, 166), (213, 94, 0), (20, 20, 20)
_OPACITY = 0.55


def read_facts(out: Path) -> dict[str, Any]:
    """The figures of a prediction.

    Parameters
    ----------
    out
        The `.h5ad` file.

    Returns
    -------
    JSON-like: `nuclei`, `genes`, `umi_per_nucleus`, the shares `ood` and `artefacts` of the nuclei (None where unknown), nuclei by kind of
    artifact, `mpp`, `width`, `height`, `units` and `verdict`.
    """
    with h5py.File(out) as file:
        obs, about = read_elem(file["obs"]), read_elem(file["uns/prts"])
        n_genes = int(file["X"].attrs["shape"][1])
        umi = _sum(file["X/data"])
    kinds = obs["artefact"].value_counts() if "artefact" in obs else None
    return {
        "nuclei": len(obs),
        "genes": n_genes,
        "umi_per_nucleus": umi / len(obs),
        "ood": float((obs["ood"] > STRANGE).mean()) if "ood" in obs else None,
        "artefacts": None if kinds is None else float(is_artefact(obs).mean()),
        "artefact_kinds": {} if kinds is None else {str(k): int(n) for k, n in kinds.items() if n and k != "none"},
        "mpp": float(about["mpp"]),
        "width": int(about["width"]),
        "height": int(about["height"]),
        "verdict": str(about.get("verdict", "")),
    }


def _sum(values: h5py.Dataset) -> float:
    """The sum of a long column, a piece at a time."""
    step = 1 << 22
    return float(sum(values[start : start + step].sum(dtype=np.float64) for start in range(0, len(values), step)))


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
    column, row = np.minimum((xy * scale * factor).astype(int), [size[0] - 1, size[1] - 1]).clip(0).T
    for rows, colour in _kinds(obs):
        pixels[row[rows], column[rows]] = (1 - _OPACITY) * pixels[row[rows], column[rows]] + _OPACITY * np.array(colour)
    with atomic(picture) as temporary:
        Image.fromarray(pixels.astype(np.uint8)).save(temporary, "JPEG", quality=_QUALITY)


def _kinds(obs: Any) -> list[tuple[Any, tuple[int, int, int]]]:
    spoilt = is_artefact(obs) if "artefact" in obs else np.zeros(len(obs), bool)
    strange = (obs["ood"] > STRANGE).to_numpy() & ~spoilt if "ood" in obs else np.zeros(len(obs), bool)
    return [(~spoilt & ~strange, USUAL), (strange, STRANGE_COLOUR), (spoilt, SPOILT_COLOUR)]
