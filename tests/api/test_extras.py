"""What is installed with each extra, and what is said where one is missing."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from prts.cli.app import run
from prts.errors import InputError
from prts.extras import DISTRIBUTION, EXTRAS, install_command, missing_modules, require_extra

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_every_extra_is_one_of_the_package():
    assert PROJECT["name"] == DISTRIBUTION
    assert set(EXTRAS) <= set(PROJECT["optional-dependencies"])
    everything = PROJECT["optional-dependencies"]["all"][0]
    assert set(everything.split("[")[1].rstrip("]").split(",")) == set(EXTRAS) - {
        "lazyslide",
        "mlflow",
    }  # see pyproject.toml


def test_an_extra_is_complete_only_with_all_that_it_installs():
    provided: dict[str, set[str]] = {}
    for module, names in packages_distributions().items():
        for name in names:
            provided.setdefault(canonicalize_name(name), set()).add(module)
    for extra, (modules, _) in EXTRAS.items():
        checked = {module.split(".")[0] for module in modules}
        for text in PROJECT["optional-dependencies"][extra]:
            found = provided.get(canonicalize_name(Requirement(text).name))
            assert found is None or found & checked, f"{extra}: {text}"


def test_a_missing_extra_is_named_before_any_work(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("prts.extras._is_installed", lambda module: module != "plotly")
    monkeypatch.chdir(tmp_path)
    for command, extra in (("train", "train"), ("report", "report")):
        assert run(command, []) == 2
        line = capsys.readouterr().err.strip()
        assert line == f"prts: {command}: plotly is not installed; run {install_command(extra)}"
    assert not list(tmp_path.iterdir())
    assert missing_modules("stardist") == []
    with pytest.raises(InputError, match=r"Model.train: plotly is not installed.*prts-spatial\[train\]"):
        require_extra("train", "Model.train")


@pytest.mark.slow
def test_predicting_needs_no_extra(trained, sections, tmp_path):
    """With every module of every extra absent, a slide is predicted and exported."""
    code = f"""
import sys
from prts.extras import EXTRAS

class Absent:
    names = {{module for extra in EXTRAS.values() for module in extra.modules if "." not in module}}
    def find_spec(self, name, path=None, target=None):
        if name in self.names:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())
import prts
from prts.cli.app import run
prts.Model, prts.evaluate, prts.read_section
given = [{f"bundle={trained.bundle.folder}"!r}, {f"image={sections['third'].image}"!r}]
assert run("predict", [*given, "out=a.h5ad", "roi=[0,0,300,300]"]) == 0
assert run("export", ["prediction=a.h5ad", "format=geojson", "out=a.geojson"]) == 0
assert run("train", []) == 2
"""
    found = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert (tmp_path / "a.geojson").is_file()
