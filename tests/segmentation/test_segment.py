import logging

import geopandas as gpd
import numpy as np
import pytest
import shapely
from PIL import Image
from shapely import box

from prts.errors import InputError
from prts.io.nuclei import make_nuclei
from prts.io.slide import open_slide
from prts.segmentation.polygons import Polygons
from prts.segmentation.segment import Block, blocks, owned, sample, segment, without_doubles


@pytest.fixture
def slide(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (60, 90, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "slide.png")
    with open_slide(tmp_path / "slide.png", mpp=0.5) as slide:
        yield slide


def test_blocks_cover_the_grid_once():
    count = np.zeros((23, 50), int)
    for block in blocks(50, 23, 8):
        assert block.x1 - block.x0 <= 8 and block.y1 - block.y0 <= 8
        count[block.y0 : block.y1, block.x0 : block.x1] += 1
    assert (count == 1).all()
    assert blocks(5, 4, 8) == [Block(0, 0, 5, 4)]


def test_a_polygon_belongs_to_the_block_with_its_centroid():
    polygons = np.array([box(3, 0, 5, 2), box(3, 0, 6, 2), box(2, 0, 5, 2)])  # centroids x = 4, 4.5, 3.5
    assert list(owned(polygons, Block(0, 0, 4, 4))) == [False, False, True]
    assert list(owned(polygons, Block(4, 0, 8, 4))) == [True, True, False]


def test_doubles_on_a_seam_go_and_neighbours_stay():
    polygons = np.array([box(0, 0, 10, 10), box(1, 0, 10, 10), box(9, 0, 20, 10), box(0, 0, 0.9, 10)])
    # 0 and 1 are one nucleus seen by two blocks; 2 overlaps both by a tenth; 3 lies in 0 but is of the same block.
    assert list(without_doubles(polygons, np.array([0, 1, 1, 0]))) == [True, False, True, True]


def test_the_sample_is_all_of_a_small_slide(slide):
    (window,) = sample(slide, 0.5)
    np.testing.assert_array_equal(window, slide.read_region(0, 0, 90, 60))


def test_the_sample_of_a_large_slide_is_spread_over_it():
    class Large:
        def size_at(self, mpp):
            return 10_000, 5_000

        def read_region(self, x, y, width, height, mpp):
            return np.array([[x, y, width, height]])

    windows = np.concatenate(list(sample(Large(), 0.5)))
    assert windows.shape == (64, 4) and (windows[:, 2:] == 512).all()
    assert (windows[0, :2] == 0).all() and list(windows[-1, :2]) == [9488, 4488]


class Fixed:
    name = "fixed"
    extra = None
    hint = "try another way"

    def __init__(self, shapes):
        self.shapes = shapes

    def settings(self):
        return {"name": "fixed"}

    def __call__(self, slide):
        return make_nuclei(self.shapes, slide.mpp)


def test_segment_logs_the_count_and_refuses_nothing(slide, caplog):
    with caplog.at_level(logging.INFO, "prts.segmentation.segment"):
        assert len(segment(slide, Fixed([box(0, 0, 10, 10)]))) == 1
    assert "1 nuclei by fixed, median 25 um2" in caplog.text
    with pytest.raises(InputError, match=r"slide.png: fixed found no nuclei at 0.5 um/px .*or try another way"):
        segment(slide, Fixed([]))


def test_polygons_reads_a_file_against_the_slide(slide, tmp_path):
    gpd.GeoDataFrame({"cell_id": ["a"]}, geometry=[box(2, 2, 12, 12)]).to_parquet(tmp_path / "n.parquet")
    segmenter = Polygons(str(tmp_path / "n.parquet"))
    nuclei = segment(slide, segmenter)
    assert list(nuclei["cell_id"]) == ["a"] and list(nuclei["area_um2"]) == [25.0]
    before = segmenter.settings()
    gpd.GeoDataFrame({"cell_id": ["b"]}, geometry=[shapely.box(2, 2, 13, 12)]).to_parquet(tmp_path / "n.parquet")
    assert segmenter.settings() != before
    with pytest.raises(InputError, match=r"segmenter path: is not set"):
        Polygons()(slide)
