"""Multiruns of `prts train` as a user starts them."""

import csv
import json
import pickle
import subprocess
import sys

import pytest
from hydra import compose, initialize_config_dir

from prts.cli.app import config_dir
from prts.cli.exit_status import exit_status_of
from prts.cli.jobs import _cause
from prts.cli.loggers import run_loggers
from prts.errors import InputError

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
    assert _cause(-15) == _cause(143) == "killed: by SIGTERM"
    assert _cause(1).startswith("failed: ")
    assert _cause(0).startswith("failed: ")  # a job that ends well without metrics.json is not done
    assert exit_status_of(InputError("x: is wrong")) == (2, "x: is wrong")
    assert exit_status_of(ValueError("no\nmore")) == (1, "ValueError: no")


def test_a_job_can_be_sent_to_a_process_that_composed_nothing():
    sent = pickle.dumps(composed(hydra=False))
    code = "import pickle, sys; print(pickle.load(sys.stdin.buffer).seed)"
    out = subprocess.run([sys.executable, "-c", code], input=sent, capture_output=True, check=True).stdout
    assert out.strip() == b"0"


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
        *(f"paths.cache_dir={tmp_path / 'cache'}", f"hydra.sweep.dir={sweep}", "logger=none", *TINY),
    ]
    first = subprocess.run([*command, "data.batch_size=64,-1,32,128"], capture_output=True, text=True, check=False)
    assert first.returncode == 2, first.stderr  # and not 1: what failed was wrong input
    assert "prts: 3 of 4 jobs done" in first.stderr
    with (sweep / "summary.csv").open() as handle:
        rows = list(csv.DictReader(handle))
    outcomes = [(row["data.batch_size"], row["status"]) for row in rows]
    assert outcomes == [("64", "done"), ("-1", "wrong input"), ("32", "done"), ("128", "done")]
    assert rows[1]["reason"] and f"job 1: wrong input: {rows[1]['reason']}" in first.stderr
    metrics = [json.loads((sweep / job / "metrics.json").read_text()) for job in "023"]
    assert [str(m["val/pcc_mean"])[:12] for m in metrics] == [rows[job]["val/pcc_mean"][:12] for job in (0, 2, 3)]
    assert len({m["val/pcc_mean"] for m in metrics}) == 3

    written = (sweep / "0" / "metrics.json").stat().st_mtime_ns
    again = subprocess.run([*command, "data.batch_size=64"], capture_output=True, text=True, check=False)
    assert again.stdout.count("is already done") == 1
    assert (sweep / "0" / "metrics.json").stat().st_mtime_ns == written
