import numpy as np
import pytest
import shapely
from PIL import Image
from scipy import ndimage
from shapely import STRtree
from skimage.color import rgb2hed
from skimage.morphology import reconstruction

from prts.errors import ParameterError
from prts.evaluation.segmentation import match_nuclei
from prts.io.slide import open_slide
from prts.segmentation import segmenters
from prts.segmentation.watershed import Watershed, _reconstruction, haematoxylin

PINK, BLUE, GLASS = (225, 160, 195), (90, 60, 140), (243, 242, 244)


def picture(tmp_path, *, size=400, n=90, tissue=True, mpp=0.5, seed=0, name="slide.png"):
    """A slide with blue discs of 5-8 px radius on pink, glass at its right, and the true discs (px at 0.5 um/px)."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:size, :size] + 0.5
    image = np.empty((size, size, 3))
    image[:] = GLASS
    truth = []
    if tissue:
        image[:, : int(0.8 * size)] = PINK
        while len(truth) < n:
            x, y, r = rng.uniform(12, 0.8 * size - 12), rng.uniform(12, size - 12), rng.uniform(5, 8)
            if all(np.hypot(x - p, y - q) > r + s + 3 for p, q, s in truth):
                truth.append((x, y, r))
                image[np.hypot(columns - x, rows - y) < r] = BLUE
    image = np.clip(image + rng.normal(0, 4, image.shape), 0, 255).astype(np.uint8)
    picture = Image.fromarray(image)
    if mpp != 0.5:
        picture = picture.resize((round(size * 0.5 / mpp),) * 2, Image.Resampling.BICUBIC)
    picture.save(tmp_path / name)
    discs = np.array([shapely.Point(x, y).buffer(r) for x, y, r in truth], dtype=object)
    return open_slide(tmp_path / name, mpp=mpp), discs


def test_haematoxylin_is_that_of_scikit_image():
    rgb = np.random.default_rng(0).integers(0, 256, (100, 90, 3)).astype(np.uint8)
    rgb[0, :3] = [[0, 0, 0], [255, 255, 255], [0, 0, 255]]
    np.testing.assert_allclose(haematoxylin(rgb), rgb2hed(rgb)[..., 0], rtol=1e-6)


def test_finds_discs_where_they_are(tmp_path):
    slide, truth = picture(tmp_path)
    nuclei = Watershed()(slide)
    assert match_nuclei(truth, nuclei.geometry.to_numpy(), 0.75).f1 == 1
    assert nuclei["area_um2"].sum() == pytest.approx(shapely.area(truth).sum() * 0.25, rel=0.1)
    assert list(nuclei["cell_id"]) == [str(i) for i in range(len(nuclei))] and nuclei["score"].isna().all()


def test_works_at_its_own_um_per_px_and_returns_full_resolution(tmp_path):
    slide, truth = picture(tmp_path, mpp=0.25)
    nuclei = Watershed()(slide)
    assert slide.width == 800
    doubled = shapely.transform(truth, lambda xy: 2 * xy)
    assert match_nuclei(doubled, nuclei.geometry.to_numpy(), 0.7).f1 == 1
    assert nuclei["area_um2"].sum() == pytest.approx(shapely.area(truth).sum() * 0.25, rel=0.1)


def test_glass_has_no_nuclei(tmp_path):
    slide, _ = picture(tmp_path, tissue=False, size=128)
    assert len(Watershed()(slide)) == 0
    Image.new("RGB", (64, 64), "white").save(tmp_path / "white.png")
    assert len(Watershed()(open_slide(tmp_path / "white.png", mpp=0.5))) == 0


def test_touching_discs_are_parted_and_one_oval_is_not(tmp_path):
    rows, columns = np.mgrid[:100, :160] + 0.5
    image = np.empty((100, 160, 3), np.uint8)
    image[:] = PINK
    image[np.hypot(columns - 30, rows - 50) < 8] = BLUE
    image[np.hypot(columns - 44, rows - 50) < 8] = BLUE
    image[np.hypot((columns - 110) / 2, rows - 50) < 8] = BLUE
    Image.fromarray(image).save(tmp_path / "s.png")
    nuclei = Watershed()(open_slide(tmp_path / "s.png", mpp=0.5))
    x = np.sort(nuclei.geometry.centroid.x.to_numpy())
    assert x == pytest.approx([30, 44, 110], abs=1)


def test_area_limits_are_in_um2(tmp_path):
    slide, truth = picture(tmp_path)
    area = shapely.area(truth) * 0.25
    limits = Watershed(min_area_um2=float(np.median(area)))
    assert (limits(slide)["area_um2"] >= np.median(area)).all()
    assert len(limits(slide)) == pytest.approx(len(truth) / 2, abs=6)
    assert len(Watershed(max_area_um2=11)(slide)) == 0


def test_moved_together_or_not_the_reconstruction_is_the_same():
    rng = np.random.default_rng(0)
    mask = ndimage.gaussian_filter(rng.normal(size=(300, 400)), 3) > 0.12
    mask[0, :50] = mask[:40, -1] = True
    relief = np.where(mask, rng.uniform(-3, 3, mask.shape), -10.0)
    whole = reconstruction(relief - 0.5, relief)
    assert ndimage.label(mask, np.ones((3, 3)))[1] > 30
    np.testing.assert_array_equal(_reconstruction(relief, 0.5, mask), whole[mask])


def test_threads_change_nothing(tmp_path, monkeypatch):
    slide, _ = picture(tmp_path, size=400, n=100)
    found = []
    for threads in (1, 3):
        monkeypatch.setattr("prts.segmentation.watershed.cores_given", lambda threads=threads: threads)
        found.append(Watershed(block_px=90)(slide))
    assert found[0].equals(found[1]) and len(found[0]) > 50


@pytest.mark.slow
def test_blocks_leave_no_seam(tmp_path):
    slide, truth = picture(tmp_path, size=700, n=330)
    whole = Watershed(block_px=4096)(slide).geometry
    small = Watershed(block_px=90)(slide).geometry
    assert len(small) == len(whole) == len(truth)
    # The same outlines, in another order.
    first, second = (set(shapely.to_wkb(shapely.normalize(shapes.to_numpy()))) for shapes in (whole, small))
    assert first == second


@pytest.mark.real
@pytest.mark.slow
def test_blocks_on_real_tissue_neither_lose_nor_double_nuclei(prts_data, tmp_path):
    with open_slide(prts_data / "images/CMU-1-Small-Region.svs") as full:
        Image.fromarray(full.read_region(300, 900, 1400, 1400)).save(tmp_path / "crop.png")
    slide = open_slide(tmp_path / "crop.png", mpp=0.5)
    whole = Watershed()(slide).geometry.to_numpy()
    small = Watershed(block_px=300)(slide).geometry.to_numpy()
    assert len(whole) > 400
    assert match_nuclei(whole, small, 0.9).f1 > 0.995
    first, second = STRtree(small).query(small, predicate="overlaps")
    shared = shapely.area(shapely.intersection(small[first], small[second]))
    assert (shared <= 0.5 * np.minimum(shapely.area(small[first]), shapely.area(small[second]))).all()


@pytest.mark.real
@pytest.mark.slow
def test_f1_on_the_data_science_bowl(prts_data):
    from prts.evaluation.segmentation import Matching
    from prts.io.outlines import labels_to_polygons

    total = Matching(0, 0, 0)
    for path in sorted((prts_data / "nuclei_dsb2018/images").glob("*.png"))[::3]:
        labels = np.asarray(Image.open(prts_data / "nuclei_dsb2018/labels" / path.name))
        with open_slide(path, mpp=0.5) as slide:
            total += match_nuclei(
                labels_to_polygons(labels)[1], Watershed(max_area_um2=1000)(slide).geometry.to_numpy()
            )
    assert total.f1 > 0.56


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"mpp": 0}, "mpp"),
        ({"split": 1.0}, "split"),
        ({"max_area_um2": 5}, "max_area_um2"),
        ({"block_px": 8}, "block_px"),
    ],
)
def test_settings_that_make_no_sense(settings, key):
    with pytest.raises(ParameterError, match=rf"segmenter {key}: "):
        segmenters.build({"name": "watershed", **settings})


def test_settings_tell_all_parameters():
    assert Watershed().settings() != Watershed(floor=0.8).settings()
    assert Watershed().settings()["name"] == "watershed"
