"""Commands on a disk that fills up: one line, nothing damaged, and the same command works once there is space."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from prts.cli.main import main

Ask = Callable[..., tuple[int, str]]

pytestmark = pytest.mark.slow


@dataclass
class Disk:
    """A small disk. `leave` fills it except for some space, `clear` frees it again."""

    root: Path

    def leave(self, n_bytes: int) -> None:
        ballast = self.root / "ballast"
        ballast.unlink(missing_ok=True)
        stat = os.statvfs(self.root)
        page = stat.f_frsize
        with ballast.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, (stat.f_bavail - n_bytes // page) * page)

    def clear(self) -> None:
        (self.root / "ballast").unlink()

    def taken(self) -> int:
        """Size of all files in whole pages."""
        return sum(-(-len(content) // 4096) * 4096 for content in self.files().values())

    def files(self) -> dict[str, bytes]:
        """Contents of all files except locks."""
        found = (path for path in self.root.rglob("*") if path.is_file())
        return {
            str(path.relative_to(self.root)): path.read_bytes()
            for path in found
            if path.suffix != ".lock" and path.name != "ballast"
        }


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    root = tmp_path / "disk"
    root.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(root)]
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("only root can mount a small disk")
    if (done := subprocess.run(command, capture_output=True, text=True)).returncode:
        pytest.skip(f"no small disk can be mounted here: {done.stderr.strip()}")
    try:
        yield Disk(root)
    finally:
        subprocess.run(["umount", "--lazy", str(root)], check=True)


def fills_up(
    disk: Disk,
    command: Callable[[], tuple[int, str]],
    may_stay: tuple[str, ...] = (),
    shares: tuple[float, ...] = (0, 0.3, 0.6, 0.95),
    *,
    anew: bool = True,
) -> None:
    """Run undisturbed, then with space for a share of the output, then with enough space again.

    `may_stay` is part of the names of finished files from which a run resumes; without `anew`, each run resumes from the previous one.
    """
    assert command() == (0, "")
    whole = disk.files()
    taken = disk.taken()
    for share in shares:
        for path in disk.root.iterdir() if anew or share == shares[0] else ():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        disk.leave(max(0, int(share * taken) - (0 if anew else disk.taken())))
        status, line = command()
        assert status == 2, (share, line)
        assert "\n" not in line and line.count(str(disk.root)) == 1, line
        assert "the disk is full; free some space or choose another folder" in line
        assert ".tmp" not in line
        for name, content in disk.files().items():
            assert whole.get(name) == content or any(part in name for part in may_stay), (share, name)
            assert ".tmp" not in name
        disk.clear()
        if anew or share == shares[-1]:
            assert command() == (0, "")
            assert disk.files() == whole


@pytest.mark.nightly
@pytest.mark.parametrize("format", ["geojson", "parquet", "csv", "spatialdata"])
def test_export(disk: Disk, ask: Ask, world: Any, format: str) -> None:
    if format == "spatialdata":
        pytest.importorskip("spatialdata")
    out = disk.root / f"out.{format}"
    fills_up(disk, lambda: ask("export", prediction=world.prediction, format=format, out=out))


def test_simulate(disk: Disk, ask: Ask) -> None:
    fills_up(disk, lambda: ask("simulate", out=disk.root / "section", cells=50, genes=50))


def test_predict(disk: Disk, ask: Ask, world: Any, quick_encoder: None) -> None:
    given = {"bundle": world.bundle, "image": world.image, "mpp": world.mpp, "nuclei": world.nuclei}
    out, cache = disk.root / "out" / "slide.h5ad", disk.root / "cache"
    fills_up(disk, lambda: ask("predict", **given, out=out, paths__cache_dir=cache), (".parts/",))


@pytest.mark.nightly
def test_report(disk: Disk, ask: Ask, world: Any) -> None:
    given = {"prediction": world.prediction, "image": world.image, "out": disk.root / "report"}
    fills_up(disk, lambda: ask("report", **given), shares=(0.1, 0.6), anew=False)


@pytest.fixture
def say(capfd: pytest.CaptureFixture[str]) -> Callable[[list[str]], tuple[int, str]]:
    """Run a command like the command line; returns the exit status and stderr."""

    def run(arguments: list[str]) -> tuple[int, str]:
        capfd.readouterr()
        status = main(arguments)
        said = capfd.readouterr().err
        return status, said.strip() if status else ""

    return run


@pytest.mark.nightly
def test_prepare(disk: Disk, say: Any, tissue: list[str], quick_encoder: None) -> None:
    command = ["prepare", *tissue, f"paths.cache_dir={disk.root / 'cache'}"]
    fills_up(disk, lambda: say(command), (".parts/",))


@pytest.mark.nightly
def test_train(disk: Disk, say: Any, training: list[str], tmp_path: Path, quick_encoder: None) -> None:
    run = disk.root / "run"
    command = ["train", *training, f"paths.cache_dir={tmp_path / 'cache'}", f"hydra.run.dir={run}"]

    def train() -> tuple[int, str]:
        answer = say([*command, *(["resume=true"] if run.exists() else [])])
        if answer[0] == 0:
            for path in (run / ".hydra", run / "csv"):  # the command, and curves that start where it resumed
                shutil.rmtree(path)
            # contain times, or whether it resumed
            for path in (
                *run.glob("figures/training.*"),
                *(run / n for n in ("train.log", "metrics.json", "config.yaml")),
            ):
                path.unlink()
        return answer

    stays = ("run/resume.ckpt", "run/.hydra/", "run/csv/", "run/train.log", "run/config.yaml")
    fills_up(disk, train, stays, (0, 0.03, 0.5, 0.95), anew=False)
