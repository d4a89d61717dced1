from __future__ import annotations

import gzip
from math import comb
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from prts.analysis.enrich import enrich_gmt, enrich_go, marker_lists, read_annotations
from prts.analysis.symbols import Orthologs
from prts.errors import InputError

GENES = [f"GENE{i}" for i in range(200)]
OBO = """format-version: 1.2

[Term]
id: GO:0000001
name: root process
namespace: biological_process

[Term]
id: GO:0000002
name: planted process
namespace: biological_process
is_a: GO:0000001 ! root process

[Term]
id: GO:0000003
name: other process
namespace: biological_process
is_a: GO:0000001 ! root process

[Term]
id: GO:0000004
name: planted function
namespace: molecular_function

[Term]
id: GO:0000005
name: some component
namespace: cellular_component
"""


def tail(hits: int, own: int, of_term: int, background: int) -> float:
    ways = [comb(of_term, k) * comb(background - of_term, own - k) for k in range(hits, min(own, of_term) + 1)]
    return sum(ways) / comb(background, own)


@pytest.fixture
def gmt(tmp_path: Path) -> Path:
    """Forty sets of 10 genes; the first is the planted one, its name has a GO id. Genes that were not tested are in it, too."""
    rng = np.random.default_rng(0)
    lines = ["planted process (GO:0000002)\t\t" + "\t".join([*GENES[:10], "UNTESTED1", "UNTESTED2"])]
    lines += [f"set {k}\t\t" + "\t".join(rng.choice(GENES[20:], 10, replace=False)) for k in range(39)]
    path = tmp_path / "GO_Biological_Process.gmt"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def go(tmp_path: Path) -> tuple[Path, Path]:
    """An ontology and a GAF by UniProt-like ids: GENE0-9 in the planted process and function, GENE20-59 in the other process."""
    (tmp_path / "go.obo").write_text(OBO)
    rows = []
    for i in range(100):
        terms = [("GO:0000002", "P"), ("GO:0000004", "F")] if i < 10 else [("GO:0000003", "P")] if 20 <= i < 60 else []
        for term, aspect in terms:
            rows.append(
                [
                    "UniProtKB",
                    f"P{i:05d}",
                    f"GENE{i}",
                    "involved_in",
                    term,
                    "PMID:1",
                    "IDA",
                    "",
                    aspect,
                    "",
                    f"OLD{i}|x",
                    "protein",
                    "taxon:9606",
                    "20260101",
                    "X",
                    "",
                    "",
                ]
            )
    rows.append(
        [
            "UniProtKB",
            "P00150",
            "GENE150",
            "NOT|involved_in",
            "GO:0000002",
            "",
            "IDA",
            "",
            "P",
            "",
            "",
            "protein",
            "taxon:9606",
            "20260101",
            "X",
            "",
            "",
        ]
    )
    rows.append(
        [
            "UniProtKB",
            "P00151",
            "GENE151",
            "involved_in",
            "GO:0000002",
            "",
            "ND",
            "",
            "P",
            "",
            "",
            "protein",
            "taxon:9606",
            "20260101",
            "X",
            "",
            "",
        ]
    )
    text = "!gaf-version: 2.2\n" + "".join("\t".join(row) + "\n" for row in rows)
    with gzip.open(tmp_path / "a.gaf.gz", "wt") as handle:
        handle.write(text)
    return tmp_path / "go.obo", tmp_path / "a.gaf.gz"


def test_the_planted_set_is_found_with_the_tested_genes_as_background(gmt: Path) -> None:
    table = enrich_gmt({"0": [*GENES[:6], *GENES[100:110]]}, GENES, gmt)
    first = table.iloc[0]
    assert (first["term"], first["name"], first["namespace"]) == ("GO:0000002", "planted process", "BP")
    assert (first["n_found"], first["n_markers"], first["n_term"], first["n_background"]) == (6, 16, 10, 200)
    assert first["p_value"] == pytest.approx(tail(6, 16, 10, 200))
    assert first["p_adj"] == pytest.approx(40 * first["p_value"])  # forty sets were tested
    assert first["fold"] == pytest.approx((6 / 16) / (10 / 200))
    assert first["genes"].split() == sorted(GENES[:6])
    assert (table["p_adj"].iloc[1:] > 0.05).all()


def test_a_mouse_section_is_looked_up_by_human_symbols(gmt: Path) -> None:
    mouse = [f"Gene{i}" for i in range(200)]
    orthologs = Orthologs(to_mouse={}, to_human={f"Gene{i}": [f"GENE{i}"] for i in range(150)})
    table = enrich_gmt({"0": mouse[:6]}, mouse, gmt, species="mouse", orthologs=orthologs)
    assert table.iloc[0]["name"] == "planted process"
    assert table.iloc[0]["genes"].split() == sorted(mouse[:6])
    assert table.iloc[0]["n_background"] == 150  # genes without a human counterpart cannot be found
    with pytest.raises(InputError, match=r"no set contains two of the section's genes.*orthologs"):
        enrich_gmt({"0": mouse[:6]}, mouse, gmt, species="mouse")


def test_ontology_terms_by_namespace_and_with_their_ancestors(go: tuple[Path, Path]) -> None:
    own = [*GENES[:6], *GENES[20:22], *GENES[120:124]]
    table = enrich_go({"7": own}, GENES, *go).set_index("term")
    planted = table.loc["GO:0000002"]
    assert (planted["namespace"], planted["n_found"], planted["n_term"]) == ("BP", 6, 10)
    # genes without an annotation were tested as well; NOT and ND annotations do not count
    assert (planted["n_markers"], planted["n_background"]) == (12, 200)
    assert planted["p_value"] == pytest.approx(tail(6, 12, 10, 200))
    assert planted["p_adj"] == pytest.approx(3 * tail(6, 12, 10, 200))  # three processes were tested
    assert planted["genes"].split() == sorted(GENES[:6])  # by symbol again, not by UniProt's id
    assert table.loc["GO:0000001", "n_found"] == 8  # the root has the genes of both its children
    assert table.loc["GO:0000001", "n_term"] == 50
    function = table.loc["GO:0000004"]
    assert (function["namespace"], function["p_adj"]) == ("MF", pytest.approx(tail(6, 12, 10, 200)))


def test_a_plain_table_of_genes_and_terms_serves_as_well(go: tuple[Path, Path], tmp_path: Path) -> None:
    rows = [f"GENE{i}\tGO:0000002; GO:0000004" for i in range(10)] + [f"GENE{i}\tGO:0000003" for i in range(20, 60)]
    (tmp_path / "gene2go.tsv").write_text("\n".join(rows) + "\n")
    own = {"7": [*GENES[:6], *GENES[20:22], *GENES[120:124]]}
    by_table = enrich_go(own, GENES, go[0], tmp_path / "gene2go.tsv")
    pd.testing.assert_frame_equal(by_table, enrich_go(own, GENES, *go))


def test_symbols_go_before_synonyms_in_a_gaf(go: tuple[Path, Path]) -> None:
    terms, id_of = read_annotations(go[1])
    assert terms["P00000"] == {"GO:0000002", "GO:0000004"}
    assert (id_of["GENE3"], id_of["OLD3"]) == ("P00003", "P00003")
    assert "x" not in id_of  # the synonym of several
    assert "P00150" not in terms
    assert "P00151" not in terms


@pytest.mark.parametrize("separator", ["\t", ",", "; ", " "])
def test_a_table_of_genes_and_go_ids(tmp_path: Path, separator: str) -> None:
    rows = [("A", "GO:0000002; GO:0000004"), ("B", "GO:0000003"), ("A", "GO:0000003"), ("C", "none")]
    (tmp_path / "t.tsv").write_text("".join(f"{separator.join(row)}\n" for row in rows))
    terms, id_of = read_annotations(tmp_path / "t.tsv")
    assert terms == {"A": {"GO:0000002", "GO:0000003", "GO:0000004"}, "B": {"GO:0000003"}}
    assert id_of == {"A": "A", "B": "B"}


def test_nothing_is_found_in_shuffled_lists(gmt: Path, go: tuple[Path, Path]) -> None:
    rng = np.random.default_rng(1)
    lists = {f"{k}": list(rng.choice(GENES, 20, replace=False)) for k in range(30)}
    for table, n_tests in ((enrich_gmt(lists, GENES, gmt), 30), (enrich_go(lists, GENES, *go), 90)):
        found = table[table["p_adj"] < 0.05].groupby(["cluster", "namespace"]).ngroups
        # BH at 0.05: one list and namespace in twenty may have a false term; exact tests of few genes have fewer
        assert found <= 0.1 * n_tests


def test_marker_lists_are_cut_at_a_rank() -> None:
    markers = pd.DataFrame({"cluster": ["0", "0", "1"], "rank": [1, 2, 1], "gene": ["A", "B", "C"]})
    assert marker_lists(markers, 1) == {"0": ["A"], "1": ["C"]}


def test_wrong_files_are_refused_in_one_line(tmp_path: Path, go: tuple[Path, Path]) -> None:
    lists = {"0": GENES[:5]}
    (tmp_path / "bad.gmt").write_text("a set without genes\n")
    (tmp_path / "empty.tsv").write_text("GENE1\tno term\n")
    (tmp_path / "bad.obo").write_text("no ontology\n")
    wrong = [
        (lambda: enrich_gmt(lists, GENES, tmp_path / "bad.gmt"), "not a .gmt file"),
        (lambda: enrich_gmt(lists, GENES, tmp_path / "no.gmt"), "no such file"),
        (lambda: enrich_go(lists, GENES, go[0], tmp_path / "empty.tsv"), "contains no annotations"),
        (
            lambda: enrich_go(lists, GENES, tmp_path / "bad.obo", go[1]),
            "contains no terms|cannot be read as an ontology",
        ),
        (lambda: enrich_go(lists, GENES, tmp_path / "no.obo", go[1]), "no such file"),
        (lambda: enrich_go(lists, ["other1", "other2"], *go), "annotates none of the section's genes"),
    ]
    for call, match in wrong:
        with pytest.raises(InputError, match=match) as caught:
            call()
        assert "\n" not in str(caught.value)


@pytest.mark.real
def test_the_real_gene_sets_know_the_matrix_of_fibroblasts(prts_data: Path) -> None:
    rng = np.random.default_rng(0)
    gmt = prts_data / "markers/enrichr.GO_Biological_Process_2021.gmt"
    pool = sorted({g for line in gmt.read_text().splitlines() for g in line.split("\t")[2:] if g})
    collagens = ["COL1A1", "COL1A2", "COL3A1", "COL5A1", "COL5A2", "FBN1", "LUM", "DCN", "FN1"]
    background = sorted({*rng.choice(pool, 1500, replace=False), *collagens})
    table = enrich_gmt({"0": collagens}, background, gmt)
    assert "extracellular matrix organization" in table.loc[table["p_adj"] < 0.01, "name"].tolist()[:5]
