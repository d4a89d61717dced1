"""Multiruns of `prts train` as a user starts them."""

import csv
import json
import subprocess
import sys

import pytest
from hydra import compose, initialize_config_dir

from prts.cli.app import config_dir, verdict
from prts.cli.jobs import _cause
from prts.errors import InputError
from prts.report.loggers import RunLoggers

TINY = [
    *("tissue.sections.train.simulate.cells=250", "tissue.sections.val.simulate.cells=250"),
    *("tissue.sections.test.simulate.cells=250", "trainer.max_epochs=1", "evaluation.bootstrap=20"),
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
    assert _cause(1).startswith("failed: ")
    assert verdict(InputError("x: is wrong")) == (2, "x: is wrong")
    assert verdict(ValueError("no\nmore")) == (1, "ValueError: no")


def test_loggers_are_closed_as_failed_when_the_run_fails(tmp_path):
    cfg = composed("logger=tensorboard", hydra=False)
    closed = []
    with pytest.raises(FloatingPointError), RunLoggers(cfg, tmp_path) as loggers:
        for item in loggers.start():
            item.finalize = closed.append
        raise FloatingPointError("loss is NaN")
    assert closed == ["failed", "failed"]
    assert (tmp_path / "tensorboard").is_dir()


def test_a_logger_that_is_not_installed_is_named_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"logger=wandb: wandb is not installed; pip install 'prts\[loggers\]'"):
        RunLoggers(composed("logger=wandb", hydra=False), tmp_path)


@pytest.mark.slow
def test_a_failing_job_spoils_nothing_and_a_second_start_repeats_only_it(tmp_path):
    sweep = tmp_path / "sweep"
    command = [
        *(sys.executable, "-m", "prts.cli.main", "train", "-m", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"),
        *(f"paths.cache_dir={tmp_path / 'cache'}", f"hydra.sweep.dir={sweep}", *TINY),
        *("seed=1,2", "data.batch_size=64,-1"),
    ]
    # 2 and not 1: what failed was all wrong input
    first = subprocess.run(command, capture_output=True, text=True, check=False)
    assert first.returncode == 2, first.stderr
    assert "prts: 2 of 4 jobs done" in first.stderr
    with (sweep / "summary.csv").open() as handle:
        rows = list(csv.DictReader(handle))
    assert [(row["seed"], row["data.batch_size"], row["status"]) for row in rows] == [
        *(("1", "64", "done"), ("1", "-1", "wrong input")),
        *(("2", "64", "done"), ("2", "-1", "wrong input")),
    ]
    assert all(
        row["reason"] and f"job {row['job']}: wrong input: {row['reason']}" in first.stderr for row in rows[1::2]
    )
    # each process counts its own memory and draws from its own seed
    metrics = [json.loads((sweep / job / "metrics.json").read_text()) for job in ("0", "2")]
    assert metrics[0]["val/pcc_mean"] != metrics[1]["val/pcc_mean"]
    assert str(metrics[0]["val/pcc_mean"])[:12] == rows[0]["val/pcc_mean"][:12]

    written = (sweep / "0" / "metrics.json").stat().st_mtime_ns
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.returncode == 2
    assert (sweep / "0" / "metrics.json").stat().st_mtime_ns == written
    assert again.stderr.count("is done already") == 2
