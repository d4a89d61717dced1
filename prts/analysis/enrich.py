"""What the markers of clusters have in common: over-represented gene sets and Gene Ontology terms, from local files.

Two ways in: gene sets (.gmt, tested by gseapy), or the ontology itself (.obo and annotations, tested by goatools, which also counts a
gene for all ancestors of its terms). The background is the genes that were tested, not the genome: a panel of variable genes is rich in
markers of cell types, which against the genome would come out for every cluster.
"""

from __future__ import annotations

import logging
import re
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from prts.analysis.symbols import Orthologs
from prts.errors import InputError

logger = logging.getLogger(__name__)

_COLUMNS = [
    "cluster",
    "namespace",
    "term",
    "name",
    "n_found",
    "n_markers",
    "n_term",
    "n_background",
    "fold",
    "p_value",
    "p_adj",
    "genes",
]
_SHORT = {"biological_process": "BP", "molecular_function": "MF", "cellular_component": "CC"}
_GO_ID = re.compile(r"GO:\d{7}")
_LEAST_TERM = 2


def marker_lists(markers: pd.DataFrame, n_markers: int) -> dict[str, list[str]]:
    """The best markers of each cluster, by its name, of the table that `prts.analysis.clusters.find_markers` gives."""
    best = markers[markers["rank"] <= n_markers]
    return {str(name): table["gene"].tolist() for name, table in best.groupby("cluster", observed=True)}


def enrich_gmt(
    lists: Mapping[str, Sequence[str]],
    background: Sequence[str],
    gmt: Path,
    *,
    species: str = "human",
    orthologs: Orthologs | None = None,
) -> pd.DataFrame:
    """Over-representation of the gene sets of a .gmt file among lists of genes (hypergeometric test, gseapy).

    Parameters
    ----------
    lists
        Genes by the name of the list.
    background
        All genes that were tested.
    gmt
        Gene sets with human symbols, or those of the section. Its namespace is BP, MF or CC where its name says so
        (`GO_Biological_Process`), else its name.
    species
        "human" or "mouse": of the genes.
    orthologs
        With it the genes of a mouse section are looked for by their human symbols.

    Returns
    -------
    `cluster, namespace, term, name, n_found, n_markers, n_term, n_background, fold, p_value, p_adj, genes`, by falling significance
    in each list. `p_adj` is Benjamini-Hochberg over all sets with at least two tested genes, those that no gene of the list hits included.

    Raises
    ------
    InputError
        If gseapy is missing, the file is no .gmt, or shares no gene with the background.
    """
    try:
        import gseapy
    except ImportError as error:
        raise InputError("enrich.gmt: needs the extra `analysis`: pip install 'prts[analysis]'") from error

    sets = _read_gmt(Path(gmt))
    own = _human_of(background, species, orthologs)
    tested = {human for names in own.values() for human in names}
    sets = {name: members & tested for name, members in sets.items()}
    sets = {name: members for name, members in sets.items() if len(members) >= _LEAST_TERM}
    if not sets:
        raise InputError(
            f"{gmt}: none of its sets holds two of the section's genes ({', '.join(list(background)[:3])}, ...); human symbols are "
            "found for a mouse section with orthologs=FILE"
        )
    back: dict[str, str] = {human: gene for gene, names in own.items() for human in names}
    rows = []
    for cluster, genes in lists.items():
        found = sorted({human for gene in genes for human in own.get(gene, ())})
        if not set(found) & set().union(*sets.values()):
            continue
        ordered = {name: sorted(members) for name, members in sets.items()}
        result = gseapy.enrich(found, ordered, background=sorted(tested), outdir=None, no_plot=True).results
        for record in result.to_dict("records"):
            hits = str(record["Genes"]).split(";")
            rows.append(
                {
                    "cluster": cluster,
                    **_term(str(record["Term"])),
                    "n_found": len(hits),
                    "n_markers": len(found),
                    "n_term": len(sets[str(record["Term"])]),
                    "p_value": float(record["P-value"]),
                    "genes": " ".join(sorted(back[hit] for hit in hits)),
                }
            )
    table = (
        pd.DataFrame(rows).assign(namespace=_namespace(Path(gmt)), n_background=len(tested)) if rows else pd.DataFrame()
    )
    return _finish(table, {_namespace(Path(gmt)): len(sets)})


def enrich_go(
    lists: Mapping[str, Sequence[str]],
    background: Sequence[str],
    obo: Path,
    annotations: Path,
    *,
    species: str = "human",
    orthologs: Orthologs | None = None,
) -> pd.DataFrame:
    """Over-representation of Gene Ontology terms among lists of genes (Fisher's exact test, goatools), BP, MF and CC apart.

    Parameters
    ----------
    lists, background, species, orthologs
        As for `enrich_gmt`.
    obo
        The ontology.
    annotations
        A GAF (.gaf, .gaf.gz), whose ids (UniProt's, say) the symbols are mapped to by its own columns of symbols and synonyms; or a table
        of two columns, gene and GO ids, by the section's own names. Annotations with NOT, or without data (ND), are left out.

    Returns
    -------
    As `enrich_gmt` gives it; a gene counts for the ancestors of its terms too.

    Raises
    ------
    InputError
        If goatools is missing, a file cannot be read, or no gene of the background is annotated.
    """
    try:
        from goatools.go_enrichment import GOEnrichmentStudy
        from goatools.obo_parser import GODag
    except ImportError as error:
        raise InputError("enrich.obo: needs the extra `analysis`: pip install 'prts[analysis]'") from error

    for path, what in ((obo, "an ontology (go-basic.obo)"), (annotations, "a GAF, or a table of genes and GO ids")):
        if not Path(path).is_file():
            raise InputError(f"{path}: no such file; {what} is needed")
    try:
        dag = GODag(str(obo), prt=None)
    except Exception as error:  # goatools raises whatever the line it stumbles over leads to
        raise InputError(f"{obo}: cannot be read as an ontology ({type(error).__name__}: {error})") from error
    if not dag:
        raise InputError(f"{obo}: holds no term; an ontology (go-basic.obo) is needed")
    terms, id_of = read_annotations(Path(annotations))
    own = _human_of(background, species, orthologs)
    ids = {gene: sorted({id_of[human] for human in names if human in id_of}) for gene, names in own.items()}
    back = {one: gene for gene, found in ids.items() for one in found}
    if not back:
        raise InputError(
            f"{annotations}: annotates none of the section's genes ({', '.join(list(background)[:3])}, ...); human annotations are "
            "found for a mouse section with orthologs=FILE"
        )
    # a gene without an annotation stays in the background: it was tested, and is in no term
    population = set(back) | {gene for gene, found in ids.items() if not found}
    rows, n_terms = [], {}
    for full, namespace in _SHORT.items():
        of = {one: {go for go in terms[one] if go in dag and dag[go].namespace == full} for one in back}
        of = {one: gos for one, gos in of.items() if gos}
        if not of:
            continue
        study = GOEnrichmentStudy(
            population, of, dag,
            propagate_counts=True, methods=["fdr_bh"], log=None, alternative="greater",
        )  # fmt: skip
        n_terms[namespace] = sum(len(items) >= _LEAST_TERM for items in study.go2popitems.values())
        for cluster, genes in lists.items():
            members = {one for gene in genes if gene in ids for one in (ids[gene] or [gene])}
            for record in study.run_study(members, prt=None) if members else []:
                if record.study_count == 0 or record.pop_count < _LEAST_TERM:
                    continue
                rows.append(
                    {
                        "cluster": cluster,
                        "namespace": namespace,
                        "term": record.GO,
                        "name": record.name,
                        "n_found": record.study_count,
                        "n_markers": record.study_n,
                        "n_term": record.pop_count,
                        "n_background": record.pop_n,
                        "p_value": float(record.p_uncorrected),
                        "genes": " ".join(sorted(back[one] for one in record.study_items)),
                    }
                )
    return _finish(pd.DataFrame(rows), n_terms)


def read_annotations(path: Path) -> tuple[dict[str, set[str]], dict[str, str]]:
    """Read a GAF or a table of genes and GO ids.

    Returns
    -------
    terms
        GO ids by the id that the file uses.
    id_of
        That id by symbol. In a GAF an official symbol goes before a synonym, and a synonym of several ids names none.

    Raises
    ------
    InputError
        If the file cannot be read or holds no annotation.
    """
    path = Path(path)
    is_gaf = path.name.removesuffix(".gz").endswith(".gaf")
    # of a table, lines as they are: GO ids are found in whatever form they follow the gene
    options: dict[str, Any] = (
        {"sep": "\t", "comment": "!", "names": range(17)} if is_gaf else {"sep": "\0", "names": [0]}
    )
    try:
        raw = pd.read_csv(path, header=None, dtype=str, encoding="utf-8", quoting=3, index_col=False, **options)
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error}); a GAF or a table of genes and GO ids is needed") from error
    terms = _gaf_terms(raw) if is_gaf else _table_terms(raw[0])
    if not terms:
        raise InputError(
            f"{path}: holds no annotation; a GAF (.gaf) or a table with a gene and GO ids in a row is needed"
        )
    if not is_gaf:
        return terms, {name: name for name in terms}
    synonyms = raw.assign(synonym=raw[10].str.split("|")).explode("synonym").dropna(subset="synonym")
    several = synonyms.groupby("synonym")[1].agg(lambda ids: ids.iloc[0] if ids.nunique() == 1 else None).dropna()
    ids = {**several.to_dict(), **raw.drop_duplicates(2).set_index(2)[1].to_dict()}
    return terms, {symbol: one for symbol, one in ids.items() if one in terms}


def _gaf_terms(raw: pd.DataFrame) -> dict[str, set[str]]:
    holds = raw[4].str.fullmatch(_GO_ID.pattern, na=False) & (raw[6] != "ND")
    holds &= ~raw[3].fillna("").str.split("|").map(lambda words: "NOT" in words)
    return {str(name): set(gos) for name, gos in raw[holds].groupby(1)[4]}


def _table_terms(lines: pd.Series) -> dict[str, set[str]]:
    """GO ids of lines by what stands before the first tab, comma, semicolon or space."""
    pairs = (
        lines.dropna()
        .astype(str)
        .str.strip()
        .str.split(r"[\t,; ]+", n=1, regex=True, expand=True)
        .reindex(columns=[0, 1])
        .dropna()
    )
    pairs = pairs.assign(go=pairs[1].astype(str).str.findall(_GO_ID.pattern)).explode("go").dropna(subset="go")
    return {str(name): set(gos) for name, gos in pairs.groupby(0)["go"]}


def _read_gmt(path: Path) -> dict[str, set[str]]:
    if not path.is_file():
        raise InputError(f"{path}: no such file; gene sets (.gmt) are needed")
    try:
        lines = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error}); gene sets (.gmt) are needed") from error
    if not lines or any(len(fields) < 3 for fields in lines):
        raise InputError(f"{path}: is no .gmt; each line holds a name, a description and genes, with tabs between")
    # some libraries write a weight behind the gene
    return {fields[0]: {gene.split(",")[0].strip() for gene in fields[2:]} - {""} for fields in lines}


def _human_of(genes: Sequence[str], species: str, orthologs: Orthologs | None) -> dict[str, list[str]]:
    """By gene of the section: the names to look for in the annotation."""
    if species != "mouse" or orthologs is None:
        return {gene: [gene] for gene in genes}
    return {gene: orthologs.to_human.get(gene, []) for gene in genes}


def _namespace(gmt: Path) -> str:
    words = gmt.stem.casefold()
    return next((short for full, short in _SHORT.items() if full in words), gmt.stem)


def _term(name: str) -> dict[str, str]:
    """Id and name of a set: `axonogenesis (GO:0007409)` holds both."""
    go = _GO_ID.search(name)
    return {"term": go[0] if go else name, "name": name.replace(f"({go[0]})", "").strip() if go else name}


def _finish(table: pd.DataFrame, n_terms: Mapping[str, int]) -> pd.DataFrame:
    """Adjust the p values, BH within a cluster and namespace, and sort."""
    from scipy.stats import false_discovery_control

    if table.empty:
        return pd.DataFrame(columns=_COLUMNS)
    table["fold"] = (table["n_found"] / table["n_markers"]) / (table["n_term"] / table["n_background"])
    adjusted = pd.Series(np.nan, index=table.index)
    for (_, namespace), part in table.groupby(["cluster", "namespace"]):
        # terms that no marker hits have p = 1; they were tested too
        missing = max(0, n_terms[str(namespace)] - len(part))
        p = np.concatenate([part["p_value"].clip(0, 1).to_numpy(), np.ones(missing)])
        adjusted[part.index] = false_discovery_control(p, method="bh")[: len(part)]
    table["p_adj"] = adjusted
    order = ["cluster", "namespace", "p_value", "term"]
    return table.sort_values(order, kind="stable")[_COLUMNS].reset_index(drop=True)
