"""Kill `prepare`, `train` and `predict` at random moments, start them again, and compare with runs that nobody disturbed.

usage: python benchmarks/crash.py [--kills 20] [--only prepare,train,predict] [--seed 0]

SIGKILL, which no program can catch, comes at a random moment of the work. The same command is then started again (`train` with
`resume=true`) and must end well; every file that it leaves is compared with the undisturbed run's, byte by byte (of metrics.json all but
seconds and memory), and nothing else may be left behind. Prints a line per command: kills, how many runs ended as the undisturbed one,
how many did not (lost), and the largest number of epochs that a killed training did twice. Exits with 1 if anything was lost.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

EPOCHS = 6
NUCLEI = {"train": 300, "val": 150, "test": 150}
CHUNK = 64  # nuclei of features that a kill may cost; so few that a small section has several chunks


def start(arguments: Sequence[str], log: Path) -> int:
    """Run a command in a child that has everything imported already: kills then meet the work, not the imports. Returns its id."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        os.setsid()
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        from prts.cli.main import main as prts_main

        status = prts_main(arguments)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)


def finish(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def contents(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder that a command is to leave there."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if not path.is_file() or path.suffix == ".lock" or name.startswith((".hydra", "csv/", "figures/training")):
            continue
        data = path.read_bytes()
        if path.name == "metrics.json":
            figures = {k: v for k, v in json.loads(data).items() if not k.startswith(("seconds/", "peak_rss"))}
            data = json.dumps(figures, sort_keys=True).encode()
        if path.name == "config.yaml":
            data = re.sub(rb"resume: \w+", b"", data)
        if path.name != "train.log":
            found[name] = hashlib.sha256(data).hexdigest()
    return found


class Command:
    """One command, its arguments for a cache and an output, and what of both is compared."""

    def __init__(self, name: str, arguments: list[str], *, warm: Path | None = None) -> None:
        self.name, self._arguments, self._warm = name, arguments, warm

    def prepared(self, root: Path) -> Path:
        """A fresh root: a cache as it is before the command, and no output."""
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir(parents=True)
        if self._warm is not None:
            shutil.copytree(self._warm, root / "cache")
        return root

    def arguments(self, root: Path, again: bool) -> list[str]:
        given = [self.name, *self._arguments, f"paths.cache_dir={root / 'cache'}"]
        if self.name == "train":
            given += [f"hydra.run.dir={root / 'run'}", *(["resume=true"] if again else [])]
        if self.name == "predict":
            given.append(f"out={root / 'slide.h5ad'}")
        return given


def check(command: Command, kills: int, rng: random.Random, work: Path) -> int:
    """Kill, start again, compare; returns how many were lost."""
    whole = command.prepared(work / "whole" / command.name)
    began = time.perf_counter()
    if finish(start(command.arguments(whole, False), whole.with_suffix(".log"))) != 0:
        sys.exit(f"{command.name} fails undisturbed: see {whole.with_suffix('.log')}")
    seconds = time.perf_counter() - began
    wanted = contents(whole)
    same = lost = missed = repeated = 0
    while same + lost < kills:
        root = command.prepared(work / "killed" / command.name)
        log = root.with_suffix(".log")
        log.unlink(missing_ok=True)
        pid = start(command.arguments(root, False), log)
        time.sleep(rng.uniform(0.02, 1.0) * seconds)
        os.killpg(pid, signal.SIGKILL) if os.waitpid(pid, os.WNOHANG)[0] == 0 else None
        try:
            if finish(pid) != -signal.SIGKILL:
                raise ChildProcessError
        except ChildProcessError:  # it was faster this time
            missed += 1
            continue
        status = finish(start(command.arguments(root, True), log))
        got = contents(root)
        if status == 0 and got == wanted:
            same += 1
        else:
            lost += 1
            kept = work / f"lost-{command.name}-{lost}"
            shutil.copytree(root, kept)
            differ = sorted(name for name in wanted.keys() | got.keys() if wanted.get(name) != got.get(name))
            print(f"{command.name}: exit {status}, differs in {', '.join(differ) or 'nothing'}: {kept}", flush=True)
        repeated = max(repeated, len(re.findall(r"epoch +\d+: val/loss", log.read_text())) - EPOCHS)
    more = f", at most {max(repeated, 0)} epoch done twice" if command.name == "train" else ""
    print(
        f"{command.name}: {kills} kills within {seconds:.1f} s ({missed} came too late and do not count), {same} as undisturbed, "
        f"{lost} lost{more}",
        flush=True,
    )
    return lost


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--only", default="prepare,train,predict")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="work in this folder and leave it there")
    given = parser.parse_args()
    work = given.keep or Path(tempfile.mkdtemp(prefix="prts-crash-"))
    work.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads do not survive a fork

    import prts.features.extract
    from prts.cli.main import main as prts_main
    from prts.simulate.section import simulate_section

    prts.features.extract.CHUNK = CHUNK

    sections = []
    for seed, (name, cells) in enumerate(NUCLEI.items()):
        folder = simulate_section(work / "data" / name, cells=cells, genes=60, seed=seed)
        bins = folder / "binned_outputs/square_002um"
        sections.append(f"  {name}: {{image: '{folder / 'tissue_image.tif'}', bins: '{bins}'}}\n")
    tissue = (
        "name: crash\nspecies: human\nsections:\n" + "".join(sections) + "train: [train]\nval: [val]\ntest: [test]\n"
    )
    (work / "configs" / "tissue").mkdir(parents=True, exist_ok=True)
    (work / "configs" / "tissue" / "crash.yaml").write_text(tissue)
    setting = ["--config-dir", str(work / "configs"), "tissue=crash", "encoder=classical", "segmentation=watershed"]
    setting += ["panel=demo", "panel.n_genes=30"]
    training = [f"trainer.max_epochs={EPOCHS}", "trainer.accelerator=cpu", "evaluation.bootstrap=20"]
    cache = Command("warm", []).prepared(work / "warm") / "cache"
    model = work / "warm" / "run" / "model"
    commands = {
        "prepare": Command("prepare", setting),
        "train": Command("train", [*setting, *training], warm=cache),
        "predict": Command("predict", [f"bundle={model}", f"image={work / 'data' / 'train' / 'tissue_image.tif'}"]),
    }
    # in this process, which so imports whatever the children need
    if prts_main(Command("train", [*setting, *training]).arguments(work / "warm", False)) != 0:
        sys.exit("training fails undisturbed")
    rng = random.Random(given.seed)
    lost = sum(check(commands[name], given.kills, rng, work) for name in given.only.split(","))
    if given.keep is None and not lost:
        shutil.rmtree(work)
    sys.exit(int(lost > 0))


if __name__ == "__main__":
    main()
