"""Kill `prepare`, `train` and `predict` at random moments, restart them, and compare the results with undisturbed runs.

usage: python benchmarks/crash.py [--kills 20] [--only prepare,train,predict] [--seed 0]

Commands are killed by SIGKILL at a random moment, every other time during a random epoch of `train`. The same command is restarted (`train`
with `resume=true`) and must succeed. Every file is compared with the undisturbed run byte by byte, except for seconds and memory in
metrics.json, `resume` in config.yaml, the log, the curves of Lightning and their figure, and lock files. No other file may be left behind.
Prints a line per command: kills, runs that ended like the undisturbed one, runs that did not (lost), work done twice, and the stages that
were killed. Exits with 1 if anything was lost.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

EPOCHS = 10
AT_END = os.WEXITED | os.WNOHANG | os.WNOWAIT
NUCLEI = {"train": 100, "val": 60, "test": 60}
CHUNK = 16  # nuclei per chunk of features; so few that a small section has several chunks
# Stage of a killed command, by the last of these lines in its log.
STAGES = {
    "prepare": {
        r": nuclei by ": "nuclei",
        r": counts of nuclei": "counts",
        r"gene panel from": "panel",
        r"panel top": "features",
    },
    "train": {
        r"training, .* features": "epochs",
        r"kept the weights": "scores",
        r"wrote .*predictions.h5ad": "figures",
        r"test PCC": "page",
    },
    "predict": {
        r": nuclei by ": "nuclei",
        r"nuclei by watershed, median": "features",
        r"features-.* nuclei in": "prediction",
    },
}


def start(work: Callable[[], int], log: Path) -> int:
    """Work in a child process that has imported everything, so that kills hit the work. Returns its id."""
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
        status = work()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)


def finish(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def prts(arguments: Sequence[str]) -> Callable[[], int]:
    def work() -> int:
        import prts.features.extract
        from prts.cli.main import main

        prts.features.extract.CHUNK = CHUNK
        return main(arguments)

    return work


def contents(folder: Path) -> dict[str, str]:
    """SHA-256 of every file in a folder that a command should leave."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if (
            not path.is_file()
            or path.suffix == ".lock"
            or name.startswith(("run/.hydra", "run/csv/", "run/figures/tr"))
        ):
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
    """A command with its cache and output."""

    def __init__(self, name: str, arguments: list[str], *, warm: Path | None = None) -> None:
        self.name, self._arguments, self._warm = name, arguments, warm

    def prepared(self, root: Path) -> Path:
        """A new root with the cache before the command and no output."""
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir(parents=True)
        if self._warm is not None:
            shutil.copytree(self._warm, root / "cache")
        return root

    def arguments(self, root: Path, again: bool) -> list[str]:
        given = [self.name, *self._arguments, f"paths.cache_dir={root / 'cache'}"]
        if self.name == "train":
            # the same folder each time, since the bundle contains the config
            given += [f"hydra.run.dir={root / 'run'}", *(["resume=true"] if again else [])]
        if self.name == "predict":
            given.append(f"out={root / 'slide.h5ad'}")
        return given


def stage(command: str, log: str) -> str:
    """Stage of a killed command according to its log."""
    said = "start"
    for line in log.splitlines():
        said = next((name for pattern, name in STAGES[command].items() if re.search(pattern, line)), said)
    return said


def chunks(root: Path) -> int:
    """Number of finished chunks of features."""
    return sum(1 for path in root.rglob("*.parts/*.npy") if not path.name.startswith("."))


def check(command: Command, kills: int, rng: random.Random, work: Path) -> int:
    """Kill, restart, compare; returns the number of lost runs."""
    root = work / command.name
    log = root.with_suffix(".log")
    log.unlink(missing_ok=True)
    command.prepared(root)
    began = time.perf_counter()
    if finish(start(prts(command.arguments(root, False)), log)) != 0:
        sys.exit(f"{command.name} fails undisturbed: see {log}")
    seconds = time.perf_counter() - began
    wanted = contents(root)
    same = lost = missed = repeated = again = 0
    met: Counter[str] = Counter()
    while same + lost < kills:
        command.prepared(root)
        log.unlink(missing_ok=True)
        pid = start(prts(command.arguments(root, False)), log)
        if command.name == "train" and (same + lost) % 2:
            # epochs are a small part of so short a training: every other kill comes within them
            epoch = rng.randrange(EPOCHS)
            while (
                not (log.is_file() and f"epoch {epoch:3d}: " in log.read_text())
                and os.waitid(os.P_PID, pid, AT_END) is None
            ):
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 0.1))
        else:
            time.sleep(rng.uniform(0.02, 1.0) * seconds)
        if os.waitpid(pid, os.WNOHANG)[0]:  # it was faster this time
            missed += 1
            continue
        os.killpg(pid, signal.SIGKILL)
        if finish(pid) != -signal.SIGKILL:
            missed += 1
            continue
        before, whole = log.read_text(), chunks(root)
        status = finish(start(prts(command.arguments(root, True)), log))
        after = log.read_text()[len(before) :]
        found = re.search(r"\.parts: (\d+) of \d+ chunks are already done", after)
        kept = int(found[1]) if found else 0
        met[stage(command.name, before)] += 1
        got = contents(root)
        if status == 0 and got == wanted and kept == whole:
            same += 1
        else:
            lost += 1
            kept_at = work / f"lost-{command.name}-{lost}"
            shutil.copytree(root, kept_at)
            shutil.copy(log, kept_at.with_suffix(".log"))
            differ = sorted(name for name in wanted.keys() | got.keys() if wanted.get(name) != got.get(name))
            print(
                f"{command.name}: exit {status}, {kept} of {whole} chunks kept, differs in {', '.join(differ) or 'nothing'}: {kept_at}",
                flush=True,
            )
        again += "going on from" in after
        repeated = max(repeated, len(re.findall(r"epoch +\d+: val/loss", before + after)) - EPOCHS)
    more = (
        f"; {again} went on from a checkpoint, at most {max(repeated, 0)} epoch done twice"
        if command.name == "train"
        else ""
    )
    print(
        f"{command.name}: {kills} kills within {seconds:.1f} s ({missed} came too late and do not count), {same} as undisturbed, "
        f"{lost} lost{more}; met at {', '.join(f'{name} {n}' for name, n in met.most_common())}",
        flush=True,
    )
    return lost


def simulated(work: Path) -> list[str]:
    """Three small sections outside of the cache, and the arguments that name them."""
    from prts.simulate.section import simulate_section

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
    return [*setting, "panel=demo", "panel.n_genes=30"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--only", default="prepare,train,predict")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="work in this folder, leave it there, and begin with what is there")
    given = parser.parse_args()
    work = given.keep or Path(tempfile.mkdtemp(prefix="prts-crash-"))
    work.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads do not survive a fork

    training = [
        f"trainer.max_epochs={EPOCHS}",
        "trainer.accelerator=cpu",
        "evaluation.bootstrap=20",
        "data.batch_size=32",
    ]
    warm = Command("train", [])
    model = work / "warm" / "run" / "model"

    def once() -> int:
        """A whole run in a child, which notes what it imported: this process must not compute, or its children could not."""
        setting = simulated(work)
        (work / "setting.json").write_text(json.dumps(setting))
        root = warm.prepared(work / "warm")
        slide = work / "data" / "train" / "tissue_image.tif"
        status = prts(Command("train", [*setting, *training]).arguments(root, False))()
        predict = ["predict", f"bundle={model}", f"image={slide}", f"out={root / 'slide.h5ad'}"]
        status = status or prts([*predict, f"paths.cache_dir={root / 'predicted'}"])()
        (work / "modules.json").write_text(json.dumps(sorted(sys.modules)))
        return status

    # what was kept serves again
    if not (work / "modules.json").is_file() and finish(start(once, work / "warm.log")) != 0:
        sys.exit(f"training fails undisturbed: see {work / 'warm.log'}")
    for name in json.loads((work / "modules.json").read_text()):
        with contextlib.suppress(Exception):
            importlib.import_module(name)
    setting = json.loads((work / "setting.json").read_text())
    commands = {
        "prepare": Command("prepare", setting),
        "train": Command("train", [*setting, *training], warm=work / "warm" / "cache"),
        "predict": Command("predict", [f"bundle={model}", f"image={work / 'data' / 'train' / 'tissue_image.tif'}"]),
    }
    rng = random.Random(given.seed)
    lost = sum(check(commands[name], given.kills, rng, work) for name in given.only.split(","))
    if given.keep is None and not lost:
        shutil.rmtree(work)
    sys.exit(int(lost > 0))


if __name__ == "__main__":
    main()
