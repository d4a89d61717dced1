"""Multiruns of `prts train` as a user starts them."""

import csv
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time

import pytest
from hydra import compose, initialize_config_dir

from prts.cli import scheduler
from prts.cli.app import config_dir, run
from prts.cli.exit_status import verdict
from prts.cli.hydra_errors import explained
from prts.cli.jobs import _cause, summarize, threads
from prts.cli.loggers import run_loggers
from prts.cli.multirun import planned_jobs, progress_line, say_what_runs_on, start_jobs
from prts.errors import InputError

# no encoder is run on morphology alone
TINY = [
    *("tissue.sections.train.simulate.cells=250", "tissue.sections.val.simulate.cells=250"),
    *("tissue.sections.test.simulate.cells=250", "data.use=[morphology]", "trainer.max_epochs=1"),
    *("evaluation.bootstrap=20", "logger=none", "report=false"),
]


def composed(*overrides, hydra=True):
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        return compose("train", list(overrides), return_hydra_config=hydra)


@pytest.mark.parametrize("sweep", sorted(path.stem for path in (config_dir() / "sweep").glob("*.yaml")))
def test_every_sweep_is_a_multirun_over_keys_that_are_there(sweep):
    cfg = composed(f"sweep={sweep}")
    assert cfg.hydra.mode.name == "MULTIRUN"
    first = {key: str(choices).split(",")[0] for key, choices in cfg.hydra.sweeper.params.items()}
    if sweep != "optuna":  # whose choices are distributions
        composed(f"sweep={sweep}", *(f"{key}={value}" for key, value in first.items()))
    assert first


def test_no_two_jobs_of_the_loss_grid_are_one_loss():
    params = composed("sweep=loss_weights").hydra.sweeper.params
    losses = set()
    for w_0 in map(float, params["loss.w_0"].split(",")):
        for alpha_w in map(float, params["loss.alpha_w"].split(",")):
            for lambda_1 in map(float, str(params["loss.lambda_1"]).split(",")):
                for lambda_2 in map(float, params["loss.lambda_2"].split(",")):
                    # the loss up to a factor, which AdamW does not notice
                    losses.add((round(alpha_w / w_0, 9), round(lambda_1 * w_0 / lambda_2, 9)))
    assert len(losses) == 36
    assert (5.0, 0.05) in losses  # the paper's optimum


def test_a_job_that_dies_says_how():
    assert _cause(-9).startswith("killed: by SIGKILL")
    assert _cause(-15) == _cause(143) == "killed: by SIGTERM"
    assert _cause(1).startswith("failed: ")
    assert _cause(0).startswith("failed: ")  # a job that ends well without metrics.json is not done
    assert verdict(InputError("x: is wrong")) == (2, "x: is wrong")
    assert verdict(ValueError("no\nmore")) == (1, "ValueError: no")


def test_a_job_can_be_sent_to_a_process_that_composed_nothing():
    sent = pickle.dumps(composed(hydra=False))
    code = "import pickle, sys; print(pickle.load(sys.stdin.buffer).seed)"
    out = subprocess.run([sys.executable, "-c", code], input=sent, capture_output=True, check=True).stdout
    assert out.strip() == b"0"


@pytest.fixture
def sweep(tmp_path):
    """A multirun of which job 0 is done, 1 failed and 2 is running."""
    for name in "012":
        (tmp_path / name / ".hydra").mkdir(parents=True)
        (tmp_path / name / ".hydra" / "overrides.yaml").write_text("[]")
    (tmp_path / "0" / "prepared.json").write_text("{}")
    (tmp_path / "1" / "error.txt").write_text("killed: by SIGKILL\n")
    (tmp_path / "2" / "train.log").write_text(
        "12:00 INFO prts.fit: network\n12:01 INFO prts.module: epoch   7: val/pcc 0.2\n"
    )
    return tmp_path


def test_progress_is_read_from_the_folders_of_the_jobs(sweep):
    assert progress_line(sweep, 5) == "1 of 5 jobs done, 1 killed, 1 running, 2 not started; job 2: val/pcc 0.2"
    (sweep / "2" / "metrics.json").write_text("{}")
    assert progress_line(sweep, None) == "2 jobs done, 1 killed"


def test_jobs_that_were_never_started_are_not_forgotten(sweep, capsys):
    (sweep / "1" / "error.txt").unlink()
    for name in "12":
        (sweep / name / "prepared.json").write_text("{}")
    assert summarize("prepare", sweep, 3) == 0
    assert summarize("prepare", sweep, 5) == 1
    assert "prts: 2 of 5 jobs were never started\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "n"),
    [
        (["sweep=ablations", "seed=1,2"], 10),  # a key of the command line replaces that of the sweep
        (["hydra.mode=MULTIRUN"], 1),
        (["sweep=optuna"], 40),
    ],
)
def test_the_number_of_jobs_is_known_before_they_start(overrides, n):
    hydra = composed(*[each for each in overrides if "," not in each]).hydra
    hydra.overrides.task = [each for each in overrides if "," in each]
    assert planned_jobs(hydra) == n


class BrokenProcessPool(Exception):  # noqa: N818  (the name in the standard library)
    pass


def test_lost_workers_are_replaced_three_times_in_the_same_folder(tmp_path):
    calls = []

    def start(again):
        calls.append(again)
        if len(calls) < failing:
            raise RuntimeError("wrapped") from BrokenProcessPool("killed")

    failing = 3
    start_jobs(start, lambda: tmp_path)
    assert calls == [[], [f"hydra.sweep.dir='{tmp_path}'"], [f"hydra.sweep.dir='{tmp_path}'"]]
    failing = 99
    with pytest.raises(InputError, match="workers were killed 4 times"):
        start_jobs(start, lambda: tmp_path)
    with pytest.raises(RuntimeError):  # before there is a folder, nothing is known about it
        start_jobs(start, lambda: None)


@pytest.mark.parametrize(
    ("launcher", "environment", "n"),
    [
        ({"_target_": "a.submitit_launcher.SlurmLauncher"}, {"SLURM_CPUS_PER_TASK": "1"}, "1"),
        ({"_target_": "a.submitit_launcher.LocalLauncher", "cpus_per_task": 1}, {}, "1"),
        (
            {"_target_": "a.submitit_launcher.SlurmLauncher", "cpus_per_task": 4096},
            {},
            str(len(os.sched_getaffinity(0))),
        ),
        ({"_target_": "a.submitit_launcher.SlurmLauncher"}, {"OMP_NUM_THREADS": "3", "SLURM_CPUS_PER_TASK": "1"}, None),
        ({"_target_": "hydra_plugins.hydra_joblib_launcher.joblib_launcher.JoblibLauncher"}, {}, None),
    ],
)
def test_threads_follow_the_cores_of_a_job(launcher, environment, n):
    assert threads(launcher, environment).get("OMP_NUM_THREADS") == n


def test_an_interrupt_names_what_runs_on(tmp_path, monkeypatch, capsys):
    for job in ("7_0", "7_1", "7_10"):
        (tmp_path / ".submitit" / job).mkdir(parents=True)
        (tmp_path / ".submitit" / job / f"{job}_submitted.pkl").touch()
    monkeypatch.setattr(scheduler, "_ask", lambda *command: "7_10\n7_0\n8_0\n" if command[0] == "squeue" else None)
    say_what_runs_on(tmp_path)
    assert "prts: 2 submitted jobs run or wait on; end them with `scancel 7_0 7_10`" in capsys.readouterr().err
    monkeypatch.setattr(scheduler, "_ask", lambda *command: None)
    say_what_runs_on(tmp_path)
    assert capsys.readouterr().err == ""


def test_what_the_launcher_refuses_is_said(tmp_path, monkeypatch, capsys):
    refused = RuntimeError("sbatch: error: invalid partition specified: x\nsbatch: error: Batch job submission failed")
    text = "hydra/launcher=submitit_slurm: sbatch: invalid partition specified: x; Batch job submission failed; "
    assert str(explained(refused, "train", [], [])).startswith(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run("train", ["-m", "seed=1,2", "hydra/launcher=submitit_slurm", "hydra.sweep.dir=sweep"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.startswith("prts: WARNING: sacct does not answer") for line in lines] == [True, False]
    assert lines[1].startswith("prts: hydra/launcher=submitit_slurm: srun was not found; ")
    assert not (tmp_path / "sweep").exists()


@pytest.mark.parametrize(
    ("command", "arguments", "n"),
    [
        ("predict", ["bundle=m", "image=a.tif,b.tif", "out=one.h5ad"], 2),
        ("predict", ["bundle=m", "image=a.tif,b.tif", "mpp=0.5,0.25", "out=one.h5ad,two.h5ad"], 4),
        ("simulate", ["seed=1,2", "out=folder"], 2),
    ],
)
def test_jobs_that_would_write_one_file_are_refused(command, arguments, n, capsys):
    assert run(command, ["-m", *arguments]) == 2
    line = capsys.readouterr().err
    assert re.match(rf"prts: out='?(one.h5ad|folder)'?: {n} jobs would write it; .*-\$\{{hydra:job.num\}}", line)


def test_loggers_are_closed_as_failed_when_the_run_fails(tmp_path):
    cfg = composed("logger=tensorboard", hydra=False)
    closed = []
    with pytest.raises(FloatingPointError), run_loggers(cfg, tmp_path) as loggers:
        for item in loggers.start():
            item.finalize = closed.append
        raise FloatingPointError("loss is NaN")
    assert closed == ["failed", "failed"]


def test_a_logger_that_is_not_installed_is_named_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"logger: wandb is not installed; run pip install 'prts-spatial\[loggers\]'"):
        run_loggers(composed("logger=wandb", hydra=False), tmp_path)


@pytest.mark.slow
def test_a_failing_job_spoils_nothing_and_what_is_done_is_not_done_again(tmp_path):
    sweep = tmp_path / "sweep"
    command = [
        *(sys.executable, "-m", "prts.cli.main", "train", "-m", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"),
        *(f"paths.cache_dir={tmp_path / 'cache'}", f"hydra.sweep.dir={sweep}", *TINY),
    ]
    first = subprocess.run([*command, "data.batch_size=64,-1,32"], capture_output=True, text=True, check=False)
    assert first.returncode == 2, first.stderr  # and not 1: what failed was wrong input
    assert "prts: 2 of 3 jobs done" in first.stderr
    with (sweep / "summary.csv").open() as handle:
        rows = list(csv.DictReader(handle))
    outcomes = [(row["data.batch_size"], row["status"]) for row in rows]
    assert outcomes == [("64", "done"), ("-1", "wrong input"), ("32", "done")]
    assert rows[1]["reason"] and f"job 1: wrong input: {rows[1]['reason']}" in first.stderr
    metrics = [json.loads((sweep / job / "metrics.json").read_text()) for job in "02"]
    assert [str(m["val/pcc_mean"])[:12] for m in metrics] == [rows[job]["val/pcc_mean"][:12] for job in (0, 2)]
    assert len({m["val/pcc_mean"] for m in metrics}) == 2

    written = (sweep / "0" / "metrics.json").stat().st_mtime_ns
    again = subprocess.run([*command, "data.batch_size=64"], capture_output=True, text=True, check=False)
    assert again.stdout.count("is already done") == 1
    assert (sweep / "0" / "metrics.json").stat().st_mtime_ns == written


@pytest.mark.slow
def test_a_job_of_two_processes_writes_one_log_and_one_set_of_results(tmp_path):
    command = [
        *(sys.executable, "-m", "prts.cli.main", "train", "-m", "seed=1", *TINY),
        *("trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", f"paths.cache_dir={tmp_path / 'cache'}"),
        f"hydra.sweep.dir={tmp_path / 'sweep'}",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=400)
    assert done.returncode == 0, done.stderr
    job = tmp_path / "sweep" / "0"
    assert "val/pcc_mean" in json.loads((job / "metrics.json").read_text())
    assert [path.name for path in job.glob("*.log")] == ["train.log"]
    log = (job / "train.log").read_text()
    assert "2 processes" in log
    assert log.count("epoch   0: val/loss") == log.count("gene panel from the training nuclei") == 1


@pytest.mark.nightly  # a minute of processor time; how lost workers are replaced is tested above
def test_a_sweep_goes_on_when_a_worker_is_killed(tmp_path):
    sweep = tmp_path / "sweep"
    command = [
        *(sys.executable, "-m", "prts.cli.main", "train", "-m", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"),
        *(f"paths.cache_dir={tmp_path / 'cache'}", f"hydra.sweep.dir={sweep}", *TINY),
        *("trainer.max_epochs=300,3", "callbacks.early_stopping.patience=1000"),
    ]
    run = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while run.poll() is None and not (sweep / "0" / "resume.ckpt").exists():
        time.sleep(0.05)
    holder = (sweep / "0" / ".job.lock").read_text()
    os.kill(int(holder.split()[1]), signal.SIGKILL)  # the worker, not the process of the job
    _, stderr = run.communicate()

    assert run.returncode == 0, stderr
    assert "prts: a worker was killed; the jobs that it ended start again and resume" in stderr
    assert "prts: 2 of 2 jobs done" in stderr
    log = (sweep / "0" / "train.log").read_text()
    assert log.count(" epoch   0:") == 1 and log.count(" resuming from ") == 1
