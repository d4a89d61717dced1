"""A section's parts belong together, or the section does not open."""

from __future__ import annotations

import json
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import tifffile

from prts.errors import InputError
from prts.platforms.visium_hd import VisiumHD
from prts.section import open_section, open_section_folder, read_section, read_visium_hd

MPP = 0.5
N = 40  # bins along each side of the array: 80 um, 160 px


def write_image(path: Path, mpp: float | None = None, size: int = 200) -> Path:
    tags = {} if mpp is None else {"resolution": (1e4 / mpp, 1e4 / mpp), "resolutionunit": "CENTIMETER"}
    tifffile.imwrite(path, np.full((size, size, 3), 200, np.uint8), photometric="rgb", **tags)
    return path


def write_bins(bins: Path, mpp: float | None = MPP, pitch_um: float = 2.0, shift_px: float = 20.0) -> Path:
    (bins / "spatial").mkdir(parents=True)
    factors = {"bin_size_um": 2.0} | ({} if mpp is None else {"microns_per_pixel": mpp})
    (bins / "spatial/scalefactors_json.json").write_text(json.dumps(factors))
    row, col = (axis.ravel() for axis in np.mgrid[:N, :N])
    pd.DataFrame(
        {
            "barcode": [f"s_002um_{r:05}_{c:05}-1" for r, c in zip(row, col, strict=True)],
            "in_tissue": 1,
            "array_row": row,
            "array_col": col,
            "pxl_row_in_fullres": row * pitch_um / MPP + shift_px,
            "pxl_col_in_fullres": col * pitch_um / MPP + shift_px,
        }
    ).to_parquet(bins / "spatial/tissue_positions.parquet")
    with h5py.File(bins / "filtered_feature_bc_matrix.h5", "w"):
        pass
    return bins


def write_spots(path: Path, mpp: float = MPP, x: float = 50.0) -> Path:
    data = ad.AnnData(np.ones((4, 2), np.int32))
    data.obsm["spatial"] = np.array([[x, 10.0], [x, 60.0], [x + 5, 110.0], [x, 160.0]])
    data.uns |= {"spot_radius_px": 30.0, "mpp": mpp}
    data.write_h5ad(path)
    return path


def test_a_folder_as_10x_delivers_it(tmp_path: Path) -> None:
    folder = tmp_path / "lung, São=1"
    bins = write_bins(folder / "binned_outputs/square_002um")
    image = write_image(folder / "tissue_image.btf", MPP)
    (folder / "segmented_outputs").mkdir()
    nuclei = folder / "segmented_outputs/nucleus_segmentations.geojson"
    nuclei.write_text("{}")
    spots = write_spots(folder / "spots.h5ad")
    (folder / "truth.h5ad").touch()
    section = open_section_folder(folder)
    assert (section.name, section.image, section.measurement) == ("lung, São=1", image, VisiumHD(bins))
    assert (section.nuclei, section.spots, section.truth) == (nuclei, spots, folder / "truth.h5ad")
    assert (section.mpp, section.mpp_source) == (MPP, "scalefactors_json.json")
    assert (section.width, section.height) == (200, 200)
    with section.open_slide() as slide:
        assert slide.read_region(0, 0, 3, 2).tolist() == [[[200] * 3] * 3] * 2
        assert slide.mpp == MPP


def test_a_folder_with_an_image_only(tmp_path: Path) -> None:
    write_image(tmp_path / "Visium_HD_tissue_image.tif", 0.25)
    section = open_section_folder(tmp_path, name="a")
    assert (section.name, section.mpp, section.measurement, section.nuclei, section.spots) == (
        "a",
        0.25,
        None,
        None,
        None,
    )
    assert section.mpp_source == "the TIFF resolution tags"


def test_folders_with_no_image_or_two(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        open_section_folder(tmp_path / "none")
    (tmp_path / "tissue_image.tif.md5").touch()
    with pytest.raises(InputError, match="no tissue_image"):
        open_section_folder(tmp_path)
    write_image(tmp_path / "tissue_image.tif", MPP)
    write_image(tmp_path / "tissue_image.btf", MPP)
    with pytest.raises(InputError, match=r"tissue_image\.btf, tissue_image\.tif; expected exactly one"):
        open_section_folder(tmp_path)


@pytest.mark.parametrize("name", ["._tissue_image.tif", "._sample_tissue_image.btf"])
def test_files_of_macos_next_to_the_image_are_ignored(name: str, tmp_path: Path) -> None:
    image = write_image(tmp_path / "tissue_image.tif", MPP)
    (tmp_path / name).write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X" + bytes(4080))
    (tmp_path / ".DS_Store").touch()
    assert open_section_folder(tmp_path).image == image


def test_um_per_pixel_is_never_taken_from_the_bins_alone(tmp_path: Path) -> None:
    bins, image = write_bins(tmp_path / "square_002um", mpp=None), write_image(tmp_path / "a.tif")
    with pytest.raises(InputError, match=r"a\.tif.*set mpp"):
        open_section("a", image, measurement=VisiumHD(bins))
    assert open_section("a", image, measurement=VisiumHD(bins), mpp=MPP).mpp_source == "mpp="


def test_every_source_is_held_against_every_other(tmp_path: Path) -> None:
    bins = write_bins(tmp_path / "square_002um")
    assert open_section("a", write_image(tmp_path / "a.tif", MPP * 1.015), measurement=VisiumHD(bins)).mpp == MPP
    with pytest.raises(InputError, match=r"a\.tif.*0\.5 in scalefactors_json\.json but 0\.25 in the TIFF"):
        open_section("a", write_image(tmp_path / "a.tif", 0.25), measurement=VisiumHD(bins))
    # bins are a measurement, not metadata
    with pytest.raises(InputError, match=r"0\.25 in mpp= but 0\.5 in the spacing of bins"):
        open_section("a", write_image(tmp_path / "a.tif"), measurement=VisiumHD(bins), mpp=0.25)


@pytest.mark.parametrize("stale", [{"mpp": 0.25}, {"mpp": 1.0}, {"mpp": None}])
def test_a_given_um_per_pixel_wins_over_the_metadata_of_a_section(stale: dict, tmp_path: Path, caplog) -> None:
    bins = write_bins(tmp_path / "square_002um", **stale)
    section = open_section("a", write_image(tmp_path / "a.tif", 1.0), measurement=VisiumHD(bins), mpp=MPP)
    assert (section.mpp, section.mpp_source) == (MPP, "mpp=")
    assert caplog.text.count("um/px is 0.5 in mpp= but") == 1
    with section.open_slide() as slide:
        assert slide.mpp == MPP
    assert caplog.text.count("um/px is 0.5 in mpp= but") == 1  # once, not each time that the image is opened


@pytest.mark.parametrize("mpp", [2.3, 4.6])
def test_an_image_too_coarse_for_nuclei_is_refused(mpp: float, tmp_path: Path) -> None:
    bins = write_bins(tmp_path / "square_002um", mpp=mpp, pitch_um=2 * MPP / mpp)
    with pytest.raises(InputError, match=r"a\.tif: .* um/px is too coarse .*CytAssist; give the microscope image"):
        open_section("a", write_image(tmp_path / "a.tif", mpp), measurement=VisiumHD(bins))


@pytest.mark.parametrize("pitch_um", [1.0, 2.05, 40.0])
def test_the_distance_of_bins_is_a_source(tmp_path: Path, pitch_um: float) -> None:
    bins, image = write_bins(tmp_path / "square_002um", pitch_um=pitch_um), write_image(tmp_path / "a.tif")
    message = r"a\.tif.*0\.5 in scalefactors_json\.json but .* in the spacing of bins.*tissue_positions\.parquet"
    with pytest.raises(InputError, match=message):
        open_section("a", image, measurement=VisiumHD(bins))
    bins = write_bins(tmp_path / "other/square_002um", mpp=None, pitch_um=pitch_um)
    with pytest.raises(InputError, match=r"0\.5 in mpp= but"):
        open_section("a", image, measurement=VisiumHD(bins), mpp=MPP)


@pytest.mark.parametrize(("shift_px", "fits"), [(20, True), (60, True), (64, False), (-30, False), (5000, False)])
def test_bins_of_another_image(tmp_path: Path, shift_px: float, fits: bool) -> None:
    bins, image = write_bins(tmp_path / "square_002um", shift_px=shift_px), write_image(tmp_path / "a.tif")
    if fits:
        assert open_section("a", image, measurement=VisiumHD(bins)).measurement == VisiumHD(bins)
        return
    with pytest.raises(InputError, match=r"square_002um: bins do not belong to this image.*a\.tif"):
        open_section("a", image, measurement=VisiumHD(bins))


def test_missing_parts_are_named(tmp_path: Path) -> None:
    image = write_image(tmp_path / "a.tif", MPP)
    with pytest.raises(InputError, match=r"none\.geojson: no such file; give the nuclei"):
        open_section("a", image, nuclei=tmp_path / "none.geojson")
    with pytest.raises(InputError, match=r"none\.h5ad: no such file"):
        open_section("a", image, spots=tmp_path / "none.h5ad")
    with pytest.raises(InputError, match="square_002um"):
        open_section("a", image, measurement=VisiumHD(tmp_path / "none"))
    bins = write_bins(tmp_path / "square_002um")
    (bins / "filtered_feature_bc_matrix.h5").unlink()
    with pytest.raises(InputError, match=r"filtered_feature_bc_matrix\.h5: no such file"):
        open_section("a", image, measurement=VisiumHD(bins))


def test_spots_of_another_image(tmp_path: Path) -> None:
    image = write_image(tmp_path / "a.tif", MPP)
    assert open_section("a", image, spots=write_spots(tmp_path / "s.h5ad")).spots == tmp_path / "s.h5ad"
    with pytest.raises(InputError, match=r"s\.h5ad: spots do not belong.*100%"):
        open_section("a", image, spots=write_spots(tmp_path / "s.h5ad", x=900.0))
    with pytest.raises(InputError, match=r"0\.5 in the TIFF resolution tags but 0\.25 in uns\['mpp'\] of .*s\.h5ad"):
        open_section("a", image, spots=write_spots(tmp_path / "s.h5ad", mpp=0.25))


@pytest.mark.parametrize("name", ["", ".", "..", "a/b"])
def test_names_that_are_no_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="section name"):
        open_section(name, write_image(tmp_path / "a.tif", MPP))


@pytest.mark.real
@pytest.mark.parametrize("name", ["C2", "C3", "C4"])
def test_real_sections(prts_data: Path, name: str) -> None:
    section = open_section_folder(prts_data / "her2st_hd" / name)
    assert section.mpp == pytest.approx(0.688, rel=2e-3)
    assert section.nuclei is not None
    assert section.spots is not None


@pytest.mark.real
def test_bins_of_a_mouse_brain_do_not_belong_to_a_breast(prts_data: Path) -> None:
    bins = prts_data / "visium_hd_schema/binned_outputs/square_002um"
    with pytest.raises(InputError, match=r"scalefactors_json\.json but 0\.6881 in the TIFF"):
        open_section("a", prts_data / "her2st_hd/C2/tissue_image.tif", measurement=VisiumHD(bins))


@pytest.mark.parametrize("given", ["", "outs", "outs/binned_outputs", "outs/binned_outputs/square_002um"])
def test_visium_hd_is_read_from_any_folder_of_space_ranger(tmp_path: Path, given: str) -> None:
    folder = tmp_path / "sample"
    bins = write_bins(folder / "outs/binned_outputs/square_002um")
    image = write_image(folder / "tissue_image.tif", MPP)
    nuclei = folder / "outs/segmented_outputs/nucleus_segmentations.geojson"
    nuclei.parent.mkdir()
    nuclei.write_text("{}")
    section = read_visium_hd(folder / given)
    assert section.name == "sample"
    assert section.image.samefile(image) and section.nuclei.samefile(nuclei)
    assert section.measurement.path.samefile(bins)
    other = write_image(tmp_path / "other.tif", MPP)
    assert read_visium_hd(folder / given, other, name="b").image == other


def test_the_folder_of_bins_alone_needs_an_image(tmp_path: Path) -> None:
    bins = write_bins(tmp_path / "square_002um")
    with pytest.raises(InputError, match=r"expected exactly one tissue_image"):
        read_visium_hd(bins)
    image = write_image(tmp_path / "a.tif", MPP)
    assert read_visium_hd(bins, image).measurement == VisiumHD(bins)
    with pytest.raises(InputError, match="contains no Visium HD bins"):
        read_visium_hd(tmp_path / "square_002um" / "spatial", image)


def test_segmented_outputs_below_outs_are_found(tmp_path: Path) -> None:
    write_image(tmp_path / "tissue_image.tif", MPP)
    nuclei = tmp_path / "outs/segmented_outputs/nucleus_segmentations.geojson.gz"
    nuclei.parent.mkdir(parents=True)
    nuclei.touch()
    assert open_section_folder(tmp_path).nuclei == nuclei


def test_an_image_alone_is_a_section(tmp_path: Path) -> None:
    section = read_section(write_image(tmp_path / "slide.tif"), mpp=0.25)
    assert (section.name, section.mpp, section.measurement) == ("slide", 0.25, None)
