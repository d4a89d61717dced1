"""The table of slides."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from prts.cohort.slides import read_slides
from prts.errors import InputError
from prts.segmentation.watershed import Watershed


def make(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def test_a_folder_is_searched_for_images(tmp_path: Path) -> None:
    folder = make(tmp_path / "in", "b.svs", "A b.ome.TIF", "._b.svs", "notes.txt", "deep/c.svs", "deep/out/d.svs")
    assert [(slide.name, slide.image.name) for slide in read_slides(folder)] == [
        ("A b.ome", "A b.ome.TIF"),
        ("b", "b.svs"),
    ]
    found = read_slides(folder, patterns=["**/*.svs"], leave_out=folder / "deep" / "out")
    assert [slide.name for slide in found] == ["b", "deep/c"]


def test_a_csv_overrides_the_settings_of_a_slide(tmp_path: Path) -> None:
    """Semicolons, a byte-order mark and spaces as spreadsheets write them; empty cells leave the settings of all."""
    table = tmp_path / "slides.csv"
    table.write_text(
        "\ufeffimage;out;mpp;rotate;flip;stain;artefacts;roi;nuclei;segmentation\n"
        "a.svs; b/first.h5ad;0.25;90;;macenko;false;[0,0,9,9];;watershed\n"
        f"{tmp_path}/c.svs;;;;;;;lumen.geojson;n.parquet;\n"
        ";;;;;;;;;\n",
        encoding="utf-8",
    )
    first, second = read_slides(table)
    assert (first.name, first.image, first.nuclei) == ("b/first", tmp_path / "a.svs", Watershed())
    assert first.settings == {"mpp": 0.25, "rotate": 90, "stain": "macenko", "artefacts": False, "roi": "[0,0,9,9]"}
    assert (second.name, second.image, second.nuclei) == ("c", tmp_path / "c.svs", tmp_path / "n.parquet")
    assert second.settings == {"roi": tmp_path / "lumen.geojson"}


def test_a_table_in_memory_and_a_list(tmp_path: Path) -> None:
    table = pd.DataFrame(
        {
            "image": [tmp_path / "a.tif", "b.tif"],
            "mpp": [0.5, float("nan")],
            "flip": [None, "vertical"],
            "stain": pd.array([pd.NA, "reinhard"], "string"),
            "roi": [[0, 0, 9, 9], None],
        }
    )
    assert [(s.image.name, s.settings) for s in read_slides(table)] == [
        ("a.tif", {"mpp": 0.5, "roi": [0, 0, 9, 9]}),
        ("b.tif", {"flip": "vertical", "stain": "reinhard"}),
    ]
    assert [slide.name for slide in read_slides(["x/a.tif", Path("y/b.tif")])] == ["a", "b"]


BAD = {
    "image,mmp\na,1\n": "unknown column 'mmp', did you mean 'mpp'?",
    "slide\na\n": "unknown column 'slide'",
    "mpp\n0.5\n": "has no column `image`",
    "image,image\na,b\n": "has the column 'image' twice",
    "": "not a table",
    "image\n": "lists no slides",
    "image,mpp\n,0.5\n": "line 2: image: is empty",
    "image,rotate\na.svs,0\nb.svs,45\n": "line 3: rotate: 45 is not accepted; give 0, 90, 180 or 270",
    "image,mpp\na.svs,half\n": "line 2: mpp: 'half' is not accepted",
    "image,stain\na.svs,macenk\n": "line 2: stain: 'macenk' is not a method, did you mean 'macenko'?",
    "image,segmentation\na.svs,watershet\n": "line 2: segmenter: 'watershet' is not registered, did you mean 'watershed'?",
    "image,segmentation,nuclei\na.svs,watershed,n.parquet\n": "mutually exclusive",
    "image,out\na.svs,a.h5\n": "line 2: out: a.h5 does not end in .h5ad",
    "image,out\na.svs,../a.h5ad\n": "line 2: out: ../a.h5ad is not inside the cohort folder",
    "image\na/x.svs\nb/x.svs\n": "line 2, line 3 would all write x.h5ad",
}


@pytest.mark.parametrize("text", BAD)
def test_a_wrong_table_is_refused_in_one_line(tmp_path: Path, text: str) -> None:
    table = tmp_path / "slides.csv"
    table.write_text(text)
    with pytest.raises(InputError) as caught:
        read_slides(table)
    assert BAD[text] in str(caught.value) and str(table) in str(caught.value)


def test_a_folder_without_slides_says_where_they_are(tmp_path: Path) -> None:
    folder = make(tmp_path / "in", "deep/a.svs")
    with pytest.raises(InputError, match=r"contains no image .*patterns=\[\*\*/\*\.svs\] searches its subfolders"):
        read_slides(folder)
    assert len(read_slides(folder, patterns=["**/*.svs"])) == 1  # the cure works
    with pytest.raises(InputError, match=r"no image matches \*\.tif"):
        read_slides(folder, patterns=["*.tif"])
    with pytest.raises(InputError, match="no such folder or file"):
        read_slides(tmp_path / "none")
    (tmp_path / "a.tif").write_bytes(bytes(range(256)))
    with pytest.raises(InputError, match="not a text file"):
        read_slides(tmp_path / "a.tif")
    make(folder, "a.svs", "a.tif")
    with pytest.raises(InputError, match=r"would all write a\.h5ad"):
        read_slides(folder)
