"""Sweeps and cohorts on a real SLURM: a cluster of one node and one core, started for the test without systemd.

The tests need root, slurmctld, slurmd and munged; with slurmdbd and mariadbd, they also test what submitit learns from `sacct`.
"""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import tifffile

from prts.cli.scheduler import submitted
from prts.cohort.states import read_state
from prts.simulate.section import simulate_section

_ACCOUNTING = ("slurmdbd", "mariadbd", "mariadb-install-db")
_DAEMONS = ("munged", "slurmctld", "slurmd")

_SLURM_CONF = """
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SlurmctldPort={ctld}
SlurmdPort={slurmd}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/affinity
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
MpiDefault=none
JobRequeue=1
{accounting}
NodeName=localhost NodeAddr=127.0.0.1 CPUs=1 RealMemory=4000 State=UNKNOWN
PartitionName=only Nodes=localhost Default=YES MaxTime=INFINITE State=UP
"""
_ACCOUNTING_CONF = """AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={dbd}
AccountingStoragePass={folder}/munge.socket
JobAcctGatherType=jobacct_gather/linux"""
_SLURMDBD_CONF = """
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort={dbd}
SlurmUser=root
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={mysql}
StorageUser=root
PidFile={folder}/slurmdbd.pid
LogFile={folder}/slurmdbd.log
"""


def lacking():
    """What this machine lacks for a cluster; empty if nothing."""
    names = [name for name in _DAEMONS if shutil.which(name) is None]
    if names:
        return f"{', '.join(names)} not installed (apt-get install slurm-wlm munge slurmdbd mariadb-server)"
    return "" if os.geteuid() == 0 else "slurmd needs root"


pytestmark = [pytest.mark.slow, pytest.mark.skipif(lacking() != "", reason=lacking())]


def accounting():
    return all(shutil.which(name) for name in _ACCOUNTING)


def free_ports(n):
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(n)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def wait_for(condition, what, seconds=240):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what} did not happen within {seconds} s"
        time.sleep(0.1)


@contextlib.contextmanager
def daemons(folder, environment):
    """A function that starts a daemon in the foreground; all are ended afterwards, the last first."""
    with contextlib.ExitStack() as stack:

        def start(*command):
            log = stack.enter_context((folder / f"{command[0]}.out").open("wb"))
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)

            def stop():
                process.terminate()
                try:
                    process.wait(20)
                except subprocess.TimeoutExpired:
                    process.kill()

            stack.callback(stop)

        yield start


def start_accounting(folder, start, mysql, environment):
    data = (f"--datadir={folder}/mysql", "--user=root")
    install = ["mariadb-install-db", *data, "--auth-root-authentication-method=normal", "--skip-test-db"]
    subprocess.run(install, check=True, capture_output=True)
    start(
        *("mariadbd", "--no-defaults", *data, "--skip-grant-tables", "--bind-address=127.0.0.1", f"--port={mysql}"),
        *(f"--socket={folder}/mysql.socket", f"--pid-file={folder}/mysql.pid"),
    )
    wait_for(lambda: answers("mariadb-admin", "--no-defaults", f"--socket={folder}/mysql.socket", "ping"), "mariadbd")
    start("slurmdbd", "-D")
    wait_for(lambda: answers("sacctmgr", "-n", "show", "cluster", env=environment), "slurmdbd")


def answers(*command, expected="", env=None):
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    return done.returncode == 0 and expected in done.stdout


@pytest.fixture(scope="module")
def slurm():
    """The environment of SLURM's commands, while a cluster runs."""
    with tempfile.TemporaryDirectory(prefix="slurm-", dir="/tmp") as name:  # sockets need a short path
        folder = Path(name)
        for part in ("state", "spool"):
            (folder / part).mkdir()
        ctld, slurmd, dbd, mysql = free_ports(4)
        values = {"folder": folder, "ctld": ctld, "slurmd": slurmd, "dbd": dbd, "mysql": mysql}
        values["accounting"] = _ACCOUNTING_CONF.format_map(values) if accounting() else ""
        (folder / "slurm.conf").write_text(_SLURM_CONF.format_map(values))
        (folder / "slurmdbd.conf").write_text(_SLURMDBD_CONF.format_map(values))
        (folder / "slurmdbd.conf").chmod(0o600)
        (folder / "munge.key").write_bytes(os.urandom(128))
        (folder / "munge.key").chmod(0o400)
        environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        with daemons(folder, environment) as start:
            start(
                *("munged", "--foreground", "--force", f"--key-file={folder}/munge.key"),
                *(f"--socket={folder}/munge.socket", f"--pid-file={folder}/munged.pid"),
                *(f"--log-file={folder}/munged.log", f"--seed-file={folder}/munged.seed"),
            )
            if accounting():
                start_accounting(folder, start, mysql, environment)
            start("slurmctld", "-D")
            start("slurmd", "-D", "-N", "localhost")
            wait_for(lambda: answers("sinfo", "-h", "-o", "%T", expected="idle", env=environment), "slurmctld")
            yield environment
            subprocess.run(["scancel", "--me"], env=environment, check=False)  # what a failed test left
            wait_for(lambda: not answers("squeue", "-h", expected="root", env=environment), "the end of its jobs")


@pytest.fixture
def command(tmp_path):
    """A sweep of four small trainings: two long ones and two of a few epochs."""
    sections = [
        f"tissue.sections.{name}.simulate.{key}"
        for name in ("train", "val", "test")
        for key in ("cells=200", "genes=150")
    ]
    return [
        *(sys.executable, "-m", "prts.cli.main", "train", "-m", "trainer.max_epochs=1000,1001,2,3", *sections),
        *("panel.n_genes=60", "data.use=[morphology]", "callbacks.early_stopping.patience=1000", "logger=none"),
        *("evaluation.bootstrap=20", "report=false", f"paths.cache_dir={tmp_path / 'cache'}"),
        *(f"hydra.sweep.dir={tmp_path / 'sweep'}", "hydra/launcher=submitit_slurm", "hydra.launcher.mem_gb=2"),
        # submitit takes a signal in the last ten minutes for the time limit
        *("hydra.launcher.cpus_per_task=1", "hydra.launcher.timeout_min=10"),
    ]


def epochs(sweep, job):
    """How often the job began its first epoch."""
    return (sweep / job / "train.log").read_text().count(" epoch   0:")


def cancel(slurm, *arguments):
    """Run scancel without waiting for it: once the signal has requeued the job, it tries again until it is tired of it."""
    subprocess.Popen(["scancel", *arguments], env=slurm, stderr=subprocess.DEVNULL)


@contextlib.contextmanager
def started(command, environment):
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()


@pytest.mark.nightly
def test_a_sweep_survives_cancellation_and_time_limits(slurm, command, tmp_path):
    sweep = tmp_path / "sweep"
    with started(command, slurm) as run:
        wait_for(lambda: len(submitted(sweep)) == 4, "the submission")
        ids = submitted(sweep)
        if accounting():  # without it, nobody learns that a waiting job is gone
            cancel(slurm, ids[3])
        wait_for((sweep / "0" / "resume.ckpt").exists, "the second epoch of job 0")
        cancel(slurm, "--signal=USR2", ids[0])  # as SLURM does before the time limit
        messages = sweep / ".submitit" / ids[0] / f"{ids[0]}_0_log.out"
        wait_for(lambda: "Requeued job" in messages.read_text(), "the end of the first attempt of job 0")
        wait_for((sweep / "1" / "resume.ckpt").exists, "the second epoch of job 1")
        cancel(slurm, ids[1])
        _, stderr = run.communicate(timeout=400)

    assert run.returncode == 1, stderr
    assert "prts: job 1: killed: by SIGTERM" in stderr
    if accounting():
        assert f"prts: SLURM job {ids[3]}: left the queue before it started" in stderr
        assert "prts: 1 of 4 jobs were never started" in stderr
    else:
        assert "prts: WARNING: sacct does not answer" in stderr
    assert (sweep / "0" / "metrics.json").is_file() and (sweep / "2" / "metrics.json").is_file()
    assert "this job is timed-out" in messages.read_text()
    assert epochs(sweep, "0") == 1  # the second attempt went on from the checkpoint

    written = (sweep / "0" / "metrics.json").stat().st_mtime_ns
    again = subprocess.run(command, env=slurm, capture_output=True, text=True, timeout=400, check=False)
    assert again.returncode == 0, again.stderr
    assert "prts: 4 of 4 jobs done" in again.stderr
    assert epochs(sweep, "1") == 1
    assert (sweep / "0" / "metrics.json").stat().st_mtime_ns == written


def test_a_wrong_partition_is_named_and_leaves_nothing(slurm, command, tmp_path):
    done = subprocess.run(
        [*command, "hydra.launcher.partition=gpus"], env=slurm, capture_output=True, text=True, check=False
    )

    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(
        "prts: hydra/launcher=submitit_slurm: sbatch: invalid partition specified: gpus"
    )
    assert not (tmp_path / "sweep").exists()


@pytest.mark.nightly
def test_a_cohort_survives_cancellation_and_time_limits(slurm, tmp_path):
    """Two workers, one after the other on the only core: the first is canceled, the second reaches its time limit."""
    names = [f"s{k}" for k in range(5)]
    pixels = tifffile.imread(simulate_section(tmp_path / "section", cells=200, genes=50, seed=5) / "tissue_image.tif")
    (tmp_path / "slides").mkdir()
    for k, name in enumerate(names):
        tifffile.imwrite(tmp_path / f"slides/{name}.tif", np.roll(pixels, 23 * k, axis=1), photometric="rgb")
    prts, cache = (sys.executable, "-m", "prts.cli.main"), f"paths.cache_dir={tmp_path / 'cache'}"
    sections = [
        f"tissue.sections.{name}.simulate.{key}"
        for name in ("train", "val", "test")
        for key in ("cells=200", "genes=150")
    ]
    model = [*prts, "train", *sections, "trainer.max_epochs=1", "panel.n_genes=60", "data.use=[morphology]", cache]
    model += [f"hydra.run.dir={tmp_path / 'run'}", "logger=none", "evaluation.bootstrap=20", "report=false"]
    subprocess.run(model, check=True, capture_output=True)
    out = tmp_path / "out"
    command = [*prts, "predict", "-m", f"bundle={tmp_path / 'run/model'}", f"slides={tmp_path / 'slides'}", cache]
    command += [f"out={out}", "mpp=0.5", "check_scale=false", "worker=0,1", "hydra/launcher=submitit_slurm"]
    command += ["hydra.launcher.mem_gb=2", "hydra.launcher.cpus_per_task=1", "hydra.launcher.timeout_min=10"]

    def states():
        return [state for name in names if (state := read_state(out, name)) is not None]

    def done():
        return sum(state.status == "done" for state in states())

    with started(command, slurm) as run:
        wait_for(lambda: done() >= 1 and len(states()) > done(), "the second slide of the first worker")
        first, second = submitted(out / "workers")[:2]
        cancel(slurm, first)
        by_first, messages = done(), out / f"workers/.submitit/{second}/{second}_0_log.out"
        wait_for(lambda: done() > by_first and len(states()) > done(), "the second slide of the second worker")
        cancel(slurm, "--signal=USR2", second)  # as SLURM does before the time limit
        wait_for(lambda: "Requeued job" in messages.read_text(), "the end of the second worker's first attempt")
        _, stderr = run.communicate(timeout=400)

    assert run.returncode == 0, stderr
    assert "prts: 1 worker ended early: killed: by SIGTERM" in stderr
    assert f"prts: 5 of 5 slides done: {out / 'summary.html'}" in stderr
    assert all((out / f"{name}.h5ad").is_file() for name in names)
    # each interruption cost the slide in hand one attempt at most, and nothing was done twice
    attempts = [state.attempts for state in states()]
    assert max(attempts) <= 3 and sum(attempts) <= 7
