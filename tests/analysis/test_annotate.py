from __future__ import annotations

from math import comb
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from prts.analysis.annotate import UNASSIGNED, annotate, broad_class, read_markers
from prts.analysis.symbols import read_orthologs
from prts.errors import InputError

HUMAN = [f"GENE{i}" for i in range(30)]
MOUSE = [f"Gene{i}" for i in range(30)]


def table(folder: Path, text: str, name: str = "markers.csv") -> Path:
    (folder / name).write_text(text)
    return folder / name


def markers_of(**clusters: list[str]) -> pd.DataFrame:
    rows = [
        {"cluster": name, "rank": i + 1, "gene": gene}
        for name, genes in clusters.items()
        for i, gene in enumerate(genes)
    ]
    return pd.DataFrame(rows)


def hypergeometric(hits: int, own: int, of_type: int, background: int) -> float:
    ways = [comb(of_type, k) * comb(background - of_type, own - k) for k in range(hits, min(own, of_type) + 1)]
    return sum(ways) / comb(background, own)


def test_the_name_its_p_value_and_its_genes() -> None:
    known = pd.DataFrame({"type": ["T"] * 4 + ["B"] * 4, "gene": [*HUMAN[:4], *HUMAN[4:8]]})
    markers = markers_of(c0=[HUMAN[2], HUMAN[0], HUMAN[1], HUMAN[4], HUMAN[20]], c1=HUMAN[20:25])
    names = annotate(markers, known, HUMAN, clusters=["c0", "c1", "c2"]).set_index("cluster")
    assert names.loc["c0", "type"] == "T"
    assert names.loc["c0", "genes"] == "GENE2 GENE0 GENE1"  # best marker first
    assert names.loc["c0", "p_value"] == pytest.approx(hypergeometric(3, 5, 4, 30))
    # four pairs of cluster and type were tested; this one has the smallest p
    assert names.loc["c0", "p_adj"] == pytest.approx(4 * hypergeometric(3, 5, 4, 30))
    assert names.loc["c0", "second"] == "B"
    assert names.loc["c0", "second_genes"] == "GENE4"
    assert names.loc["c1", "type"] == UNASSIGNED  # none of its genes is known
    assert names.loc["c2", "type"] == UNASSIGNED  # it has no marker
    assert np.isnan(names.loc["c2", "p_value"])


def test_the_background_is_what_was_tested_and_not_the_genome() -> None:
    known = pd.DataFrame({"type": ["T"] * 6, "gene": HUMAN[:6]})
    markers = markers_of(c0=HUMAN[:4])
    # 4 of 4 hits are no wonder where 6 of the 8 tested genes are markers of T
    narrow = annotate(markers, known, HUMAN[:8], clusters=["c0"]).iloc[0]
    assert narrow["type"] == UNASSIGNED
    assert narrow["second"] == "T"
    assert annotate(markers, known, HUMAN, clusters=["c0"]).iloc[0]["type"] == "T"


def test_one_gene_is_no_evidence() -> None:
    known = pd.DataFrame({"type": ["T"], "gene": HUMAN[:1]})
    names = annotate(markers_of(c0=HUMAN[:1]), known, HUMAN, clusters=["c0"], max_p=0.05)
    assert names.iloc[0]["type"] == UNASSIGNED
    assert annotate(markers_of(c0=HUMAN[:1]), known, HUMAN, clusters=["c0"], min_genes=1).iloc[0]["type"] == "T"


def test_only_the_best_markers_count() -> None:
    known = pd.DataFrame({"type": ["T"] * 3, "gene": HUMAN[:3]})
    markers = markers_of(c0=[*HUMAN[10:15], *HUMAN[:3]])
    assert annotate(markers, known, HUMAN, clusters=["c0"], n_markers=5).iloc[0]["genes"] == ""


def test_panglaodb_is_filtered_by_species_and_tissue(tmp_path: Path) -> None:
    head = "species\tofficial gene symbol\tcell type\tubiquitousness index\torgan\n"
    rows = "Mm Hs\tGENE1\tNeurons\t0\tBrain\nHs\tGENE2\tNeurons\t0\tBrain\n"
    rows += "Mm\tGENE3\tNeurons\t0\tBrain\nMm Hs\tGENE4\tB cells\t0\tBlood\n4\tGENE5\tx\t0\tNA\n"
    path = table(tmp_path, head + rows, "pangla.tsv")
    human = read_markers(path, species="human", genes=HUMAN)
    assert set(human["gene"]) == {"GENE1", "GENE2", "GENE4"}
    brain = read_markers(path, species="human", genes=HUMAN, tissues=["brain"])
    assert set(brain["type"]) == {"Neurons"}
    mouse = read_markers(path, species="mouse", genes=MOUSE)
    assert set(mouse["gene"]) == {"Gene1", "Gene3", "Gene4"}
    orthologs = read_orthologs(table(tmp_path, "GENE1,Gene7\nGENE1,Gene8\nGENE3,\nGENE4,Gene4\n", "o.csv"))
    mapped = read_markers(path, species="mouse", genes=MOUSE, orthologs=orthologs)
    assert set(mapped["gene"]) == {"Gene7", "Gene8", "Gene4"}


def test_cellmarker_in_both_of_its_shapes(tmp_path: Path) -> None:
    short = table(tmp_path, 'Tissue,CT,Gene\nBrain,Astrocyte,"Gene1,Gene2,Gene1"\nLiver,Hepatocyte,Gene3\n')
    found = read_markers(short, species="mouse", genes=MOUSE, tissues=["Brain"])
    assert found.to_dict("list") == {"type": ["Astrocyte", "Astrocyte"], "gene": ["Gene1", "Gene2"]}
    text = "species,tissue_class,tissue_type,cell_name,marker,Symbol\nHuman,Brain,Brain,Neuron,NeuN,GENE1\n"
    text += "Mouse,Brain,Brain,Neuron,x,Gene1\n"
    full = read_markers(table(tmp_path, text, "full.csv"), species="human", genes=HUMAN)
    assert full.to_dict("list") == {"type": ["Neuron"], "gene": ["GENE1"]}


def test_wrong_tables_are_refused_in_one_line(tmp_path: Path) -> None:
    def refused(text: str, match: str, species: str = "human", **more: object) -> None:
        genes = HUMAN if species == "human" else MOUSE
        with pytest.raises(InputError, match=match) as caught:
            read_markers(table(tmp_path, text), species=species, genes=genes, **more)
        assert "\n" not in str(caught.value)

    refused("name,symbols\na,b\n", "has the columns name, symbols; a marker table needs `type` and `gene`")
    refused("type,gene\n" + "".join(f"T,{g}\n" for g in MOUSE), "are not human; give a table of human markers")
    refused("type,gene\nT,OTHER1\nT,OTHER2\n", "shares no genes with the section")
    refused("species,type,gene\nMouse,T,GENE1\n", "has no human markers")
    refused("type,gene,tissue\nT,GENE1,Lung\n", "annotate tissues: Brain not found", tissues=["Brain"])
    refused("type,gene\nT,GENE1\n", "has no tissue column", tissues=["Brain"])
    with pytest.raises(InputError, match="no such file"):
        read_markers(tmp_path / "nowhere.csv", species="human", genes=HUMAN)
    with pytest.raises(InputError, match="does not look like human symbols"):
        read_orthologs(table(tmp_path, "Gene1,GENE1\n", "o.csv"))


def test_broad_classes_take_the_first_pattern_that_fits() -> None:
    classes = {"Neurons": ["*neuron*", "gac"], "Astrocytes": ["*astrocyte*"], "Stromal": ["vlm*"]}
    types = pd.Series(["GABAergic neurons", "GAC", "Astrocytes", "VLM 2", "Hepatocytes", UNASSIGNED, None])
    broad = broad_class(types, classes)
    assert broad.iloc[:5].tolist() == ["Neurons", "Neurons", "Astrocytes", "Stromal", "Hepatocytes"]
    assert broad.iloc[5:].isna().all()


@pytest.mark.parametrize("text", ["CAMK2A\tCamk2a\n", "CAMK2A;Camk2a\n", "CAMK2A Camk2a\n", '"CAMK2A","Camk2a"\n'])
def test_orthologs_with_any_separator(tmp_path: Path, text: str) -> None:
    assert read_orthologs(table(tmp_path, text, "o.csv")).to_mouse == {"CAMK2A": ["Camk2a"]}


@pytest.mark.parametrize("text", ['{"a":' * 50_000, "x" * 300_000, "\0" * 100, '"\n'])
def test_what_is_no_table_is_refused_at_once(tmp_path: Path, text: str) -> None:
    # pandas' search for the separator of the first took minutes
    path = table(tmp_path, text, "o.csv")
    for read in (read_orthologs, lambda path: read_markers(path, species="human", genes=HUMAN)):
        with pytest.raises(InputError, match=r"o\.csv: (cannot|has)"):
            read(path)
    (tmp_path / "o.csv.gz").write_bytes(b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03\xff\xff\xff\xff")
    with pytest.raises(InputError, match="cannot be read as a table"):
        read_orthologs(tmp_path / "o.csv.gz")


@pytest.mark.real
def test_the_real_tables_are_read(prts_data: Path) -> None:
    genes = ["Gad1", "Gfap", "Mbp", "Plp1", "Aqp4", "Snap25"]
    cellmarker = read_markers(prts_data / "markers/CellMarker2_Mouse.csv", species="mouse", genes=genes)
    assert ("Astrocyte", "Gfap") in set(cellmarker.itertuples(index=False, name=None))
    orthologs = read_orthologs(prts_data / "markers/Ensembl105_Human2Mouse_Genes.csv")
    assert orthologs.to_human["Gfap"] == ["GFAP"]
    more = {"species": "mouse", "tissues": ["Brain"], "orthologs": orthologs}
    pangla = read_markers(prts_data / "markers/PanglaoDB_markers_27_Mar_2020.tsv", genes=genes, **more)
    assert ("Oligodendrocytes", "Plp1") in set(pangla.itertuples(index=False, name=None))
