"""Gene programs: effects of cell type, domain and gradients (visible in the image) and of cell-level factors (invisible).

The programs depend only on `program_seed` and the number of genes, so that sections of one tissue share them. The expected UMI count of
gene g in nucleus c is

    X[c, g] = depth[c] * exp(log_rate[c, g] - log_total[c])
    log_rate[c, g] = type[g, kind(c)] + domain[g, domain(c)] + gradient[g] . gradient(c) + latent[g] . latent(c)

where log_total is the log of the sum over genes, so that the rates of a nucleus add up to its depth.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import anndata as ad
import numpy as np
import pandas as pd

from prts.simulate.tissue import DOMAIN_NAMES, N_GRADIENTS, TYPE_NAMES

if TYPE_CHECKING:
    from collections.abc import Sequence

    import geopandas as gpd
    from numpy.typing import NDArray

    from prts.simulate.nuclei import SimulatedNuclei

    Floats = NDArray[np.float32]

N_LATENT = 5
"""Number of cell-level factors; the last one is stress, which drives the mitochondrial genes."""
MEDIAN_UMI = 150.0
"""Median expected number of UMIs in the bins inside a nucleus."""

DENSE_ENTRIES = 20_000_000
"""Sections with more cells x genes store the factors in truth.h5ad but not the rates."""

_MITO = ("ND1", "ND2", "CO1", "CO2", "ATP8", "ATP6", "CO3", "ND3", "ND4L", "ND4", "ND5", "ND6", "CYB")
_MITO_SHARE = 0.05
_DEPTH_SD = 0.40
_AREA_POWER = 0.6
# Makes up for the UMIs that nuclei lose by diffusion (1 um); measured on sections of 2,000 to 20,000 nuclei.
_DEPTH_BEFORE_SPILL = 1.12


@dataclass(frozen=True)
class GenePrograms:
    """Genes and their effects on the log rate (natural logarithm)."""

    names: NDArray[np.object_]
    ids: NDArray[np.object_]
    mitochondrial: NDArray[np.bool_]
    marker_of: NDArray[np.int8]
    """Index of the cell type that the gene marks, or -1."""
    kind: Floats
    """(genes, types), including the abundance of the gene."""
    domain: Floats
    gradient: Floats
    latent: Floats
    dispersion: Floats
    """Size (r) of the negative binomial: variance = mean + mean^2 / r."""

    def markers(self) -> dict[str, list[str]]:
        """Marker genes of each cell type."""
        return {name: self.names[self.marker_of == k].tolist() for k, name in enumerate(TYPE_NAMES)}


def draw_gene_programs(genes: int, *, species: str = "human", program_seed: int = 0) -> GenePrograms:
    """Draw the genes of a tissue and their effects.

    Parameters
    ----------
    genes
        Number of genes: 13 mitochondrial ones (fewer below 260 genes), 1.5% markers per cell type (at least 2), and the rest, named
        SIM0001, SIM0002, ...
    species
        `human` (MT-ND1) or `mouse` (mt-Nd1).
    program_seed
        Sections with the same seed and number of genes share their programs.
    """
    rng = np.random.default_rng([program_seed, 11])
    n_mito = min(len(_MITO), genes // 20)
    each = max(2, round(0.015 * genes))
    n_types, n_plain = len(TYPE_NAMES), genes - n_mito - each * len(TYPE_NAMES)
    mito = [f"MT-{gene}" if species == "human" else f"mt-{gene.capitalize()}" for gene in _MITO[:n_mito]]
    markers = [f"{name}{k:02d}" for name in TYPE_NAMES for k in range(1, each + 1)]
    names = np.array([*mito, *markers, *(f"SIM{k:04d}" for k in range(1, n_plain + 1))], dtype=object)
    marker_of = np.concatenate([np.full(n_mito, -1), np.repeat(np.arange(n_types), each), np.full(n_plain, -1)]).astype(
        np.int8
    )
    is_mito, is_marker = np.arange(genes) < n_mito, marker_of >= 0

    abundance = 1.5 * rng.standard_normal(genes)
    abundance[is_marker] = 0.4 + 1.0 * rng.standard_normal(int(is_marker.sum()))
    kind = np.repeat(abundance[:, None], n_types, axis=1)
    kind += np.where(rng.random((genes, 1)) < 0.5, 0.55, 0.08) * rng.standard_normal((genes, n_types))
    strength = np.log(rng.uniform(6, 30, genes))
    kind[is_marker, marker_of[is_marker]] += strength[is_marker]
    kind[is_mito] = 0.6 * rng.standard_normal((n_mito, 1))
    plain = np.exp(kind[~is_mito].mean(axis=1)).sum() if n_mito else 0.0
    if n_mito:
        kind[is_mito] += np.log(_MITO_SHARE / (1 - _MITO_SHARE) * 1.25 * plain / np.exp(kind[is_mito, 0]).sum())
    domain = np.where(rng.random((genes, 1)) < 0.4, 0.45, 0.04) * rng.standard_normal((genes, len(DOMAIN_NAMES)))
    gradient = np.where(rng.random((genes, N_GRADIENTS)) < 0.35, 0.50, 0.03) * rng.standard_normal((genes, N_GRADIENTS))
    latent = 0.22 * rng.standard_normal((genes, N_LATENT))
    latent[:, -1] = np.where(is_mito, 0.40, 0.03 * rng.standard_normal(genes))
    return GenePrograms(
        names=names,
        ids=np.array([f"SIMG{k:011d}" for k in range(1, genes + 1)], dtype=object),
        mitochondrial=is_mito,
        marker_of=marker_of,
        kind=kind.astype(np.float32),
        domain=domain.astype(np.float32),
        gradient=gradient.astype(np.float32),
        latent=latent.astype(np.float32),
        dispersion=np.exp(rng.normal(np.log(4.0), 0.5, genes)).astype(np.float32),
    )


def make_truth(
    nuclei: SimulatedNuclei, outlines: gpd.GeoDataFrame, programs: GenePrograms, rng: np.random.Generator
) -> ad.AnnData:
    """Draw the depth and cell-level factors of each nucleus and collect the factors of all rates.

    Parameters
    ----------
    nuclei
        The n nuclei of a section.
    outlines
        Their ids and areas: a larger nucleus contains more bins, and so more UMIs.
    programs
        The genes and their effects.
    rng
        Source of depths and cell-level factors.

    Returns
    -------
    AnnData (n, genes) without X; `true_rates` computes the rates.
    """
    n = len(nuclei)
    area_um2 = outlines["area_um2"].to_numpy()
    shown = MEDIAN_UMI * _DEPTH_BEFORE_SPILL * (area_um2 / np.median(area_um2)) ** _AREA_POWER
    depth = shown * np.exp(_DEPTH_SD * rng.standard_normal(n))
    latent = rng.standard_normal((n, N_LATENT)).astype(np.float32)
    # A few damaged cells for quality control to find.
    latent[:, -1] += 4.0 * (rng.random(n) < 0.02)
    obs = pd.DataFrame(
        {
            "cell_type": pd.Categorical.from_codes(nuclei.kind, pd.Index(TYPE_NAMES)),
            "domain": pd.Categorical.from_codes(nuclei.domain, pd.Index(DOMAIN_NAMES)),
            "depth": depth.astype(np.float32),
            "image_depth": (shown * np.exp(_DEPTH_SD**2 / 2)).astype(np.float32),
            "area_um2": area_um2,
        },
        index=outlines["cell_id"].to_numpy(),
    )
    var = pd.DataFrame(
        {
            "gene_id": programs.ids,
            "mitochondrial": programs.mitochondrial,
            "marker_of": pd.Categorical.from_codes(programs.marker_of, pd.Index(TYPE_NAMES)),
            "dispersion": programs.dispersion,
        },
        index=programs.names,
    )
    truth = ad.AnnData(obs=obs, var=var)
    truth.obsm["gradient"] = nuclei.gradients.astype(np.float32)
    truth.obsm["latent"] = latent
    truth.varm["type"] = programs.kind
    truth.varm["domain"] = programs.domain
    truth.varm["gradient"] = programs.gradient
    truth.varm["latent"] = programs.latent
    return truth


def true_rates(truth: ad.AnnData, genes: Sequence[str] | None = None, *, image: bool = False) -> Floats:
    """Expected UMIs per nucleus and gene, computed from the factors in truth.h5ad.

    Parameters
    ----------
    truth
        Result of `make_truth`, or a subset of its nuclei.
    genes
        Names of genes; all by default.
    image
        Return what a perfect reader of the image would expect: type, domain, gradients and area are known, while cell-level factors
        and depth are replaced by their expectation (neither includes the gamma noise of the counts).

    Returns
    -------
    (n, genes) float32. The UMIs of a nucleus are negative binomial around it; diffusion, ambient UMIs and neighbors are added on top.
    """
    kind, domain = truth.obs["cell_type"].cat.codes.to_numpy(), truth.obs["domain"].cat.codes.to_numpy()
    latent = np.asarray(truth.varm["latent"])
    # With type and domain as one-hot columns, the log rate is one matrix product.
    cells: list[Any] = [np.eye(len(TYPE_NAMES))[kind], np.eye(len(DOMAIN_NAMES))[domain], truth.obsm["gradient"]]
    effects: list[Any] = [truth.varm["type"], truth.varm["domain"], truth.varm["gradient"]]
    # The mean of a log-normal factor is above its median.
    cells.append(np.ones((truth.n_obs, 1)) if image else truth.obsm["latent"])
    effects.append(0.5 * (latent**2).sum(axis=1, keepdims=True) if image else latent)
    rate = np.hstack(cells).astype(np.float32) @ np.hstack(effects).astype(np.float32).T
    np.exp(rate, out=rate)
    depth = truth.obs["image_depth" if image else "depth"].to_numpy()
    rate *= (depth / rate.sum(axis=1)).astype(np.float32)[:, None]
    return rate if genes is None else rate[:, truth.var_names.get_indexer(list(genes))]
