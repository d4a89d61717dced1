"""`prts analyze` on a simulated section whose truth is the judge, and its refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from prts.cli.app import run
from prts.simulate.section import simulate_section

GENES = 1000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sections of one tissue, a perfect image reader's prediction of the second, and markers: the programmes and 50 decoys."""
    root = tmp_path_factory.mktemp("analyze")
    simulate_section(root / "train", cells=900, genes=GENES, seed=1)
    simulate_section(root / "test", cells=900, genes=GENES, seed=2)
    truth = ad.read_h5ad(root / "test" / "truth.h5ad")
    rates = truth.layers["image_rate"].astype(np.float32)
    prediction = ad.AnnData(sp.csr_matrix(rates), obs=truth.obs[["area_um2"]].copy(), var=truth.var[["gene_id"]].copy())
    prediction.obsm["spatial"] = truth.obsm["spatial"]
    prediction.layers["prob"] = -np.expm1(-rates)
    outlines = root / "test" / "truth_nuclei.parquet"
    from PIL import Image

    with Image.open(root / "test" / "tissue_image.tif") as image:
        width, height = image.size
    qc = {"min_umi": 20, "max_area_um2": 150, "max_pct_mt": 15}
    prediction.uns["prts"] = {
        "scale": "umi",
        "width": width,
        "height": height,
        "mpp": 0.5,
        "species": "human",
        "qc": qc,
        "threshold": 0.5,
    }
    prediction.write_h5ad(root / "p.h5ad")
    shutil.copy(outlines, root / "p.nuclei.parquet")
    rng = np.random.default_rng(0)
    rows = [(kind, gene) for kind, genes in truth.uns["markers"].items() for gene in genes]
    rows += [(f"decoy {d}", g) for d in range(50) for g in rng.choice(truth.var_names, 15, replace=False)]
    pd.DataFrame(rows, columns=["type", "gene"]).to_csv(root / "markers.csv", index=False)
    return root


def arguments(folder: Path, out: Path, *more: str) -> list[str]:
    return [f"prediction={folder / 'p.h5ad'}", f"out={out}", *more]


@pytest.mark.slow
def test_the_truth_judges_types_clusters_and_names(
    folder: Path, tmp_path: Path, full_dpi: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prts.report.figures_canvas._DPI", full_dpi)
    out = tmp_path / "with spaces"
    training = [f"train_section={folder / 'train'}", f"train_nuclei={folder / 'train' / 'truth_nuclei.parquet'}"]
    given = [f"section={folder / 'test'}", f"markers={folder / 'markers.csv'}", *training]
    assert run("analyze", arguments(folder, out, *given, "figures=[png]", "clusters.resolution=0.2")) == 0
    scores = json.loads((out / "analysis.json").read_text())
    # what limits naming is the counting noise: none of it is in the rates, and a perfect reader of the image knows the type
    assert scores["classifier/measured/accuracy"] > 0.85
    assert scores["classifier/rates/accuracy"] > scores["classifier/measured/accuracy"]
    assert scores["classifier/predicted/accuracy"] > 0.98
    assert scores["classifier/predicted/macro_f1"] > 0.95
    assert scores["classifier/predicted/majority"] < 0.5
    assert scores["truth/predicted/ari"] > 0.4
    assert scores["truth/measured/ari"] > 0.4
    assert scores["measured/n_clusters"] == scores["predicted/n_clusters"]

    truth = ad.read_h5ad(folder / "test" / "truth.h5ad").obs["cell_type"].astype(str)
    for name in ("analysis", "measured"):
        nuclei = ad.read_h5ad(out / f"{name}.h5ad")
        types = nuclei.obs["type"].astype(object)
        named = types.notna() & (types != "unassigned")
        assert named.mean() > 0.7
        assert not types[named].str.startswith("decoy").any()
        # a cluster is named after the type that most of its nuclei are
        main = truth.loc[nuclei.obs_names].groupby(nuclei.obs["cluster"].astype(object)).agg(lambda t: t.mode().iloc[0])
        clusters = pd.read_csv(
            out / f"{'measured_' if name == 'measured' else ''}annotation.csv", dtype={"cluster": str}
        )
        clusters = clusters[clusters["type"] != "unassigned"].set_index("cluster")
        assert (clusters["type"] == main.loc[clusters.index]).mean() >= 0.8
        assert (clusters["p_adj"] < 0.05).all()
    shares = pd.read_csv(out / "shares_classifier.csv").set_index("name")
    np.testing.assert_allclose(shares.sum(), 1)
    for figure in (
        "umap",
        "tissue_type",
        "qc_maps",
        "markers_predicted",
        "shares_type",
        "confusion_classifier_predicted",
    ):
        assert (out / "figures" / f"{figure}.png").stat().st_size > 10_000


@pytest.mark.slow
def test_a_prediction_alone_is_clustered_and_its_markers_tested(folder: Path, tmp_path: Path) -> None:
    sets = ad.read_h5ad(folder / "test" / "truth.h5ad").uns["markers"]
    lines = [f"{kind} programme\t\t" + "\t".join(genes) for kind, genes in sets.items()]
    (tmp_path / "sets.gmt").write_text("\n".join(lines) + "\n")
    out = tmp_path / "out"
    options = [f"enrich.gmt=['{tmp_path / 'sets.gmt'}']", "figures=[]", "clusters.min_share=0.01"]
    assert run("analyze", arguments(folder, out, *options)) == 0
    found = pd.read_csv(out / "enrichment.csv", dtype={"cluster": str})
    assert found["name"].nunique() >= 5
    assert (found["p_adj"] < 0.2).all()
    nuclei = ad.read_h5ad(out / "analysis.h5ad")
    assert nuclei.n_obs == 900
    assert "X_umap" in nuclei.obsm
    assert not (out / "measured.h5ad").exists()
    assert not (out / "figures").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["markers={tmp}/columns.csv"], "a marker table needs `type` and `gene`"),
        (["markers={tmp}/mouse.csv"], "has no human markers"),
        (["markers={tmp}/other.csv"], "shares no genes with the section"),
        (["clusters.min_share=0.9"], "raise `resolution` or lower `min_share`"),
        (["enrich.obo=go.obo"], "needs `annotations` as well"),
        (["enrich.annotations=a.gaf"], "needs the ontology as well"),
        (["train_section={folder}/train"], "give `section` as well"),
        (["section={folder}/test", "train_section={folder}/train"], "has no nuclei; give their file"),
        (["section={tmp}/nowhere"], "no such folder"),
        (["section={tmp}/damaged"], "truth.h5ad: not HDF5, or damaged"),
        (["visium={tmp}"], "expected the `outs` folder of a Visium run"),
        (["figures=[gif]"], "figures: ['gif'] is not accepted; give a list, each png"),
    ],
)
def test_wrong_input_is_one_line_and_leaves_nothing(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], words: str
) -> None:
    (tmp_path / "columns.csv").write_text("name,symbols\na,b\n")
    (tmp_path / "mouse.csv").write_text("species,type,gene\nMouse,T,SIM0001\n")
    (tmp_path / "other.csv").write_text("type,gene\nT,NOTHERE1\nT,NOTHERE2\n")
    truth = shutil.copytree(folder / "test", tmp_path / "damaged") / "truth.h5ad"
    truth.write_bytes(truth.read_bytes()[:5000])
    given = [option.format(tmp=tmp_path, folder=folder) for option in options]
    assert run("analyze", arguments(folder, tmp_path / "out", *given)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    assert words in error
    assert not (tmp_path / "out").exists()
