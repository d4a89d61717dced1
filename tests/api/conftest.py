"""A small tissue in the Visium HD layout, and a model trained on it through the Python interface."""

from __future__ import annotations

from pathlib import Path

import pytest

import prts


@pytest.fixture(scope="session")
def sections(tmp_path_factory: pytest.TempPathFactory) -> dict[str, prts.Section]:
    """Three simulated sections of one tissue."""
    from prts.simulate.section import simulate_section

    root = tmp_path_factory.mktemp("sections")
    for seed, name in enumerate(("first", "second", "third")):
        simulate_section(root / name, name=name, cells=400, genes=150, seed=seed)
    return {name: prts.read_visium_hd(root / name) for name in ("first", "second", "third")}


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def encoder() -> prts.encoders.Classical:
    """Tiles of 64 px take a tenth of the time that 256 px take."""
    return prts.encoders.Classical(tile_px=64)


@pytest.fixture(scope="session")
def trained(sections: dict[str, prts.Section], encoder: prts.encoders.Classical, cache: Path) -> prts.Model:
    model = prts.Model(encoder, likelihood="poisson", network={"hidden": (64,)})
    model.train(
        [sections["first"]],
        validation=[sections["second"]],
        nuclei="watershed",
        genes=60,
        max_epochs=5,
        cache_dir=cache,
        trainer={"accelerator": "cpu"},
    )
    return model
