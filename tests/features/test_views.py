"""Views of a section: what they do to pixels and units, and how training reads them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import geopandas as gpd
import numpy as np
import pytest
import shapely
import tifffile

from prts.data.prepare_input import prepare_features, prepare_input
from prts.errors import InputError
from prts.features.encoders import Encoder
from prts.features.store import read_features
from prts.features.views import BRIGHTNESS, Look, View, blurred, jittered
from prts.io.nuclei import make_nuclei
from prts.io.orientation import FLIP, ROTATE, UPRIGHT, Orientation
from prts.section import Section, open_section

MPP, BLOCK = 0.5, 32
NOTHING = Look((1.0, 1.0, 1.0), 0.0, 1.0, 0.0)
# Optical density of hematoxylin and eosin in red, green, blue (Ruifrok & Johnston 2001, as in skimage).
H, E = np.array([0.65, 0.70, 0.29]), np.array([0.07, 0.99, 0.11])


@pytest.fixture
def section(tmp_path: Path) -> Section:
    """An image of 12 x 15 uniform blocks of 16 um."""
    colors = np.random.default_rng(0).integers(60, 250, (12, 15, 3)).astype(np.uint8)
    tifffile.imwrite(tmp_path / "s.tif", colors.repeat(BLOCK, 0).repeat(BLOCK, 1), tile=(256, 256), photometric="rgb")
    return open_section("s", tmp_path / "s.tif", mpp=MPP)


@pytest.fixture
def nuclei() -> gpd.GeoDataFrame:
    """A nucleus in the middle of every second block, at least three blocks from the edge."""
    at = [(BLOCK * (x + 0.5), BLOCK * (y + 0.5)) for y in range(3, 9, 2) for x in range(3, 12, 2)]
    return make_nuclei([shapely.Point(xy).buffer(9, quad_segs=2) for xy in at], MPP)


class Compass(Encoder):
    """Color of the center, and of the blocks to the right, above, to the left and below; and the polygon's area."""

    name, tile_px, mpp = "compass", 160, MPP
    global_width, local_width = 12, 4

    def encode(self, tiles, polygons):
        middle, step = self.tile_px // 2, BLOCK
        around = [(middle, middle + step), (middle - step, middle), (middle, middle - step), (middle + step, middle)]
        compass = np.concatenate([tiles[:, y, x] for y, x in around], axis=1).astype(np.float32)
        area = np.array([polygon.area for polygon in polygons], dtype=np.float32)[:, None]
        return compass, np.hstack([tiles[:, middle, middle], area]).astype(np.float32)


def seen(folder: Path, section: Section, nuclei: gpd.GeoDataFrame, view: View) -> np.ndarray:
    """Center, area and compass of each nucleus in a view."""
    moved = view.orientation.nuclei(nuclei, section.file_size)
    store = prepare_features(folder, view.of(section), moved, Compass(), "n")
    return read_features(store, nuclei["cell_id"].to_numpy())


def pixels(section: Section, *window: int, mpp: float = MPP) -> np.ndarray:
    with section.open_slide() as slide:
        return slide.read_region(*(window or (0, 0, slide.width, slide.height)), mpp)


@pytest.mark.parametrize("flip", FLIP[:2])
@pytest.mark.parametrize("rotate", ROTATE)
def test_a_turned_unit_sees_its_own_tissue_with_the_directions_turned(
    section: Section, nuclei: gpd.GeoDataFrame, tmp_path: Path, rotate: int, flip: str
) -> None:
    upright = seen(tmp_path, section, nuclei, View(UPRIGHT, NOTHING, 1.0))
    turned = seen(tmp_path, section, nuclei, View(Orientation(rotate, flip), NOTHING, 1.0))

    np.testing.assert_allclose(turned[:, :4], upright[:, :4], rtol=1e-5)
    right, above, left, below = upright[:, 4:].reshape(-1, 4, 3).swapaxes(0, 1)
    # counterclockwise, what was on the right comes to lie above; a mirror then swaps right and left
    wanted = [right, above, left, below]
    for _ in range(rotate // 90):
        wanted = [wanted[3], wanted[0], wanted[1], wanted[2]]
    if flip == "horizontal":
        wanted = [wanted[2], wanted[1], wanted[0], wanted[3]]
    np.testing.assert_array_equal(turned[:, 4:].reshape(-1, 4, 3).swapaxes(0, 1), wanted)


def test_a_larger_scale_enlarges_nuclei(section: Section, nuclei: gpd.GeoDataFrame, tmp_path: Path) -> None:
    upright = seen(tmp_path, section, nuclei, View(UPRIGHT, NOTHING, 1.0))
    larger = seen(tmp_path, section, nuclei, View(UPRIGHT, NOTHING, 1.1))
    np.testing.assert_allclose(larger[:, 3], 1.21 * upright[:, 3], rtol=1e-4)
    np.testing.assert_array_equal(larger[:, :3], upright[:, :3])


def test_stain_jitter_is_that_of_the_stains_and_leaves_white_white() -> None:
    def light(h: float, e: float) -> np.ndarray:
        return 255 * 10 ** -(h * H + e * E)

    violet = np.round(light(0.5, 0.2)).astype(np.uint8)
    np.testing.assert_allclose(jittered(violet, (1.2, 0.5, 1.0), 0.0), light(0.6, 0.1), atol=1.5)
    mean = (0.5 * H + 0.2 * E).mean()
    np.testing.assert_allclose(jittered(violet, (1, 1, 1), 0.3), light(0.5 + 0.3 * mean, 0.2 + 0.3 * mean), atol=1.5)
    for number in range(16):
        white = np.full((40, 40, 3), 255, np.uint8)
        look = replace(View.draw(3, "s", number).look, brightness=1.0)
        np.testing.assert_array_equal(look(white, MPP), white)


def test_a_look_is_a_change_of_stain_then_of_light_then_a_blur(section: Section) -> None:
    look = Look((1.1, 0.9, 1.0), 0.02, 0.9, 0.7)
    whole = pixels(replace(section, look=look))
    changed = (jittered(pixels(section), (1.1, 0.9, 1.0), 0.02) * np.float32(0.9) + 0.5).astype(np.uint8)
    inside = slice(20, -20)
    np.testing.assert_array_equal(whole[inside, inside], blurred(changed, 1.4)[inside, inside])


def test_pieces_of_a_view_are_the_whole(section: Section) -> None:
    view = View.draw(0, "s", 3).of(section)
    whole = pixels(view, 0, 0, 400, 300, mpp=0.6)
    for left, top, width, height in ((0, 0, 130, 300), (130, 0, 270, 111), (130, 111, 270, 189)):
        piece = pixels(view, left, top, width, height, mpp=0.6)
        np.testing.assert_array_equal(piece, whole[top : top + height, left : left + width])


def test_what_was_not_scanned_stays_black() -> None:
    rgb = np.full((60, 60, 3), 200, np.uint8)
    rgb[20:] = 9
    changed = Look((1.2, 0.8, 1.1), 0.04, 1.15, 0.7)(rgb, MPP)
    np.testing.assert_array_equal(changed[20:], rgb[20:])
    assert (changed[:10] > 200).all()


def test_a_view_follows_from_seed_section_and_number() -> None:
    assert View.draw(1, "a", 2) == View.draw(1, "a", 2)
    assert len({View.draw(*which) for which in ((1, "a", 2), (2, "a", 2), (1, "b", 2), (1, "a", 3))}) == 4
    four = [View.draw(5, "a", number) for number in range(4)]
    low, high = BRIGHTNESS
    quarters = {int(4 * (view.look.brightness - low) / (high - low)) for view in four}
    assert quarters == {0, 1, 2, 3} and len({view.orientation for view in four}) == 4


def test_each_view_is_a_cache_file_that_is_written_once(
    section: Section, nuclei: gpd.GeoDataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    encode = Compass.encode
    monkeypatch.setattr(Compass, "encode", lambda self, *given: calls.append(1) or encode(self, *given))

    def stores(view: View) -> tuple[Path | None, ...]:
        moved = view.orientation.nuclei(nuclei, section.file_size)
        return prepare_input(tmp_path, view.of(section), moved, ("local", "context"), Compass, "n")

    views = [View(UPRIGHT, NOTHING, 1.0), *(View.draw(0, "s", number) for number in range(3))]
    made = [stores(view) for view in views]
    n = len(calls)
    assert n == len(made) and [stores(view) for view in views] == made and len(calls) == n
    assert len({path for paths in made for path in paths}) == 2 * len(views)


def test_context_sees_the_view(section: Section, nuclei: gpd.GeoDataFrame, tmp_path: Path) -> None:
    def context(look: Look) -> np.ndarray:
        view = View(Orientation(90), look, 1.0)
        moved = view.orientation.nuclei(nuclei, section.file_size)
        store = prepare_input(tmp_path, view.of(section), moved, ("context",), Compass, "n").context
        return read_features(store, nuclei["cell_id"].to_numpy())

    # a tenth darker adds -log10(0.9) to every optical density, whose spread stays
    change = context(replace(NOTHING, brightness=0.9)) - context(NOTHING)
    np.testing.assert_allclose(change[:, :3], -np.log10(0.9), atol=0.004)
    np.testing.assert_allclose(change[:, 3:6], 0, atol=0.004)


def test_only_training_sections_get_views_and_bad_numbers_are_refused(
    tmp_path: Path, settings_of: Callable[..., object]
) -> None:
    from prts.data.prepare import prepare_sections
    from prts.data.splits import Roles
    from prts.section import read_visium_hd
    from prts.simulate.section import simulate_section

    sections = {}
    for seed, name in enumerate(("a", "b")):
        simulate_section(tmp_path / name, name=name, cells=60, genes=60, seed=seed)
        sections[name] = read_visium_hd(tmp_path / name)
    settings = settings_of(tmp_path / "cache", augment=2, seed=4, use=("context", "morphology"))
    prepared = prepare_sections("t", "human", sections, Roles(["a"], ["b"], []), settings).sections

    assert prepared["b"].views == ()
    assert [view.features for view in prepared["a"].views] == [None, None]
    kinds = {prepared["a"].context, *(view.context for view in prepared["a"].views)}
    assert len(kinds) == 3 and all(path.is_file() for path in kinds)
    for given, problem in (({"augment": -1}, "not a number of views"), ({"augment": 65}, "give 0 to 64")):
        with pytest.raises(InputError, match=rf"encoder augment: .*{problem}"):
            settings_of(tmp_path, **given)
    with pytest.raises(InputError, match="encoder augment: has no effect on morphology"):
        settings_of(tmp_path, augment=1, use=("morphology",))


@pytest.fixture
def settings_of() -> Callable[..., object]:
    """Settings of a preparation without an encoder."""
    from prts.data.prepare import PrepareSettings
    from prts.data.splits import BySection
    from prts.features.no_encoder import NoEncoder
    from prts.preprocess.counts import QCSettings
    from prts.preprocess.panel import TopPanel
    from prts.segmentation import segmenters

    def make(cache: Path, **given: object) -> PrepareSettings:
        return PrepareSettings(
            segmenter=segmenters.build({"name": "watershed"}),
            splitter=BySection(test_required=False),
            panel=TopPanel(n_genes=10, min_nuclei=1),
            encoder=NoEncoder(),
            cache_dir=cache,
            qc=QCSettings(min_umi=1),
            **given,
        )

    return make
