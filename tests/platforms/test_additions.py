"""A platform, a segmenter or a stain method of another package is one file, found through an entry point."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import shapely
import tifffile

from prts.data.prepare import PrepareSettings, prepare_sections, prepare_tissue
from prts.data.splits import Random, Roles
from prts.data.tissue import parse_tissue
from prts.errors import InputError
from prts.features.no_encoder import NoEncoder
from prts.io.nuclei import load_nuclei
from prts.platforms import platforms
from prts.preprocess.counts import QCSettings
from prts.preprocess.panel import TopPanel
from prts.preprocess.stains import stains
from prts.preprocess.stains.base import match_stain, sample_slides, statistics
from prts.registry import Registry
from prts.section import open_section, open_section_folder
from prts.segmentation import segmenters
from prts.segmentation.segment import recorded_segmenter, segment
from prts.simulate.section import simulate_section

PLATFORM = '''
from dataclasses import dataclass
from pathlib import Path

import geopandas as gpd
import numpy as np
import pandas as pd
import scipy.sparse as sp

from prts.io.cache import file_identity
from prts.platforms import platforms
from prts.platforms.base import counts_table


@platforms.register("cells_csv")
@dataclass(frozen=True)
class CellsCsv:
    """Counts of cells in a CSV file: x, y in full-resolution pixels, then a column per gene."""

    cells: Path | str

    @property
    def path(self):
        return Path(self.cells)

    @property
    def files(self):
        return {"cells": self.path}

    @classmethod
    def find(cls, folder):
        return cls(folder / "cells.csv") if (folder / "cells.csv").is_file() else None

    def identity(self):
        return {"cells": file_identity(self.path)}

    def mpp_sources(self):
        return []

    def check(self, image, width, height, mpp):
        pass

    def counts(self, nuclei, *, registration=None):
        cells = pd.read_csv(self.path)
        genes = list(cells.columns[2:])
        points = gpd.GeoDataFrame(geometry=gpd.points_from_xy(cells["x"], cells["y"]))
        cell, nucleus = points.sindex.query(nuclei.geometry, predicate="contains")[::-1]
        sums = sp.csr_matrix((np.ones(len(cell), np.int32), (nucleus, cell)), shape=(len(nuclei), len(cells)))
        X = sp.csr_matrix(sums @ sp.csr_matrix(cells[genes].to_numpy(np.int32)), dtype=np.int32)
        return counts_table(X, nuclei, pd.DataFrame({"gene_id": genes, "symbol": genes}, index=genes))
'''

SEGMENTER = '''
from dataclasses import dataclass
from typing import Annotated

import shapely
from pydantic import Field

from prts.io.nuclei import make_nuclei
from prts.segmentation import segmenters


@segmenters.register("squares")
@dataclass(frozen=True)
class Squares:
    """A grid of squares."""

    step_px: Annotated[int, Field(ge=4)] = 20
    extra = None
    hint = "choose a smaller `step_px`"

    def settings(self):
        return {"name": self.name, "step_px": self.step_px}

    def __call__(self, slide):
        at = range(0, min(slide.width, slide.height) - self.step_px, self.step_px)
        boxes = [shapely.box(x, y, x + self.step_px / 2, y + self.step_px / 2) for x in at for y in at]
        return make_nuclei(boxes, slide.mpp)
'''

STAIN = '''
import numpy as np

from prts.preprocess.stains import stains


@stains.register("brightness")
class Brightness:
    """Shifts the mean gray level."""

    uses = ("brightness",)

    def __init__(self, reference, own):
        self.shift = reference["brightness"] - own["brightness"]

    @staticmethod
    def statistics(sample):
        return float(sample.tissue.mean())

    def __call__(self, rgb):
        return np.clip(rgb + self.shift + 0.5, 0, 255).astype(np.uint8)
'''


def install(folder: Path, module: str, source: str, group: str, name: str, kind: str) -> None:
    """What `pip install` leaves of a package with one entry point."""
    (folder / f"{module}.py").write_text(source)
    info = folder / f"{module}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{group}]\n{name} = {module}:{kind}\n")


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Three packages on the path, and nothing of them left behind."""
    folder = tmp_path / "site-packages"
    folder.mkdir()
    install(folder, "prts_cells_csv", PLATFORM, "prts.platforms", "cells_csv", "CellsCsv")
    install(folder, "prts_squares", SEGMENTER, "prts.segmenters", "squares", "Squares")
    install(folder, "prts_brightness", STAIN, "prts.stains", "brightness", "Brightness")
    registries: list[Registry] = [platforms, segmenters, stains]
    members = []
    for registry in registries:
        registry.names()  # discovers the built-in ones
        members.append(dict(registry._members))
    monkeypatch.syspath_prepend(str(folder))
    importlib.invalidate_caches()
    yield
    for registry, before in zip(registries, members, strict=True):
        registry._members.clear()
        registry._members.update(before)
    for module in ("prts_cells_csv", "prts_squares", "prts_brightness"):
        sys.modules.pop(module, None)


def write_section(folder: Path) -> Path:
    """A simulated section whose bins are replaced by a CSV of cells."""
    simulate_section(folder, cells=120, genes=60, seed=3)
    truth = ad.read_h5ad(folder / "truth.h5ad")
    counts = np.random.default_rng(0).poisson(truth.X)
    x, y = truth.obsm["spatial"].T
    cells = pd.concat([pd.DataFrame({"x": x, "y": y}), pd.DataFrame(counts, columns=truth.var_names)], axis=1)
    cells.to_csv(folder / "cells.csv", index=False)
    return folder


@pytest.fixture(scope="module")
def section_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_section(tmp_path_factory.mktemp("section") / "s")


def settings(cache: Path, **given: object) -> PrepareSettings:
    return PrepareSettings(
        segmenter=segmenters["polygons"](),
        splitter=Random(),
        panel=TopPanel(n_genes=20),
        encoder=NoEncoder(),
        cache_dir=cache,
        qc=QCSettings(min_umi=1),
        **given,
    )


@pytest.mark.usefixtures("packages")
def test_a_platform_of_another_package_goes_through_prepare(
    section_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    image, nuclei = section_folder / "tissue_image.tif", section_folder / "truth_nuclei.parquet"
    node = {"image": str(image), "nuclei": str(nuclei), "mpp": 0.5, "platform": "cells_csv"}
    tissue = {"name": "toy", "species": "human", "train": ["s"]}
    parsed = parse_tissue({**tissue, "sections": {"s": node | {"cells": str(section_folder / "cells.csv")}}})
    prepared = prepare_tissue(parsed, settings(tmp_path, register=True))
    counts = ad.read_h5ad(prepared.sections["s"].counts)
    cells = pd.read_csv(section_folder / "cells.csv")
    outlines = load_nuclei(nuclei).set_index("cell_id").geometry
    name = counts.obs_names[0]
    inside = shapely.contains_xy(outlines[name], cells["x"], cells["y"])
    assert counts[name].X.toarray().ravel().tolist() == cells.loc[inside, counts.var_names].sum().tolist()
    assert prepared.sections["s"].registration is None
    assert "the shift of cells_csv counts cannot be measured" in caplog.text
    with pytest.raises(InputError, match=r"section s\.cels: no such key, did you mean 'cells'"):
        parse_tissue({**tissue, "sections": {"s": node | {"cels": "x"}}})
    with pytest.raises(InputError, match=r"section s\.cells: is required for the platform cells_csv"):
        parse_tissue({**tissue, "sections": {"s": node}})


@pytest.mark.usefixtures("packages")
def test_its_files_are_found_in_a_sections_folder_after_those_of_visium_hd(
    section_folder: Path, tmp_path: Path
) -> None:
    assert open_section_folder(section_folder).measurement.name == "visium_hd"
    folder = tmp_path / "s"
    folder.mkdir()
    for name in ("tissue_image.tif", "cells.csv"):
        (folder / name).write_bytes((section_folder / name).read_bytes())
    section = open_section_folder(folder)
    assert section.measurement.name == "cells_csv"
    assert section.measurement.files == {"cells": folder / "cells.csv"}
    open_sections = {
        "s": open_section(
            "s", section.image, measurement=section.measurement, nuclei=section_folder / "truth_nuclei.parquet"
        )
    }
    prepared = prepare_sections("toy", "human", open_sections, Roles(["s"], [], []), settings(tmp_path))
    assert ad.read_h5ad(prepared.sections["s"].counts).n_obs > 20


@pytest.mark.usefixtures("packages")
def test_a_segmenter_of_another_package_segments_and_is_built_again_from_a_bundle(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "x.tif", np.full((100, 100, 3), 200, np.uint8), photometric="rgb")
    segmenter = segmenters.build({"name": "squares", "step_px": 25})
    with open_section("x", tmp_path / "x.tif", mpp=0.5).open_slide() as slide:
        assert len(segment(slide, segmenter)) == 9
    assert recorded_segmenter({"name": "squares", "arguments": {"step_px": 25}}) == segmenter
    with pytest.raises(InputError, match="segmenter step_px: 2 is not accepted"):
        segmenters.build({"name": "squares", "step_px": 2})


@pytest.mark.usefixtures("packages")
def test_a_stain_method_of_another_package_has_its_statistics_in_the_bundle(tmp_path: Path) -> None:
    for name, level in (("a", 120), ("b", 160)):
        image = np.random.default_rng(0).integers(level - 20, level + 20, (100, 100, 3)).astype(np.uint8)
        tifffile.imwrite(tmp_path / f"{name}.tif", image, photometric="rgb")
    a, b = (open_section(name, tmp_path / f"{name}.tif", mpp=0.5) for name in "ab")
    with a.open_slide() as slide:
        reference = statistics(sample_slides([slide]))
    assert reference["brightness"] == pytest.approx(119.5, abs=1.5)
    with match_stain(b, "brightness", reference).open_slide() as slide:
        assert slide.read_region(0, 0, 100, 100).mean() == pytest.approx(119.5, abs=1.5)


def test_a_class_registered_by_hand_is_a_member() -> None:
    @segmenters.register("by_hand")
    class ByHand:
        """Registered without a package, as in a notebook."""

    try:
        assert segmenters["by_hand"] is ByHand
        assert ByHand.name == "by_hand"
    finally:
        del segmenters._members["by_hand"]
