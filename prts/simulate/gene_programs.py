"""Genes and what drives them: type, domain, gradients (which the image shows) and a cell-level part (which it cannot show).

The programme depends on `program_seed` and the number of genes only, so sections of one tissue share it. A nucleus c expects of gene g

    X[c, g] = depth[c] * exp(log_rate[c, g] - log_total[c])
    log_rate[c, g] = type[g, kind(c)] + domain[g, domain(c)] + gradient[g] . gradient(c) + latent[g] . latent(c)

with log_total the log of the sum over genes, so that a nucleus's rates add up to its depth.
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

    from prts.simulate.nuclei import Nuclei

    Floats = NDArray[np.float32]

N_LATENT = 5
"""Cell-level factors; the last one is stress and drives the mitochondrial genes."""
MEDIAN_UMI = 150.0
"""Median over nuclei of the UMIs that the bins within them are expected to hold."""

DENSE_ENTRIES = 20_000_000
"""A section with more cells x genes keeps its factors in truth.h5ad, but not the rates they give."""

_MITO = ("ND1", "ND2", "CO1", "CO2", "ATP8", "ATP6", "CO3", "ND3", "ND4L", "ND4", "ND5", "ND6", "CYB")
_MITO_SHARE = 0.05
_DEPTH_SD = 0.40
_AREA_POWER = 0.6
# A nucleus loses more UMIs to its surroundings by diffusion (1 um) than it gains: measured on sections of 2,000 to 20,000 nuclei.
_DEPTH_BEFORE_SPILL = 1.12


@dataclass(frozen=True)
class Programme:
    """Genes and their effects, all in natural logarithms."""

    names: NDArray[np.object_]
    ids: NDArray[np.object_]
    mitochondrial: NDArray[np.bool_]
    marker_of: NDArray[np.int8]
    """Index of the type whose marker the gene is, else -1."""
    kind: Floats
    """(genes, types), the abundance included."""
    domain: Floats
    gradient: Floats
    latent: Floats
    dispersion: Floats
    """Size (r) of the negative binomial: variance = mean + mean^2 / r."""

    def markers(self) -> dict[str, list[str]]:
        """Names of each type's marker genes."""
        return {name: self.names[self.marker_of == k].tolist() for k, name in enumerate(TYPE_NAMES)}


def make_programme(genes: int, *, species: str = "human", program_seed: int = 0) -> Programme:
    """Draw the genes of a tissue.

    Parameters
    ----------
    genes
        How many: 13 mitochondrial ones (fewer below 260 genes), 1.5 % markers for each type (at least 2), the rest named SIM0001
        and so on.
    species
        `human` (MT-ND1) or `mouse` (mt-Nd1).
    program_seed
        Sections with the same seed and number of genes share everything returned here.

    Returns
    -------
    The programme.
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
    return Programme(
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
    nuclei: Nuclei, outlines: gpd.GeoDataFrame, programme: Programme, rng: np.random.Generator
) -> ad.AnnData:
    """Draw depth and cell-level factors of each nucleus and put the factors of all rates into one object, without the rates.

    Parameters
    ----------
    nuclei
        The n nuclei of a section.
    outlines
        Their ids and areas: a larger one holds more bins, so more UMIs.
    programme
        The genes.
    rng
        Decides on the cell-level part.

    Returns
    -------
    AnnData (n, genes) without X; `true_rates` reads it.
    """
    n = len(nuclei)
    area_um2 = outlines["area_um2"].to_numpy()
    shown = MEDIAN_UMI * _DEPTH_BEFORE_SPILL * (area_um2 / np.median(area_um2)) ** _AREA_POWER
    depth = shown * np.exp(_DEPTH_SD * rng.standard_normal(n))
    latent = rng.standard_normal((n, N_LATENT)).astype(np.float32)
    # A few damaged cells, which quality control should find.
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
            "gene_id": programme.ids,
            "mitochondrial": programme.mitochondrial,
            "marker_of": pd.Categorical.from_codes(programme.marker_of, pd.Index(TYPE_NAMES)),
            "dispersion": programme.dispersion,
        },
        index=programme.names,
    )
    truth = ad.AnnData(obs=obs, var=var)
    truth.obsm["gradient"] = nuclei.gradients.astype(np.float32)
    truth.obsm["latent"] = latent
    truth.varm["type"] = programme.kind
    truth.varm["domain"] = programme.domain
    truth.varm["gradient"] = programme.gradient
    truth.varm["latent"] = programme.latent
    return truth


def true_rates(truth: ad.AnnData, genes: Sequence[str] | None = None, *, image: bool = False) -> Floats:
    """Expected UMIs of each nucleus and gene, from the factors in a truth.h5ad.

    Parameters
    ----------
    truth
        What `make_truth` made, or a slice of its nuclei.
    genes
        Names of the wanted genes, default all.
    image
        What a perfect reader of the image expects: type, domain, gradients and area known; the cell-level factors and the depth
        replaced by their expectation (the gamma noise of the counts is left out of both).

    Returns
    -------
    (n, genes) float32. The counts of a nucleus's own UMIs are negative binomial around it; diffusion, ambient UMIs and neighbours come
    on top.
    """
    kind, domain = truth.obs["cell_type"].cat.codes.to_numpy(), truth.obs["domain"].cat.codes.to_numpy()
    latent = np.asarray(truth.varm["latent"])
    # Type and domain as one-hot columns make the whole rate one matrix product.
    cells: list[Any] = [np.eye(len(TYPE_NAMES))[kind], np.eye(len(DOMAIN_NAMES))[domain], truth.obsm["gradient"]]
    effects: list[Any] = [truth.varm["type"], truth.varm["domain"], truth.varm["gradient"]]
    # The mean of a log-normal factor lies above its median.
    cells.append(np.ones((truth.n_obs, 1)) if image else truth.obsm["latent"])
    effects.append(0.5 * (latent**2).sum(axis=1, keepdims=True) if image else latent)
    rate = np.hstack(cells).astype(np.float32) @ np.hstack(effects).astype(np.float32).T
    np.exp(rate, out=rate)
    depth = truth.obs["image_depth" if image else "depth"].to_numpy()
    rate *= (depth / rate.sum(axis=1)).astype(np.float32)[:, None]
    return rate if genes is None else rate[:, truth.var_names.get_indexer(list(genes))]
