"""The job scripts and the downloader in scripts/."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

from prts.cli.app import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
JOBS = sorted((ROOT / "scripts/slurm").glob("*.sh"))

bash = pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")


def run_job(tmp_path: Path, script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a job script with a `prts` that prints its arguments, one a line."""
    prts = tmp_path / "prts"
    prts.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    prts.chmod(0o755)
    env = {**os.environ, "PRTS": str(prts), "SLURM_SUBMIT_DIR": str(tmp_path), **environment}
    command = ["bash", str(ROOT / "scripts/slurm" / script), *arguments]
    return subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)


@bash
@pytest.mark.parametrize("script", JOBS, ids=lambda path: path.name)
def test_jobs_parse_and_are_listed(script: Path) -> None:
    checked = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True)

    assert checked.stderr == "" and checked.returncode == 0
    assert f"`slurm/{script.name}`" in (ROOT / "scripts/README.md").read_text()


@bash
@pytest.mark.parametrize(
    ("script", "arguments", "environment"),
    [
        ("prepare.sh", ["tissue=demo"], {}),
        ("train.sh", ["tissue=demo"], {}),
        ("sweep.sh", ["tissue=demo"], {"SLURM_ARRAY_TASK_ID": "2"}),
        ("predict_many.sh", ["slides.txt", "model", "out"], {"SLURM_ARRAY_TASK_ID": "1"}),
    ],
)
def test_jobs_call_commands_that_exist(
    tmp_path: Path, script: str, arguments: list[str], environment: dict[str, str]
) -> None:
    (tmp_path / "slides.txt").write_text("a slide.svs\n")

    done = run_job(tmp_path, script, *arguments, **environment)

    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] in COMMANDS


@bash
def test_a_training_job_resumes_in_the_same_folder_and_ends_when_finished(tmp_path: Path) -> None:
    first = run_job(tmp_path, "train.sh", "tissue=demo", "model.net.hidden=[8,8]").stdout.splitlines()
    again = run_job(tmp_path, "train.sh", "tissue=demo", "model.net.hidden=[8,8]").stdout.splitlines()
    other = run_job(tmp_path, "train.sh", "tissue=lung").stdout.splitlines()

    assert first == again
    assert first[:3] == ["train", "tissue=demo", "model.net.hidden=[8,8]"]
    assert first[-1] == "resume=true"
    folder = first[3].removeprefix("hydra.run.dir=")
    assert folder != other[2].removeprefix("hydra.run.dir=")

    (tmp_path / folder).mkdir(parents=True)
    (tmp_path / folder / "metrics.json").write_text("{}")
    assert run_job(tmp_path, "train.sh", "tissue=demo", "model.net.hidden=[8,8]").stdout == f"{folder} is finished\n"


@bash
def test_a_prediction_task_takes_its_line_and_skips_finished_slides(tmp_path: Path) -> None:
    (tmp_path / "slides.txt").write_text("in/a.svs\nin/b c.ome.tif\n")
    arguments = ["slides.txt", "model", "out", "stain=macenko"]

    done = run_job(tmp_path, "predict_many.sh", *arguments, SLURM_ARRAY_TASK_ID="2")
    beyond = run_job(tmp_path, "predict_many.sh", *arguments, SLURM_ARRAY_TASK_ID="3")

    expected = ["predict", "bundle=model", "image=in/b c.ome.tif", "out=out/b c.ome.h5ad", "stain=macenko"]
    assert done.stdout.splitlines() == expected
    assert (beyond.returncode, beyond.stderr) == (2, "slides.txt has no line 3\n")
    (tmp_path / "out/b c.ome.h5ad").write_text("")
    assert "is finished" in run_job(tmp_path, "predict_many.sh", *arguments, SLURM_ARRAY_TASK_ID="2").stdout


@pytest.fixture
def download_data() -> ModuleType:
    spec = importlib.util.spec_from_file_location("download_data", ROOT / "scripts/download_data.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_downloader_lists_every_public_section(
    download_data: ModuleType, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert download_data.main(["--list", "--data-dir", str(tmp_path)]) == 0

    rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert {row[0] for row in rows} == {"brain", "breast", "colon", "lung", "prostate", "xenium_breast", "xenium_lung"}
    assert rows[0][:2] == ["brain", "ffpe"]
    assert "md5 2e728d1c1bda99a36535ba45b4319a98" in {row[3] for row in rows}
    assert all(row[2].startswith("https://") for row in rows)
    assert list(tmp_path.iterdir()) == []


def test_the_downloader_fetches_the_sections_of_the_tissues_named(
    download_data: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fetched = []
    monkeypatch.setattr(download_data, "download_section", fetched.append)

    assert download_data.main(["lung", "--data-dir", str(tmp_path)]) == 0

    assert [spec.name for spec in fetched] == ["lung1", "lung2"]
    assert str(fetched[0].image).startswith(str(tmp_path))


def test_the_downloader_names_what_it_does_not_know(
    download_data: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert download_data.main(["liver"]) == 2
    assert download_data.main(["demo"]) == 2

    lines = capsys.readouterr().err.splitlines()
    known = "choose from brain, breast, colon, lung, prostate, xenium_breast, xenium_lung"
    assert lines[0] == f"download_data: liver: no such tissue; {known}"
    assert lines[1] == f"download_data: demo: has no download address; {known}"
