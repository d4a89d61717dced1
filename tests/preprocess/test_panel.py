from __future__ import annotations

import json
import logging

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from anndata import AnnData

from prts.errors import InputError
from prts.io.gene_list import read_gene_list
from prts.preprocess.panel import FEW, FilePanel, Panel, PaperPanel, TopPanel, warn_of_small


def section(X, symbols=None, gene_ids=None):
    X = sp.csr_matrix(np.asarray(X, dtype=np.int32))
    gene_ids = [f"ENSG{i:03d}" for i in range(X.shape[1])] if gene_ids is None else list(gene_ids)
    symbols = [f"GENE{i}" for i in range(X.shape[1])] if symbols is None else list(symbols)
    twice = pd.Series(symbols).duplicated(keep=False)
    names = [f"{s}_{i}" if again else s for s, i, again in zip(symbols, gene_ids, twice, strict=True)]
    return AnnData(X, var=pd.DataFrame({"gene_id": gene_ids, "symbol": symbols, "genome": "GRCh38"}, index=names))


def clustered(n_per_type=50, n_genes=400, n_types=4, seed=0):
    """Nuclei of types that differ in ten marker genes each, over a varied background."""
    rng = np.random.default_rng(seed)
    rates = np.tile(np.random.default_rng(9).gamma(0.5, 4.0, n_genes), (n_types, 1))
    for kind in range(n_types):
        rates[kind, kind * 10 : kind * 10 + 10] += 8.0
    return section(rng.poisson(np.repeat(rates, n_per_type, axis=0)))


SMALL = {"n_top_genes": 150, "n_pcs": 10, "n_neighbors": 8}


@pytest.mark.slow
@pytest.mark.parametrize(("p", "log2fc", "resolution"), [(0.01, 1.0, 0.6), (0.2, 0.7, 1.5)])
def test_paper_panel_is_plain_scanpy(p, log2fc, resolution):
    import scanpy as sc

    first, second = clustered(seed=1), clustered(seed=2)
    panel = PaperPanel(**SMALL, resolution=resolution, max_p_adjusted=p, min_abs_log2fc=log2fc)([first, second])

    a = AnnData(np.vstack([first.X.toarray(), second.X.toarray()]).astype(np.float32), var=first.var.copy())
    sc.pp.normalize_total(a)
    sc.pp.log1p(a)
    sc.pp.highly_variable_genes(a, n_top_genes=150, flavor="seurat")
    a = a[:, a.var.highly_variable].copy()
    sc.tl.pca(a, n_comps=10)
    sc.pp.neighbors(a, n_neighbors=8)
    sc.tl.leiden(a, resolution=resolution, flavor="igraph", n_iterations=2, directed=False, random_state=0)
    sc.tl.rank_genes_groups(a, "leiden", method="wilcoxon")
    found = a.uns["rank_genes_groups"]
    expected = {
        gene
        for cluster in found["names"].dtype.names
        for gene, adjusted, change in zip(
            *(found[key][cluster] for key in ("names", "pvals_adj", "logfoldchanges")), strict=True
        )
        if adjusted < p and abs(change) > log2fc
    }
    assert panel.genes == tuple(gene for gene in first.var_names if gene in expected)
    assert 0 < len(expected) < 150
    assert panel.steps["clusters"] == a.obs.leiden.nunique()
    assert {key: panel.steps[key] for key in ("nuclei", "genes", "highly_variable", "kept")} == {
        "nuclei": 400,
        "genes": 400,
        "highly_variable": 150,
        "kept": len(expected),
    }


@pytest.mark.slow
def test_paper_panel_finds_the_markers_and_repeats_itself():
    sections = [clustered()]
    panel = PaperPanel(**SMALL)(sections)
    assert len({f"GENE{i}" for i in range(40)} & set(panel.genes)) >= 35
    assert len(panel.genes) < 80
    assert panel == PaperPanel(**SMALL)(sections)
    assert sections[0].X.dtype == np.int32  # the counts are not normalised in place


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:DataFrame is highly fragmented")
def test_clusters_of_one_nucleus_are_not_tested():
    counts = clustered()
    options = {**SMALL, "resolution": 50.0, "max_p_adjusted": 0.9, "min_abs_log2fc": 0.1}
    # More clusters than half the nuclei: some must have one nucleus, and scanpy would refuse to test those.
    assert counts.n_obs / 2 < PaperPanel(**options)([counts]).steps["clusters"] < counts.n_obs


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"n_top_genes": 500}, "panel n_top_genes"),
        ({"n_pcs": 150}, "panel n_pcs"),
        ({"n_neighbors": 200}, "panel n_neighbors"),
        pytest.param({"resolution": 1e-6}, r"panel resolution.*raise", marks=pytest.mark.slow),
        pytest.param({"resolution": 1e6}, r"panel resolution.*lower", marks=pytest.mark.slow),
        pytest.param({"min_abs_log2fc": 50.0}, "panel: .*lower `min_abs_log2fc`", marks=pytest.mark.slow),
    ],
)
def test_paper_panel_says_which_setting_is_too_high(options, named):
    with pytest.raises(InputError, match=named):
        PaperPanel(**{**SMALL, **options})([clustered(n_types=1, n_per_type=200)])


@pytest.mark.filterwarnings("ignore:`n_top_genes` > number of normalized dispersions")
def test_paper_panel_refuses_genes_that_do_not_vary():
    X = np.zeros((60, 200), dtype=int)
    X[:, :30] = np.random.default_rng(0).poisson(3, (60, 30))
    with pytest.raises(InputError, match=r"panel n_top_genes: 150, but only \d+ genes vary"):
        PaperPanel(**SMALL)([section(X)])


@pytest.mark.parametrize(
    ("panel", "option", "value"),
    [
        (PaperPanel, "n_pcs", 0),
        (PaperPanel, "max_p_adjusted", 1.1),
        (PaperPanel, "resolution", -0.1),
        (TopPanel, "n_genes", -5),
        (TopPanel, "min_share", float("nan")),
    ],
)
def test_settings_out_of_range(panel, option, value):
    with pytest.raises(InputError, match=rf"panel {option}: "):
        panel(**{option: value})


def test_top_panel_by_hand():
    X = np.zeros((20, 5), dtype=int)
    X[:10, 1], X[10:, 1] = 5, 15  # varies
    X[:10, 2], X[10:, 2] = 1, 19  # varies more
    X[19, 3] = 900  # varies most, but in one nucleus only
    X[:, 4] = 50
    X[:, 0] = 100_000 - X[:, 1:].sum(axis=1)  # all nuclei have as many UMIs, so nothing is rescaled
    panel = TopPanel(n_genes=2, min_nuclei=2, min_share=0.0)([section(X)])
    assert panel.genes == ("GENE2", "GENE1")
    assert panel.gene_ids == ("ENSG002", "ENSG001")
    assert panel.steps == {"nuclei": 20, "genes": 5, "seen": 4, "kept": 2}
    assert TopPanel(n_genes=1, min_nuclei=1, min_share=0.0)([section(X)]).genes == ("GENE3",)
    with pytest.raises(InputError, match=r"panel n_genes: 5, but only 4 genes"):
        TopPanel(n_genes=5, min_nuclei=1, min_share=0.1)([section(X)])


def test_top_panel_equals_dense_variance():
    counts = clustered(seed=3)
    X = counts.X.toarray().astype(float)
    total = X.sum(axis=1, keepdims=True)
    variance = np.log1p(X / total * np.median(total)).var(axis=0)
    variance[(X > 0).sum(axis=0) < 10] = -1
    expected = [f"GENE{i}" for i in np.argsort(-variance)[:50]]
    assert list(TopPanel(n_genes=50)([counts]).genes) == expected


def test_top_panel_breaks_ties_by_gene_id():
    X = np.ones((20, 4), dtype=int)
    X[::2, :3] = 3
    counts = section(np.c_[X, 20 - X.sum(axis=1)], gene_ids=["d", "b", "c", "a", "z"])
    assert TopPanel(n_genes=2)([counts]).gene_ids == ("b", "c")
    assert TopPanel(n_genes=3)([counts]).gene_ids == ("b", "c", "d")


def test_sections_are_stacked_on_the_genes_they_share():
    X = np.random.default_rng(0).poisson(5, (30, 4))
    first = section(X, gene_ids=["a", "b", "c", "d"])
    second = section(X, gene_ids=["d", "x", "b", "a"], symbols=["D", "X", "B", "A"])
    panel = TopPanel(n_genes=3)([first, second])
    assert sorted(panel.gene_ids) == ["a", "b", "d"]
    assert panel.steps["nuclei"] == 60
    with pytest.raises(InputError, match="no gene id"):
        TopPanel(n_genes=1)([first, section(X, gene_ids=["p", "q", "r", "s"])])


@pytest.fixture
def shared():
    X = np.ones((3, 5), dtype=int)
    return section(X, symbols=["A", "B", "TWIN", "TWIN", "E"], gene_ids=["id0", "id1", "id2", "id3", "id4"])


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("a.txt", "E\n# a comment\n\nid1\nA\nE\n", ("id4", "id1", "id0")),
        ("a.csv", "mean,gene\n1.5,B\n2.5,A\n", ("id1", "id0")),
        ("a.csv", "gene_id,symbol\nid3,TWIN\nid0,A\n", ("id3", "id0")),
        ("a.tsv", "B\t1\nA\t2\n", ("id1", "id0")),
        ("a.csv", "\ufeffSymbol;n\nB;1\n", ("id1",)),
        ("a.json", '["TWIN_id3", "id0"]', ("id3", "id0")),
        ("a.json", '{"genes": ["B"], "gene_ids": ["id1"]}', ("id1",)),
    ],
)
def test_file_panel_reads(tmp_path, shared, name, text, expected):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    panel = FilePanel(path)([shared])
    assert panel.gene_ids == expected
    assert panel.genes == tuple(shared.var_names[list(shared.var["gene_id"]).index(g)] for g in expected)


def test_file_panel_warns_of_unknown_genes(tmp_path, shared, caplog):
    path = tmp_path / "genes.txt"
    path.write_text("A\nNOPE\nB\n")
    with caplog.at_level(logging.WARNING):
        assert FilePanel(path)([shared]).genes == ("A", "B")
    assert "1 of 3 genes" in caplog.text
    assert "NOPE" in caplog.text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("A\nTWIN\n", r"TWIN names several genes \(id2, id3\)"),
        ("x\ny\n", "none of its 2 genes"),
        ("# nothing\n", "contains no genes"),
        ("", "contains no genes"),
        ("[1, 2]", "JSON list"),
        ('["A"', "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[" + "9" * 5000 + "]", "not valid JSON"),
        ("x" * 200_000, "cannot be read as a table"),
    ],
)
def test_file_panel_refuses(tmp_path, shared, text, message):
    path = tmp_path / "my genes.txt"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        FilePanel(path)([shared])


def test_file_panel_needs_a_file(tmp_path, shared):
    for path in (None, tmp_path / "absent.txt"):
        with pytest.raises(InputError):
            FilePanel(path).settings()
        with pytest.raises(InputError):
            FilePanel(path)([shared])


def test_settings_follow_every_option(tmp_path):
    assert PaperPanel().settings() != PaperPanel(resolution=0.7).settings()
    assert TopPanel().settings() != TopPanel(min_nuclei=9).settings()
    path = tmp_path / "genes.txt"
    path.write_text("A\n")
    before = FilePanel(path).settings()
    path.write_text("AB\n")
    assert before != FilePanel(path).settings()
    json.dumps([before, PaperPanel().settings(), TopPanel().settings()])


def test_align_orders_adds_zeros_and_keeps_integers(shared, caplog):
    counts = section([[1, 0, 3, 4, 5], [0, 7, 0, 0, 9]], gene_ids=["id0", "id1", "id2", "id3", "id4"])
    panel = Panel(("E", "GONE", "A"), ("id4", "gone", "id0"), "file", {})
    with caplog.at_level(logging.WARNING):
        aligned = panel.align(counts)
    assert aligned.toarray().tolist() == [[5, 0, 1], [9, 0, 0]]
    assert aligned.dtype == np.int32
    assert aligned.format == "csr"
    assert aligned.has_sorted_indices
    assert "1 of 3 panel genes" in caplog.text
    assert "GONE" in caplog.text
    with pytest.raises(InputError, match="none of its 1 genes"):
        Panel(("Q",), ("q",), "file", {}).align(counts)


def test_json_round_trip(tmp_path):
    panel = Panel(("B", "Ä_id"), ("id1", "id9"), "top", {"kept": 2})
    panel.to_json(tmp_path / "panel.json")
    assert Panel.from_json(tmp_path / "panel.json") == panel
    assert read_gene_list(tmp_path / "panel.json") == ["id1", "id9"]


@pytest.mark.parametrize(
    "change",
    [
        {"genes": ["A"]},
        {"genes": ["A", "A"]},
        {"gene_ids": ["x", 3]},
        {"gene_ids": []},
        {"steps": {"kept": "many"}},
        {"steps": None},
        {"extra": 1},
    ],
)
def test_json_is_checked(tmp_path, change):
    path = tmp_path / "panel.json"
    good = {"genes": ["A", "B"], "gene_ids": ["x", "y"], "method": "top", "steps": {"kept": 2}}
    path.write_text(json.dumps({**good, **change}))
    with pytest.raises(InputError, match=r"panel\.json"):
        Panel.from_json(path)


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe\x00", None])
def test_what_is_no_panel_is_refused(tmp_path, content):
    path = tmp_path / "panel.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=r"panel\.json"):
        Panel.from_json(path)


@pytest.mark.parametrize(("method", "n", "warns"), [("paper", FEW - 1, True), ("paper", FEW, False), ("top", 5, False)])
def test_a_small_panel_names_the_method_that_finds_more_genes(caplog, method, n, warns):
    names = tuple(f"GENE{k}" for k in range(n))
    with caplog.at_level(logging.WARNING):
        warn_of_small(Panel(names, names, method, {"highly_variable": 2000}))
    assert (f"only {n} of 2000 highly variable genes mark a cluster; panel=top" in caplog.text) is warns
    assert bool(caplog.records) is warns
