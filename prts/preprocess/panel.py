"""The methods that choose the gene panel, on the nuclei of the training sections only.

Several training sections are stacked on the genes (by `gene_id`) that all of them measure. A gene that one section's probe
set lacks has no counts there for a technical reason; filled with zeros it would look like a gene that differs between tissues.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData
from pydantic import Field

from prts.arguments import checked
from prts.errors import InputError, ParameterError, some_of
from prts.io.cache import file_identity
from prts.io.gene_list import read_gene_list
from prts.io.unit_names import unit_name
from prts.preprocess.gene_panel import Panel as Panel
from prts.preprocess.gene_panel import aligned_counts, name_panel, shared_genes

logger = logging.getLogger(__name__)

# Clustering needs all nuclei in memory; more of them do not change which genes mark a cluster.
_MOST = 200_000
# Fewer genes than this are too few for clusters and cell types.
FEW = 200


def warn_of_small(panel: Panel) -> None:
    """Say where the paper's method found few genes, as on small or uniform sections, and what finds more."""
    if panel.method == "paper" and len(panel.genes) < FEW:
        logger.warning(
            "panel: only %d of %d highly variable genes mark a cluster; panel=top takes the most variable genes, as many as "
            "panel.n_genes says",
            len(panel.genes), panel.steps["highly_variable"],
        )  # fmt: skip


class PaperPanel:
    """The paper's panel: highly variable genes that mark a cluster of nuclei.

    normalize_total, log1p, highly variable genes (seurat flavor), PCA, neighbors, Leiden, Wilcoxon of each cluster against
    the rest; kept are the highly variable genes with adjusted p and |log2 fold change| beyond the limits in any cluster. All
    steps are scanpy's. Only the highly variable genes are tested: their p values are the same as in a test of all genes, and
    Benjamini-Hochberg adjusts for the tested hypotheses only. Clusters of one nucleus have no variance and are excluded from
    the test, as scanpy requires.

    Parameters
    ----------
    n_top_genes
        Highly variable genes.
    n_pcs
        Principal components of the highly variable genes.
    n_neighbors
        Neighbors of each nucleus (scanpy's default).
    resolution
        Resolution of Leiden; higher gives more clusters.
    max_p_adjusted
        Upper limit of the Benjamini-Hochberg adjusted p.
    min_abs_log2fc
        Lower limit of |log2 fold change|.
    seed
        Seed of PCA, neighbors and Leiden.
    """

    @checked("panel")
    def __init__(
        self,
        n_top_genes: Annotated[int, Field(ge=1)] = 2000,
        n_pcs: Annotated[int, Field(ge=1)] = 50,
        n_neighbors: Annotated[int, Field(ge=2)] = 15,
        resolution: Annotated[float, Field(ge=0)] = 0.6,
        max_p_adjusted: Annotated[float, Field(ge=0, le=1)] = 0.01,
        min_abs_log2fc: Annotated[float, Field(ge=0)] = 1.0,
        seed: Annotated[int, Field(ge=0)] = 0,
    ) -> None:
        self.n_top_genes = n_top_genes
        self.n_pcs = n_pcs
        self.n_neighbors = n_neighbors
        self.resolution = resolution
        self.max_p_adjusted = max_p_adjusted
        self.min_abs_log2fc = min_abs_log2fc
        self.seed = seed

    def settings(self) -> dict[str, Any]:
        """Everything that determines the panel apart from the counts."""
        return {"method": "paper", **vars(self)}

    def __call__(self, counts: Sequence[AnnData]) -> Panel:
        """Choose the panel on the nuclei of the training sections.

        Parameters
        ----------
        counts
            Counts of each training section after quality control.

        Returns
        -------
        The panel, in the order of the first section's genes.

        Raises
        ------
        InputError
            If there are fewer nuclei, genes or clusters than the settings need, or no gene passes.
        """
        import prts._torchvision  # noqa: F401, I001  scanpy's neighbors import umap, which imports torchvision
        import scanpy as sc

        nuclei = _stack(counts)
        self._check_size(nuclei)
        _log_normalize(nuclei)
        n_genes = nuclei.n_vars
        sc.pp.highly_variable_genes(nuclei, n_top_genes=self.n_top_genes, flavor="seurat")
        nuclei = nuclei[:, nuclei.var["highly_variable"]].copy()
        if nuclei.n_vars < self.n_top_genes:
            raise ParameterError(
                "panel", "n_top_genes", f"{self.n_top_genes}, but only {nuclei.n_vars} genes vary; lower it"
            )
        sc.pp.pca(nuclei, n_comps=self.n_pcs, random_state=self.seed)
        sc.pp.neighbors(nuclei, n_neighbors=self.n_neighbors, n_pcs=self.n_pcs, random_state=self.seed)
        sc.tl.leiden(
            nuclei, resolution=self.resolution, flavor="igraph", n_iterations=2, directed=False, random_state=self.seed
        )
        sizes = nuclei.obs["leiden"].value_counts()
        tested = sorted(sizes.index[sizes > 1], key=int)
        if len(sizes) < 2 or not tested:
            found = "one cluster; raise it" if len(sizes) < 2 else "only clusters of one nucleus; lower it"
            raise ParameterError(
                "panel",
                "resolution",
                f"at {self.resolution:g} Leiden splits {nuclei.n_obs} nuclei into {found}, or choose the panel top",
            )
        sc.tl.rank_genes_groups(nuclei, "leiden", groups=tested, method="wilcoxon", use_raw=False)
        result = pd.concat(sc.get.rank_genes_groups_df(nuclei, group=group) for group in tested)
        significant = result["pvals_adj"] < self.max_p_adjusted
        strong = significant & (result["logfoldchanges"].abs() > self.min_abs_log2fc)
        kept = nuclei.var_names.isin(result.loc[strong, "names"])
        if not kept.any():
            raise ParameterError(
                "panel",
                "",
                f"none of {nuclei.n_vars} highly variable genes marks one of {len(sizes)} clusters; lower `min_abs_log2fc`, "
                "raise `max_p_adjusted`, or choose the panel top",
            )
        steps = {
            "nuclei": nuclei.n_obs,
            "genes": n_genes,
            "highly_variable": nuclei.n_vars,
            "clusters": len(sizes),
            "significant": int(result.loc[significant, "names"].nunique()),
            "kept": int(kept.sum()),
        }
        return name_panel(nuclei.var[kept], "paper", steps)

    def _check_size(self, nuclei: AnnData) -> None:
        n_nuclei, n_genes = nuclei.shape
        if n_genes < self.n_top_genes:
            raise ParameterError(
                "panel", "n_top_genes", f"{self.n_top_genes}, but the training sections share {n_genes} genes; lower it"
            )
        if min(n_nuclei, self.n_top_genes) <= self.n_pcs:
            raise ParameterError(
                "panel",
                "n_pcs",
                f"{self.n_pcs} components need more nuclei and highly variable genes than {n_nuclei} and {self.n_top_genes}; lower it",
            )
        if n_nuclei <= self.n_neighbors:
            raise ParameterError(
                "panel", "n_neighbors", f"{self.n_neighbors}, but there are {n_nuclei} training nuclei; lower it"
            )


class TopPanel:
    """The most variable genes: highest variance of log-normalized counts over the training nuclei.

    Genes seen in few nuclei are excluded: their variance rests on a few counts, and no metric could judge a prediction.
    Ties are broken by `gene_id`.

    Parameters
    ----------
    n_genes
        Number of genes.
    min_nuclei, min_share
        A gene must have a count in at least `min_nuclei` nuclei and in at least this share of them.
    """

    @checked("panel")
    def __init__(
        self,
        n_genes: Annotated[int, Field(ge=1)] = 1000,
        min_nuclei: Annotated[int, Field(ge=0)] = 10,
        min_share: Annotated[float, Field(ge=0, le=1)] = 0.01,
    ) -> None:
        self.n_genes = n_genes
        self.min_nuclei = min_nuclei
        self.min_share = min_share

    def settings(self) -> dict[str, Any]:
        """Everything that determines the panel apart from the counts."""
        return {"method": "top", **vars(self)}

    def __call__(self, counts: Sequence[AnnData]) -> Panel:
        """Choose the panel on the nuclei of the training sections.

        Parameters
        ----------
        counts
            Counts of each training section after quality control.

        Returns
        -------
        The panel, most variable gene first.

        Raises
        ------
        InputError
            If fewer than `n_genes` genes are seen in enough nuclei.
        """
        from sklearn.utils.sparsefuncs import incr_mean_variance_axis

        var, n_obs, seen_in, totals = shared_genes(counts), 0, 0, []
        for section in aligned_counts(counts, var):
            n_obs += section.shape[0]
            seen_in = seen_in + section.getnnz(axis=0)
            totals.append(np.asarray(section.sum(axis=1)).ravel())
        _log_size(n_obs, counts, len(var))
        needed = max(self.min_nuclei, math.ceil(self.min_share * n_obs))
        seen = np.asarray(seen_in) >= needed
        if seen.sum() < self.n_genes:
            raise ParameterError(
                "panel",
                "n_genes",
                f"{self.n_genes}, but only {seen.sum()} genes are seen in at least {needed} of {n_obs} training nuclei; "
                "lower it, or `min_nuclei` and `min_share`",
            )
        umi = np.concatenate(totals)
        target = float(np.median(umi[umi > 0]))
        mean, variance, n = np.zeros(len(var)), np.zeros(len(var)), np.zeros(len(var))
        for section in aligned_counts(counts, var):  # one after the other, so that memory is that of the largest
            # scanpy's normalize_total and log1p, without the seconds that its import takes
            total = np.asarray(section.sum(axis=1), dtype=np.float64).ravel()
            factor = np.divide(target, total, out=np.zeros_like(total), where=total > 0)
            rows = (sp.diags_array(factor) @ section.astype(np.float64)).tocsr().log1p()
            mean, variance, n = incr_mean_variance_axis(rows, axis=0, last_mean=mean, last_var=variance, last_n=n)
        order = np.lexsort((var["gene_id"].to_numpy(dtype=str), -np.where(seen, variance, -1.0)))[: self.n_genes]
        steps = {"nuclei": n_obs, "genes": len(var), "seen": int(seen.sum()), "kept": self.n_genes}
        return name_panel(var.iloc[order], "top", steps)


class FilePanel:
    """Genes from a list: text with one per line, a table (comma, semicolon, tab), or JSON (a list, or a panel of prts).

    Entries are gene ids, or symbols that name exactly one gene. In a table with a header the column of ids
    (`gene_id`, `id`, ...) or names (`gene`, `symbol`, ...) is read, in any other table the first column. Lines that start
    with # are skipped.

    Parameters
    ----------
    path
        The list.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        self.path = path

    def settings(self) -> dict[str, Any]:
        """Everything that determines the panel apart from the counts."""
        return {"method": "file", "file": file_identity(self._file())}

    def __call__(self, counts: Sequence[AnnData]) -> Panel:
        """Look the listed genes up in the training sections.

        Parameters
        ----------
        counts
            Counts of each training section.

        Returns
        -------
        The panel, in the order of the list.

        Raises
        ------
        InputError
            If the list cannot be read, has a symbol shared by several genes, or has no gene that all training sections measure.
        """
        path = self._file()
        return _listed(read_gene_list(path), counts, str(path))

    def _file(self) -> Path:
        if self.path is None:
            raise ParameterError("panel", "path", "is missing; give the list of genes")
        return Path(self.path)


class ListPanel:
    """Genes given by name or id, in this order.

    Parameters
    ----------
    genes
        Gene ids, or symbols that name one gene.
    """

    def __init__(self, genes: Sequence[str]) -> None:
        self.genes = tuple(map(str, genes))
        if not self.genes:
            raise ParameterError("panel", "genes", "is empty; name at least one gene")

    def settings(self) -> dict[str, Any]:
        """The genes."""
        return {"method": "list", "genes": list(self.genes)}

    def __call__(self, counts: Sequence[AnnData]) -> Panel:
        """Look the genes up in the training sections; see `FilePanel`."""
        return _listed(self.genes, counts, "genes")


def _listed(listed: Sequence[str], counts: Sequence[AnnData], source: str) -> Panel:
    """The panel of the genes that a list names."""
    wanted = pd.Index(list(listed)).unique()
    var = shared_genes(counts)
    symbols = pd.Index(var["symbol"].to_numpy(dtype=object))
    ambiguous = symbols.duplicated(keep=False)
    own = np.append(np.flatnonzero(~ambiguous), -1)  # so that -1 (not found) stays -1
    by_id, by_name = pd.Index(var["gene_id"]).get_indexer(wanted), var.index.get_indexer(wanted)
    by_symbol = own[symbols[own[:-1]].get_indexer(wanted)]
    at = np.where(by_id >= 0, by_id, np.where(by_name >= 0, by_name, by_symbol))
    unclear = wanted[(at < 0) & wanted.isin(symbols[ambiguous])]
    if len(unclear):
        ids = some_of(var["gene_id"][symbols == unclear[0]])
        raise InputError(f"{source}: {unclear[0]} names several genes ({ids}); list the id of one of them")
    unknown = wanted[at < 0]
    if len(unknown) == len(wanted):
        raise InputError(
            f"{source}: none of its {len(wanted)} genes ({some_of(wanted)}) is in the training sections (such as "
            f"{some_of(var.index)}); list symbols or gene ids of the same species"
        )
    if len(unknown):
        logger.warning(
            "%s: %d of %d genes are not in the training sections: %s",
            source,
            len(unknown),
            len(wanted),
            some_of(unknown),
        )
    chosen = var.iloc[pd.unique(at[at >= 0])]
    steps = {"listed": len(wanted), "genes": len(var), "kept": len(chosen)}
    return name_panel(chosen, "file", steps)


def _stack(counts: Sequence[AnnData]) -> AnnData:
    """Training nuclei of all sections x their shared genes, CSR float32; of more than 200,000, that many, evenly chosen."""
    var = shared_genes(counts)
    n_nuclei = sum(section.n_obs for section in counts)
    parts = []
    for section in aligned_counts(counts, var):
        size = section.shape[0]
        if n_nuclei > _MOST:
            section = section[np.linspace(0, size - 1, max(1, size * _MOST // n_nuclei)).astype(np.intp)]
        parts.append(section)
    X = sp.vstack(parts, format="csr")
    units = unit_name(counts[0].obs_names)
    if n_nuclei > _MOST:
        logger.info("panel: %d of %d training %s are used, evenly chosen", X.shape[0], n_nuclei, units)
    _log_size(X.shape[0], counts, X.shape[1])
    return AnnData(X, var=var.copy())


def _log_size(n: int, counts: Sequence[AnnData], n_genes: int) -> None:
    units = unit_name(counts[0].obs_names)
    logger.info("panel: %d %s of %d training sections, %d shared genes", n, units, len(counts), n_genes)


def _log_normalize(nuclei: AnnData) -> None:
    """Scale each nucleus to the median total and take log1p."""
    import scanpy as sc

    sc.pp.normalize_total(nuclei)
    sc.pp.log1p(nuclei)
