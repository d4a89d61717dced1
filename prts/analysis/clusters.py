"""Clusters of nuclei and their marker genes, by the steps of the paper, the same for predicted and measured sections."""

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

from prts.errors import InputError

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
        Highly variable genes (flavour `seurat`); all genes where there are no more.
    n_pcs, n_neighbors
        Of PCA and of the graph.
    resolution
        Of Leiden. None where another count of clusters is to be met (`cluster_to_match`).
    min_share
        Clusters with a smaller share of the nuclei are dropped: the paper's 1,200 of about 60,000 are 2 %.
    min_cells
        The same as a number of nuclei, in place of the share.
    seed
        Of PCA, Leiden and UMAP.
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
                raise InputError(f"clusters.{key}: {getattr(self, key)} is too few; give {low} or more")
        if not 0 < self.resolution < np.inf:
            raise InputError(f"clusters.resolution: {self.resolution} is not above 0; the paper's is 0.6")
        if not 0 <= self.min_share < 1:
            raise InputError(f"clusters.min_share: {self.min_share} is no share; the paper's is 0.02")
        if self.min_cells is not None and self.min_cells < 2:
            raise InputError(
                f"clusters.min_cells: {self.min_cells} is too few to test for markers; give 2 or more, or null"
            )

    def least(self, n_nuclei: int) -> int:
        """Fewest nuclei of a cluster that is kept, of so many nuclei; no test for markers can be made of one."""
        return self.min_cells if self.min_cells is not None else max(2, int(np.ceil(self.min_share * n_nuclei)))


def embed(counts: ad.AnnData, settings: ClusterSettings, *, what: str = "prediction") -> ad.AnnData:
    """Normalise, find variable genes, reduce, link neighbours, draw the UMAP.

    Parameters
    ----------
    counts
        UMI counts, measured or expected, (n_nuclei, n_genes), in X.
    settings
        Of the steps.
    what
        What the counts are, for messages.

    Returns
    -------
    A new object (n_nuclei, n_genes) with X = log1p of counts scaled to the median total, `layers["umi"]`, `var["highly_variable"]`,
    `obsm["X_pca"]`, `obsm["X_umap"]`, the graph, and the `obs`, `obsm["spatial"]` and `uns["spatial"]` of `counts`.

    Raises
    ------
    InputError
        If there are too few nuclei or genes.
    """
    _import_umap()
    import scanpy as sc

    if counts.n_obs <= settings.n_neighbors or counts.n_vars < 3:
        raise InputError(
            f"{what}: {counts.n_obs} nuclei x {counts.n_vars} genes are too few to cluster with "
            f"clusters.n_neighbors={settings.n_neighbors}; more nuclei than neighbours and 3 genes are needed"
        )
    umi = sp.csr_matrix(counts.X, dtype=np.float32)
    nuclei = ad.AnnData(umi.copy(), obs=counts.obs.copy(), var=counts.var.copy())
    nuclei.layers["umi"] = umi
    nuclei.obsm["spatial"] = np.asarray(counts.obsm["spatial"], dtype=float)
    if "spatial" in counts.uns:
        nuclei.uns["spatial"] = counts.uns["spatial"]
    nuclei.obs["total_counts"] = np.asarray(umi.sum(axis=1)).ravel()
    # of a prediction the number that is expected to show: it has some of every gene
    shown = counts.layers.get("prob", umi > 0)
    nuclei.obs["n_genes_by_counts"] = np.asarray(shown.sum(axis=1), dtype=float).ravel()
    log_normalise(nuclei)
    if nuclei.n_vars > settings.n_top_genes:
        sc.pp.highly_variable_genes(nuclei, n_top_genes=settings.n_top_genes, flavor="seurat")
    else:
        nuclei.var["highly_variable"] = True
    n_hvg = int(nuclei.var["highly_variable"].sum())
    n_pcs = min(settings.n_pcs, nuclei.n_obs - 1, n_hvg - 1)
    sc.pp.pca(nuclei, n_comps=n_pcs, random_state=settings.seed)
    with warnings.catch_warnings():
        # scanpy's own way to set the diagonal of distances
        warnings.simplefilter("ignore", sp.SparseEfficiencyWarning)
        sc.pp.neighbors(nuclei, n_neighbors=settings.n_neighbors, n_pcs=n_pcs, random_state=settings.seed)
    sc.tl.umap(nuclei, random_state=settings.seed)
    return nuclei


def log_normalise(nuclei: ad.AnnData) -> None:
    """Scale each nucleus to the median total and take log1p, in place."""
    import scanpy as sc

    sc.pp.normalize_total(nuclei)
    sc.pp.log1p(nuclei)


def cluster(nuclei: ad.AnnData, settings: ClusterSettings, *, what: str = "prediction") -> int:
    """Leiden clusters at the resolution of the settings, small ones dropped.

    Parameters
    ----------
    nuclei
        Of `embed`; gets `obs["cluster"]`: "0", "1", ... by falling size, missing for nuclei of dropped clusters, and in
        `uns["clusters"]` the resolution and how many were dropped.
    settings
        As for `embed`.
    what
        What the nuclei are, for messages.

    Returns
    -------
    How many clusters were kept.

    Raises
    ------
    InputError
        If fewer than two are left: there is nothing to compare.
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
    """Leiden clusters at the resolution that gives as many of them as another section has, found by bisection.

    The number that counts is that of the clusters kept. Where no resolution gives exactly that many, the nearest is taken, and
    the log says so.

    Parameters
    ----------
    nuclei, settings, what
        As for `cluster`; `settings.resolution` is not used.
    n_clusters
        How many clusters are wanted.
    low, high
        The resolutions between which to look.

    Returns
    -------
    How many clusters there are.
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
        logger.warning("%s: %d clusters where %d were wanted: no resolution gives as many", what, n, n_clusters)
    return n


def bisect(count: Callable[[float], int], wanted: int, low: float, high: float) -> float:
    """Look for the argument at which a count that rises with it is as wanted, halving on the logarithm.

    Returns
    -------
    The last argument tried; the count there is as wanted unless no tried argument gives it.
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
    """Genes that each cluster has more of than the other nuclei (Wilcoxon, Benjamini-Hochberg).

    Only genes that are higher in the cluster name it: the paper's |log2FC| > 0.25 admits lower ones, but its top 25 by score
    are higher ones.

    Parameters
    ----------
    nuclei
        Log-normalised, with `obs[groupby]`; nuclei without a cluster are left out.
    groupby
        Column of the clusters.
    min_log2fc
        Least log2 fold change.
    max_p
        Largest adjusted p value.

    Returns
    -------
    `cluster, rank, gene, score, log2fc, p_value, p_adj, share_in, share_out` (nuclei with any of the gene), best first in each
    cluster.
    """
    import scanpy as sc

    known = nuclei[nuclei.obs[groupby].notna()]
    tested = ad.AnnData(known.X, obs=known.obs[[groupby]].copy(), var=pd.DataFrame(index=known.var_names))
    tested.obs[groupby] = tested.obs[groupby].cat.remove_unused_categories()
    tested.uns["log1p"] = {"base": None}
    sc.tl.rank_genes_groups(tested, groupby, method="wilcoxon", use_raw=False, pts=True)
    table = sc.get.rank_genes_groups_df(tested, group=None)
    if "group" not in table:  # scanpy leaves the column out where there is one group
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
    """Score of each cluster's best markers in every nucleus (scanpy's `score_genes`).

    Parameters
    ----------
    nuclei
        Log-normalised, (n_nuclei, n_genes).
    markers
        Of `find_markers`.
    n_genes
        How many of the best markers make a score.
    seed
        Of the choice of control genes.

    Returns
    -------
    (n_nuclei, n_clusters with markers), a column `score_<cluster>` each.
    """
    import scanpy as sc

    scores = ad.AnnData(nuclei.X, obs=pd.DataFrame(index=nuclei.obs_names), var=pd.DataFrame(index=nuclei.var_names))
    for name, table in markers[markers["rank"] <= n_genes].groupby("cluster", observed=True):
        sc.tl.score_genes(scores, table["gene"].tolist(), score_name=f"score_{name}", random_state=seed)
    of_clusters: pd.DataFrame = scores.obs
    return of_clusters


def silhouette(nuclei: ad.AnnData, labels: pd.Series, *, seed: int = 0) -> float:
    """Mean silhouette width of clusters in the space of the principal components, of at most 10,000 nuclei; NaN below two clusters.

    Parameters
    ----------
    nuclei
        Of `embed`.
    labels
        Cluster of each nucleus; missing ones are left out.
    seed
        Of the choice of nuclei.
    """
    from sklearn.metrics import silhouette_score

    known = np.flatnonzero(labels.notna().to_numpy())
    names = labels.astype(object).to_numpy()[known]
    if not 2 <= len(set(names)) < len(names):
        return float("nan")
    size = min(_SILHOUETTE_NUCLEI, len(known))
    return float(silhouette_score(nuclei.obsm["X_pca"][known], names, sample_size=size, random_state=seed))


def _import_umap() -> None:
    """Import umap, which scanpy's neighbours need, without what it takes along for a part that is not used here.

    Where TensorFlow is installed umap imports it: ten seconds, and log lines on stderr. Told that it is not there, umap does without.
    """
    import prts._torchvision  # noqa: F401  umap imports torchvision through it, too

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
    """Labels of the clusters that are large enough, by falling size."""
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
            f"{what}: Leiden at resolution {resolution:.3g} gives {n_all} clusters of which {len(kept)} hold {least} nuclei or more, "
            "and one cluster has nothing to be compared with; raise clusters.resolution or lower clusters.min_share"
        )
    position = np.full(labels.max() + 1, -1)
    position[kept] = np.arange(len(kept))
    codes = position[labels]
    nuclei.obs["cluster"] = pd.Categorical.from_codes(codes, pd.Index([str(i) for i in range(len(kept))]))
    dropped = int((codes < 0).sum())
    nuclei.uns["clusters"] = {"resolution": resolution, "least_nuclei": least, "n_dropped_nuclei": dropped}
    logger.info(
        "%s: %d clusters at resolution %.3g; %d nuclei in %d smaller ones than %d dropped",
        what, len(kept), resolution, dropped, n_all - len(kept), least,
    )  # fmt: skip
    return len(kept)
