"""Two processes train as one does: the same batches, losses, validation and weights."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[2]
Found = dict[str, Any]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Found, Found, Found]:
    """What a process alone saw, and each of two."""
    folder = tmp_path_factory.mktemp("ddp")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
    common |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [
        {"RANK": str(r), "LOCAL_RANK": str(r), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0"}
        | {"TORCHELASTIC_RUN_ID": "none"}
        for r in range(2)
    ]
    command = [sys.executable, str(ROOT / "tests" / "models" / "ddp_process.py"), str(folder)]
    started = [
        subprocess.Popen(command, env=common | rank, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for rank in ({}, *ranks)
    ]
    said = [process.communicate(timeout=300)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0, 0], "\n".join(said)
    alone, *both = (torch.load(folder / f"{name}.pt", weights_only=True) for name in ("1-0", "2-0", "2-1"))
    return alone, both[0], both[1]


def test_the_processes_share_each_batch(runs: tuple[Found, Found, Found]) -> None:
    alone, first, second = runs
    assert len(alone["seen"]) == 3 * 4  # the last batch has 9 nuclei: 5 and 4
    for whole, *parts in zip(alone["seen"], first["seen"], second["seen"], strict=True):
        assert sorted(whole) == sorted(parts[0] + parts[1])
        assert abs(len(parts[0]) - len(parts[1])) <= 1


def test_losses_validation_and_weights_are_those_of_one_process(runs: tuple[Found, Found, Found]) -> None:
    alone, *both = runs
    for process in both:
        np.testing.assert_allclose(process["steps"], alone["steps"], rtol=1e-5)
        for mine, whole in zip(process["epochs"], alone["epochs"], strict=True):
            assert mine.keys() == whole.keys() >= {"train/loss", "val/loss", "val/pcc"}
            for name, value in whole.items():
                assert mine[name] == pytest.approx(value, rel=1e-4), name
        assert process["plain"].keys() == alone["plain"].keys()
        for name, tensor in alone["plain"].items():
            torch.testing.assert_close(process["plain"][name], tensor, rtol=1e-4, atol=1e-5, msg=name)
    assert alone["steps"][-1] < 0.9 * alone["steps"][0]  # it learned, so equal weights say something


def test_streamed_batches_are_shared_as_well(runs: tuple[Found, Found, Found]) -> None:
    alone, *both = runs
    for process in both:
        np.testing.assert_allclose(process["streamed_steps"], alone["streamed_steps"], rtol=1e-5)
        for name, tensor in alone["streamed"].items():
            torch.testing.assert_close(process["streamed"][name], tensor, rtol=1e-4, atol=1e-5, msg=name)
    assert alone["streamed_steps"] != alone["steps"]  # another order


def test_a_killed_job_resumes_to_the_same_weights(runs: tuple[Found, Found, Found]) -> None:
    for process in runs[1:]:
        for name, tensor in process["dropout"].items():
            torch.testing.assert_close(process["resumed"][name], tensor, rtol=1e-6, atol=1e-7, msg=name)


def test_each_process_drops_other_units(runs: tuple[Found, Found, Found]) -> None:
    _, first, second = runs
    assert not torch.equal(first["random"], second["random"])
    for name, tensor in first["dropout"].items():  # and yet they hold the same network
        assert torch.equal(tensor, second["dropout"][name])
