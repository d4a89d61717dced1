"""An encoder from outside the package is one class: registered, extracted with, stored in settings and rebuilt."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import numpy as np
import pytest
import shapely

from prts.errors import InputError, ParameterError
from prts.features import encoders as module
from prts.features.encoders import Encoder, encoder_from_settings, encoders, weights_status
from prts.features.extract import extract
from prts.features.store import read_features, read_store_attrs

SOURCE = '''
    import numpy as np
    import shapely

    from prts.features.encoders import Encoder


    class MeanColor(Encoder):
        """Mean color of the tile, area of the nucleus."""

        global_width, local_width = 3, 1

        def __init__(self, scale: float = 1.0, tile_px: int = 256) -> None:
            self.scale, self.tile_px = scale, tile_px

        def settings(self):
            return {**super().settings(), "scale": self.scale}

        def encode(self, tiles, polygons):
            mean = tiles.mean(axis=(1, 2)).astype(np.float32)
            return self.scale * mean, shapely.area(polygons)[:, None].astype(np.float32)
'''


def _mean_color():
    made = SimpleNamespace()
    namespace = {"__name__": __name__}
    exec(textwrap.dedent(SOURCE), namespace)
    made.cls = namespace["MeanColor"]
    return made.cls


@pytest.fixture
def registered(request, tmp_path, monkeypatch):
    """The encoder `mean_color`: by the decorator, or from an installed package."""
    encoders.names()  # finds the built-in ones
    monkeypatch.setattr(encoders, "_members", {**encoders._members})
    if request.param == "decorator":
        encoders.register("mean_color")(_mean_color())
        return
    site = tmp_path / "site"
    info = site / "mean_color-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "mean_color_encoder.py").write_text(textwrap.dedent(SOURCE))
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mean-color\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[prts.encoders]\nmean_color = mean_color_encoder:MeanColor\n")
    monkeypatch.syspath_prepend(str(site))
    request.addfinalizer(lambda: sys.modules.pop("mean_color_encoder", None))


@pytest.mark.parametrize("registered", ["decorator", "entry point"], indirect=True)
def test_an_addition_is_one_class(registered, fake_slide, nuclei_at, tmp_path):
    assert "mean_color" in encoders.names() and "mean_color" in encoders
    encoder = encoders.build({"name": "mean_color", "scale": 2.0, "tile_px": 64})
    assert isinstance(encoder, Encoder) and encoder.name == "mean_color"
    assert module.mean_color(scale=3.0).scale == 3.0

    slide = fake_slide(height=600, width=700)
    xy = np.random.default_rng(0).uniform(300, 1000, (30, 2))
    nuclei = nuclei_at(xy, np.linspace(5, 20, 30))
    extract(slide, nuclei, encoder, tmp_path / "f.h5")
    got = read_features(tmp_path / "f.h5", nuclei["cell_id"].to_numpy())
    for (x, y), row, polygon in zip(xy, got, nuclei.geometry, strict=True):
        left, top = (int(np.floor(value * 0.5 + 0.5)) - 32 for value in (x, y))
        tile = slide.rescaled[top : top + 64, left : left + 64]
        np.testing.assert_allclose(row[1:], 2 * tile.mean(axis=(0, 1)), rtol=1e-5)
        assert row[0] == pytest.approx(shapely.area(polygon) / 4, rel=1e-4)

    settings = read_store_attrs(tmp_path / "f.h5")["settings"]
    again = encoder_from_settings(settings, device="cpu", compile=False)  # it has neither
    assert again.settings() == encoder.settings() and (again.scale, again.tile_px) == (2.0, 64)
    assert weights_status(settings).found


@pytest.mark.parametrize("registered", ["decorator"], indirect=True)
def test_an_encoder_that_cannot_be_made_the_same_is_refused(registered):
    settings = encoders.build({"name": "mean_color"}).settings()
    with pytest.raises(InputError, match=r"mean_color features is fp32 .* bf16 in the model"):
        encoder_from_settings({**settings, "precision": "bf16"})
    with pytest.raises(InputError, match=r"scale of the mean_color features is 1.0 .* not recorded"):
        encoder_from_settings({key: value for key, value in settings.items() if key != "scale"})
    with pytest.raises(InputError, match="None has sha256 None, but the model was trained with abc"):
        encoder_from_settings({**settings, "weights_sha256": "abc"})


@pytest.mark.parametrize("name", [None, 3, ["classical"], {}])
def test_settings_without_a_name_are_refused(name):
    with pytest.raises(InputError, match="encoder: the model's encoder settings name no encoder"):
        encoder_from_settings({"name": name})


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"name": "clasical"}, r"encoder: 'clasical' is not registered, did you mean 'classical'"),
        ({"pooling": "nucleus"}, r"encoder name: is missing; choose one of classical"),
        (
            {"name": "classical", "tilepx": 3},
            r"encoder tilepx: classical has no such setting, did you mean 'tile_px'",
        ),
        ({"name": "classical", "tile_px": 100}, r"encoder tile_px: 100 is not a multiple of 32"),
        ({"name": "classical", "tile_px": "wide"}, r"encoder tile_px: 'wide' is not accepted"),
        (
            {"name": "vit256", "pooling": "mean"},
            r"encoder pooling: 'mean' is not accepted; give nucleus, center2x2 or bilinear",
        ),
    ],
)
def test_wrong_settings_name_the_setting(settings, why):
    with pytest.raises(ParameterError, match=why) as caught:
        encoders.build(settings)
    assert caught.value.owner == "encoder"


def test_what_is_built_and_what_is_given_on_top():
    encoder = encoders.build({"name": "vit256", "weights": "a.pth", "device": "cpu"}, weights="b.pth", tile_px=128)
    assert (str(encoder.weights), encoder.tile_px, encoder.batch_size) == ("b.pth", 128, 16)


def test_registered_names_are_attributes_and_no_file_hides_one():
    assert module.vit256("vit256.pth", device="cpu").settings is not None
    assert module.classical().global_width == 384
    assert module.timm is encoders["timm"] and module.dino_vits16 is encoders["dino_vits16"]
    files = {file.name for file in pkgutil.iter_modules(module.__path__)}
    assert not files & set(encoders.names())
    for name in module.__all__:
        assert getattr(module, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'vit257'"):
        _ = module.vit257


def test_an_encoder_that_derives_from_another_has_its_settings(monkeypatch):
    encoders.names()
    monkeypatch.setattr(encoders, "_members", {**encoders._members})

    @encoders.register("vit512")
    class Larger(module.ViT256):
        """The same network on larger tiles."""

    encoder = encoders.build({"name": "vit512", "tile_px": 512, "local_width": None, "device": "cpu"})
    assert (encoder.name, encoder.tile_px, encoder.local_width) == ("vit512", 512, 384)
    with pytest.raises(ParameterError, match="encoder tile_px: '512' is not accepted"):
        encoders.build({"name": "vit512", "tile_px": "512"})


@pytest.mark.parametrize("name", ["vit256", "dino_vits16", "timm", "classical"])
def test_signatures_show_every_setting(name):
    parameters = inspect.signature(encoders[name]).parameters
    assert {"mpp", "tile_px", "pooling", "batch_size"} <= set(parameters)
    for parameter in parameters.values():
        assert parameter.annotation is not inspect.Parameter.empty and not isinstance(parameter.annotation, str)
        assert parameter.kind is not inspect.Parameter.VAR_KEYWORD
    file = importlib.import_module(encoders[name].__module__).__file__
    assert file is not None


def test_the_package_is_imported_without_torch():
    code = "import sys, prts.features.encoders; sys.exit('torch' in sys.modules or 'timm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
