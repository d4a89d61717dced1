"""A small section, a bundle and a prediction, and fixtures that run commands and check their message and output."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import tifffile
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from scipy.sparse import csr_matrix

from prts.cli.app import config_dir
from prts.cli.exit_status import verdict
from prts.features.encoders import Classical
from prts.io.nuclei import load_nuclei
from prts.models.bundle import save_bundle
from prts.models.likelihoods.paper import Paper
from prts.models.network import PRTSNet
from prts.models.output import OutputRule
from prts.simulate.section import BINS, simulate_section

Ask = Callable[..., tuple[int, str]]


def pytest_itemcollected(item: pytest.Function) -> None:
    """Of tests marked as sampled, run only the first value of the named parameters by default."""
    for mark in item.iter_markers("sampled"):
        if any(item.callspec.indices[name] for name in mark.args):
            item.add_marker(pytest.mark.nightly)


@dataclass(frozen=True)
class World:
    """Valid files; tests damage copies of them."""

    section: Path
    image: Path
    nuclei: Path
    bundle: Path
    prediction: Path
    cache: Path
    mpp: float = 0.5

    def copy(self, source: Path, folder: Path) -> Path:
        """A copy that a test may damage."""
        target = folder / source.name
        if source.is_dir():
            shutil.copytree(source, target)
        else:
            shutil.copy(source, target)
            if (polygons := source.with_suffix(".nuclei.parquet")).exists():
                shutil.copy(polygons, folder)
        return target


@pytest.fixture(scope="session")
def ask() -> Ask:
    """Run a command in this process, with its config composed once: `ask("predict", image=..., out=...)` gives status and line."""
    import importlib

    composed: dict[tuple[str, ...], Any] = {}

    def run(command: str, *choices: str, **values: Any) -> tuple[int, str]:
        if (command, *choices) not in composed:
            with initialize_config_dir(str(config_dir()), version_base="1.3"):
                composed[command, *choices] = compose(command, list(choices))
        cfg = composed[command, *choices].copy()
        for key, value in values.items():
            OmegaConf.update(
                cfg, key.replace("__", "."), str(value) if isinstance(value, Path) else value, force_add=True
            )
        try:
            importlib.import_module(f"prts.cli.{command}").main(cfg)
        except Exception as error:  # noqa: BLE001 (what the command line does with it is what is tested)
            return verdict(error)
        return 0, ""

    return run


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory, ask: Ask) -> World:
    root = tmp_path_factory.mktemp("world")
    section = simulate_section(root / "section", cells=60, genes=50, seed=5)
    (section / "truth_nuclei.parquet").rename(section / "nuclei.parquet")
    genes = ad.read_h5ad(section / "truth.h5ad").var
    metadata = {
        "encoder": Classical().settings(),
        "encoder_weights": None,
        "mpp": 0.5,
        "tile": 256,
        "pooling": "nucleus",
        "input": {"use": ["local", "global"], "widths": {"local": 192, "global": 384}},
        "loss": {},
        "segmentation": {"name": "watershed", "arguments": {}},
        "qc": {"min_umi": 1, "max_area_um2": 1000.0, "max_pct_mt": 100.0},
        "tissue": "demo",
        "species": "human",
        "train_sections": ["train"],
        "split": {},
        "seed": 0,
        "validation": {},
    }
    save_bundle(
        root / "model",
        net=PRTSNet(576, len(genes), hidden=(4,)),
        likelihood=Paper(target="log1p").allocate(len(genes)),
        rule=OutputRule("none", 0.5),
        genes=list(zip(genes.index, genes["gene_id"], strict=True)),
        metadata=metadata,
    )
    made = World(
        section,
        section / "tissue_image.tif",
        section / "nuclei.parquet",
        root / "model",
        root / "prediction.h5ad",
        root / "cache",
    )
    xy = load_nuclei(made.nuclei).geometry.centroid
    spots = ad.AnnData(
        csr_matrix(np.ones((2, len(genes)), np.int32)),
        obs=pd.DataFrame(index=["s1", "s2"]),
        var=pd.DataFrame({"gene_id": genes["gene_id"]}, index=genes.index),
        obsm={"spatial": np.column_stack([xy.x[:2], xy.y[:2]])},
        uns={"spot_radius_px": 50.0},
    )
    spots.write_h5ad(section / "spots.h5ad")
    said = ask(
        "predict",
        bundle=made.bundle,
        image=made.image,
        nuclei=made.nuclei,
        out=made.prediction,
        mpp=made.mpp,
        paths__cache_dir=made.cache,
    )
    assert said == (0, "")
    return made


@pytest.fixture
def quick_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """`classical` in a hundredth of the time: a few numbers per tile, the rest 0."""
    from prts.features.encoders import Classical

    def encode(self: Classical, tiles: np.ndarray, polygons: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        vectors = np.zeros((len(tiles), self.global_width + self.local_width), np.float32)
        vectors[:, :12] = (tiles[:, ::64, ::64].reshape(len(tiles), -1)[:, :12] / 255).astype(np.float32)
        vectors[:, -6:] = (tiles[:, 120:136:8, 128] / 255).reshape(len(tiles), -1)
        return vectors[:, : self.global_width].copy(), vectors[:, self.global_width :].copy()

    monkeypatch.setattr(Classical, "encode", encode)


@pytest.fixture
def tissue(world: World, tmp_path: Path) -> list[str]:
    """Arguments of `prepare` and `train` for a tissue in which one small section has all roles."""
    bins = world.section / BINS
    section = f"{{image: '{world.image}', bins: '{bins}', nuclei: '{world.nuclei}'}}"
    (tmp_path / "configs" / "tissue").mkdir(parents=True)
    (tmp_path / "configs" / "tissue" / "mine.yaml").write_text(
        f"name: mine\nspecies: human\nsections: {{a: {section}, b: {section}, c: {section}}}\ntrain: [a]\nval: [b]\ntest: [c]\n"
    )
    small = ["encoder=classical", "panel=demo", "panel.n_genes=20", "qc.min_umi=1"]
    return ["--config-dir", str(tmp_path / "configs"), "tissue=mine", *small]


@pytest.fixture
def training(tissue: list[str]) -> list[str]:
    """Arguments of `train`."""
    return [*tissue, "trainer.max_epochs=3", "trainer.accelerator=cpu", "evaluation.bootstrap=3", "report=false"]


@pytest.fixture
def predict(ask: Ask, world: World, tmp_path: Path) -> Ask:
    """Run `predict` on the valid section with some arguments replaced; a refusal must not leave anything at `out`."""

    def run(*choices: str, **values: Any) -> tuple[int, str]:
        given: dict[str, Any] = {
            "bundle": world.bundle,
            "image": world.image,
            "nuclei": None if choices else world.nuclei,
            "mpp": world.mpp,
            "out": tmp_path / "out" / "slide.h5ad",
            "paths__cache_dir": world.cache,
        } | values
        status, line = ask("predict", *choices, **given)
        out = Path(given["out"])
        if status == 0:
            assert ad.read_h5ad(out).n_obs > 0
        elif out.parent.is_dir():
            assert not [path for path in out.parent.iterdir() if "slide" in path.name]
        return status, line

    return run


@pytest.fixture
def evaluate(ask: Ask, world: World, tmp_path: Path) -> Ask:
    """Run `evaluate` on the valid files with some arguments replaced; a refusal must not leave `out`."""

    def run(*choices: str, **values: Any) -> tuple[int, str]:
        given: dict[str, Any] = {
            "prediction": world.prediction,
            "section": world.section,
            "out": tmp_path / "out",
            "evaluation__bootstrap": 3,
        } | values
        status, line = ask("evaluate", *choices, **given)
        out = Path(given["out"])
        if status == 0:
            assert json.loads((out / "metrics.json").read_text())["test/n_cells"] > 0
        elif out == tmp_path / "out":
            assert not out.exists()
        return status, line

    return run


@pytest.fixture
def section(world: World, tmp_path: Path) -> Path:
    """A copy of the section."""
    return world.copy(world.section, tmp_path)


@pytest.fixture
def matrix(section: Path) -> Path:
    """The matrix of its bins."""
    return section / BINS / "filtered_feature_bc_matrix.h5"


@pytest.fixture
def pixels(world: World) -> np.ndarray:
    """The section's image, (h, w, 3)."""
    return np.asarray(tifffile.imread(world.image))


def cut(path: Path, share: float) -> None:
    """Truncate a file to a share of its size."""
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])


SPOILT: dict[str, Callable[[Path], object]] = {
    "nine tenths": lambda path: cut(path, 0.9),  # an interrupted download
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "a tenth": lambda path: cut(path, 0.1),
    "text": lambda path: path.write_text("this is something else altogether\n" * 50),
    "noise": lambda path: path.write_bytes(np.random.default_rng(0).bytes(5000)),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.fixture(params=SPOILT)
def spoil(request: pytest.FixtureRequest) -> Callable[[Path], object]:
    """Each way to damage a file of any kind; mark tests as sampled("spoil")."""
    return SPOILT[request.param]


def refused(answer: tuple[int, str], *words: str) -> None:
    """Assert exit status 2 and one line that contains these words."""
    status, line = answer
    assert status == 2, answer
    assert "\n" not in line
    for word in words:
        assert word in line, line


@pytest.fixture(name="refused")
def refused_fixture() -> Callable[..., None]:
    """Function that asserts exit status 2 and one line that contains some words."""
    return refused
