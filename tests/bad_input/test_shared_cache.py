"""A cache that is read-only, deleted, or used by several processes."""

from __future__ import annotations

import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from prts.cli.main import main
from prts.data import prepare_input

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.slow


class Deletes(logging.Handler):
    """Delete a folder when the k-th line is logged."""

    def __init__(self, folder: Path, k: int) -> None:
        super().__init__()
        self._folder, self.left = folder, k

    def emit(self, record: logging.LogRecord) -> None:
        self.left -= 1
        if self.left == 0:
            shutil.rmtree(self._folder, ignore_errors=True)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.suffix != ".lock"
    }


@pytest.mark.parametrize("command", ["prepare", pytest.param("train", marks=pytest.mark.nightly)])
def test_a_cache_deleted_midway(
    command: str,
    tissue: list[str],
    training: list[str],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    quick_encoder: None,
) -> None:
    """Either one line and exit status 2, or the run succeeds; the next run ends like an undisturbed one."""
    cache, run = tmp_path / "cache", tmp_path / "run"
    given = [command, *(tissue if command == "prepare" else training), f"paths.cache_dir={cache}"]
    given += [f"hydra.run.dir={run}"] if command == "train" else []
    counter = Deletes(tmp_path / "nothing", 10**6)
    logging.getLogger("prts").addHandler(counter)
    try:
        assert main(given) == 0
    finally:
        logging.getLogger("prts").removeHandler(counter)
    whole, n_lines = contents(cache), 10**6 - counter.left
    weights = (run / "model" / "model.safetensors").read_bytes() if command == "train" else b""
    ended = []
    for share in (0.1, 0.5, 0.9) if command == "prepare" else (0.4,):
        deletes = Deletes(cache, int(share * n_lines))
        if command == "prepare":
            shutil.rmtree(cache)
        logging.getLogger("prts").addHandler(deletes)
        capfd.readouterr()
        try:
            ended.append(main(given))
        finally:
            logging.getLogger("prts").removeHandler(deletes)
        assert deletes.left <= 0
        said = capfd.readouterr().err
        if ended[-1]:
            assert ended[-1] == 2 and said.count("\n") == 1 and str(cache) in said, said
        found = contents(cache)
        assert all(whole[name] == content for name, content in found.items() if ".parts/" not in name)
        assert main(given) == 0
        assert contents(cache) == whole
        assert not weights or (run / "model" / "model.safetensors").read_bytes() == weights
    assert command == "train" or 2 in ended  # else no deletion had any effect


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user, or mount")
def test_a_read_only_cache(
    tissue: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str], quick_encoder: None
) -> None:
    """Files that are up to date are used; missing ones are refused in one line."""
    cache = tmp_path / "cache"
    cache.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(cache)], capture_output=True).returncode:
        pytest.skip("nothing can be mounted here")
    try:
        given = ["prepare", *tissue, f"paths.cache_dir={cache}"]
        assert main(given) == 0
        before = contents(cache)
        subprocess.run(["mount", "-o", "remount,ro", str(cache)], check=True)
        assert main(given) == 0
        capfd.readouterr()
        assert main([*given, "qc.min_umi=2"]) == 2
        said = capfd.readouterr().err
        assert said.count("\n") == 1
        assert re.search(r"counts-\w+\.h5ad: does not exist and cannot be written \(Read-only file system\)", said)
        assert contents(cache) == before
    finally:
        subprocess.run(["umount", "--lazy", str(cache)], check=True)


def test_a_stage_leaves_torch_its_threads(tmp_path: Path) -> None:
    """Weights depend on the number of threads, which must not depend on whether a stage was run or skipped."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        prepare_input.build(
            tmp_path / "x", lambda path: (torch.set_num_threads(2), path.touch()), what="x"
        )  # as numba does
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


# Imports everything once, then forks processes that prepare at the same time; the first one may be killed.
CROWD = """
    import os, signal, sys, time
    from pathlib import Path
    import anndata, geopandas, pyarrow, scanpy, scipy, sklearn, skimage, torch
    import prts.cli.prepare
    from prts.features.encoders import Classical
    from prts.cli.main import main

    def quick(self, tiles, polygons):
        import numpy as np
        time.sleep(0.05)
        vectors = np.zeros((len(tiles), 576), np.float32)
        vectors[:, 0] = tiles[:, 128, 128, 0]
        return vectors[:, :384].copy(), vectors[:, 384:].copy()

    Classical.encode = quick
    n, kill, cache, *given = sys.argv[1:]
    children = []
    for _ in range(int(n)):
        pid = os.fork()
        if pid == 0:
            os._exit(main(["prepare", *given, "paths.cache_dir=" + cache]))
        children.append(pid)
        while len(children) == 1 and not list(Path(cache).rglob("*.lock")):
            time.sleep(0.01)
    if kill == "kill":
        while not list(Path(cache).rglob("*.parts")):
            time.sleep(0.002)
        os.kill(children[0], signal.SIGKILL)
    print([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children])
"""


@pytest.mark.parametrize("kill", ["kill", pytest.param("spare", marks=pytest.mark.nightly)])
def test_four_processes_on_one_cache(kill: str, tissue: list[str], tmp_path: Path) -> None:
    def crowd(n: int, how: str, cache: Path) -> tuple[str, str]:
        script = "\n".join(line.removeprefix("    ") for line in CROWD.splitlines())
        command = [sys.executable, "-c", script, str(n), how, str(cache), *tissue]
        environment: dict[str, Any] = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()[-1], done.stdout

    assert crowd(1, "spare", tmp_path / "alone")[0] == "[0]"
    ended, log = crowd(4, kill, tmp_path / "crowd")
    assert ended == ("[0, 0, 0, 0]" if kill == "spare" else "[-9, 0, 0, 0]")
    assert contents(tmp_path / "crowd") == contents(tmp_path / "alone")
    if kill == "spare":  # each stage was built by one process
        assert log.count("a: counts of nuclei") == 1 and log.count("gene panel from the training nuclei") == 1
