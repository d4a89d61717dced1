import base64
import json
import re
import zlib

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from prts.cli.app import run
from prts.errors import InputError
from prts.preprocess.artefacts import KINDS
from prts.report import text as page_text
from prts.report.embed import (
    PROB_STEPS,
    colour_top,
    delta_blocks,
    measured_blocks,
    nucleus_columns,
    packed,
    predicted_codes,
)
from prts.report.html import MeasuredCounts, PageContent, choose_genes, gene_table, write_page
from prts.report.load import _score_names

EVIL = ["<script>alert(1)</script>", "</script>", "A&amp;B", '" onload="x']


def unpack(block: str, kind: type = np.uint8) -> np.ndarray:
    return np.frombuffer(zlib.decompress(base64.b64decode(block)), kind)


def prediction(n: int = 60, genes: tuple[str, ...] = ("Plp1", "Ttr", "Apoe")) -> ad.AnnData:
    rng = np.random.default_rng(0)
    X = rng.gamma(1, 1, (n, len(genes))).astype(np.float32)
    about = {
        "section": "s1",
        "image": "a.tif",
        "width": 1000,
        "height": 800,
        "mpp": 0.5,
        "scale": "umi",
        "species": "human",
    }
    about |= {"model": {"tissue": "demo", "train_sections": np.array(["t1"], dtype=object)}, "threshold": 0.5}
    about["features"] = {"encoder": {"name": "classical", "mpp": 0.5}}
    return ad.AnnData(
        sp.csr_matrix(X),
        obs=pd.DataFrame(
            {"area_um2": rng.uniform(20, 80, n), "type": pd.Categorical(rng.choice(["a", "<b>"], n))},
            index=[f"n{i}" for i in range(n)],
        ),
        var=pd.DataFrame({"gene_id": genes, "val_pcc": [0.1, 0.5, np.nan, 0.2][: len(genes)]}, index=list(genes)),
        obsm={"spatial": rng.uniform([100, 100], [900, 700], (n, 2))},
        layers={"prob": 1 - np.exp(-X)},
        uns={"prts": about},
    )


def page(**parts: object) -> PageContent:
    picture = np.full((80, 100, 3), 230, np.uint8)
    return PageContent(parts.pop("prediction", None) or prediction(), picture, **parts)  # type: ignore[arg-type]


def embedded(text: str, name: str) -> dict:
    return json.loads(re.search(rf'<script type="application/json" id="prts-{name}">(.*?)</script>', text, re.S)[1])


def test_predicted_values_come_back_within_half_a_step():
    umi = np.array([[0, 0.1, 0], [3, 0.4, 0], [50, 0.2, 0]], np.float32)
    codes, highest = predicted_codes(umi)
    np.testing.assert_allclose(highest, np.log1p([50, 0.4, 0]), rtol=1e-6)
    np.testing.assert_allclose(codes / 255 * highest, np.log1p(umi), atol=highest.max() / 510 + 1e-6)
    assert (np.abs(codes / 255 * highest - np.log1p(umi)) <= highest / 510 + 1e-6).all()


def test_fewer_levels_are_as_close_as_half_of_their_step():
    umi = np.random.default_rng(0).gamma(1, 3, (500, 2)).astype(np.float32)
    codes, highest = predicted_codes(umi, 3)
    assert len(np.unique(codes)) <= 86
    assert (codes.max(axis=0) == 255).all()
    assert (np.abs(codes / 255 * highest - np.log1p(umi)) <= highest / 170 + 1e-6).all()


def probability(block: str, codes: np.ndarray) -> np.ndarray:
    table = unpack(block)
    return (table[codes] + table[256:]) / PROB_STEPS  # of bytes, so modulo 256


def test_probabilities_come_back_and_those_that_follow_from_the_level_cost_nothing():
    rng = np.random.default_rng(0)
    umi = rng.gamma(1, 1, (5000, 1)).astype(np.float32)
    codes, _ = predicted_codes(umi)
    follows, free = 1 - np.exp(-umi), rng.uniform(size=umi.shape).astype(np.float32)
    sizes = []
    for prob in (follows, free):
        (block,) = delta_blocks(np.rint(prob * PROB_STEPS).astype(np.uint8), codes)
        np.testing.assert_allclose(probability(block, codes[:, 0]), prob[:, 0], atol=0.5 / PROB_STEPS + 1e-6)
        sizes.append(len(block))
    assert sizes[0] < 0.5 * sizes[1]


def test_measured_counts_are_exact_and_nuclei_without_any_say_so():
    counts = sp.csr_matrix([[0, 254], [300, 7]], dtype=np.int32)
    (first, size), (second, small) = measured_blocks(counts, np.array([2, 0]), 4)
    assert (size, small) == (2, 1)
    np.testing.assert_array_equal(unpack(first, np.uint16), [300, 65535, 0, 65535])
    np.testing.assert_array_equal(unpack(second), [7, 255, 254, 255])


def test_colours_end_at_the_99th_percentile_or_the_highest_where_that_is_zero():
    values = np.zeros((1000, 2))
    values[:, 0] = np.arange(1000)
    values[0, 1] = 4
    np.testing.assert_allclose(colour_top(values), [989.01, 4])


def test_columns_of_nuclei_keep_codes_labels_and_missing():
    obs = pd.DataFrame(
        {
            "kind": pd.Categorical(["b", None, "a"], categories=["a", "b"]),
            "ood": [True, False, False],
            "area": [1.0, np.nan, 3.0],
            "same": ["x", "x", "x"],
        }
    )
    kind, ood, area = nucleus_columns(obs)
    assert kind["labels"] == ["a", "b"]
    np.testing.assert_array_equal(unpack(kind["block"]), [1, 255, 0])
    assert ood["labels"] == ["False", "True"]
    np.testing.assert_array_equal(unpack(area["block"], np.float32), np.array([1, np.nan, 3], np.float32))
    measured = pd.DataFrame({"kind": pd.Categorical(["a", "c", "b"])})
    paired, *_ = nucleus_columns(obs, measured)
    assert paired["labels"] == ["a", "b", "c"]  # one colour a name on both sides
    np.testing.assert_array_equal(unpack(paired["block"]), [1, 255, 0])
    np.testing.assert_array_equal(unpack(paired["measured_block"]), [0, 2, 1])
    names = pd.DataFrame({"name": [f"n{i}" for i in range(101)]})
    assert nucleus_columns(names) == []


def test_big_numbers_are_little_endian():
    assert zlib.decompress(base64.b64decode(packed(np.array([1], ">u2")))) == b"\x01\x00"


def test_named_genes_come_first_then_the_best_predicted():
    table = pd.DataFrame({"gene": list("abcd"), "val_pcc": [0.1, np.nan, 0.9, 0.5]})
    assert choose_genes(table, 10, None).tolist() == [2, 3, 0, 1]
    assert choose_genes(table, 10, 2).tolist() == [2, 3]
    assert choose_genes(table, 10, ["b"]).tolist() == [1, 2, 3, 0]
    assert choose_genes(table, 6_000_000, None).tolist() == [2, 3]  # 12 million values at most
    assert choose_genes(table, 6_000_000, list("abd")).tolist() == [0, 1, 3]
    with pytest.raises(InputError, match="genes: e is not among the 4 genes"):
        choose_genes(table, 10, ["e"])
    with pytest.raises(InputError, match="genes: 0 must be"):
        choose_genes(table, 10, 0)


def test_large_sections_show_200_genes_and_small_ones_all():
    table = pd.DataFrame({"gene": [f"g{i}" for i in range(1000)], "pcc": np.arange(1000.0)})
    assert len(choose_genes(table, 60_000, None)) == 200
    assert len(choose_genes(table, 2_000, None)) == 1000
    assert len(choose_genes(table, 120_000, None)) == 100


def test_the_table_has_test_figures_where_there_are_any():
    per_gene = pd.DataFrame(
        {"gene": ["Ttr", "Plp1"], "pcc": [0.4, 0.3], "ceiling": [0.5, 0.6], "mean_counts": [2.0, 1.0]}
    )
    table = gene_table(page(per_gene=per_gene))
    assert table["pcc"].tolist()[:2] == [0.3, 0.4]
    assert np.isnan(table["pcc"][2])
    bare = gene_table(page())
    assert "pcc" not in bare
    assert bare["mean_predicted"][0] == pytest.approx(prediction().X[:, 0].mean())


def test_the_page_holds_the_values_of_every_gene(tmp_path):
    shown = prediction()
    counts = sp.csr_matrix(np.random.default_rng(1).poisson(1, (20, 3)).astype(np.int32))
    rows = np.arange(0, 60, 3)
    text = write_page(
        tmp_path / "report.html", page(prediction=shown, measured=MeasuredCounts(counts, rows))
    ).read_text()
    meta, blocks = embedded(text, "meta"), embedded(text, "blocks")
    assert [gene["name"] for gene in meta["genes"]] == ["Ttr", "Plp1", "Apoe"]  # by val_pcc
    for place, column in enumerate([1, 0, 2]):
        umi = shown.X[:, [column]].toarray().ravel()
        level = unpack(blocks["predicted"][place]) / 255 * meta["genes"][place]["highest"]
        np.testing.assert_allclose(level, np.log1p(umi), atol=meta["genes"][place]["highest"] / 500)
        np.testing.assert_allclose(
            probability(blocks["prob"][place], unpack(blocks["predicted"][place])),
            1 - np.exp(-umi),
            atol=0.5 / PROB_STEPS + 1e-6,
        )
        np.testing.assert_array_equal(unpack(blocks["measured"][place])[rows], counts[:, [column]].toarray().ravel())
        top = np.percentile(np.log1p(counts[:, [column]].toarray()), 99)
        assert meta["genes"][place]["top"] == pytest.approx(top)
    np.testing.assert_array_equal(unpack(blocks["x"], np.float32), shown.obsm["spatial"][:, 0].astype(np.float32))
    assert json.loads(unpack(blocks["ids"]).tobytes()) == list(shown.obs_names)
    assert (meta["n"], meta["n_measured"]) == (60, 20)


def test_intervals_of_counts_are_exact(tmp_path):
    shown = prediction()
    ends = np.random.default_rng(2).integers(0, 9, (2, 60, 3))
    shown.layers["lower"], shown.layers["upper"] = (sp.csr_matrix(end) for end in (ends.min(axis=0), ends.sum(axis=0)))
    shown.uns["prts"]["interval_level"] = 0.9
    text = write_page(tmp_path / "report.html", page(prediction=shown)).read_text()
    blocks = embedded(text, "blocks")
    assert embedded(text, "meta")["interval"] == 0.9
    for place, column in enumerate([1, 0, 2]):
        table, codes = unpack(blocks["upper"][place]), unpack(blocks["predicted"][place])
        np.testing.assert_array_equal(table[codes] + table[256:], ends.sum(axis=0)[:, column])


def test_no_name_from_data_becomes_markup(tmp_path):
    shown = prediction(genes=tuple(EVIL))
    shown.uns["prts"]["section"] = EVIL[0]
    shown.obs["type"] = shown.obs["type"].cat.rename_categories({"a": EVIL[1]})
    shown.obs[EVIL[0]] = shown.obs["type"]
    shown.uns["prts"]["image"] = EVIL[3]
    text = write_page(tmp_path / "report.html", page(prediction=shown, metrics={"warning/split": EVIL[0]})).read_text()
    assert "<script>alert" not in text
    assert 'onload="x' not in text
    plain = write_page(tmp_path / "plain.html", page()).read_text()
    for tag in ("<script", "</script", "<img", "<b>"):
        assert text.count(tag) == plain.count(tag), tag
    meta = embedded(text, "meta")
    assert sorted(gene["name"] for gene in meta["genes"]) == sorted(EVIL)
    assert meta["section"] == EVIL[0]


def test_the_page_asks_nothing_of_any_network(tmp_path):
    text = write_page(tmp_path / "report.html", page()).read_text()
    assert "default-src 'none'" in text
    markup = re.sub(r"<script.*?</script>", "", text, flags=re.S)
    addresses = re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?([^"')\s>]+)""", markup)
    assert addresses
    assert all(address.startswith(("data:", "#")) for address in addresses), addresses


def test_the_page_is_written_whole_or_not_at_all(tmp_path):
    with pytest.raises(InputError):
        write_page(tmp_path / "report.html", page(), genes=["None such"])
    assert not list(tmp_path.iterdir())


def test_scores_include_baselines_and_ceiling():
    figures = page_text.section_metrics(
        {
            "test/pcc_mean": 0.3, "test/pcc_mean_low": 0.25, "test/pcc_mean_high": 0.34, "test/ceiling_mean": 0.6,
            "test/ceiling_share": 0.5, "test/n_genes": 1000, "test/n_cells": 5312, "val/pcc_mean": 0.9,
            "baseline/ridge/pcc_mean": 0.2, "baseline/ridge/difference": 0.1, "baseline/ridge/difference_low": 0.05,
            "baseline/ridge/difference_high": 0.15, "baseline/gene_mean/pcc_mean": 0.0, "baseline/colour/pcc_mean": 0.25,
        },
        "s1",
    )  # fmt: skip
    lines = page_text.score_table(figures)
    assert [line.name for line in lines] == ["prts", "colour", "ridge", "gene mean", "noise ceiling"]
    assert lines[0].text == "0.300 [0.250, 0.340]"
    assert lines[2].difference == "+0.100 [0.050, 0.150]"
    assert lines[4].bar == pytest.approx(100 / 1.02, abs=0.01)
    assert lines[0].bar == pytest.approx(50 / 1.02, abs=0.01)
    assert page_text.headline(figures) == (
        "Mean correlation between predicted and measured expression: 0.300 (95% CI 0.250 to 0.340), over 1,000 genes and 5,312 nuclei. "
        "This is 50% of the maximum that counting noise allows."
    )
    assert page_text.score_table({}) == []


def test_of_several_test_sections_each_page_has_its_own_figures():
    metrics = {"test/a/pcc_mean": 0.1, "test/b/pcc_mean": 0.3, "test/pcc_mean": 0.2, "baseline/b/ridge/pcc_mean": 0.25}
    metrics |= {"baseline/ridge/pcc_mean": 0.2}
    figures = page_text.section_metrics(metrics, "b")
    assert figures["pcc_mean"] == 0.3
    assert figures["baseline/ridge/pcc_mean"] == 0.25
    assert page_text.section_metrics(metrics, "c")["pcc_mean"] == 0.2


def test_warnings_say_what_to_beware_of():
    shown = prediction()
    about = shown.uns["prts"]
    assert page_text.reader_warnings(about, shown.obs, shown.var, {}, {}) == []
    shown.obs["ood"] = np.arange(60) < 6
    shown.obs["artefact"] = pd.Categorical(["fold"] * 5 + ["none"] * 55, categories=list(KINDS))  # as many as usual
    shown.var["predictable"] = [True, False, False]
    found = page_text.reader_warnings(
        about | {"mpp": 1.0}, shown.obs, shown.var, {}, {"warning/split": "cells at random"}
    )
    assert [words.split()[0] for words in found] == ["Split:", "Resolution:", "Out", "Genes:"]
    assert "1 µm/px, but the model was trained at 0.5 µm/px. The image was enlarged 2 times" in found[1]
    assert found[2].startswith("Out of distribution: 6 of 60 nuclei (10.0%)")
    shown.obs["ood"] = np.where(np.arange(60) < 12, 0.99, 0.5)  # a fifth is strange
    assert page_text.reader_warnings(about | {"verdict": "parts are unlike"}, shown.obs, shown.var, {}, {})[0] == (
        "Out of distribution: parts are unlike."
    )
    shown.obs["ood"] = np.where(np.arange(60) < 3, 0.99, 0.5)  # as usual
    assert len(page_text.reader_warnings(about | {"verdict": "as usual"}, shown.obs, shown.var, {}, {})) == 1
    shown.obs["artefact"] = pd.Categorical(["pen"] * 9 + ["fold"] * 12 + ["none"] * 39, categories=list(KINDS))
    assert page_text.reader_warnings(about, shown.obs, shown.var, {}, {})[0] == (
        "Artifacts: 21 of 60 nuclei (35.0%) are on a likely artifact (fold: 12, pen: 9)."
    )


def test_the_page_says_how_the_slide_was_read():
    about = prediction().uns["prts"]
    assert "orientation" not in dict(page_text.model_facts(about, {}))
    assert "orientation" not in dict(page_text.model_facts(about | {"orientation": {"rotate": 0, "flip": "none"}}, {}))
    turned = page_text.model_facts(about | {"orientation": {"rotate": 90, "flip": "horizontal"}}, {})
    assert dict(turned)["orientation"] == "rotated 90° counterclockwise, then mirrored left to right"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "run, prediction: give either"),
        (["run=a", "prediction=b.h5ad"], "run, prediction: give either"),
        (["prediction=none.h5ad", "out=o"], "image: is required"),
        (["prediction=none.h5ad", "image=i.tif", "out=o"], "none.h5ad: no such file"),
        (["run=.", "image=i.tif"], "image: only applies to prediction=FILE"),
        (["run=."], ".: has no config.yaml"),
    ],
)
def test_wrong_input_is_one_line_and_exit_2(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run("report", arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert words in error
    assert not list(tmp_path.iterdir())


def test_scores_of_clusters_are_named_after_their_type():
    obs = pd.DataFrame({"cluster": ["0", "1", None], "type": ["T cell", None, None], "score_0": 1.0, "score_1": 2.0})
    named = _score_names(obs)
    assert named == {"score_0": "marker score, cluster 0 (T cell)", "score_1": "marker score, cluster 1"}
    assert _score_names(obs[["score_0"]]) == {}
