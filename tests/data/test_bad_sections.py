"""Sections that cannot be used, and sections that another process is working on."""

import filelock
import numpy as np
import pytest
import tifffile

from prts.data.bad_sections import BadSections, in_turn
from prts.data.prepare import PrepareSettings, check_sections, prepare_section, prepare_tissue
from prts.data.splits import Random, Roles
from prts.data.tissue import parse_tissue
from prts.errors import InputError
from prts.features.no_encoder import NoEncoder
from prts.io.cache import LockedError, lock, no_waiting
from prts.preprocess.counts import QCSettings
from prts.preprocess.panel import Panel, TopPanel
from prts.segmentation import segmenters
from prts.simulate.section import simulate_section

ROLES = Roles(["a", "b"], ["c"], ["d"])


def noted(skip, **errors):
    bad = BadSections(skip=skip)
    for name, reason in errors.items():
        with bad.noting(name):
            raise InputError(reason)
    return bad


def test_every_bad_section_is_named_at_once():
    with pytest.raises(
        InputError, match=r"^2 of 4 sections cannot be used: a \(a.tif: is cut\); c \(c.tif: is a photo\); "
    ):
        noted(False, a="a.tif: is cut", c="c.tif: is a photo").settle(ROLES)
    with pytest.raises(InputError, match=r"^a.tif: is cut$"):  # one is said as it is
        noted(False, a="a.tif: is cut").settle(ROLES)
    assert noted(False).settle(ROLES) is ROLES


def test_bad_sections_are_left_out_if_every_role_keeps_one(caplog):
    bad = noted(True, a="a.tif: is cut")
    assert bad.settle(ROLES) == Roles(["b"], ["c"], ["d"])
    assert bad.reasons == {"a": "a.tif: is cut"}
    assert "section a is left out: a.tif: is cut" in caplog.text
    with pytest.raises(InputError, match=r"^skip_bad: leaves no section for val; "):
        noted(True, a="a.tif: is cut", c="c.tif: is a photo").settle(ROLES)


def test_a_full_disk_is_not_the_fault_of_a_section():
    bad = BadSections(skip=True)
    with pytest.raises(InputError, match="the disk is full"), bad.noting("a"):
        try:
            raise OSError(28, "No space left on device")
        except OSError as error:
            raise InputError("cache: the disk is full") from error
    assert bad.reasons == {}


def test_locked_sections_come_last(tmp_path):
    held = filelock.FileLock(tmp_path / ".a.lock")
    held.acquire()
    order = []

    def step(name):
        if name == "c":
            held.release()  # the other process is done
        with lock(tmp_path / name):
            order.append(name)

    in_turn(["a", "b", "c"], step)
    assert order == ["b", "c", "a"]


def test_only_no_waiting_raises(tmp_path):
    with filelock.FileLock(tmp_path / ".a.lock"), pytest.raises(LockedError), no_waiting(), lock(tmp_path / "a"):
        pass


@pytest.mark.slow
def test_preparation_names_or_leaves_out_sections_and_goes_on(tmp_path):
    simulate_section(tmp_path / "s", cells=120, genes=60, seed=3)
    good = {
        "image": str(tmp_path / "s" / "tissue_image.tif"),
        "bins": str(tmp_path / "s" / "binned_outputs" / "square_002um"),
        "nuclei": str(tmp_path / "s" / "truth_nuclei.parquet"),
    }
    noise = np.random.default_rng(0).integers(0, 255, (600, 600, 3), dtype=np.uint8)
    tifffile.imwrite(tmp_path / "photo.tif", noise, photometric="rgb")
    (tmp_path / "nuclei.geojson").write_text("{}")
    sections = {
        "good": good,
        "gone": {**good, "image": str(tmp_path / "gone.tif")},
        "photo": {**good, "image": str(tmp_path / "photo.tif"), "mpp": 0.5},
        "shapes": {**good, "nuclei": str(tmp_path / "nuclei.geojson")},  # noticed only when they are read
    }
    tissue = parse_tissue({"name": "t", "species": "human", "train": list(sections), "sections": sections})
    settings = {
        **{"segmenter": segmenters["polygons"](), "splitter": Random(), "panel": TopPanel(n_genes=20)},
        **{"encoder": NoEncoder(), "cache_dir": tmp_path / "cache", "qc": QCSettings(min_umi=1)},
    }

    with pytest.raises(InputError, match=r"^2 of 4 sections cannot be used: gone \(.*; photo \("):
        prepare_tissue(tissue, PrepareSettings(**settings))
    assert not (tmp_path / "cache" / "t" / "good").exists()  # before any work
    skipping = PrepareSettings(**settings, skip_bad=True)
    assert check_sections(tissue, skipping) == ["good", "shapes"]
    alone = prepare_section(tissue, "good", skipping)
    prepared = prepare_tissue(tissue, skipping)
    assert list(prepared.skipped) == ["gone", "photo", "shapes"] and "nuclei.geojson" in prepared.skipped["shapes"]
    assert prepared.train == ["good"] and prepared.sections == {"good": alone}
    assert len(Panel.from_json(prepared.panel).genes) == 20
