"""Species: how their gene ids and the names of their mitochondrial genes begin."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from prts.errors import ParameterError, did_you_mean

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    import pandas as pd
    from numpy.typing import NDArray

logger = logging.getLogger(__name__)

# As Ensembl names them, from which Cell Ranger's references are made. Any other species needs `qc.mt_prefix`.
MITOCHONDRIAL_PREFIX = {
    "human": "MT-",
    "mouse": "mt-",
    "rat": "Mt-",
    "zebrafish": "mt-",
    "pig": "MT-",
    "cow": "MT-",
    "sheep": "MT-",
    "dog": "MT-",
    "rabbit": "MT-",
    "macaque": "MT-",
    "marmoset": "MT-",
    "chicken": "MT-",
    "frog": "mt-",
    "fruit fly": "mt:",
}
GENE_IDS = {
    "human": r"ENSG\d",
    "mouse": r"ENSMUSG\d",
    "rat": r"ENSRNOG\d",
    "zebrafish": r"ENSDARG\d",
    "pig": r"ENSSSCG\d",
    "cow": r"ENSBTAG\d",
    "sheep": r"ENSOARG\d",
    "dog": r"ENSCAFG\d",
    "rabbit": r"ENSOCUG\d",
    "macaque": r"ENSM(?:MU|FA)G\d",
    "marmoset": r"ENSCJAG\d",
    "chicken": r"ENSGALG\d",
    "frog": r"ENSXETG\d",
    "fruit fly": r"FBgn\d",
}
_LOOKS_MITOCHONDRIAL = r"^(mt[-:_.])"


def mitochondrial_prefix(species: str, given: str | None = None, owner: str = "") -> str:
    """How the mitochondrial genes of a species begin.

    Parameters
    ----------
    species
        Name of the species.
    given
        The prefix, if it is another one or the species is not a known one.
    owner
        Whose parameter the species is, for messages.

    Raises
    ------
    ParameterError
        If the species is not known and no prefix is given.
    """
    if given is not None:
        return given
    if species not in MITOCHONDRIAL_PREFIX:
        raise ParameterError(
            owner,
            "species",
            f"{species!r} is not known{did_you_mean(species, MITOCHONDRIAL_PREFIX)}; choose {', '.join(MITOCHONDRIAL_PREFIX)}, or set "
            "`qc.mt_prefix` to how the names of its mitochondrial genes begin",
        )
    return MITOCHONDRIAL_PREFIX[species]


def mitochondrial_genes(var: pd.DataFrame, species: str, source: Path, given: str | None = None) -> NDArray[np.bool_]:
    """Which genes are mitochondrial, (n_genes,).

    Parameters
    ----------
    var
        Genes with `gene_id` and `symbol`.
    species, given
        As for `mitochondrial_prefix`.
    source
        The file or folder that messages name.

    Raises
    ------
    ParameterError
        If the names of mitochondrial genes begin in another way only: the species or the prefix is wrong.
    """
    prefix, symbols = mitochondrial_prefix(species, given), var["symbol"].astype(str)
    chosen: NDArray[np.bool_] = symbols.str.startswith(prefix).to_numpy(bool)
    if chosen.any():
        return chosen
    others = symbols.str.extract(f"(?i){_LOOKS_MITOCHONDRIAL}", expand=False).dropna()
    if len(others):
        other = str(others.mode()[0])
        fits = [name for name, begin in MITOCHONDRIAL_PREFIX.items() if begin == other]
        by_id = [name for name in fits if var["gene_id"].astype(str).str.match(GENE_IDS[name]).any()]
        fits = (by_id or fits)[:2]
        found = f"{source} has no gene {prefix}... and {len(others)} genes {other}..."
        if given is not None:
            raise ParameterError("qc", "mt_prefix", f"{given!r}, but {found}; set it to {other!r}")
        cure = f"choose {' or '.join(fits)}, or set" if fits else "set"
        raise ParameterError("", "species", f"{species}, but {found}; {cure} `qc.mt_prefix` to {other!r}")
    if given is not None:
        raise ParameterError(
            "qc", "mt_prefix", f"{given!r} begins the name of no gene in {source}; give another one or null"
        )
    logger.warning("%s has no mitochondrial genes (%s...), so their share is 0", source, prefix)
    return chosen


def species_of(var: pd.DataFrame) -> str | None:
    """The species of genes with `gene_id` and unique names, by their ids or mitochondrial genes; None if unclear."""
    ids, names = var["gene_id"].astype(str), var.index.astype(str)
    said = {species for species, pattern in GENE_IDS.items() if ids.str.match(pattern).any()}
    if not said:  # the species that have cell atlases; others share their prefixes
        prefixes = {species: MITOCHONDRIAL_PREFIX[species] for species in ("human", "mouse", "rat")}
        said = {species for species, prefix in prefixes.items() if names.str.startswith(prefix).any()}
    return said.pop() if len(said) == 1 else None
