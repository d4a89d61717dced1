from __future__ import annotations

import hashlib
import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

from hydra import compose, initialize_config_dir

from prts import __version__, provenance
from prts.api.metadata import run_provenance
from prts.cli.app import config_dir, plain
from prts.io.cache import fingerprint
from prts.platforms.visium_hd import VisiumHD


def test_the_commit_is_that_of_the_checkout_or_is_left_out() -> None:
    found = provenance.code()
    assert found["version"] == __version__
    root = Path(provenance.__file__).resolve().parents[1]
    if (root / ".git").exists():
        head = subprocess.run(["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True)
        assert found["commit"] == head.stdout.strip()
        assert isinstance(found["changed"], bool)
    else:
        assert list(found) == ["version"]


def test_a_file_is_known_again_wherever_and_whenever_it_was_copied(tmp_path: Path) -> None:
    for folder, content in (("a", b"pixels"), ("b", b"pixels"), ("c", b"pixelz")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "slide.tif").write_bytes(content)
    first, copy, other = (provenance.identity(tmp_path / folder / "slide.tif") for folder in "abc")
    assert first == copy == {"name": "slide.tif", "size": 6, "sha256_of_ends": hashlib.sha256(b"pixels").hexdigest()}
    assert other != first


def test_a_section_is_known_by_the_files_it_has(tmp_path: Path) -> None:
    (tmp_path / "spatial").mkdir()
    for name in ("slide.tif", "filtered_feature_bc_matrix.h5", "spatial/tissue_positions.parquet"):
        (tmp_path / name).write_bytes(name.encode())
    section = SimpleNamespace(image=tmp_path / "slide.tif", nuclei=None, measurement=VisiumHD(tmp_path))
    files = provenance.section_files(section)
    assert {key: value["size"] for key, value in files.items()} == {"image": 9, "matrix": 29, "positions": 33 - 1}


def test_the_config_of_a_run_is_kept_without_places_and_known_again_from_json(tmp_path: Path) -> None:
    (tmp_path / "slide.tif").write_bytes(b"pixels")
    section = SimpleNamespace(image=tmp_path / "slide.tif", nuclei=None, measurement=None)
    tissue = SimpleNamespace(sections={"train": SimpleNamespace(section=section)})
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        cfg = compose("train", ["tissue=demo", "seed=3"])
    made = run_provenance(plain(cfg), tissue)
    again = json.loads(json.dumps(made))
    assert fingerprint(again["config"]) == made["config_fingerprint"]
    assert again["config"]["seed"] == 3 and not {"paths", "logger"} & set(again["config"])
    assert again["data"]["train"]["image"]["size"] == 6
    cfg.seed = 4
    assert run_provenance(plain(cfg), tissue)["config_fingerprint"] != made["config_fingerprint"]
