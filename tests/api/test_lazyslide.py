"""A model registered in LazySlide predicts what prts itself predicts."""

from __future__ import annotations

import geopandas as gpd
import numpy as np
import pytest

import prts
import prts._torchvision  # (before LazySlide imports torchvision)
from prts.api.lazyslide import extract_features, register_model
from prts.errors import InputError

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]

NAME = "prts-test.model"


@pytest.fixture(scope="module")
def zs():
    pytest.importorskip("lazyslide", reason="the extra lazyslide is not installed")
    import lazyslide

    return lazyslide


@pytest.fixture(scope="module")
def expected(trained, sections, cache):
    """A prediction by prts itself, with its polygons."""
    return trained.predict(sections["third"].image, nuclei="watershed", mpp=sections["third"].mpp, cache_dir=cache)


@pytest.fixture
def wsi(zs, expected, sections):
    from wsidata.io import add_shapes

    slide = zs.open_wsi(str(sections["third"].image), store=None)
    slide.set_mpp(sections["third"].mpp)
    polygons = prts.nuclei_of(expected).geometry.iloc[::-1]
    add_shapes(slide, "cells", gpd.GeoDataFrame(geometry=polygons.to_numpy()))
    return slide


@pytest.fixture(scope="module")
def registered(zs, trained):
    from lazyslide_models import MODEL_REGISTRY

    trained.save(trained.bundle.folder.parent / "registered")
    yield register_model(trained.bundle.folder.parent / "registered", NAME)
    del MODEL_REGISTRY[NAME]


def test_cells_get_the_prediction_of_prts(zs, wsi, registered, expected, cache, tmp_path):
    import spatialdata as sd
    from lazyslide_models import list_models

    assert NAME in list_models("feature_prediction")
    extract_features(wsi, NAME, cache_dir=cache)
    zs.tl.feature_prediction(wsi, NAME, tile_key="cells", device="cpu", pbar=False)
    adata = wsi.fetch.features_anndata(NAME, tile_key="cells")
    assert adata.var_names.tolist() == expected.var_names.tolist()
    np.testing.assert_allclose(adata.X, expected.X.toarray()[::-1], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(adata.obs["ood"], expected.obs["ood"][::-1], atol=1e-6)
    assert adata.obs["artefact"].tolist() == expected.obs["artefact"].tolist()[::-1]
    # the table belongs to the cells, also after it was written
    wsi.write(tmp_path / "slide.zarr")
    read = sd.read_zarr(tmp_path / "slide.zarr")
    gene = expected.var_names[0]
    values = sd.get_values(gene, sdata=read, element_name="cells", table_name=f"{NAME}_cells")
    np.testing.assert_array_equal(values[gene], adata[:, gene].X.ravel())


def test_wrong_input_is_one_line(zs, wsi, registered, trained, cache):
    from wsidata.io import add_shapes

    with pytest.raises(InputError, match="name: 'a b' cannot name a table"):
        register_model(trained.bundle.folder, "a b")
    with pytest.raises(InputError, match=r"'path2space' is no prts model; call register_model"):
        extract_features(wsi, "path2space")
    with pytest.raises(InputError, match=r"'nuclei' is not in wsi.shapes \(cells\); run zs.seg.cells first"):
        extract_features(wsi, NAME, tile_key="nuclei")
    twice = wsi.shapes["cells"].geometry.iloc[[0, 1, 0, 2]].to_numpy()
    add_shapes(wsi, "twice", gpd.GeoDataFrame(geometry=twice))
    with pytest.raises(InputError, match=r"twice: 1 of 4 cells are duplicates or have no area, the first in row 2"):
        extract_features(wsi, NAME, tile_key="twice", cache_dir=cache, check_scale=False)
    assert f"{NAME}-features_twice" not in wsi.tables
    wsi.properties.mpp = None
    with pytest.raises(InputError, match=r"does not state its um/px; set it with wsi.set_mpp"):
        extract_features(wsi, NAME, cache_dir=cache)
