"""Name clusters by comparing their markers with a marker table (PanglaoDB, CellMarker or a custom one)."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import pandas as pd

from prts.analysis.symbols import Orthologs
from prts.errors import InputError, ParameterError
from prts.extras import install_command

logger = logging.getLogger(__name__)

UNASSIGNED = "unassigned"
_SPECIES = {"human": ("hs", "human", "homo sapiens"), "mouse": ("mm", "mouse", "mus musculus")}
# Possible column names of each format, in lower case.
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
    """Read a marker table; the format is inferred from the columns.

    Parameters
    ----------
    path
        .csv, or tab-separated .tsv or .txt: PanglaoDB (`official gene symbol`, `cell type`, `species`, `organ`), CellMarker (`cell_name`
        and `Symbol` or `marker`, or `Tissue, CT, Gene` with several genes per field), or custom (`type`, `gene`).
    species
        Species of the section, "human" or "mouse". If the table has a species column, other rows are ignored.
    genes
        Names of the tested genes; other genes in the table are ignored.
    tissues
        Tissues to keep (case-insensitive); all if empty.
    orthologs
        Human and mouse symbols. PanglaoDB lists human symbols: for a mouse section, they are translated with this table or, without it,
        capitalized like mouse symbols.

    Returns
    -------
    Unique pairs `type, gene`, limited to `genes`.

    Raises
    ------
    InputError
        If the file cannot be read, has unknown columns, or has no rows for the species, tissues or genes.
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
        "markers: %s (%s): %d types; %d of %d genes in the table are in the section",
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
    """Name each cluster after the cell type with the most over-represented markers.

    The top markers of a cluster are tested against the markers of each type with Fisher's exact test (decoupler's `query_set`), and p
    values are adjusted over all pairs of cluster and type (Benjamini-Hochberg). A cluster is "unassigned" unless the adjusted p value is
    below `max_p` and at least `min_genes` genes support the name.

    Parameters
    ----------
    markers
        Result of `prts.analysis.clusters.find_markers`.
    table
        Result of `read_markers`.
    background
        All tested genes, that is, the genes of the section rather than of the genome.
    clusters
        Names of all clusters; clusters without markers are unassigned.
    max_p, min_genes
        Requirements for a name.
    n_markers
        Number of top markers per cluster to use.

    Returns
    -------
    One row per cluster: `cluster, type, score` (log odds ratio), `p_value, p_adj, genes` (that support the name, best first), `n_markers`,
    and `second, second_score, second_p_adj, second_genes` for the runner-up, significant or not.

    Raises
    ------
    InputError
        If decoupler is not installed.
    """
    try:
        import decoupler
    except ImportError as error:
        raise ParameterError("", "markers", f"needs decoupler; run {install_command('analysis')}") from error

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
    """Group cell types into broad classes.

    Parameters
    ----------
    types
        Type names.
    classes
        Name patterns of the types in each class, as in file names (`*neuron*`), case-insensitive. The first match wins; a type without
        a match is its own class.

    Returns
    -------
    Class of each type; missing if the type is missing or unassigned.

    Examples
    --------
    >>> broad_class(pd.Series(["GABAergic neurons", "Microglia"]), {"Neurons": ["*neuron*"]}).tolist()
    ['Neurons', 'Microglia']
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
        # a type that is supported by a single gene can only be the runner-up
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
        raise InputError(f"{path}: no such file; expected a marker table (.csv or .tsv)")
    try:
        first = path.open(encoding="utf-8-sig").readline()
        return pd.read_csv(path, sep="\t" if "\t" in first else ",", encoding="utf-8-sig", dtype=str)
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise InputError(
            f"{path}: cannot be read as a table ({error}); expected a marker table (.csv or .tsv)"
        ) from error


def _format(path: Path, raw: pd.DataFrame) -> tuple[str, dict[str, str]]:
    there = {str(column).strip().casefold(): str(column) for column in raw.columns}
    for name, wanted in _FORMATS.items():
        found = {key: next((there[c] for c in options if c in there), None) for key, options in wanted.items()}
        if found["type"] is not None and found["gene"] is not None:
            return name, {key: column for key, column in found.items() if column is not None}
    raise InputError(
        f"{path}: has the columns {', '.join(map(str, raw.columns[:8]))}; a marker table needs `type` and `gene`, or the columns of "
        "PanglaoDB (`cell type`, `official gene symbol`) or CellMarker (`cell_name`, `Symbol`; `CT`, `Gene`)"
    )


def _of_species(path: Path, table: pd.DataFrame, species: str) -> pd.DataFrame:
    if "species" not in table:
        return table
    words = table["species"].str.casefold()
    short, *full = _SPECIES.get(species, (species, species))
    kept = table[words.str.split().map(lambda w: short in w) | words.isin(full)]
    if kept.empty:
        there = ", ".join(sorted(table["species"].unique())[:4])
        raise InputError(
            f"{path}: has no {species} markers (its species: {there}); give a table for the species of the section"
        )
    return kept


def _of_tissues(path: Path, table: pd.DataFrame, tissues: Sequence[str]) -> pd.DataFrame:
    if not tissues:
        return table
    if "tissue" not in table:
        raise ParameterError("annotate", "tissues", f"{path} has no tissue column; leave `tissues` empty")
    kept = table[table["tissue"].str.casefold().isin({str(t).casefold() for t in tissues})]
    if kept.empty:
        there = ", ".join(sorted(table["tissue"].unique())[:12])
        raise ParameterError(
            "annotate", "tissues", f"{', '.join(tissues)} not found in {path}; choose from {there}, ..."
        )
    return kept


def _to_mouse(table: pd.DataFrame, orthologs: Orthologs | None) -> pd.DataFrame:
    if orthologs is None:
        logger.warning(
            "markers: human symbols are capitalized like mouse symbols (CAMK2A -> Camk2a), which misses genes whose names differ; "
            "give `orthologs` to translate them"
        )
        return table.assign(gene=table["gene"].str.capitalize())
    return table.assign(gene=table["gene"].map(orthologs.to_mouse)).explode("gene").dropna(subset="gene")


def _require_shared(path: Path, table: pd.DataFrame, known: pd.DataFrame, genes: Sequence[str], species: str) -> None:
    """Refuse a table that shares almost no genes with the section; if only the case differs, it is for another species."""
    in_table, own = set(table["gene"]), set(genes)
    alike = {g.casefold() for g in in_table} & {g.casefold() for g in own}
    if len(alike) >= 10 and known["gene"].nunique() < len(alike) / 5:
        example = next(iter(sorted(in_table)))
        raise InputError(
            f"{path}: shares {known['gene'].nunique()} genes with the section, but {len(alike)} if case is ignored: its symbols "
            f"({example}, ...) are not {species}; give a table of {species} markers"
        )
    if known.empty:
        raise InputError(
            f"{path}: shares no genes with the section ({', '.join(list(genes)[:3])}, ...); "
            f"give {species} markers that use the same gene names"
        )
