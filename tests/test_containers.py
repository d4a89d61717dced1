"""Dockerfile and environment.yml say what pyproject.toml has, and the Dockerfile's own lines install it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
LINES = re.findall(r"^([A-Z]+) ((?:.*\\\n)*.*)$", (ROOT / "Dockerfile").read_text(encoding="utf-8"), re.MULTILINE)
ARGS = dict(value.split("=", 1) for name, value in LINES if name == "ARG")
COPIES = [value.split() for name, value in LINES if name == "COPY"]


def test_the_dockerfile_copies_all_that_the_package_needs():
    copied = {source for *sources, _ in COPIES for source in sources}
    assert all((ROOT / source).exists() for source in copied)
    built = {PROJECT["readme"], *PROJECT["license-files"], "pyproject.toml", "prts", "configs"}
    assert copied == built | {"constraints.txt"}
    # what the build may see is exactly that
    seen = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    assert set(seen) == copied
    assert "*" in (ROOT / ".dockerignore").read_text().splitlines()


def test_the_dockerfile_has_a_python_and_extras_that_exist():
    extras = ARGS["EXTRAS"].split(",")
    assert set(extras) <= set(PROJECT["optional-dependencies"])
    python = re.fullmatch(r"python:(\d+\.\d+)-slim", ARGS["BASE"])
    assert python is not None
    assert python[1] in SpecifierSet(PROJECT["requires-python"])


def test_the_conda_environment_installs_this_checkout_with_tested_versions():
    given = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    *conda, pip = given["dependencies"]
    python = next(line.split("=")[1] for line in conda if line.startswith("python="))
    assert python in SpecifierSet(PROJECT["requires-python"])
    constraint, package = pip["pip"]
    assert (ROOT / constraint.removeprefix("--constraint ")).is_file()
    extras = Requirement(package.replace("--editable .", PROJECT["name"])).extras
    assert extras
    assert extras <= set(PROJECT["optional-dependencies"])


def test_every_pin_lies_in_the_range_of_the_package():
    """What pip would find out after minutes of downloads."""
    pins = dict(line.split("==") for line in _lines("constraints.txt"))
    pins = {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in pins.items()}
    named = [*PROJECT["dependencies"], *(each for group in PROJECT["optional-dependencies"].values() for each in group)]
    for text in named:
        requirement = Requirement(text)
        pin = pins.get(re.sub(r"[-_.]+", "-", requirement.name).lower())
        assert pin is None or pin in requirement.specifier, text


@pytest.mark.nightly
def test_the_run_lines_of_the_dockerfile_install_a_prts_that_works(tmp_path):
    """The RUN lines in a folder instead of an image, for machines that cannot build one."""
    place = tmp_path / "opt"
    (place / "prts").mkdir(parents=True)
    for *sources, target in COPIES:
        for source in sources:
            if (ROOT / source).is_dir():
                ignore = shutil.ignore_patterns("__pycache__")
                shutil.copytree(ROOT / source, place / "prts" / target, ignore=ignore)
            else:
                shutil.copy(ROOT / source, place / "prts" / target)
    for name, value in LINES:
        if name == "RUN":
            command = value.replace("/opt/", f"{place}/")
            environment = {**os.environ, **{key: each for key, each in ARGS.items() if each}}
            done = subprocess.run(["sh", "-ec", command], cwd=place / "prts", env=environment, text=True, check=False,
                                  stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
            assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}"
    assert "extra report" in done.stdout
    assert (place / "venv/bin/prts").is_file()


def _lines(name: str) -> list[str]:
    return [line for line in (ROOT / name).read_text(encoding="utf-8").splitlines() if line and line[0] != "#"]
