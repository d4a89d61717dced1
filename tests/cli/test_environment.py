"""Machines as they are: home folders, containers, other systems, devices without memory, names that are numbers."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from omegaconf import OmegaConf

from prts import _numba
from prts.cli import devices
from prts.cli.devices import own_gpu
from prts.cli.exit_status import verdict
from prts.cli.overrides import quote_paths, split_flags
from prts.cli.tidy import tidy
from prts.errors import ParameterError
from prts.models.slurm import own_processes


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    "key", ["image", "out", "bundle", "paths.cache_dir", "hydra.run.dir", "tissue.sections.s1.image"]
)
def test_a_tilde_on_the_command_line_is_the_home_folder(key: str, home: Path) -> None:
    assert quote_paths([f"{key}=~/a b/x=1.tif", f"{key}=a~/b"]) == [f"{key}='{home}/a b/x=1.tif'", f"{key}='a~/b'"]


def test_a_tilde_names_a_file_if_there_is_one(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("~x.tif").touch()
    assert quote_paths(["image=~x.tif"]) == ["image='~x.tif'"]


def test_a_tilde_in_yaml_is_the_home_folder(home: Path) -> None:
    cfg = OmegaConf.create(
        {
            "paths": {"data_dir": "~/data", "cache_dir": "${paths.data_dir}/cache"},
            "tissue": {"sections": {"s": {"image": "~/s.tif", "bins": "${paths.data_dir}/bins"}}},
            "files": ["~", "a~b", "~/x"],
            "name": "???",
            "other": "${nothing}",
        }
    )
    OmegaConf.set_struct(cfg, True)
    tidy(cfg)
    assert cfg.paths.cache_dir == f"{home}/data/cache"
    assert dict(cfg.tissue.sections.s) == {"image": f"{home}/s.tif", "bins": f"{home}/data/bins"}
    assert list(cfg.files) == [str(home), "a~b", f"{home}/x"]


@pytest.mark.parametrize("names", [[151673], [151673, 151674], [1.5, 7]])
def test_sections_may_have_numbers_for_names(names: list[float]) -> None:
    cfg = OmegaConf.create(
        {"tissue": {"sections": {name: {"image": "a"} for name in names}, "train": names, "val": None}}
    )
    OmegaConf.set_struct(cfg, True)
    tidy(cfg)
    assert list(cfg.tissue.sections) == list(cfg.tissue.train) == [str(name) for name in names]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 7.79 GiB"
        ),
        RuntimeError("MPS backend out of memory (MPS allocated: 9.00 GB, other allocations: 1 MB)"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: 42949672960 bytes"
        ),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_a_device_without_memory_names_the_batch_sizes(error: RuntimeError) -> None:
    wrapped = ValueError("in a worker")
    wrapped.__cause__ = error
    for each in (error, wrapped):
        status, line = verdict(each)
        assert status == 2 and "\n" not in line and line.startswith("out of memory (")
        assert "lower encoder.batch_size (features) or data.batch_size" in line


@pytest.mark.parametrize("message", ["shape mismatch", "memory format"])
def test_other_errors_of_torch_are_bugs(message: str) -> None:
    assert verdict(RuntimeError(message))[0] == 1


def test_numba_gets_a_folder_where_none_is_writable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    monkeypatch.setattr(_numba, "_is_writable", lambda place: True)
    _numba.provide_cache()
    assert "NUMBA_CACHE_DIR" not in os.environ
    monkeypatch.setattr(_numba, "_is_writable", lambda place: False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    _numba.provide_cache()
    first = Path(os.environ.pop("NUMBA_CACHE_DIR"))
    assert first.parent == tmp_path and first.stat().st_mode & 0o777 == 0o700
    first.chmod(0o777)  # another user may have put something there
    _numba.provide_cache()
    second = Path(os.environ["NUMBA_CACHE_DIR"])
    assert second != first and second.stat().st_mode & 0o777 == 0o700
    monkeypatch.setenv("NUMBA_CACHE_DIR", "/mine")
    _numba.provide_cache()
    assert os.environ["NUMBA_CACHE_DIR"] == "/mine"


@pytest.mark.parametrize("absent", ["resource fcntl", "pread pwrite O_CLOEXEC getuid sched_getaffinity"])
def test_what_windows_lacks_is_not_needed(absent: str, tmp_path: Path) -> None:
    program = f"""
import os, sys
for name in {absent!r}.split():
    if hasattr(os, name): delattr(os, name)
    else: sys.modules[name] = None
import anndata, numpy, pandas
from prts.io.hdf5 import write_h5ad
from prts.stopwatch import peak_rss_mb
table = anndata.AnnData(numpy.arange(6.0).reshape(2, 3), obs=pandas.DataFrame(index=["a", "b"]))
write_h5ad(table, "t.h5ad", compression="gzip")
assert (anndata.read_h5ad("t.h5ad").X == table.X).all()
peak_rss_mb()
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_config_folder_may_be_in_the_home_folder(home: Path) -> None:
    from prts.cli.overrides import config_folders

    (home / "mine/tissue").mkdir(parents=True)
    _, flags = split_flags(["--config-dir", "~/mine"])
    assert config_folders(flags, Path("configs").resolve()) == [home / "mine"]


def slurm(monkeypatch: pytest.MonkeyPatch, **variables: str) -> None:
    for name, value in {"JOB_ID": "7", "JOB_NAME": "prts", "CPUS_ON_NODE": "8", **variables}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)


@pytest.mark.parametrize("variables", [{"NTASKS": "8"}, {"NTASKS": "2", "PROCID": "0", "STEP_NUM_TASKS": "1"}])
def test_tasks_of_slurm_that_are_meant_as_processors(
    variables: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    slurm(monkeypatch, **variables)
    make = partial(pl.Trainer, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
    with pytest.raises(RuntimeError, match="ntasks"):
        make()
    trainer = make(**own_processes(make))
    assert trainer.world_size == 1 and trainer.is_global_zero


def test_processes_that_srun_started_are_left_to_lightning(monkeypatch: pytest.MonkeyPatch) -> None:
    slurm(monkeypatch, NTASKS="2", STEP_NUM_TASKS="2", PROCID="1")
    assert own_processes(partial(pl.Trainer, devices=2, strategy="ddp")) == {}
    with pytest.raises(ParameterError, match=r"srun started 2 tasks .* use srun --ntasks=1 --cpus-per-task=2"):
        own_processes(partial(pl.Trainer, devices=1))
    monkeypatch.setenv("SLURM_NTASKS", "1")
    assert own_processes(partial(pl.Trainer, devices=1)) == {}


def test_jobs_side_by_side_have_one_gpu_each(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("shutil.which", lambda name: name)
    monkeypatch.setattr(devices, "_POLL_S", 0.01)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, 5")
    config = {"trainer": {"accelerator": "auto", "devices": 1}, "encoder": {"device": "auto"}}
    third: list[dict[str, str]] = []

    def wait() -> None:
        with own_gpu(config) as environment:
            third.append(environment)

    with own_gpu(config) as first:
        with own_gpu(config) as second:
            assert [first, second] == [{"CUDA_VISIBLE_DEVICES": "3"}, {"CUDA_VISIBLE_DEVICES": "5"}]
            waiting = threading.Thread(target=wait)
            waiting.start()
            waiting.join(0.1)
            assert waiting.is_alive()
        waiting.join(10)
        assert third == [{"CUDA_VISIBLE_DEVICES": "5"}]


@pytest.mark.parametrize(
    ("change", "gpus"),
    [
        ({"trainer": {"accelerator": "cpu", "devices": 1}, "encoder": {"device": "cpu"}}, 2),
        ({"trainer": {"accelerator": "gpu", "devices": -1}, "encoder": {"device": "auto"}}, 2),
        ({"trainer": {"accelerator": "auto", "devices": 1}}, 0),
    ],
)
def test_other_jobs_keep_their_devices(
    change: dict, gpus: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    monkeypatch.setattr("shutil.which", lambda name: name)
    with own_gpu(change) as environment:
        assert environment == {} and not list(tmp_path.iterdir())
