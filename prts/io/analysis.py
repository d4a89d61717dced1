"""What `prts analyze` found, as columns next to the nuclei of a prediction."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from prts.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

logger = logging.getLogger(__name__)


def join_analysis(obs: pd.DataFrame, path: Path) -> pd.DataFrame:
    """Add the columns of an analysis to the nuclei of a prediction.

    Parameters
    ----------
    obs
        The nuclei of the prediction, by `cell_id`.
    path
        analysis.h5ad.

    Returns
    -------
    `obs` with the columns of the analysis that it lacks: cluster, types, scores. Nuclei that are not in the analysis have missing values.

    Raises
    ------
    InputError
        If the file is not an analysis, or shares no nuclei with the prediction.
    """
    found = read_analysis_obs(path)
    shared = obs.index.isin(found.index)
    if not shared.any():
        raise InputError(f"{path}: shares no nuclei with the prediction; give the analysis of this prediction")
    new = found[[column for column in found.columns if column not in obs]]
    logger.info("analysis: %d of %d nuclei, columns %s", shared.sum(), len(shared), ", ".join(map(str, new.columns)))
    return obs.join(new)


def read_analysis_obs(path: Path) -> pd.DataFrame:
    """The nuclei of analysis.h5ad or measured.h5ad with their clusters and types, by `cell_id`.

    Raises
    ------
    InputError
        If the file is not an .h5ad file.
    """
    import h5py
    from anndata.io import read_elem

    if not path.is_file() or not h5py.is_hdf5(path):
        raise InputError(f"{path}: no such .h5ad file; expected analysis.h5ad of `prts analyze`")
    with h5py.File(path) as file:
        if "obs" not in file:
            raise InputError(f"{path}: has no obs; expected analysis.h5ad of `prts analyze`")
        obs: pd.DataFrame = read_elem(file["obs"])
    obs.index = obs.index.astype(str)
    return obs
