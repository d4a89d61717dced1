import json
import sys

import numpy as np
import pytest
import shapely
from PIL import Image

from prts.errors import InputError, ParameterError
from prts.io.slide import open_slide
from prts.segmentation import segmenters, stardist
from prts.segmentation.stardist import StarDist


@pytest.fixture(autouse=True)
def no_model_kept():
    stardist._load.cache_clear()


@pytest.fixture
def slide(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "slide.png")
    with open_slide(tmp_path / "slide.png", mpp=0.25) as slide:
        yield slide


# --- without TensorFlow


def test_percentiles_are_of_all_channels_together(slide):
    low, high = stardist._percentiles(slide, 0.25, (5.0, 95.0))
    pixels = slide.read_region(0, 0, 70, 50)
    assert (low, high) == pytest.approx(np.percentile(pixels, [5, 95]), abs=1)


def test_the_lazy_image_is_the_normalised_slide_padded_with_white(slide):
    image = stardist._LazyImage(slide, 0.25, 50.0, 150.0, multiple=16)
    assert image.shape == (64, 80, 3) and image.ndim == 3
    part = image[slice(40, 64), slice(60, 80), slice(0, 3)]
    assert part.dtype == np.float32 and part.shape == (24, 20, 3)
    np.testing.assert_allclose(part[:10, :10], (slide.read_region(60, 40, 10, 10) - 50.0) / 100, rtol=1e-6)
    assert (part[10:] == np.float32(2.05)).all() and (part[:, 10:] == np.float32(2.05)).all()
    assert stardist._LazyImage(slide, 0.5, 50.0, 150.0, multiple=16).shape == (32, 48, 3)


def test_outlines_become_full_resolution_pixels(slide):
    angle = np.linspace(0, 2 * np.pi, 32, endpoint=False)
    disc = np.stack([10 + 4 * np.sin(angle), 20 + 4 * np.cos(angle)])  # y, x at pixel centres
    outside = disc + np.array([[30.0], [0.0]])
    found = {"coord": np.stack([disc, outside]), "prob": np.array([0.75, 0.5], np.float32)}
    nuclei = stardist._nuclei(found, slide, mpp=0.5)
    assert list(nuclei["score"]) == [0.75]  # the other lies below the image
    assert shapely.get_coordinates(nuclei.centroid)[0] == pytest.approx([41.0, 21.0])  # (x + 0.5) * 0.5 / 0.25
    assert nuclei["area_um2"][0] == pytest.approx(np.pi * 2**2, rel=0.01)
    assert len(stardist._nuclei({"coord": np.empty((0, 2, 32)), "prob": np.empty(0)}, slide, mpp=0.5)) == 0


def test_a_slide_of_one_colour_has_no_nuclei(tmp_path):
    Image.new("RGB", (64, 64), "white").save(tmp_path / "white.png")
    with open_slide(tmp_path / "white.png", mpp=0.5) as slide:
        assert len(StarDist()(slide)) == 0


def test_without_the_extra_the_error_names_it(slide, monkeypatch):
    monkeypatch.setitem(sys.modules, "stardist.models", None)
    with pytest.raises(InputError, match=r"pip install 'prts-spatial\[stardist\]'"):
        StarDist()(slide)


def test_models_that_are_none(slide, tmp_path):
    def with_config(**config):
        (tmp_path / "model").mkdir(exist_ok=True)
        (tmp_path / "model/config.json").write_text(json.dumps(config))
        return StarDist(model=str(tmp_path / "model"))

    with pytest.raises(InputError, match="neither a model folder nor a pretrained H&E model"):
        StarDist(model="2D_versatile_hee")(slide)
    with pytest.raises(InputError, match=r"not a StarDist model folder \(config.json"):
        StarDist(model=str(tmp_path))(slide)
    with pytest.raises(InputError, match="not a StarDist model folder"):
        with_config(n_dim=2)(slide)
    with pytest.raises(InputError, match="a model for 1 channel"):
        with_config(axes="YXC", n_channel_in=1)(slide)
    with pytest.raises(InputError, match="has no weights"):
        with_config(axes="YXC", n_channel_in=3)(slide)


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"prob_thresh": 2}, "prob_thresh"),
        ({"nms_thresh": -1}, "nms_thresh"),
        ({"percentiles": (95, 5)}, "percentiles"),
        ({"block_size": 384}, "block_size"),
        ({"model_mpp": 0}, "model_mpp"),
    ],
)
def test_settings_that_make_no_sense(settings, key):
    with pytest.raises(ParameterError, match=rf"segmenter {key}: "):
        segmenters.build({"name": "stardist", **settings})


def test_settings_are_json_and_follow_the_files_of_a_folder(tmp_path):
    assert json.loads(json.dumps(StarDist().settings()))["percentiles"] == [5.0, 95.0]
    (tmp_path / "thresholds.json").write_text("1")
    before = StarDist(model=str(tmp_path)).settings()
    (tmp_path / "thresholds.json").write_text("23")
    assert StarDist(model=str(tmp_path)).settings() != before


# --- the real thing


@pytest.fixture
def model(prts_data):
    pytest.importorskip("stardist")
    return str(prts_data / "stardist/he_dsb2018")


@pytest.mark.real
@pytest.mark.slow
def test_finds_nuclei_and_prints_nothing(prts_data, model, capfd):
    from prts.evaluation.segmentation import match_nuclei
    from prts.io.outlines import labels_to_polygons

    path = sorted((prts_data / "nuclei_dsb2018/images").glob("*.png"))[0]
    truth = labels_to_polygons(np.asarray(Image.open(prts_data / "nuclei_dsb2018/labels" / path.name)))[1]
    segmenter = StarDist(model=model, prob_thresh=None, nms_thresh=None, percentiles=(1, 99.8))
    with open_slide(path, mpp=0.5) as slide:
        nuclei = segmenter(slide)
        released = StarDist(model=model)(slide)
    assert match_nuclei(truth, nuclei.geometry.to_numpy()).f1 > 0.6
    assert nuclei["score"].between(0.46, 1).all()
    assert released["score"].min() < 0.46 and len(released) > len(nuclei)
    assert capfd.readouterr() == ("", "")


@pytest.mark.real
@pytest.mark.slow
def test_blocks_and_rescaling_change_little(prts_data, model, tmp_path):
    from prts.evaluation.segmentation import match_nuclei

    with open_slide(prts_data / "images/CMU-1-Small-Region.svs") as full:
        crop = Image.fromarray(full.read_region(300, 900, 700, 620))
    crop.save(tmp_path / "crop.png")
    crop.resize((1400, 1240), Image.Resampling.BICUBIC).save(tmp_path / "large.png")
    own = {"model": model, "prob_thresh": None, "nms_thresh": None, "model_mpp": 0.5}
    with open_slide(tmp_path / "crop.png", mpp=0.5) as slide:
        whole = StarDist(**own)(slide)
        parts = StarDist(**own, block_size=400, min_overlap=64, context=96)(slide)
        assert (
            len(StarDist(**own, min_overlap=8)(slide)) < len(whole) / 2
        )  # outlines over 8 px are dropped, not an error
    assert len(whole) > 100
    assert match_nuclei(whole.geometry.to_numpy(), parts.geometry.to_numpy(), 0.9).f1 > 0.98
    with open_slide(tmp_path / "large.png", mpp=0.25) as slide:
        large = StarDist(**own)(slide)
    halved = shapely.transform(large.geometry.to_numpy(), lambda xy: xy / 2)
    assert match_nuclei(whole.geometry.to_numpy(), halved, 0.7).f1 > 0.9
    assert large["area_um2"].median() == pytest.approx(whole["area_um2"].median(), rel=0.05)


@pytest.mark.real
@pytest.mark.slow
def test_weights_that_do_not_fit_are_an_input_error(model, slide, tmp_path):
    from pathlib import Path

    for file in Path(model).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "weights_best.h5").write_bytes(b"no weights")
    with pytest.raises(InputError, match="not a StarDist model folder that can be loaded"):
        StarDist(model=str(tmp_path))(slide)
