"""Find over-represented gene sets and Gene Ontology terms among marker genes, from local files.

There are two sources: gene sets (.gmt, tested with gseapy), and the ontology itself (.obo and annotations, tested with goatools, which also
counts a gene for all ancestors of its terms). The background is the tested genes rather than the genome: a panel of variable genes is rich
in cell type markers, and against the genome every cluster would be enriched for them.
"""

from __future__ import annotations

import logging
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from prts.analysis.symbols import Orthologs
from prts.errors import InputError, ParameterError
from prts.extras import install_command

if TYPE_CHECKING:
    from goatools.obo_parser import GODag

logger = logging.getLogger(__name__)

_COLUMNS = [
    *("cluster", "namespace", "term", "name", "n_found", "n_markers", "n_term", "n_background"),
    *("fold", "p_value", "p_adj", "genes"),
]
_SHORT = {"biological_process": "BP", "molecular_function": "MF", "cellular_component": "CC"}
_GO_ID = re.compile(r"GO:\d{7}")
_LEAST_TERM = 2


@dataclass(frozen=True)
class EnrichmentSettings:
    """Gene sets that marker genes are tested for.

    Attributes
    ----------
    gmt
        Gene set files (.gmt).
    obo, annotations
        Gene Ontology (go-basic.obo), and the annotations of the genes: a GAF, or a table of gene and GO ids. One needs the other.
    max_p
        Maximum adjusted p value of reported terms; the default is the paper's.
    n_markers
        Number of top markers per cluster that are tested.
    """

    gmt: Sequence[Path] = ()
    obo: Path | None = None
    annotations: Path | None = None
    max_p: float = 0.2
    n_markers: int = 100

    def __post_init__(self) -> None:
        if self.obo is not None and self.annotations is None:
            raise ParameterError(
                "enrich", "obo", f"{self.obo} needs `annotations` as well; give a GAF or a table of gene and GO ids"
            )
        if self.annotations is not None and self.obo is None:
            raise ParameterError(
                "enrich", "annotations", f"{self.annotations} needs the ontology as well; give `obo` (go-basic.obo)"
            )


def enrich_clusters(
    markers: pd.DataFrame,
    background: Sequence[str],
    settings: EnrichmentSettings,
    *,
    species: str = "human",
    orthologs: Orthologs | None = None,
) -> pd.DataFrame | None:
    """Test the top markers of each cluster for all gene sets of the settings.

    Parameters
    ----------
    markers
        Result of `prts.analysis.clusters.find_markers`.
    background
        All tested genes.
    settings
        Gene sets, and the p value below which a term is reported.
    species, orthologs
        As for `enrich_gmt`.

    Returns
    -------
    Terms with an adjusted p value below `max_p`, with the columns of `enrich_gmt`; None if the settings name no gene sets.
    """
    lists = marker_lists(markers, settings.n_markers)
    options: dict[str, Any] = {"species": species, "orthologs": orthologs}
    parts = [enrich_gmt(lists, background, Path(gmt), **options) for gmt in settings.gmt]
    if settings.obo is not None and settings.annotations is not None:
        parts.append(enrich_go(lists, background, Path(settings.obo), Path(settings.annotations), **options))
    if not parts:
        return None
    table = pd.concat([part for part in parts if len(part)] or parts[:1], ignore_index=True)
    significant = table["p_adj"] < settings.max_p
    logger.info("enrichment: %d of %d terms have p < %g", significant.sum(), len(table), settings.max_p)
    return table[significant].reset_index(drop=True)


def marker_lists(markers: pd.DataFrame, n_markers: int) -> dict[str, list[str]]:
    """Top markers of each cluster, from the table of `prts.analysis.clusters.find_markers`."""
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
    """Test lists of genes for the gene sets of a .gmt file (hypergeometric test, gseapy).

    Parameters
    ----------
    lists
        Genes by cluster.
    background
        All tested genes.
    gmt
        Gene sets with human symbols, or with those of the section. The namespace is BP, MF or CC if the file name contains it
        (`GO_Biological_Process`), else the file name.
    species
        Species of the genes, "human" or "mouse".
    orthologs
        Translates mouse genes to human symbols.

    Returns
    -------
    `cluster, namespace, term, name, n_found, n_markers, n_term, n_background, fold, p_value, p_adj, genes`, most significant first within
    each cluster. `p_adj` is Benjamini-Hochberg over all sets with at least two tested genes, including sets without a hit.

    Raises
    ------
    InputError
        If gseapy is not installed, the file is not a .gmt, or it shares no genes with the background.
    """
    try:
        import gseapy
    except ImportError as error:
        raise ParameterError("enrich", "gmt", f"needs gseapy; run {install_command('analysis')}") from error

    own = _annotation_names(background, species, orthologs)
    tested = {name for names in own.values() for name in names}
    sets = {name: members & tested for name, members in _read_gmt(Path(gmt)).items()}
    sets = {name: members for name, members in sets.items() if len(members) >= _LEAST_TERM}
    if not sets:
        raise InputError(
            f"{gmt}: no set contains two of the section's genes ({', '.join(list(background)[:3])}, ...); for human gene sets and a mouse "
            "section, give `orthologs`"
        )
    gene_of = {name: gene for gene, names in own.items() for name in names}
    ordered = {name: sorted(members) for name, members in sets.items()}
    in_any_set = set().union(*sets.values())
    rows = []
    for cluster, genes in lists.items():
        found = sorted({name for gene in genes for name in own.get(gene, ())})
        if not in_any_set & set(found):
            continue
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
                    "genes": " ".join(sorted(gene_of[hit] for hit in hits)),
                }
            )
    namespace = _namespace(Path(gmt))
    table = pd.DataFrame(rows).assign(namespace=namespace, n_background=len(tested)) if rows else pd.DataFrame()
    return _adjusted(table, {namespace: len(sets)})


def enrich_go(
    lists: Mapping[str, Sequence[str]],
    background: Sequence[str],
    obo: Path,
    annotations: Path,
    *,
    species: str = "human",
    orthologs: Orthologs | None = None,
) -> pd.DataFrame:
    """Test lists of genes for Gene Ontology terms (Fisher's exact test, goatools); BP, MF and CC are tested separately.

    Parameters
    ----------
    lists, background, species, orthologs
        As for `enrich_gmt`.
    obo
        The ontology.
    annotations
        A GAF (.gaf, .gaf.gz), whose symbol and synonym columns map gene symbols to its ids (such as UniProt); or a table of two columns,
        gene and GO ids, that uses the gene names of the section. Annotations with NOT or without data (ND) are ignored.

    Returns
    -------
    The same columns as `enrich_gmt`; a gene also counts for the ancestors of its terms.

    Raises
    ------
    InputError
        If goatools is not installed, a file cannot be read, or none of the background genes is annotated.
    """
    try:
        from goatools.go_enrichment import GOEnrichmentStudy
    except ImportError as error:
        raise ParameterError("enrich", "obo", f"needs goatools; run {install_command('analysis')}") from error

    for path, what in ((obo, "an ontology (go-basic.obo)"), (annotations, "a GAF, or a table of gene and GO ids")):
        if not Path(path).is_file():
            raise InputError(f"{path}: no such file; expected {what}")
    dag = _read_ontology(Path(obo))
    terms, id_of = read_annotations(Path(annotations))
    own = _annotation_names(background, species, orthologs)
    ids = {gene: sorted({id_of[name] for name in names if name in id_of}) for gene, names in own.items()}
    gene_of = {one: gene for gene, found in ids.items() for one in found}
    if not gene_of:
        raise InputError(
            f"{annotations}: annotates none of the section's genes ({', '.join(list(background)[:3])}, ...); for human annotations and a "
            "mouse section, give `orthologs`"
        )
    # a gene without annotation was tested too: it stays in the background, under its own name
    population = set(gene_of) | {gene for gene, found in ids.items() if not found}
    members = {
        name: {one for gene in genes if gene in ids for one in (ids[gene] or [gene])} for name, genes in lists.items()
    }
    rows, n_terms = [], {}
    for full, namespace in _SHORT.items():
        annotated = {one: {go for go in terms[one] if go in dag and dag[go].namespace == full} for one in gene_of}
        annotated = {one: gos for one, gos in annotated.items() if gos}
        if not annotated:
            continue
        study = GOEnrichmentStudy(
            population, annotated, dag,
            propagate_counts=True, methods=["fdr_bh"], log=None, alternative="greater",
        )  # fmt: skip
        n_terms[namespace] = sum(len(items) >= _LEAST_TERM for items in study.go2popitems.values())
        rows += [{**row, "namespace": namespace} for row in _go_records(study, members, gene_of)]
    return _adjusted(pd.DataFrame(rows), n_terms)


def _read_ontology(obo: Path) -> GODag:
    from goatools.obo_parser import GODag

    try:
        dag = GODag(str(obo), prt=None)
    except Exception as error:  # goatools can raise anything on a malformed line
        raise InputError(f"{obo}: cannot be read as an ontology ({type(error).__name__}: {error})") from error
    if not dag:
        raise InputError(f"{obo}: contains no terms; expected an ontology (go-basic.obo)")
    return dag


def _go_records(study: Any, members: Mapping[str, set[str]], gene_of: Mapping[str, str]) -> list[dict[str, Any]]:
    """Terms that goatools finds in each cluster, one row per term."""
    return [
        {
            "cluster": cluster,
            "term": record.GO,
            "name": record.name,
            "n_found": record.study_count,
            "n_markers": record.study_n,
            "n_term": record.pop_count,
            "n_background": record.pop_n,
            "p_value": float(record.p_uncorrected),
            "genes": " ".join(sorted(gene_of[one] for one in record.study_items)),
        }
        for cluster, genes in members.items()
        for record in (study.run_study(genes, prt=None) if genes else [])
        if record.study_count > 0 and record.pop_count >= _LEAST_TERM
    ]


def read_annotations(path: Path) -> tuple[dict[str, set[str]], dict[str, str]]:
    """Read a GAF or a table of genes and GO ids.

    Returns
    -------
    terms
        GO ids by the gene id that the file uses.
    id_of
        That gene id by symbol. In a GAF, official symbols take precedence over synonyms, and ambiguous synonyms are ignored.

    Raises
    ------
    InputError
        If the file cannot be read or contains no annotations.
    """
    path = Path(path)
    is_gaf = path.name.removesuffix(".gz").endswith(".gaf")
    # a table is read line by line: GO ids are found in any format after the gene
    options: dict[str, Any] = (
        {"sep": "\t", "comment": "!", "names": range(17)} if is_gaf else {"sep": "\0", "names": [0]}
    )
    try:
        raw = pd.read_csv(path, header=None, dtype=str, encoding="utf-8", quoting=3, index_col=False, **options)
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error}); expected a GAF or a table of gene and GO ids") from error
    terms = _gaf_terms(raw) if is_gaf else _table_terms(raw[0])
    if not terms:
        raise InputError(
            f"{path}: contains no annotations; expected a GAF (.gaf), or a table with a gene and its GO ids in each row"
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
    """GO ids of each line, by the gene before the first tab, comma, semicolon or space."""
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
        raise InputError(f"{path}: no such file; expected gene sets (.gmt)")
    try:
        lines = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error}); expected gene sets (.gmt)") from error
    if not lines or any(len(fields) < 3 for fields in lines):
        raise InputError(
            f"{path}: not a .gmt file; each line must have a name, a description and genes, separated by tabs"
        )
    # some libraries append a weight to the gene
    return {fields[0]: {gene.split(",")[0].strip() for gene in fields[2:]} - {""} for fields in lines}


def _annotation_names(genes: Sequence[str], species: str, orthologs: Orthologs | None) -> dict[str, list[str]]:
    """Names to look up in the annotation for each gene of the section."""
    if species != "mouse" or orthologs is None:
        return {gene: [gene] for gene in genes}
    return {gene: orthologs.to_human.get(gene, []) for gene in genes}


def _namespace(gmt: Path) -> str:
    words = gmt.stem.casefold()
    return next((short for full, short in _SHORT.items() if full in words), gmt.stem)


def _term(name: str) -> dict[str, str]:
    """Id and name of a set, such as `axonogenesis (GO:0007409)`."""
    go = _GO_ID.search(name)
    return {"term": go[0] if go else name, "name": name.replace(f"({go[0]})", "").strip() if go else name}


def _adjusted(table: pd.DataFrame, n_terms: Mapping[str, int]) -> pd.DataFrame:
    """Add fold enrichment and adjusted p values (BH within cluster and namespace), and sort."""
    from scipy.stats import false_discovery_control

    if table.empty:
        return pd.DataFrame(columns=_COLUMNS)
    table["fold"] = (table["n_found"] / table["n_markers"]) / (table["n_term"] / table["n_background"])
    adjusted = pd.Series(np.nan, index=table.index)
    for (_, namespace), part in table.groupby(["cluster", "namespace"]):
        # terms without a hit were tested too, with p = 1
        missing = max(0, n_terms[str(namespace)] - len(part))
        p = np.concatenate([part["p_value"].clip(0, 1).to_numpy(), np.ones(missing)])
        adjusted[part.index] = false_discovery_control(p, method="bh")[: len(part)]
    table["p_adj"] = adjusted
    order = ["cluster", "namespace", "p_value", "term"]
    return table.sort_values(order, kind="stable")[_COLUMNS].reset_index(drop=True)
