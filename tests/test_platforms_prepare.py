"""One truth in the files of five platforms goes through `prts prepare` and the Python interface."""

from __future__ import annotations

import warnings
from pathlib import Path

import anndata as ad
import geopandas as gpd
import numpy as np
import pytest
import shapely
import yaml
from hydra import compose, initialize_config_dir

import prts
from prts.cli.config import config_dir
from prts.cli.prepare import preparation
from prts.errors import InputError
from prts.features.encoders import Classical
from prts.io.nuclei import load_nuclei
from prts.platforms.bin_owners import CountSettings
from prts.platforms.visium_hd import VisiumHD
from prts.section import Section
from prts.simulate.section import simulate_section
from prts.stopwatch import Stopwatch


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """The same section, as a tissue config describes it, for each platform."""
    root = tmp_path_factory.mktemp("one_truth")
    same = {"cells": 150, "genes": 80, "seed": 6, "name": "x"}
    visium, ranger, xenium = (
        simulate_section(root / name, layout=name, **same) for name in ("visium_hd", "spaceranger4", "xenium")
    )
    nuclei = visium / "truth_nuclei.parquet"
    section = prts.read_visium_hd(visium)
    assert section.measurement is not None
    counts = section.measurement.counts(gpd.read_parquet(nuclei))
    counts.uns.clear()
    counts.write_h5ad(root / "cells.h5ad")
    write_store(root / "cells.zarr", counts, gpd.read_parquet(nuclei))
    image = str(visium / "tissue_image.tif")
    return {
        "visium": {"image": image, "bins": str(visium / "binned_outputs/square_002um"), "nuclei": str(nuclei)},
        "recounted": {
            **{"image": image, "bins": str(ranger / "outs")},
            "nuclei": str(ranger / "outs/segmented_outputs/nucleus_segmentations.geojson"),
        },
        "delivered": {"image": image, "platform": "spaceranger_cells", "cells": str(ranger / "outs")},
        "xenium": {"image": image, "platform": "xenium", "outs": str(xenium)},
        "cells": {
            **{"image": image, "platform": "anndata", "cells": str(root / "cells.h5ad")},
            **{"coordinates": "px", "polygons": str(nuclei)},
        },
        "store": {"image": image, "platform": "spatialdata", "sdata": str(root / "cells.zarr")},
    }


def write_store(path: Path, counts: ad.AnnData, nuclei: gpd.GeoDataFrame) -> None:
    sd = pytest.importorskip("spatialdata")
    shapes = sd.models.ShapesModel.parse(nuclei.set_index("cell_id")[["geometry"]])
    table = counts.copy()
    table.obs = table.obs.assign(cell_id=table.obs_names, region="nuclei").rename_axis(None)
    table.obs["region"] = table.obs["region"].astype("category")
    table = sd.models.TableModel.parse(table, region="nuclei", region_key="region", instance_key="cell_id")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sd.SpatialData(shapes={"nuclei": shapes}, tables={"table": table}).write(path)


@pytest.fixture(scope="module")
def prepared(nodes: dict[str, dict[str, str]], tmp_path_factory: pytest.TempPathFactory):
    """What `prts prepare` makes of a tissue whose sections come from all platforms."""
    root = tmp_path_factory.mktemp("prepared")
    (root / "configs/tissue").mkdir(parents=True)
    tissue = {
        "name": "mixed",
        "species": "human",
        "sections": nodes,
        "train": ["visium", "xenium", "recounted", "delivered"],
    }
    tissue |= {"val": ["cells"], "test": ["store"]}
    (root / "configs/tissue/mixed.yaml").write_text(yaml.safe_dump(tissue))
    choices = [
        "tissue=mixed",
        "encoder=classical",
        "panel=demo",
        "panel.n_genes=20",
        "qc.min_umi=1",
        "qc.max_pct_mt=null",
    ]
    where = [f"hydra.searchpath=[file://{root / 'configs'}]", f"paths.cache_dir={root / 'cache'}"]
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        cfg = compose("prepare", [*choices, *where])
    prepare, _ = preparation(cfg)
    with pytest.MonkeyPatch.context() as patch:
        nothing = {"global": 384, "local": 192}  # features are not what is tested
        patch.setattr(
            Classical,
            "encode",
            lambda self, tiles, _: tuple(np.zeros((len(tiles), n), np.float32) for n in nothing.values()),
        )
        return prepare(Stopwatch())


def test_all_platforms_give_the_same_counts(prepared) -> None:
    counts = {name: ad.read_h5ad(part.counts) for name, part in prepared.sections.items()}
    outlines = {name: gpd.read_parquet(part.nuclei) for name, part in prepared.sections.items()}
    expected = counts["visium"]
    assert expected.n_obs > 100 and expected.X.sum() > 10_000
    for name in ("recounted", "xenium", "cells", "store"):
        np.testing.assert_array_equal(counts[name].X.toarray(), expected.X.toarray())
        assert counts[name].var["gene_id"].tolist() == expected.var["gene_id"].tolist()
        centers = (shapely.centroid(outlines[each].geometry.to_numpy()) for each in (name, "visium"))
        assert shapely.distance(*centers).max() < 0.01
        np.testing.assert_allclose(counts[name].obs["area_um2"], expected.obs["area_um2"], rtol=1e-4)
    assert counts["cells"].obs_names.tolist() == expected.obs_names.tolist()
    assert counts["xenium"].obs_names[0].endswith("-1")


def test_cells_as_delivered_are_those_that_nuclei_grow_into(nodes, prepared) -> None:
    delivered, recounted = (ad.read_h5ad(prepared.sections[name].counts) for name in ("delivered", "recounted"))
    section = opened(nodes, "recounted")
    assert isinstance(section.measurement, VisiumHD) and section.nuclei is not None
    nuclei = load_nuclei(prepared.sections["recounted"].nuclei)
    grown = section.measurement.counts_by(nuclei, CountSettings(expand_um=8, shared="nearest"))
    named = [f"cellid_{int(number):09d}-1" for number in grown.obs_names]
    rows = [named.index(cell) for cell in delivered.obs_names]
    assert delivered.n_obs > 100 and delivered.X.sum() > 2 * recounted.X.sum()
    np.testing.assert_array_equal(delivered.X.toarray(), grown[rows].X.toarray())


def test_one_model_scores_alike_on_all_platforms(nodes, tmp_path: Path) -> None:
    sections = {name: opened(nodes, name) for name in ("visium", "recounted", "delivered", "xenium", "cells")}
    model = prts.Model("classical", features=("context", "morphology"), network={"hidden": (16,)})
    model.train(
        *([sections["xenium"]], [sections["cells"]]),
        **{"genes": 20, "max_epochs": 2, "cache_dir": tmp_path, "trainer": {"accelerator": "cpu"}},
    )
    assert model.bundle.metadata["segmentation"]["name"] == "given"
    predictions = {name: model.predict(section, cache_dir=tmp_path) for name, section in sections.items()}
    assert predictions["xenium"].n_obs == 150 and predictions["xenium"].obs_names[0].endswith("-1")
    scores = {name: prts.evaluate(predictions[name], section).summary for name, section in sections.items()}
    assert scores["visium"]["test/n_cells"] > 100
    for name in ("recounted", "xenium", "cells"):
        assert scores[name]["test/n_cells"] == scores["visium"]["test/n_cells"]
        assert scores[name]["test/pcc_mean"] == pytest.approx(scores["visium"]["test/pcc_mean"], abs=0.005)


def opened(nodes: dict[str, dict[str, str]], name: str) -> Section:
    node = {"platform": "visium_hd"} | nodes[name]
    return prts.read_section(node.pop("image"), name=name, **node)


def test_panels_that_do_not_overlap_are_refused(nodes, tmp_path: Path) -> None:
    data = ad.read_h5ad(nodes["cells"]["cells"])
    data.var_names = [f"OTHER{i}" for i in range(data.n_vars)]
    data.var["gene_id"] = data.var["symbol"] = data.var_names.to_numpy(object)
    data.write_h5ad(tmp_path / "other.h5ad")
    here, there = (
        prts.read_section(
            nodes["cells"]["image"],
            name=name,
            platform="anndata",
            cells=path,
            coordinates="px",
            polygons=nodes["cells"]["polygons"],
        )
        for name, path in (("here", nodes["cells"]["cells"]), ("there", tmp_path / "other.h5ad"))
    )
    model = prts.Model("classical", features=("morphology",), network={"hidden": (4,)})
    with pytest.raises(InputError, match=r"gene"):
        model.train([here, there], genes=20, max_epochs=1, cache_dir=tmp_path, species="human")
