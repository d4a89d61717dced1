"""Compare predicted nuclei with measured Visium spots: sums within spots, detected genes, and spatial domains."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from prts.analysis.clusters import ClusterSettings, cluster, embed
from prts.analysis.types import agreement
from prts.errors import InputError, ParameterError
from prts.evaluation.spot_scores import spot_pcc, sum_in_spots
from prts.io.spots import Spots

if TYPE_CHECKING:
    import anndata as ad

logger = logging.getLogger(__name__)

_POSITIONS = ["barcode", "in_tissue", "array_row", "array_col", "pxl_row_in_fullres", "pxl_col_in_fullres"]


@dataclass(frozen=True)
class SpotSettings:
    """How Visium spots are filtered and clustered into domains; the defaults are the paper's.

    Attributes
    ----------
    min_counts, max_counts
        Range of UMI per spot, both ends included.
    min_genes, max_genes
        Range of detected genes per spot, both ends included.
    n_top_genes, n_pcs, resolution
        Clustering of the spots, as in `prts.analysis.clusters.ClusterSettings`.
    """

    min_counts: int = 1000
    max_counts: int = 100_000
    min_genes: int = 200
    max_genes: int = 10_000
    n_top_genes: int = 600
    n_pcs: int = 30
    resolution: float = 1.0

    def clustering(self, seed: int = 0) -> ClusterSettings:
        """Settings for clustering the spots."""
        return ClusterSettings(n_top_genes=self.n_top_genes, n_pcs=self.n_pcs, resolution=self.resolution, seed=seed)


@dataclass(frozen=True)
class SpotComparison:
    """Agreement of predicted nuclei with measured spots.

    Attributes
    ----------
    spots
        One row per spot: `x, y` (full-resolution px), `n_nuclei`, `total_measured`, `total_predicted` (over the predicted genes),
        `features_measured`, `features_predicted` (number of these genes that were detected, or are expected to be), and `domain`
        (missing if there are too few spots to cluster).
    per_gene
        `gene, mean_counts, pcc, constant`, from log1p of the sums over spots with at least one nucleus.
    composition
        Domains x clusters: share of the nuclei of a domain in each cluster; None without domains.
    summary
        `n_spots, n_nuclei_in_spots, nuclei_per_spot` (median over spots with a nucleus), `pcc_mean, pcc_median, total_pcc, features_pcc`
        and, with domains, `n_domains` and `domain_nmi` (cluster of a nucleus against the domain it is in).
    radius_px
        Radius of a spot, full-resolution px.
    """

    spots: pd.DataFrame
    per_gene: pd.DataFrame
    composition: pd.DataFrame | None
    summary: dict[str, float]
    radius_px: float


def read_visium(folder: Path) -> Spots:
    """Read the spots under tissue from the Space Ranger `outs` folder of a Visium (v1/v2) run.

    Parameters
    ----------
    folder
        Contains `filtered_feature_bc_matrix.h5`, or the folder `filtered_feature_bc_matrix`, or the raw matrix, and in `spatial/` the file
        `scalefactors_json.json` and `tissue_positions.csv` or `.parquet` (before Space Ranger 2, `tissue_positions_list.csv` without a
        header).

    Raises
    ------
    InputError
        If a file is missing or damaged, or no barcode is a spot under tissue.
    """
    import scanpy as sc

    folder = Path(folder)
    kinds = ("filtered_feature_bc_matrix", "raw_feature_bc_matrix")
    matrix = _existing(folder, *(f"{kind}{suffix}" for kind in kinds for suffix in (".h5", "")))
    positions = _positions(
        _existing(folder / "spatial", "tissue_positions.csv", "tissue_positions.parquet", "tissue_positions_list.csv")
    )
    factors = _existing(folder / "spatial", "scalefactors_json.json")
    try:
        diameter = float(json.loads(factors.read_text(encoding="utf-8"))["spot_diameter_fullres"])
        counts = sc.read_10x_mtx(matrix, make_unique=False) if matrix.is_dir() else sc.read_10x_h5(matrix)
    except Exception as error:  # scanpy can raise anything on a malformed HDF5 file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"{folder}: cannot be read as Visium output ({reason}); expected the `outs` folder of Space Ranger"
        ) from error
    counts.var["symbol"] = counts.var_names
    if "gene_ids" in counts.var:
        counts.var["gene_id"] = counts.var.pop("gene_ids")
    counts.var_names_make_unique()
    inside = positions.index[positions["in_tissue"] == 1]
    counts = counts[counts.obs_names.isin(inside)].copy()
    if not counts.n_obs:
        raise InputError(
            f"{folder}: no barcode is a spot under tissue; the matrix and the positions must come from the same Space Ranger run"
        )
    counts.X = sp.csr_matrix(counts.X).astype(np.int32)
    xy = positions.loc[counts.obs_names, ["pxl_col_in_fullres", "pxl_row_in_fullres"]].to_numpy(dtype=float)
    counts.obsm["spatial"] = xy
    return Spots(counts, xy, diameter / 2)


def filter_spots(spots: Spots, settings: SpotSettings) -> Spots:
    """Keep spots whose UMI and number of detected genes are within the limits.

    Raises
    ------
    InputError
        If no spot is left.
    """
    X = sp.csr_matrix(spots.counts.X)
    total, genes = np.asarray(X.sum(axis=1)).ravel(), np.diff(X.indptr)
    keep = (total >= settings.min_counts) & (total <= settings.max_counts)
    keep &= (genes >= settings.min_genes) & (genes <= settings.max_genes)
    if not keep.any():
        raise ParameterError(
            "spots",
            "min_counts",
            f"none of the {len(keep)} spots has {settings.min_counts}-{settings.max_counts} UMI (found {total.min():.0f}-"
            f"{total.max():.0f}) and {settings.min_genes}-{settings.max_genes} genes (found {genes.min()}-{genes.max()}); "
            "change the limits",
        )
    logger.info("spots: kept %d of %d", keep.sum(), len(keep))
    return replace(spots, counts=spots.counts[keep].copy(), xy=spots.xy[keep])


def compare_spots(
    prediction: ad.AnnData, spots: Spots, clusters: pd.Series | None, settings: ClusterSettings
) -> SpotComparison:
    """Compare predicted nuclei with the measured spots on the same image.

    Parameters
    ----------
    prediction
        All nuclei of the section, with `layers["prob"]`, (n_nuclei, n_genes).
    spots
        Result of `filter_spots`.
    clusters
        Cluster of each nucleus, missing if dropped; None skips the comparison of domains.
    settings
        How the spots are clustered into domains.

    Raises
    ------
    InputError
        If no nucleus is inside a spot, or none of the predicted genes was measured.
    """
    xy = np.asarray(prediction.obsm["spatial"], dtype=float)
    genes = prediction.var_names.astype(str).tolist()
    ids = prediction.var["gene_id"].astype(str).tolist() if "gene_id" in prediction.var else None
    mean, per_gene = spot_pcc(prediction.X, xy, spots, genes, ids)
    measured, summed = sum_in_spots(prediction.X, xy, spots, genes, ids)
    distance, nearest = cKDTree(spots.xy).query(xy)
    spot = np.where(distance <= spots.radius_px, nearest, -1)
    n_nuclei = np.bincount(spot[spot >= 0], minlength=len(spots.xy))

    table = pd.DataFrame({"x": spots.xy[:, 0], "y": spots.xy[:, 1], "n_nuclei": n_nuclei}, index=spots.counts.obs_names)
    held = n_nuclei > 0
    table[["total_measured", "total_predicted", "features_measured", "features_predicted"]] = np.nan
    table.loc[held, "total_measured"] = _rows(measured)
    table.loc[held, "total_predicted"] = _rows(summed)
    table.loc[held, "features_measured"] = _rows(measured > 0)
    table.loc[held, "features_predicted"] = _rows(_detected(prediction, spot, len(spots.xy))[held])
    table["domain"] = _domains(spots, settings)

    summary: dict[str, float] = {
        "n_spots": len(table),
        "n_nuclei_in_spots": int((spot >= 0).sum()),
        "nuclei_per_spot": float(np.median(n_nuclei[held])),
        "pcc_mean": mean,
        "pcc_median": float(per_gene["pcc"].median()),
        "total_pcc": _log_pcc(table.loc[held, "total_measured"], table.loc[held, "total_predicted"]),
        "features_pcc": _log_pcc(table.loc[held, "features_measured"], table.loc[held, "features_predicted"]),
    }
    composition = None
    if clusters is not None and table["domain"].notna().any():
        domain = table["domain"].reset_index(drop=True).reindex(np.where(spot >= 0, spot, -1)).reset_index(drop=True)
        composition = pd.crosstab(domain, clusters.astype(object).reset_index(drop=True), normalize="index")
        composition = composition.rename_axis(index="domain", columns="cluster")
        summary["n_domains"] = table["domain"].nunique()
        summary["domain_nmi"] = agreement(domain, clusters)["nmi"]
    return SpotComparison(table, per_gene, composition, summary, spots.radius_px)


def _domains(spots: Spots, settings: ClusterSettings) -> NDArray[Any]:
    """Clusters of the spots; all missing if there are too few spots."""
    counts = spots.counts.copy()
    counts.obsm["spatial"] = spots.xy
    try:
        nuclei = embed(counts, settings, what="spots")
        cluster(nuclei, settings, what="spots")
    except InputError as error:
        logger.warning("%s; continuing without spatial domains", error)
        return np.full(len(spots.xy), None, dtype=object)
    names = nuclei.obs["cluster"].astype(object)
    return np.asarray(names.where(names.notna(), None), dtype=object)


def _detected(prediction: ad.AnnData, spot: NDArray[np.intp], n_spots: int) -> NDArray[np.float64]:
    """P(a gene is detected in any nucleus of a spot), (n_spots, n_genes), with nuclei independent given the prediction."""
    prob = np.asarray(prediction.layers["prob"], dtype=float)
    inside = spot >= 0
    holds = sp.csr_matrix((np.ones(inside.sum()), (spot[inside], np.flatnonzero(inside))), shape=(n_spots, len(spot)))
    return np.asarray(-np.expm1(holds @ np.log1p(-np.minimum(prob, 1 - 1e-7))))


def _rows(matrix: Any) -> NDArray[np.float64]:
    return np.asarray(matrix.sum(axis=1), dtype=float).ravel()


def _log_pcc(a: pd.Series, b: pd.Series) -> float:
    """PCC of log1p of two columns; NaN if one is constant."""
    x, y = np.log1p(a.to_numpy()), np.log1p(b.to_numpy())
    return float(np.corrcoef(x, y)[0, 1]) if len(x) > 1 and x.std() > 0 and y.std() > 0 else float("nan")


def _existing(folder: Path, *names: str) -> Path:
    found = next((folder / name for name in names if (folder / name).exists()), None)
    if found is None:
        raise InputError(f"{folder}: has no {names[0]}; expected the `outs` folder of a Visium run")
    return found


def _positions(path: Path) -> pd.DataFrame:
    try:
        if path.suffix == ".parquet":
            table = pd.read_parquet(path)
            table = table if "barcode" in table else table.reset_index(names="barcode")
        else:
            table = pd.read_csv(path, header=None, names=_POSITIONS, dtype={"barcode": str})
            if len(table) and table["array_row"].iloc[0] == "array_row":
                table = pd.read_csv(path)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path}: cannot be read ({str(error).splitlines()[0]}); expected the file that Space Ranger wrote"
        ) from error
    missing = [name for name in _POSITIONS if name not in table]
    if missing or len(table.columns) != len(_POSITIONS):
        raise InputError(f"{path}: columns must be {', '.join(_POSITIONS)}; expected the file that Space Ranger wrote")
    return table.set_index("barcode")
