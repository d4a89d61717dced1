"""The examples in the docstrings of the public interface run, on a small simulated section."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import prts

pytestmark = pytest.mark.slow

MODULES = sorted(
    module.name for module in pkgutil.walk_packages(prts.__path__, "prts.") if not module.name.startswith("prts.cli")
)


@pytest.fixture(scope="module")
def names(trained, sections, tmp_path_factory) -> dict[str, str]:
    """What examples may refer to: a model, a section and its slide on disk."""
    model = tmp_path_factory.mktemp("examples") / "model"
    trained.save(model)
    demo, other = sections["third"].image, sections["second"].image
    return {
        "demo_model": str(model),
        "demo_section": str(demo.parent),
        "demo_slide": str(demo),
        "other_section": str(other.parent),
    }


@pytest.mark.parametrize("module", MODULES)
def test_examples_run(module, names, cache, tmp_path, monkeypatch):
    monkeypatch.setenv("PRTS_CACHE", str(cache))
    monkeypatch.chdir(tmp_path)
    loaded = importlib.import_module(module)
    flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS | doctest.IGNORE_EXCEPTION_DETAIL
    result = doctest.testmod(loaded, extraglobs=names, optionflags=flags)
    assert result.failed == 0


def test_every_public_name_has_an_example():
    for name in set(prts.__all__) - {"__version__", "InputError", "encoders", "Scores", "Section"}:
        assert ">>>" in (getattr(prts, name).__doc__ or ""), name
