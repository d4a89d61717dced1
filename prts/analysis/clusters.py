"""Clusters of nuclei and their marker genes, with the same steps for predicted and measured sections."""

from __future__ import annotations

import logging
import sys
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
from numpy.typing import NDArray

from prts.errors import InputError, ParameterError

if TYPE_CHECKING:
    from collections.abc import Callable

logger = logging.getLogger(__name__)

_BISECTIONS = 14
_SILHOUETTE_NUCLEI = 10_000


@dataclass(frozen=True)
class ClusterSettings:
    """How nuclei are clustered; the defaults are the paper's.

    Attributes
    ----------
    n_top_genes
        Number of highly variable genes (flavor `seurat`); all genes if there are fewer.
    n_pcs, n_neighbors
        Number of principal components, and of neighbors in the graph.
    resolution
        Leiden resolution.
    min_share
        Minimum share of nuclei in a cluster; smaller clusters are dropped. The paper's 1,200 of about 60,000 nuclei are 2%.
    min_cells
        Minimum number of nuclei in a cluster, instead of the share.
    seed
        Seed of PCA, Leiden and UMAP.
    """

    n_top_genes: int = 800
    n_pcs: int = 50
    n_neighbors: int = 15
    resolution: float = 0.6
    min_share: float = 0.02
    min_cells: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for key, low in {"n_top_genes": 2, "n_pcs": 1, "n_neighbors": 2}.items():
            if getattr(self, key) < low:
                raise ParameterError("clusters", key, f"{getattr(self, key)} is too small; choose {low} or more")
        if not 0 < self.resolution < np.inf:
            raise ParameterError("clusters", "resolution", f"{self.resolution} must be positive; the default is 0.6")
        if not 0 <= self.min_share < 1:
            raise ParameterError(
                "clusters", "min_share", f"{self.min_share} must be at least 0 and below 1; the default is 0.02"
            )
        if self.min_cells is not None and self.min_cells < 2:
            raise ParameterError(
                "clusters", "min_cells", f"{self.min_cells} nuclei are too few to test for markers; use 2 or more"
            )

    def least(self, n_nuclei: int) -> int:
        """Minimum size of a cluster in a section of `n_nuclei`; at least two, to test for markers."""
        return self.min_cells if self.min_cells is not None else max(2, int(np.ceil(self.min_share * n_nuclei)))


def embed(counts: ad.AnnData, settings: ClusterSettings, *, what: str = "prediction") -> ad.AnnData:
    """Normalize, select variable genes, and compute PCA, neighbor graph and UMAP.

    Parameters
    ----------
    counts
        Measured or expected UMI in X, (n_nuclei, n_genes).
    settings
        Settings of the steps.
    what
        Name of the counts in messages.

    Returns
    -------
    A new object (n_nuclei, n_genes) with X = log1p of counts scaled to the median total, `layers["umi"]`, `var["highly_variable"]`,
    `obsm["X_pca"]`, `obsm["X_umap"]`, the neighbor graph, and `obs`, `obsm["spatial"]` and `uns["spatial"]` of `counts`.

    Raises
    ------
    InputError
        If there are too few nuclei or genes.
    """
    _import_umap()
    import scanpy as sc

    if counts.n_obs <= settings.n_neighbors or counts.n_vars < 3:
        raise InputError(
            f"{what}: {counts.n_obs} nuclei x {counts.n_vars} genes are too few to cluster with {settings.n_neighbors} neighbors; "
            f"at least {settings.n_neighbors + 1} nuclei and 3 genes are needed"
        )
    umi = sp.csr_matrix(counts.X, dtype=np.float32)
    nuclei = ad.AnnData(umi.copy(), obs=counts.obs.copy(), var=counts.var.copy())
    nuclei.layers["umi"] = umi
    nuclei.obsm["spatial"] = np.asarray(counts.obsm["spatial"], dtype=float)
    if "spatial" in counts.uns:
        nuclei.uns["spatial"] = counts.uns["spatial"]
    nuclei.obs["total_counts"] = np.asarray(umi.sum(axis=1)).ravel()
    # every gene has an expected count above 0: a prediction uses the expected number of detected genes
    shown = counts.layers.get("prob", umi > 0)
    nuclei.obs["n_genes_by_counts"] = np.asarray(shown.sum(axis=1), dtype=float).ravel()
    log_normalise(nuclei)
    if not (nuclei.X.max(axis=0) - nuclei.X.min(axis=0)).nnz:
        raise InputError(f"{what}: all nuclei have the same expression, so there are no clusters; check the counts")
    if nuclei.n_vars > settings.n_top_genes:
        sc.pp.highly_variable_genes(nuclei, n_top_genes=settings.n_top_genes, flavor="seurat")
    else:
        nuclei.var["highly_variable"] = True
    n_hvg = int(nuclei.var["highly_variable"].sum())
    n_pcs = min(settings.n_pcs, nuclei.n_obs - 1, n_hvg - 1)
    sc.pp.pca(nuclei, n_comps=n_pcs, random_state=settings.seed)
    with warnings.catch_warnings():
        # raised by scanpy itself when it sets the diagonal of the distances
        warnings.simplefilter("ignore", sp.SparseEfficiencyWarning)
        sc.pp.neighbors(nuclei, n_neighbors=settings.n_neighbors, n_pcs=n_pcs, random_state=settings.seed)
    sc.tl.umap(nuclei, random_state=settings.seed)
    return nuclei


def log_normalise(nuclei: ad.AnnData) -> None:
    """Scale each nucleus to the median total and apply log1p, in place."""
    import scanpy as sc

    sc.pp.normalize_total(nuclei)
    sc.pp.log1p(nuclei)


def cluster(nuclei: ad.AnnData, settings: ClusterSettings, *, what: str = "prediction") -> int:
    """Find Leiden clusters at the resolution of the settings, and drop small ones.

    Parameters
    ----------
    nuclei
        Result of `embed`. Receives `obs["cluster"]` ("0", "1", ... by decreasing size; missing for nuclei of dropped clusters) and, in
        `uns["clusters"]`, the resolution and the number of dropped nuclei.
    settings, what
        As for `embed`.

    Returns
    -------
    Number of clusters kept.

    Raises
    ------
    InputError
        If fewer than two clusters are left.
    """
    labels = _leiden(nuclei, settings.resolution, settings)
    return _store(nuclei, labels, settings, settings.resolution, what)


def cluster_to_match(
    nuclei: ad.AnnData,
    settings: ClusterSettings,
    n_clusters: int,
    *,
    low: float = 0.02,
    high: float = 8.0,
    what: str = "section",
) -> int:
    """Find Leiden clusters at the resolution that gives a certain number of them, by bisection.

    Only clusters that are kept count. If no resolution gives exactly that number, the closest one is used and a warning is logged.

    Parameters
    ----------
    nuclei, settings, what
        As for `cluster`; `settings.resolution` is not used.
    n_clusters
        Number of clusters to aim for.
    low, high
        Range of resolutions to search.

    Returns
    -------
    Number of clusters found.
    """
    tried: list[tuple[int, float, NDArray[np.intp]]] = []

    def kept(resolution: float) -> int:
        labels = _leiden(nuclei, resolution, settings)
        n = len(_kept(labels, settings))
        tried.append((abs(n - n_clusters), resolution, labels))
        return n

    bisect(kept, n_clusters, low, high)
    _, resolution, labels = min(tried, key=lambda one: one[:2])
    n = _store(nuclei, labels, settings, resolution, what)
    if n != n_clusters:
        logger.warning("%s: found %d clusters; no resolution gives %d", what, n, n_clusters)
    return n


def bisect(count: Callable[[float], int], wanted: int, low: float, high: float) -> float:
    """Find the argument at which an increasing count reaches a value, by bisection on a log scale.

    Returns
    -------
    The last argument tried. Its count equals `wanted` unless no tried argument gives that count.
    """
    middle = low
    for _ in range(_BISECTIONS):
        middle = float(np.sqrt(low * high))
        n = count(middle)
        if n == wanted:
            break
        low, high = (middle, high) if n < wanted else (low, middle)
    return middle


def find_markers(
    nuclei: ad.AnnData, *, groupby: str = "cluster", min_log2fc: float = 0.25, max_p: float = 0.05
) -> pd.DataFrame:
    """Find genes that are upregulated in a cluster compared with all other nuclei (Wilcoxon, Benjamini-Hochberg).

    The paper's |log2FC| > 0.25 also admits downregulated genes, but its top 25 by score are all upregulated, so others are not used here.

    Parameters
    ----------
    nuclei
        Log-normalized nuclei with `obs[groupby]`; nuclei without a cluster are ignored.
    groupby
        Column of the clusters.
    min_log2fc
        Minimum log2 fold change.
    max_p
        Maximum adjusted p value.

    Returns
    -------
    `cluster, rank, gene, score, log2fc, p_value, p_adj, share_in, share_out` (share of nuclei that express the gene), best first within
    each cluster.
    """
    import scanpy as sc

    known = nuclei[nuclei.obs[groupby].notna()]
    tested = ad.AnnData(known.X, obs=known.obs[[groupby]].copy(), var=pd.DataFrame(index=known.var_names))
    tested.obs[groupby] = tested.obs[groupby].cat.remove_unused_categories()
    tested.uns["log1p"] = {"base": None}
    sc.tl.rank_genes_groups(tested, groupby, method="wilcoxon", use_raw=False, pts=True)
    table = sc.get.rank_genes_groups_df(tested, group=None)
    if "group" not in table:  # scanpy omits the column if there is one group
        table["group"] = tested.obs[groupby].cat.categories[0]
    names = {
        "group": "cluster", "names": "gene", "scores": "score", "logfoldchanges": "log2fc", "pvals": "p_value",
        "pvals_adj": "p_adj", "pct_nz_group": "share_in", "pct_nz_reference": "share_out",
    }  # fmt: skip
    table = table.rename(columns=names)
    table = table[(table["log2fc"] > min_log2fc) & (table["p_adj"] < max_p)]
    table = table.sort_values(["cluster", "score"], ascending=[True, False], kind="stable")
    table.insert(1, "rank", table.groupby("cluster", observed=True).cumcount() + 1)
    columns = ["cluster", "rank", *(name for name in names.values() if name != "cluster")]
    markers: pd.DataFrame = table[columns].reset_index(drop=True)
    return markers


def score_subtypes(nuclei: ad.AnnData, markers: pd.DataFrame, *, n_genes: int = 5, seed: int = 0) -> pd.DataFrame:
    """Score every nucleus for the top markers of each cluster (scanpy's `score_genes`).

    Parameters
    ----------
    nuclei
        Log-normalized nuclei, (n_nuclei, n_genes).
    markers
        Result of `find_markers`.
    n_genes
        Number of top markers per score.
    seed
        Seed for choosing the control genes.

    Returns
    -------
    Columns `score_<cluster>` for the clusters that have markers, (n_nuclei, n_scores).
    """
    import scanpy as sc

    scores = ad.AnnData(nuclei.X, obs=pd.DataFrame(index=nuclei.obs_names), var=pd.DataFrame(index=nuclei.var_names))
    for name, table in markers[markers["rank"] <= n_genes].groupby("cluster", observed=True):
        genes = table["gene"].tolist()
        try:
            sc.tl.score_genes(scores, genes, score_name=f"score_{name}", random_state=seed)
        except RuntimeError:  # a small panel has no control genes of similar expression: compare with all others
            chosen = scores.var_names.isin(genes)
            others = scores.X[:, ~chosen].mean(axis=1) if not chosen.all() else 0.0
            scores.obs[f"score_{name}"] = np.asarray(scores.X[:, chosen].mean(axis=1) - others).ravel()
    of_clusters: pd.DataFrame = scores.obs
    return of_clusters


def silhouette(nuclei: ad.AnnData, labels: pd.Series, *, seed: int = 0) -> float:
    """Mean silhouette width of clusters in PCA space, over at most 10,000 nuclei; NaN for fewer than two clusters.

    Parameters
    ----------
    nuclei
        Result of `embed`.
    labels
        Cluster of each nucleus; nuclei without one are ignored.
    seed
        Seed for sampling nuclei.
    """
    from sklearn.metrics import silhouette_score

    known = np.flatnonzero(labels.notna().to_numpy())
    names = labels.astype(object).to_numpy()[known]
    if not 2 <= len(set(names)) < len(names):
        return float("nan")
    size = min(_SILHOUETTE_NUCLEI, len(known))
    return float(silhouette_score(nuclei.obsm["X_pca"][known], names, sample_size=size, random_state=seed))


def _import_umap() -> None:
    """Import umap, which scanpy needs, without TensorFlow.

    If TensorFlow is installed (with StarDist), umap imports it for its parametric variant: ten seconds, and log lines on stderr.
    """
    import prts._torchvision  # noqa: F401  umap imports torchvision as well

    if "umap" in sys.modules or "tensorflow" in sys.modules:
        return
    sys.modules["tensorflow"] = None  # type: ignore[assignment]
    try:
        import umap  # noqa: F401
    finally:
        del sys.modules["tensorflow"]


def _leiden(nuclei: ad.AnnData, resolution: float, settings: ClusterSettings) -> NDArray[np.intp]:
    import scanpy as sc

    options: dict[str, Any] = {"flavor": "igraph", "n_iterations": 2, "directed": False}
    sc.tl.leiden(nuclei, resolution=resolution, random_state=settings.seed, key_added="_leiden", **options)
    labels = nuclei.obs.pop("_leiden").astype(int).to_numpy()
    nuclei.uns.pop("_leiden", None)
    return np.asarray(labels, dtype=np.intp)


def _kept(labels: NDArray[np.intp], settings: ClusterSettings) -> NDArray[np.intp]:
    """Labels of the clusters that are large enough, by decreasing size."""
    sizes = np.bincount(labels)
    order = np.argsort(-sizes, kind="stable")
    return order[sizes[order] >= settings.least(len(labels))]


def _store(
    nuclei: ad.AnnData, labels: NDArray[np.intp], settings: ClusterSettings, resolution: float, what: str
) -> int:
    kept = _kept(labels, settings)
    n_all = len(np.unique(labels))
    least = settings.least(len(labels))
    if len(kept) < 2:
        raise InputError(
            f"{what}: resolution {resolution:.3g} gives {n_all} cluster{'s' * (n_all != 1)}, {len(kept)} of them with at least "
            f"{least} nuclei, and finding markers takes two; raise `resolution` or lower `min_share` of the clusters"
        )
    position = np.full(labels.max() + 1, -1)
    position[kept] = np.arange(len(kept))
    codes = position[labels]
    nuclei.obs["cluster"] = pd.Categorical.from_codes(codes, pd.Index([str(i) for i in range(len(kept))]))
    dropped = int((codes < 0).sum())
    nuclei.uns["clusters"] = {"resolution": resolution, "least_nuclei": least, "n_dropped_nuclei": dropped}
    logger.info(
        "%s: %d clusters at resolution %.3g; dropped %d nuclei in %d clusters with fewer than %d nuclei",
        what, len(kept), resolution, dropped, n_all - len(kept), least,
    )  # fmt: skip
    return len(kept)
