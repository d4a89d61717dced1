"""Names for clusters: their markers against tables of known markers (PanglaoDB, CellMarker, or one's own), with the evidence."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import pandas as pd

from prts.analysis.symbols import Orthologs
from prts.errors import InputError

logger = logging.getLogger(__name__)

UNASSIGNED = "unassigned"
_SPECIES = {"human": ("hs", "human", "homo sapiens"), "mouse": ("mm", "mouse", "mus musculus")}
# Columns of each format, lower case: which hold the type, the gene(s), the species and the tissue.
_FORMATS: dict[str, dict[str, tuple[str, ...]]] = {
    "PanglaoDB": {
        "type": ("cell type",), "gene": ("official gene symbol",), "species": ("species",), "tissue": ("organ",)
    },
    "CellMarker": {
        "type": ("cell_name", "cellname", "ct"), "gene": ("symbol", "genesymbol", "cellmarker", "marker", "gene"),
        "species": ("species", "speciestype"), "tissue": ("tissue_class", "tissue_type", "tissuetype", "tissue"),
    },
    "own": {"type": ("type", "cell_type"), "gene": ("gene", "symbol"), "species": ("species",), "tissue": ("tissue",)},
}  # fmt: skip


def read_markers(
    path: Path,
    *,
    species: str,
    genes: Sequence[str],
    tissues: Sequence[str] = (),
    orthologs: Orthologs | None = None,
) -> pd.DataFrame:
    """Read a marker table; its format is told from its columns.

    Parameters
    ----------
    path
        .csv, or .tsv or .txt with tabs: PanglaoDB (`official gene symbol`, `cell type`, `species`, `organ`), CellMarker (`cell_name` and
        `Symbol` or `marker`, or `Tissue, CT, Gene` with several genes in a field), or one's own (`type`, `gene`).
    species
        "human" or "mouse": of the section. Rows of the other species are left out where the table has that column.
    genes
        Names of the genes that were tested; other genes of the table cannot be found and are left out.
    tissues
        Keep rows whose tissue is one of these (any case); all if empty.
    orthologs
        Human and mouse symbols. PanglaoDB writes those of human genes: for a mouse section they are translated by this table, or
        spelt as mouse symbols are if there is none.

    Returns
    -------
    `type, gene`, each pair once, in which every gene is one of `genes`.

    Raises
    ------
    InputError
        If the file cannot be read, has other columns, no row of the species or tissues, or no gene of the section.
    """
    raw = _read(path)
    name, columns = _format(path, raw)
    table = pd.DataFrame({key: raw[column].astype(str).str.strip() for key, column in columns.items()})
    table = table[raw[columns["type"]].notna() & raw[columns["gene"]].notna()]
    table = _of_species(path, table, species)
    table = _of_tissues(path, table, tissues)
    table = table.assign(gene=table["gene"].str.split(r"\s*[,;|]\s*", regex=True)).explode("gene")
    if name == "PanglaoDB" and species == "mouse":
        table = _to_mouse(table, orthologs)
    known = table[table["gene"].isin(set(genes))][["type", "gene"]].drop_duplicates().reset_index(drop=True)
    _require_shared(path, table, known, genes, species)
    logger.info(
        "markers: %s (%s): %d types, %d of %d genes of the table are in the section",
        path.name, name, known["type"].nunique(), known["gene"].nunique(), table["gene"].nunique(),
    )  # fmt: skip
    return known


def annotate(
    markers: pd.DataFrame,
    table: pd.DataFrame,
    background: Sequence[str],
    *,
    clusters: Sequence[str],
    max_p: float = 0.05,
    min_genes: int = 2,
    n_markers: int = 25,
) -> pd.DataFrame:
    """Name each cluster after the type whose known markers are over-represented among its own the most.

    Fisher's exact test (decoupler's `query_set`) of the cluster's best markers against each type's, among the genes that were tested.
    Benjamini-Hochberg over all pairs of a cluster and a type. A name needs an adjusted p value below `max_p` and at least `min_genes`
    genes behind it, else the cluster is "unassigned".

    Parameters
    ----------
    markers
        Of `prts.analysis.clusters.find_markers`.
    table
        Of `read_markers`.
    background
        All genes that were tested: those of the section, not of the genome.
    clusters
        Names of all clusters; one without markers is unassigned.
    max_p, min_genes
        What a name needs.
    n_markers
        How many of a cluster's best markers are used.

    Returns
    -------
    A row a cluster: `cluster, type, score` (log odds ratio), `p_value, p_adj, genes` (behind the name, best first), `n_markers`, and
    `second, second_score, second_p_adj, second_genes`: the runner-up, whether significant or not.

    Raises
    ------
    InputError
        If decoupler is not installed.
    """
    try:
        import decoupler
    except ImportError as error:
        raise InputError("markers: needs the extra `analysis`: pip install 'prts[analysis]'") from error

    tested = set(background)
    net = table[table["gene"].isin(tested)].rename(columns={"type": "source", "gene": "target"})
    best = markers[(markers["rank"] <= n_markers) & markers["gene"].isin(tested)]
    found = []
    for name in clusters:
        own = best.loc[best["cluster"].astype(str) == name, "gene"].tolist()
        if own:
            one = decoupler.mt.query_set(own, net, n_bg=len(tested), tmin=1)
            hits = net[net["target"].isin(own)].groupby("source")["target"].agg(list)
            genes = one["source"].map(hits)
            place = {gene: i for i, gene in enumerate(own)}
            one["genes"] = [sorted(g, key=place.__getitem__) if isinstance(g, list) else [] for g in genes]
            found.append(one.assign(cluster=name, n_markers=len(own)))
    if not found:
        return _summary([], clusters, max_p, min_genes)
    pairs = pd.concat(found, ignore_index=True)
    pairs["padj"] = _benjamini_hochberg(pairs["pval"].to_numpy())
    pairs = pairs.sort_values(["pval", "stat", "source"], ascending=[True, False, True], kind="stable")
    return _summary([pairs], clusters, max_p, min_genes)


def broad_class(types: pd.Series, classes: Mapping[str, Sequence[str]]) -> pd.Series:
    """Put types into broad classes.

    Parameters
    ----------
    types
        Names of types, of any length.
    classes
        By class: patterns of the names of its types, as in file names (`*neuron*`), in any case. The first that fits wins; a type that
        none fits is a class of its own.

    Returns
    -------
    As long as `types`; missing where the type is missing or unassigned.
    """

    def place(name: str) -> str:
        for label, patterns in classes.items():
            if any(fnmatchcase(name.casefold(), str(pattern).casefold()) for pattern in patterns):
                return label
        return name

    known = types.astype(object).where(types.notna() & (types.astype(object) != UNASSIGNED), None)
    places = {name: place(str(name)) for name in pd.unique(known.dropna())}
    return known.map(places)


def _summary(found: list[pd.DataFrame], clusters: Sequence[str], max_p: float, min_genes: int) -> pd.DataFrame:
    rows = []
    for name in clusters:
        pairs = found[0][found[0]["cluster"] == name] if found else pd.DataFrame()
        # what one gene supports is the runner-up at best
        firm = pairs[(pairs["padj"] < max_p) & (pairs["genes"].str.len() >= min_genes)] if len(pairs) else pairs
        first = firm.iloc[:1]
        rest = pairs.drop(first.index)
        rest = rest[rest["genes"].str.len() > 0].iloc[:1] if len(rest) else rest
        row = {"cluster": name, **_named("", first), "n_markers": int(pairs["n_markers"].iloc[0]) if len(pairs) else 0}
        rows.append({**row, **_named("second_", rest)})
    table = pd.DataFrame(rows).rename(columns={"second_type": "second"})
    table["type"] = table["type"].where(table["type"].notna(), UNASSIGNED)
    return table


def _named(prefix: str, pair: pd.DataFrame) -> dict[str, object]:
    if pair.empty:
        nothing = {"type": None, "score": np.nan, "p_value": np.nan, "p_adj": np.nan, "genes": ""}
        return {prefix + key: value for key, value in nothing.items()}
    row = pair.iloc[0]
    values = (row["source"], row["stat"], row["pval"], row["padj"], " ".join(row["genes"]))
    return {
        prefix + key: value for key, value in zip(("type", "score", "p_value", "p_adj", "genes"), values, strict=True)
    }


def _benjamini_hochberg(p: np.ndarray) -> np.ndarray:
    from scipy.stats import false_discovery_control

    return np.asarray(false_discovery_control(np.clip(p, 0, 1), method="bh"))


def _read(path: Path) -> pd.DataFrame:
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file; a marker table (.csv or .tsv) is needed")
    try:
        first = path.open(encoding="utf-8-sig").readline()
        return pd.read_csv(path, sep="\t" if "\t" in first else ",", encoding="utf-8-sig", dtype=str)
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise InputError(
            f"{path}: cannot be read as a table ({error}); a marker table (.csv or .tsv) is needed"
        ) from error


def _format(path: Path, raw: pd.DataFrame) -> tuple[str, dict[str, str]]:
    there = {str(column).strip().casefold(): str(column) for column in raw.columns}
    for name, wanted in _FORMATS.items():
        found = {key: next((there[c] for c in options if c in there), None) for key, options in wanted.items()}
        if found["type"] is not None and found["gene"] is not None:
            return name, {key: column for key, column in found.items() if column is not None}
    raise InputError(
        f"{path}: has the columns {', '.join(map(str, raw.columns[:8]))}; a marker table needs `type` and `gene`, or those of PanglaoDB "
        "(`cell type`, `official gene symbol`) or CellMarker (`cell_name`, `Symbol`; `CT`, `Gene`)"
    )


def _of_species(path: Path, table: pd.DataFrame, species: str) -> pd.DataFrame:
    if "species" not in table:
        return table
    words = table["species"].str.casefold()
    short, *full = _SPECIES[species]
    kept = table[words.str.split().map(lambda w: short in w) | words.isin(full)]
    if kept.empty:
        there = ", ".join(sorted(table["species"].unique())[:4])
        raise InputError(
            f"{path}: has no marker of {species} (its species: {there}), as the section is; give that species' table"
        )
    return kept


def _of_tissues(path: Path, table: pd.DataFrame, tissues: Sequence[str]) -> pd.DataFrame:
    if not tissues:
        return table
    if "tissue" not in table:
        raise InputError(f"{path}: has no column of tissues; leave annotate.tissues=[] for it")
    kept = table[table["tissue"].str.casefold().isin({str(t).casefold() for t in tissues})]
    if kept.empty:
        there = ", ".join(sorted(table["tissue"].unique())[:12])
        raise InputError(f"annotate.tissues: {list(tissues)} are none of the tissues of {path} ({there}, ...)")
    return kept


def _to_mouse(table: pd.DataFrame, orthologs: Orthologs | None) -> pd.DataFrame:
    if orthologs is None:
        logger.warning(
            "markers: human symbols are spelt as mouse symbols are (CAMK2A, Camk2a), which misses genes that are named otherwise; "
            "orthologs=FILE translates them"
        )
        return table.assign(gene=table["gene"].str.capitalize())
    return table.assign(gene=table["gene"].map(orthologs.to_mouse)).explode("gene").dropna(subset="gene")


def _require_shared(path: Path, table: pd.DataFrame, known: pd.DataFrame, genes: Sequence[str], species: str) -> None:
    """Refuse a table with next to none of the section's genes, and say if only the spelling differs: that is another species."""
    in_table, own = set(table["gene"]), set(genes)
    alike = {g.casefold() for g in in_table} & {g.casefold() for g in own}
    if len(alike) >= 10 and known["gene"].nunique() < len(alike) / 5:
        example = next(iter(sorted(in_table)))
        raise InputError(
            f"{path}: shares {known['gene'].nunique()} genes with the section as they are spelt, {len(alike)} in any case: its symbols "
            f"({example}, ...) are of another species than {species}; give a table of {species} markers"
        )
    if known.empty:
        raise InputError(
            f"{path}: shares no gene with the section ({', '.join(list(genes)[:3])}, ...); "
            f"give markers of {species}, by the names of these genes"
        )
