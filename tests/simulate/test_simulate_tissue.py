"""Nuclei, image and rates, each compared with an independent, slower implementation."""

from __future__ import annotations

import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from skimage.draw import polygon as polygon_pixels
from sklearn.ensemble import RandomForestClassifier

from prts.io.nuclei import make_nuclei
from prts.simulate import stain as stain_module
from prts.simulate.draw_counts import _negative_binomial
from prts.simulate.fields import Bilinear, noise_tile, repeat_tile, smooth_field
from prts.simulate.gene_programs import draw_gene_programs, make_truth, true_rates
from prts.simulate.lattice import BinLattice
from prts.simulate.nuclei import SimulatedNuclei, lattice_around, place_nuclei
from prts.simulate.stain import Stain, render, shifted_stain
from prts.simulate.tissue import DOMAIN_NAMES, GRID_UM, TYPE_NAMES, TYPE_SHARES, TYPES, Layout, build_layout

MPP = 0.5


class Scene:
    """A layout, its nuclei and their image."""

    def __init__(self, seed: int, cells: int = 700, stain: Stain | None = None) -> None:
        self.layout: Layout = build_layout(cells, np.random.default_rng([seed, 0]))
        self.nuclei: SimulatedNuclei = place_nuclei(self.layout, cells, np.random.default_rng([seed, 1]))
        self.polygons = self.nuclei.polygons(MPP)
        self.shape = (int(self.layout.height_um / MPP), int(self.layout.width_um / MPP))
        bands = render(self.layout, self.nuclei, self.shape, MPP, stain or Stain(), np.random.default_rng([seed, 2]))
        self.image = np.concatenate(list(bands))
        self.density = -np.log10((self.image.astype(float) + 1) / 245)


@pytest.fixture(scope="module")
def scene() -> Scene:
    return Scene(1)


def pixels(polygon: shapely.Polygon, dx: float = 0, dy: float = 0) -> tuple[np.ndarray, np.ndarray]:
    """Pixels whose center (at + 0.5) is in the polygon, moved by dx, dy."""
    x, y = polygon.exterior.coords.xy
    return polygon_pixels(np.array(y) - 0.5 + dy, np.array(x) - 0.5 + dx)


def test_number_and_domains_of_nuclei(scene: Scene) -> None:
    assert len(scene.nuclei) == 700
    col, row = (scene.nuclei.xy_um / GRID_UM).astype(int).T
    np.testing.assert_array_equal(scene.layout.domain[row, col], scene.nuclei.domain)
    assert len(TYPE_NAMES) >= 6 and set(scene.nuclei.kind) == set(range(len(TYPES)))
    assert set(scene.nuclei.domain) == set(range(len(DOMAIN_NAMES)))
    np.testing.assert_allclose(TYPE_SHARES.sum(axis=1), 1)


def test_nuclei_hardly_overlap(scene: Scene) -> None:
    assert shapely.is_valid(scene.polygons).all()
    shared = 1 - shapely.union_all(scene.polygons).area / shapely.area(scene.polygons).sum()
    assert shared < 0.02


def test_types_have_their_size_and_shape() -> None:
    nuclei = place_nuclei(layout := build_layout(3000, np.random.default_rng(0)), 3000, np.random.default_rng(1))
    assert layout.density.sum() * GRID_UM**2 == pytest.approx(3000, rel=1e-4)
    area = shapely.area(nuclei.polygons(1.0))
    for k, kind in enumerate(TYPES):
        mine = nuclei.kind == k
        assert np.median(area[mine]) == pytest.approx(np.pi / 4 * kind.diameter_um**2, rel=0.15), kind.name
        stretch = nuclei.half_um[mine, 0] / nuclei.half_um[mine, 1]
        assert np.median(stretch) == pytest.approx(kind.elongation, rel=0.1), kind.name


def test_polygons_are_where_depth_is_one(scene: Scene) -> None:
    vertices = shapely.get_coordinates(scene.polygons) * MPP
    index = np.repeat(np.arange(700), shapely.get_num_coordinates(scene.polygons))
    dx, dy = (vertices - scene.nuclei.xy_um[index]).T
    np.testing.assert_allclose(scene.nuclei.depth(index, dx, dy), 1, rtol=1e-9)
    assert (np.hypot(dx, dy) <= scene.nuclei.reach_um()[index]).all()


def test_depth_agrees_with_shapely(scene: Scene) -> None:
    rng = np.random.default_rng(0)
    index = rng.integers(0, 700, 20_000)
    d = rng.uniform(-9, 9, (2, len(index)))
    points = shapely.points((scene.nuclei.xy_um[index] + d.T) / MPP)
    inside = shapely.contains(scene.polygons[index], points)
    # Chords cut off a sliver of the curve.
    assert ((scene.nuclei.depth(index, *d) < 1) == inside).mean() > 0.995


@given(
    st.lists(st.tuples(st.floats(-5, 25), st.floats(-5, 25), st.floats(0, 6)), min_size=1, max_size=5),
    st.integers(1, 20),
    st.integers(1, 20),
)
@settings(max_examples=60, deadline=None)
def test_lattice_around_lists_each_point_once(squares: list[tuple[float, float, float]], rows: int, cols: int) -> None:
    centre, reach = np.array([s[:2] for s in squares]), np.array([s[2] for s in squares])
    found = list(zip(*(a.tolist() for a in lattice_around(centre, reach, (rows, cols))), strict=True))
    wanted = {
        (r, c, i)
        for i, (x, y, w) in enumerate(squares)
        for r in range(rows)
        for c in range(cols)
        if abs(c - x) <= w and abs(r - y) <= w
    }
    # A sum may round where the difference does not: only points on the edge may differ.
    for r, c, i in set(found) ^ wanted:
        assert np.isclose(np.abs([c, r] - centre[i]), reach[i], atol=1e-9).any()
    assert len(found) == len(set(found))


def test_image_is_dark_in_nuclei_and_not_shifted(scene: Scene) -> None:
    red = scene.density[..., 0]

    def inside(dx: float, dy: float) -> float:
        parts = [red[pixels(p, dx, dy)] for p in scene.polygons]
        return float(np.concatenate(parts).mean())

    covered = np.zeros(scene.shape, bool)
    for p in scene.polygons:
        covered[pixels(p)] = True
    tissue = ndimage.zoom(scene.layout.outline, np.array(scene.shape) / scene.layout.outline.shape, order=0)
    here = inside(0, 0)
    assert here > 2.5 * red[tissue & ~ndimage.binary_dilation(covered, iterations=2)].mean()
    # A shift of half a pixel in any direction is worse: image and polygons share one coordinate system.
    assert all(here > inside(*d) for d in [(0.5, 0), (-0.5, 0), (0, 0.5), (0, -0.5)])


def test_glass_and_lumens_are_white(scene: Scene) -> None:
    far = ndimage.zoom(scene.layout.clearance, np.array(scene.shape) / scene.layout.clearance.shape, order=1) < -9
    glass = far & ~ndimage.zoom(scene.layout.outline, np.array(scene.shape) / scene.layout.outline.shape, order=0)
    assert scene.image[glass].min() > 215 and scene.image[glass].std() > 0.5


def test_bands_have_no_seams(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(1, 60)
    monkeypatch.setattr(stain_module, "BAND_ROWS", 97)
    bands = render(scene.layout, scene.nuclei, scene.shape, MPP, Stain(), np.random.default_rng([1, 2]))
    assert np.abs(np.concatenate(list(bands)).astype(int) - scene.image).max() <= 1


def test_stain_shift_moves_colors_mildly() -> None:
    plain, moved = Scene(2, 60), Scene(2, 60, shifted_stain(1.0))
    tissue = plain.image.min(axis=2) < 215
    change = moved.image[tissue].mean(axis=0) - plain.image[tissue].mean(axis=0)
    assert 3 < np.abs(change).max() < 30
    assert shifted_stain(0.0) == Stain()


def looks(scene: Scene) -> np.ndarray:
    """Simple statistics of each nucleus and its surroundings from image and outline."""
    rows = []
    blurred = ndimage.gaussian_filter(scene.density, (8, 8, 0))
    for p in scene.polygons:
        at = pixels(p)
        od = scene.density[at]
        box = shapely.oriented_envelope(p)
        x, y = box.exterior.coords.xy
        sides = np.hypot(np.diff(x[:3]), np.diff(y[:3]))
        around = blurred[int(p.centroid.y), int(p.centroid.x)]
        rows.append([np.log(p.area), np.log(sides.max() / sides.min()), *od.mean(axis=0), *od.std(axis=0), *around])
    return np.array(rows)


@pytest.mark.slow
def test_a_simple_reader_of_the_image_tells_types_apart(scene: Scene) -> None:
    other = Scene(5)
    model = RandomForestClassifier(100, random_state=0).fit(looks(scene), scene.nuclei.kind)
    right = model.predict(looks(other)) == other.nuclei.kind
    share = np.bincount(other.nuclei.kind).max() / len(right)
    assert right.mean() > max(0.75, 2 * share)


@pytest.fixture(scope="module")
def truth(scene: Scene):
    outlines = make_nuclei(scene.polygons, MPP, cell_id=np.arange(700).astype(str))
    return make_truth(scene.nuclei, outlines, draw_gene_programs(200), np.random.default_rng(0))


def test_rates_follow_their_formula(truth) -> None:
    rates = true_rates(truth)
    np.testing.assert_allclose(rates.sum(axis=1), truth.obs["depth"], rtol=1e-5)
    for cell in (0, 123, 699):
        kind = TYPE_NAMES.index(truth.obs["cell_type"].iloc[cell])
        domain = DOMAIN_NAMES.index(truth.obs["domain"].iloc[cell])
        log = truth.varm["type"][:, kind] + truth.varm["domain"][:, domain]
        log = (
            log
            + truth.varm["gradient"] @ truth.obsm["gradient"][cell]
            + truth.varm["latent"] @ truth.obsm["latent"][cell]
        )
        share = np.exp(log.astype(float)) / np.exp(log.astype(float)).sum()
        np.testing.assert_allclose(rates[cell], truth.obs["depth"].iloc[cell] * share, rtol=1e-4)
    picked = [truth.var_names[7], truth.var_names[3]]
    np.testing.assert_array_equal(true_rates(truth, picked), rates[:, [7, 3]])


@pytest.mark.filterwarnings("ignore:Observation names")
def test_image_rate_is_the_mean_over_invisible_factors(truth) -> None:
    rng = np.random.default_rng(1)
    one = truth[:1].copy()
    many = truth[np.zeros(4000, int)].copy()
    many.obs_names_make_unique()
    many.obsm["latent"] = rng.standard_normal(many.obsm["latent"].shape)
    noise = np.exp(0.4 * rng.standard_normal(4000) - 0.08)
    many.obs["depth"] = one.obs["image_depth"].iloc[0] * noise
    expected = true_rates(many).mean(axis=0)
    # The sum over genes, by which both are divided, varies with the factors too: hence the larger tolerance.
    np.testing.assert_allclose(true_rates(one, image=True)[0], expected, rtol=0.12)


def test_gene_programs_have_the_expected_genes() -> None:
    programs = draw_gene_programs(1000)
    assert len(set(programs.names)) == len(set(programs.ids)) == 1000
    assert sum(n.startswith("MT-") for n in programs.names) == programs.mitochondrial.sum() == 13
    for kind, names in programs.markers().items():
        at = np.isin(programs.names, names)
        mine = programs.kind[at, TYPE_NAMES.index(kind)]
        others = np.delete(programs.kind[at], TYPE_NAMES.index(kind), axis=1)
        assert (mine > others.mean(axis=1)).all()
    assert len(draw_gene_programs(50).names) == 50


def test_mitochondrial_share_and_spread_of_means(truth) -> None:
    rates = true_rates(truth)
    share = rates[:, truth.var["mitochondrial"].to_numpy()].sum(axis=1) / rates.sum(axis=1)
    assert 0.03 < np.median(share) < 0.08 and 0.005 < (share > 0.15).mean() < 0.05
    means = rates.mean(axis=0)
    assert np.quantile(means, 0.95) > 20 * np.quantile(means, 0.25)


def test_counts_are_negative_binomial() -> None:
    mean, size, n = np.array([0.05, 0.8, 6.0]), np.array([0.7, 2.0, 4.0]), 40_000
    cell, gene = _negative_binomial(
        np.tile(mean, (n, 1)).astype(np.float32), size.astype(np.float32), np.random.default_rng(0)
    )
    counts = np.zeros((n, 3))
    np.add.at(counts, (cell, gene), 1)
    np.testing.assert_allclose(counts.mean(axis=0), mean, rtol=0.05)
    np.testing.assert_allclose(counts.var(axis=0), mean + mean**2 / size, rtol=0.07)
    np.testing.assert_allclose((counts == 0).mean(axis=0), (size / (size + mean)) ** size, atol=0.01)


@given(st.floats(-0.3, 0.3), st.integers(0, 3000), st.integers(0, 3000))
def test_lattice_round_trip(tilt: float, row: int, col: int) -> None:
    lattice = BinLattice(4000, 4000, (12.5, -3.0), tilt, (0.0, 0.0))
    there = lattice.to_um(np.array([row]), np.array([col]))
    np.testing.assert_allclose(lattice.from_um(there), [[col, row]], atol=1e-8)


def test_bilinear_equals_scipy() -> None:
    field = np.random.default_rng(0).standard_normal((12, 9)).astype(np.float32)
    rows, cols = np.linspace(3, 20, 7), np.linspace(2, 15, 5)
    expected = ndimage.map_coordinates(field, np.meshgrid(rows / 2 - 0.5, cols / 2 - 0.5, indexing="ij"), order=1)
    np.testing.assert_allclose(Bilinear(field.shape, 2.0, rows, cols)(field), expected, atol=1e-5)


def test_noise_repeats_without_a_seam_and_fields_are_smooth() -> None:
    tile = noise_tile(np.random.default_rng(0), 64, 3.0)
    assert tile.std() == pytest.approx(1, abs=1e-5)
    plane = repeat_tile(tile, -10, 100, 150)
    np.testing.assert_array_equal(plane[10:74, :64], tile)
    assert np.abs(np.diff(plane, axis=1)).max() == pytest.approx(
        np.abs(np.diff(tile, axis=1, append=tile[:, :1])).max()
    )
    field = smooth_field(np.random.default_rng(0), (400, 300), 2.0, 60.0)
    assert 0.6 < field.std() < 1.4 and np.abs(np.diff(field, 2, axis=0)).max() < 0.2


def test_noise_grain_equals_a_gaussian_filter() -> None:
    size, sigma = 60, (2.0, 4.0)
    white = np.random.default_rng(0).standard_normal((size, size), dtype=np.float32)
    slow = ndimage.gaussian_filter(white.astype(float), sigma, mode="wrap", truncate=7)
    expected = (slow - slow.mean()) / slow.std()
    np.testing.assert_allclose(noise_tile(np.random.default_rng(0), size, sigma), expected, atol=2e-3)
