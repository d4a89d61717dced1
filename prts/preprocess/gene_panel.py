"""The ordered genes that a model predicts, and what the methods that choose them share."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData

from prts.errors import InputError, ParameterError, some_of
from prts.io.cache import atomic
from prts.io.gene_list import is_names, read_json
from prts.preprocess.gene_columns import find_genes, selector

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Panel:
    """The ordered genes that a model predicts.

    Parameters
    ----------
    genes
        Unique names, (n_genes,).
    gene_ids
        Unique ids, (n_genes,), by which genes are found in other sections.
    method
        How they were chosen: "paper", "top" or "file".
    steps
        Number of nuclei, genes or clusters kept by each step of the method.
    """

    genes: tuple[str, ...]
    gene_ids: tuple[str, ...]
    method: str
    steps: dict[str, int]

    def to_json(self, path: Path) -> None:
        """Write the panel."""
        with atomic(path) as temporary:
            temporary.write_text(json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def from_json(cls, path: Path) -> Panel:
        """Read a panel that `to_json` wrote.

        Raises
        ------
        InputError
            If the file is missing or not a panel.
        """
        content = read_json(path)
        if not isinstance(content, dict) or set(content) != {"genes", "gene_ids", "method", "steps"}:
            raise InputError(f"{path}: not a gene panel; give a JSON object with genes, gene_ids, method and steps")
        for key in ("genes", "gene_ids"):
            if not is_names(content[key]) or len(set(content[key])) != len(content[key]):
                raise InputError(f"{path}: {key} is not a list of distinct names; get a complete copy")
        if len(content["genes"]) != len(content["gene_ids"]):
            raise InputError(
                f"{path}: {len(content['genes'])} genes but {len(content['gene_ids'])} gene_ids; get a complete copy"
            )
        if not isinstance(content["steps"], dict) or not all(type(n) is int for n in content["steps"].values()):
            raise InputError(f"{path}: steps does not map names to numbers; get a complete copy")
        genes, gene_ids = tuple(content["genes"]), tuple(content["gene_ids"])
        return cls(genes, gene_ids, str(content["method"]), content["steps"])

    def align(self, counts: AnnData) -> sp.csr_matrix:
        """Counts of the panel's genes, found by `gene_id`.

        Parameters
        ----------
        counts
            (n_nuclei, any genes) with `var["gene_id"]`.

        Returns
        -------
        CSR (n_nuclei, n_genes), sorted, of the dtype of `counts.X`; genes that `counts` lacks are columns of zeros.

        Raises
        ------
        InputError
            If `counts` has none of the genes.
        """
        aligned = sp.csr_matrix(counts.X) @ self.selector(counts.var, counts.X.dtype)
        aligned.sort_indices()
        return aligned

    def selector(self, var: pd.DataFrame, dtype: Any) -> sp.csr_matrix:
        """The matrix (any genes, n_genes) by which counts are multiplied to have the panel's genes.

        Parameters
        ----------
        var
            Genes of the counts, with `gene_id`.
        dtype
            Type of the counts.

        Raises
        ------
        InputError
            If `var` has none of the genes.
        """
        column = find_genes(var, self.gene_ids)
        absent = np.flatnonzero(column < 0)
        if len(absent) == len(column):
            raise ParameterError(
                "panel",
                "",
                f"none of its {len(self.genes)} genes ({some_of(self.gene_ids)}) is among the section's {len(var)} "
                f"({some_of(var['gene_id'])}); use a model and a section of one species with the same kind of gene ids",
            )
        if len(absent):
            names = some_of([self.genes[i] for i in absent])
            logger.warning(
                "%d of %d panel genes are not in the section and counted as 0: %s", len(absent), len(self.genes), names
            )
        return selector(column, len(var), dtype)


def shared_genes(counts: Sequence[AnnData]) -> pd.DataFrame:
    """`var` of the first section, reduced to the genes that all sections measure."""
    var: pd.DataFrame = counts[0].var
    for number in range(1, len(counts)):  # a slice would load all of them
        var = var[var["gene_id"].isin(counts[number].var["gene_id"])]
    if var.empty:
        raise ParameterError(
            "panel", "", "the training sections share no gene id; use sections of one species and genome"
        )
    return var


def aligned_counts(counts: Sequence[AnnData], var: pd.DataFrame) -> Iterator[sp.csr_matrix]:
    """Counts of some genes of each section, CSR float32."""
    genes = Panel(tuple(var.index), tuple(var["gene_id"]), "", {})
    for section in counts:
        yield genes.align(section).astype(np.float32)


def name_panel(var: pd.DataFrame, method: str, steps: dict[str, int]) -> Panel:
    """The panel of the genes in `var`, with its steps in the log."""
    logger.info("panel %s: %s", method, ", ".join(f"{name} {n}" for name, n in steps.items()))
    return Panel(tuple(map(str, var.index)), tuple(map(str, var["gene_id"])), method, steps)
