"""Maps of tissue: what is drawn where, in which colours."""

import contextlib
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import shapely
import tifffile
from matplotlib.collections import PolyCollection
from PIL import Image

from prts.errors import InputError
from prts.io.slide import open_slide
from prts.report import figures, figures_calibration, figures_maps
from prts.report.figures import training_figure
from prts.report.figures_canvas import NucleusPositions, Picture, Window, read_picture
from prts.report.figures_maps import MapRow, gene_rows, region_views, tissue_maps
from prts.report.section_figures import (
    MapData,
    Region,
    diverse_top_genes,
    informative_region,
    map_figures,
    scored_figures,
)


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved, for a look at what they hold."""
    kept, save = [], figures_maps.save
    for module in (figures, figures_calibration, figures_maps):
        monkeypatch.setattr(module, "save", lambda figure, out: (kept.append(figure), save(figure, out))[1])
    return kept


@pytest.fixture
def section():
    rng = np.random.default_rng(0)
    measured = rng.poisson(1.5, size=(400, 2)).astype(float)
    measured[:, 1] = 0
    xy = rng.random((400, 2)) * [3600, 2000] + [200, 300]
    return SimpleNamespace(
        nuclei=NucleusPositions(xy, 0.5, shapely.buffer(shapely.points(xy), 8, quad_segs=2)),
        picture=Picture(rng.integers(0, 255, (60, 100, 3), dtype=np.uint8), (0, 0, 4000, 2400)),
        measured=measured,
        predicted=measured * 0.4 + rng.random((400, 2)) * 0.2,
    )


def whole(section, out, **more):
    rows = gene_rows(["Plp1", "Ttr"], section.predicted, section.measured, [0.421, np.nan])
    tissue_maps(out, rows, nuclei=section.nuclei, picture=section.picture, **more)


def test_measured_and_predicted_share_place_and_colours(tmp_path, drawn, section):
    whole(section, tmp_path / "new" / "maps.png")
    panels = np.array(drawn[0].axes[:6]).reshape(2, 3)
    assert [a.get_title() for a in panels[0]] == ["H&E", "Measured", "Predicted"]
    assert [a.get_ylabel() for a in panels[:, 0]] == ["Plp1", "Ttr"]
    for row, values in ((0, section.measured), (1, section.predicted)):
        # the second gene was not measured at all: its prediction sets the range
        top = np.percentile(values[:, row], 99)
        for axes, shown in zip(panels[row, 1:], (section.measured, section.predicted), strict=True):
            points = axes.collections[0]
            assert points.get_clim() == pytest.approx((0, top))
            np.testing.assert_array_equal(points.get_offsets(), section.nuclei.xy_px)
            np.testing.assert_array_equal(points.get_array(), shown[:, row])
            assert points.get_rasterized()
    assert [t.get_text() for t in panels[0, 2].texts] == ["PCC 0.42"]
    assert not panels[1, 2].texts
    bars = [a for a in drawn[0].axes[6:] if a.get_ylabel()]
    assert [a.get_ylabel() for a in bars] == ["log1p(UMI)\n(0 to 99th percentile)"] * 2


def test_all_panels_show_the_same_piece_of_tissue_with_y_down(tmp_path, drawn, section):
    whole(section, tmp_path / "maps.png")
    xy = section.nuclei.xy_px
    for axes in drawn[0].axes[:6]:
        assert axes.get_aspect() == 1
        (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
        assert left < xy[:, 0].min() < xy[:, 0].max() < right
        assert top < xy[:, 1].min() < xy[:, 1].max() < bottom
    # 100 x 60 px of a picture stand for 4,000 x 2,400 px of the slide
    assert drawn[0].axes[0].images[0].get_extent() == [0, 4000, 2400, 0]
    bar = drawn[0].axes[0].patches[0]
    assert drawn[0].axes[0].texts[0].get_text() == "200 µm"
    assert bar.get_width() == 400  # at 0.5 um a pixel


def test_formats_by_suffix(tmp_path, section):
    names = ["maps.pdf", "maps.png", "maps.svg"]
    whole(section, [tmp_path / name for name in names])
    with Image.open(tmp_path / "maps.png") as picture:
        assert picture.info["dpi"][0] == pytest.approx(300, abs=0.1)
        assert picture.width == pytest.approx(7.5 * 300, abs=2)
    svg = (tmp_path / "maps.svg").read_text()
    assert "Plp1</text>" in svg
    assert svg.count("<use") < 200  # 1,600 points are a picture and not a path each
    assert (tmp_path / "maps.pdf").read_bytes().startswith(b"%PDF")
    with pytest.raises(InputError, match=r"\.png, \.pdf or \.svg"):
        whole(section, [tmp_path / "other.png", tmp_path / "other.jpg"])
    assert sorted(p.name for p in tmp_path.iterdir()) == names


def test_without_measurement_the_prediction_stands_alone(tmp_path, drawn, section):
    rows = [MapRow("Plp1", "UMI", section.predicted[:, 0])]
    tissue_maps(tmp_path / "maps.png", rows, nuclei=section.nuclei, picture=section.picture)
    titles = [a.get_title() for a in drawn[0].axes if a.get_title()]
    assert titles == ["H&E", "Predicted"]
    assert drawn[0].axes[1].collections[0].get_clim()[1] == np.percentile(section.predicted[:, 0], 99)
    assert drawn[0].axes[0].yaxis.label.get_window_extent().x0 >= 0  # the name is on the paper


@pytest.fixture
def slide(tmp_path):
    """4,000 x 2,400 px whose red says the column and whose green the row."""
    x, y = np.arange(4000) // 16, np.arange(2400) // 16
    pixels = np.stack([*np.meshgrid(x, y), np.full((2400, 4000), 7)], axis=-1).astype(np.uint8)
    tifffile.imwrite(tmp_path / "he.tif", pixels, photometric="rgb", tile=(256, 256), compression="zlib")
    with open_slide(tmp_path / "he.tif", mpp=0.5) as opened:
        yield opened


@pytest.mark.parametrize("side", [2000, 100])
def test_a_picture_covers_the_box_it_states(slide, side):
    picture = read_picture(slide, Window(1000, 500, 1801, 1301), side)
    x0, y0, x1, y1 = picture.box_px
    assert x0 <= 1000 and y0 <= 500 and x1 >= 1801 and y1 >= 1301
    height, width = picture.pixels.shape[:2]
    assert max(height, width) <= max(side, 801) + 1
    column, row = width // 3, height // 2
    at = x0 + (column + 0.5) * (x1 - x0) / width, y0 + (row + 0.5) * (y1 - y0) / height
    np.testing.assert_allclose(picture.pixels[row, column, :2], np.array(at) / 16, atol=1.1)


def test_a_region_shows_outlines_and_a_second_image_of_the_same_place(tmp_path, drawn, section, slide):
    second = np.zeros((600, 1000, 3), np.uint8)  # the same field of view at a quarter of the resolution
    second[150:300, 250:500] = 200
    Image.fromarray(second).save(tmp_path / "ihc.png")
    rows = gene_rows(["Plp1"], section.predicted[:, :1], section.measured[:, :1])
    box = (1000, 600, 2000, 1200)
    region_views(
        tmp_path / "region.pdf",
        rows,
        slide=slide,
        nuclei=section.nuclei,
        box_px=box,
        second=("IHC", tmp_path / "ihc.png"),
    )
    views = drawn[0].axes[:4]
    assert [a.get_title() for a in views] == ["H&E", "Measured", "Predicted", "IHC"]
    for axes in views:
        assert (*axes.get_xlim(), *axes.get_ylim()) == (1000, 2000, 1200, 600)
    xy = section.nuclei.xy_px
    near = ((xy >= [900, 500]) & (xy <= [2100, 1300])).all(axis=1)
    for axes, values in zip(views[1:3], (section.measured, section.predicted), strict=True):
        (shown,) = axes.collections
        assert isinstance(shown, PolyCollection)
        assert not shown.get_rasterized()
        np.testing.assert_array_equal(shown.get_array(), values[near, 0])
        centres = np.array([path.vertices[:-1].mean(axis=0) for path in shown.get_paths()])
        np.testing.assert_allclose(centres, xy[near], atol=2)
        # the colours of the whole section, so that regions compare
        assert shown.get_clim()[1] == np.percentile(section.measured[:, 0], 99)
    left, right, bottom, top = views[3].images[0].get_extent()
    pixels = views[3].images[0].get_array()
    inner = pixels[10:-10, 10:-10]
    assert (left, right, bottom, top) == pytest.approx((1000, 2000, 1200, 600), abs=4)
    assert inner.min() > 190  # the bright part of the second image is this region


def test_a_wrong_region_or_second_image_is_one_line(tmp_path, section, slide):
    rows = gene_rows(["Plp1"], section.predicted[:, :1])
    common = {"slide": slide, "nuclei": section.nuclei}
    with pytest.raises(InputError, match="x0 < x1"):
        region_views(tmp_path / "r.png", rows, box_px=(10, 10, 10, 20), **common)
    with pytest.raises(InputError, match="contains no nuclei"):
        region_views(tmp_path / "r.png", rows, box_px=(0, 0, 20, 20), **common)
    Image.fromarray(np.zeros((500, 500, 3), np.uint8)).save(tmp_path / "ihc.png")
    with pytest.raises(InputError, match=r"does not have the aspect ratio of .*\(4000 x 2400 px\)"):
        region_views(
            tmp_path / "r.png", rows, box_px=(500, 500, 2000, 2000), second=("IHC", tmp_path / "ihc.png"), **common
        )


def test_the_region_chosen_is_where_values_vary():
    rng = np.random.default_rng(0)
    xy = rng.random((3000, 2)) * [4000, 2000]
    values = np.where((xy[:, :1] > 3000) & (xy[:, 1:] > 1000), rng.choice([0.0, 5.0], (3000, 1)), 1.0)
    x0, y0, x1, y1 = informative_region(NucleusPositions(xy, 0.5), values, side_um=250)
    assert (x1 - x0, y1 - y0) == (500, 500)
    assert x0 > 2950 and y0 > 950


def test_genes_alike_are_shown_once():
    rng = np.random.default_rng(0)
    a, b, c, d = rng.poisson(3, (4, 500))
    values = np.column_stack([a, a, a, b, b, c, d])
    assert diverse_top_genes(np.arange(7, 0, -1).astype(float), values).tolist() == [0, 3, 5, 6]
    assert diverse_top_genes(np.arange(3, 0, -1).astype(float), values[:, :3]).tolist() == [0, 1, 2]


def test_a_run_writes_every_figure_and_marks_the_epoch_that_it_kept(tmp_path, drawn, section, slide):
    rng = np.random.default_rng(0)
    counts = sp.csr_matrix(rng.poisson(1.0, (400, 5)))
    table = pd.DataFrame({"gene": list("abcde"), "mean_counts": 1.0, "pcc": 0.2, "ceiling": 0.5})
    umi = rng.random((400, 5)).astype(np.float32)
    scored = SimpleNamespace(
        result=SimpleNamespace(per_gene=table),
        nuclei=SimpleNamespace(counts=counts, xy_um=section.nuclei.xy_px * 0.5),
        section=SimpleNamespace(open_slide=lambda: contextlib.nullcontext(slide), mpp=0.5),
        umi=umi,
        prob=umi,
    )
    (tmp_path / "csv").mkdir()
    pd.DataFrame({"epoch": [0, 1], "val/loss": [1.0, 2.0]}).to_csv(tmp_path / "csv" / "metrics.csv", index=False)
    scored_figures(tmp_path / "f", scored, tuple("abcde"), section.nuclei.outlines, suffix="-s1.2")
    training_figure(tmp_path, tmp_path / "f", best_epoch=1)
    names = ["calibration-s1.2", "gene_maps-s1.2", "pcc_vs_ceiling-s1.2", "qc_maps-s1.2", "region-s1.2", "training"]
    assert sorted(p.name for p in (tmp_path / "f").iterdir()) == [f"{n}.{s}" for n in names for s in ("pdf", "png")]
    assert [line.get_label() for line in drawn[-1].axes[0].lines] == ["validation", "best epoch (1)"]
    quality = drawn[2].axes
    np.testing.assert_array_equal(quality[1].collections[0].get_array(), np.asarray(counts.sum(axis=1)).ravel())
    np.testing.assert_allclose(quality[2].collections[0].get_array(), umi.sum(axis=1), rtol=1e-5)
    np.testing.assert_array_equal(quality[4].collections[0].get_array(), (counts.toarray() > 0).sum(axis=1))


def test_a_sparse_prediction_alone_is_drawn_by_rank(tmp_path, drawn, section, slide):
    rng = np.random.default_rng(0)
    umi = sp.csr_matrix(rng.poisson(1.0, (400, 5)).astype(np.float32))
    rank = np.array([0.1, 0.5, np.nan, 0.3, 0.2])
    map_figures(tmp_path, slide, MapData(section.nuclei, list("abcde"), umi, umi.toarray() / 10, rank))
    assert [a.get_ylabel() for a in drawn[1].axes[:8:2]] == ["b", "d", "e", "a"]
    np.testing.assert_allclose(drawn[1].axes[1].collections[0].get_array(), np.log1p(umi.toarray()[:, 1]))


def test_genes_and_region_as_asked_for(tmp_path, drawn, section, slide):
    umi = np.random.default_rng(0).poisson(1.0, (400, 5)).astype(np.float32)
    data = MapData(section.nuclei, list("abcde"), umi, umi / 10, rank=np.arange(5.0))
    region = Region(box_px=(1000, 600, 2000, 1200), genes=["c", "a"])
    map_figures(tmp_path / "f", slide, data, region=region)
    assert [a.get_ylabel() for a in drawn[0].axes[:6:2]] == ["c", "a", "e"]
    assert drawn[0].axes[0].get_xlim() == (1000, 2000)
    assert [a.get_ylabel() for a in drawn[1].axes[:8:2]] == ["c", "a", "e", "d"]
    for wrong, words in ((Region(genes=["a", "z"]), "no gene 'z'"), (Region(box_px=(0, 0, 9, 9)), "no nuclei")):
        with pytest.raises(InputError, match=words):
            map_figures(tmp_path / "g", slide, data, region=wrong)
    assert not (tmp_path / "g").exists()
