"""Columns of a counts table for the genes of a panel or a prediction, in their order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import scipy.sparse as sp

if TYPE_CHECKING:
    from numpy.typing import NDArray


def find_genes(
    var: pd.DataFrame, gene_ids: Sequence[str] | None, symbols: Sequence[str] | None = None
) -> NDArray[np.intp]:
    """Columns of genes in a table, by their ids; by their symbols, if these are given, where no id is found.

    Parameters
    ----------
    var
        Genes of the table; `gene_id` and `symbol` are looked at if they are there.
    gene_ids, symbols
        Ids and symbols of the genes, (n_genes,) both.

    Returns
    -------
    (n_genes,) column of each gene; -1 for a gene that is not there, or whose symbol several genes share.
    """
    wanted = gene_ids if gene_ids is not None else symbols
    assert wanted is not None
    column = np.full(len(wanted), -1, dtype=np.intp)
    searches = [(gene_ids, var.get("gene_id")), (symbols, var.index), (symbols, var.get("symbol"))]
    for names, known in searches:
        if names is None or known is None:
            continue
        index = pd.Index(np.asarray(known, dtype=object))
        unique = np.flatnonzero(~index.duplicated(keep=False))
        hit = index[unique].get_indexer(pd.Index(list(names), dtype=object))
        take = (column < 0) & (hit >= 0)
        column[take] = unique[hit[take]]
    return column


def selector(column: NDArray[np.intp], n_columns: int, dtype: Any) -> sp.csr_matrix:
    """The matrix by which counts (any, n_columns) are multiplied to have these columns, and zeros for -1."""
    known = np.flatnonzero(column >= 0)
    ones = np.ones(len(known), dtype=dtype)
    return sp.csr_matrix((ones, (column[known], known)), shape=(n_columns, len(column)))
