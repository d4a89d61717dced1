"""Feed thousands of broken files to every reader: it must read them, or refuse them in one line.

usage: python benchmarks/fuzz.py [--inputs 10000] [--only h5,parquet,...] [--engine atheris|hypothesis|both] [--seed 0] [--jobs 1]
       python benchmarks/fuzz.py --only READER --replay FILE

Atheris (libFuzzer) mutates the bytes of small valid files and continues from mutations that reach new code of prts. Hypothesis keeps the
structure of a format and changes its contents: HDF5 with other types, shapes, values, links and attributes, JSON and GeoJSON of any form,
parquet with other columns, TIFF directories with other entries, pickles in valid archives. An input is a finding unless the reader returns
or raises InputError with one printable line that names the file: another exception, a process that dies, more than 20 s of CPU time, or
more than 3 GB. Readers run in child processes, so that a crash is one finding and the next input follows. Prints a line per reader and
engine, and every kind of finding once, with a file to replay it; exits with 1 if there are any.

HDF5 can hang, crash, or ask for too much memory on crafted files; these findings are known (docs/decisions.md).
"""

from __future__ import annotations

import argparse
import faulthandler
import hashlib
import logging
import mmap
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from benchmarks.fuzzing.readers import Reader

ENGINES = ("atheris", "hypothesis")
READERS = tuple(
    "h5 parquet scalefactors geojson geoparquet wkt shapefile labels region tiff svs picture "
    "bundle bundle-weights panel genes tables store spots prediction pth safetensors".split()
)
_SECONDS = 20.0
_BYTES = 8 << 30  # address space
_KBYTES = 3 << 20  # resident memory
_MESSAGE = 2000  # longest message
_EXAMPLES = 1000  # of one run of Hypothesis, which keeps them all
_STARTED, _ACCEPTED, _REFUSED, _FOUND, _SLOWEST_MS = range(5)


class Trial:
    """Feeds one reader in a separate folder."""

    def __init__(self, reader: Reader, folder: Path) -> None:
        self.reader, self.folder = reader, folder
        self.path = folder / reader.where
        self.path.parent.mkdir(parents=True, exist_ok=True)
        for name, data in reader.beside.items():
            (folder / name).write_bytes(data)

    def __call__(self, data: bytes) -> tuple[str, str]:
        """Outcome of an input: `accepted`, `refused` or the kind of finding, and the message or traceback."""
        from prts.errors import InputError

        self.path.write_bytes(data)
        try:
            self.reader.read(self.path)
        except InputError as error:
            if any(isinstance(cause, MemoryError) for cause in _causes(error)):
                return "memory", traceback.format_exc()  # caught, but too much was requested
            message = str(error)
            if not message.isprintable() or len(message) > _MESSAGE or str(self.folder) not in message:
                return "message", message
            return "refused", message
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # noqa: BLE001 (panics of Rust are not Exceptions)
            return _kind(error), traceback.format_exc()
        return "accepted", ""


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _kind(error: BaseException) -> str:
    """Type of an exception and its last lines in prts and overall, which identify a finding."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "/prts/" in frame.filename]
    places = (frame for frame in (own[-1] if own else None, frames[-1]) if frame is not None)
    return " ".join((type(error).__name__, *(f"{Path(f.filename).name}:{f.lineno}" for f in places)))


def _kbytes(name: str) -> int:
    """Memory of this process: current (`VmRSS`) or peak (`VmHWM`)."""
    status = Path("/proc/self/status").read_text()
    return int(status[status.index(name) :].split(maxsplit=2)[1])


def _processor_seconds(pid: int) -> float:
    ticks = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")


class Campaign:
    """A number of inputs for one reader from one engine."""

    def __init__(self, reader: Reader, engine: str, n: int, seed: int, work: Path, part: int = 0) -> None:
        self.reader, self.engine, self.n, self.seed = reader, engine, n, seed + 1_000_000 * part
        self.folder = work / engine / reader.name / str(part)
        self.found = work / "findings"
        self.tally = np.frombuffer(mmap.mmap(-1, 5 * 8), np.int64)  # shared with child processes

    def run(self) -> Iterator[None]:
        """Yield while waiting for the child process."""
        for directory in (self.found, self.folder / "corpus"):
            directory.mkdir(parents=True, exist_ok=True)
        sound = Trial(self.reader, self.folder / "input")
        for seed in self.reader.seeds:
            (self.folder / "corpus" / hashlib.sha1(seed).hexdigest()).write_bytes(seed)
            if (said := sound(seed))[0] != "accepted":
                sys.exit(f"{self.reader.name}: a seed is refused: {said}")
        idle, attempt = 0, 0
        while self.tally[_STARTED] < self.n:
            before = int(self.tally[_STARTED])
            how = yield from self._watch(self._child(attempt))
            if self._in_progress():
                self.tally[_FOUND] += 1
                self._save(how, how, (self.folder / "input" / self.reader.where).read_bytes())
            idle = 0 if self.tally[_STARTED] > before else idle + 1
            if idle == 3:
                sys.exit(f"{self.reader.name}: {self.engine} does not start: see {self.folder / 'log'}")
            attempt += 1

    def _in_progress(self) -> bool:
        started, *ended, _ = map(int, self.tally)
        return started > sum(ended)

    def _child(self, attempt: int) -> int:
        pid = os.fork()
        if pid:
            return pid
        try:
            log = os.open(self.folder / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            faulthandler.enable(os.fdopen(log, "w"))
            vm_pages = int(Path("/proc/self/statm").read_text().split()[0])
            limit = vm_pages * resource.getpagesize() + _BYTES
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            warnings.simplefilter("ignore")
            logging.disable()
            trial = Trial(self.reader, self.folder / "input")
            {"atheris": self._atheris, "hypothesis": self._hypothesis}[self.engine](
                lambda data: self._one(trial, data), self.seed + 1000 * attempt
            )
        except BaseException:  # noqa: BLE001 (a child must never continue as its parent)
            traceback.print_exc()
        finally:
            os._exit(1)

    def _one(self, trial: Trial, data: bytes) -> None:
        if self.tally[_STARTED] >= self.n:
            os._exit(0)
        self.tally[_STARTED] += 1
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        before = _kbytes("VmRSS")
        began = time.process_time()
        what, text = trial(data)
        seconds = time.process_time() - began
        self.tally[_SLOWEST_MS] = max(self.tally[_SLOWEST_MS], int(1000 * seconds))
        memory = _kbytes("VmHWM") - before
        if what in ("accepted", "refused") and (seconds > _SECONDS or memory > _KBYTES):
            what, text = "slow" if seconds > _SECONDS else "memory", f"{seconds:.0f} s, {memory >> 10} MB"
        self.tally[{"accepted": _ACCEPTED, "refused": _REFUSED}.get(what, _FOUND)] += 1
        if what not in ("accepted", "refused"):
            self._save(what, text, data)

    def _save(self, kind: str, text: str, data: bytes) -> None:
        """Save the first input of each kind of finding."""
        path = self.found / f"{self.reader.name}-{hashlib.sha1(kind.encode()).hexdigest()[:8]}"
        if not path.exists():
            path.write_bytes(data)
            path.with_suffix(".txt").write_text(f"{kind}\n{text}\n", errors="backslashreplace")

    def _watch(self, pid: int) -> Generator[None, None, str]:
        """Wait for a child, or kill it if an input takes too long; returns how it ended."""
        last, since, used = -1, 0.0, 0.0
        while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            if (now := int(self.tally[_STARTED])) != last:
                last, since, used = now, time.monotonic(), _processor_seconds(pid)
            # the machine may be busy, or the child may wait forever
            late = _processor_seconds(pid) - used > _SECONDS or time.monotonic() - since > 30 * _SECONDS
            if late and self._in_progress():
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                return "hang"
            yield
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        return f"the process died: {signal.Signals(-status).name if status < 0 else f'exit {status}'}"

    def _atheris(self, one: Callable[[bytes], None], seed: int) -> None:
        import atheris

        longest = 2 * max(map(len, self.reader.seeds))
        options = [f"-seed={seed + 1}", f"-runs={2 * self.n + 1000}", f"-max_len={longest}", "-len_control=0"]
        options += ["-timeout=100000", "-rss_limit_mb=0", f"-artifact_prefix={self.folder}/"]  # our own limits apply
        options += [f"-handle_{name}=0" for name in ("segv", "bus", "abrt", "ill", "fpe", "int", "term")]

        def mutate(data: bytes, longest: int, seed: int) -> bytes:
            """Half of the mutations keep every part at its position, so that containers can still be opened."""
            rng = random.Random(seed)
            if not data or rng.random() < 0.5:
                return bytes(atheris.Mutate(data, longest))
            changed = bytearray(data)
            for _ in range(rng.randint(1, 4)):
                at, n = rng.randrange(len(changed)), min(rng.choice([1, 1, 2, 4, 8]), len(changed))
                bits = bytes([changed[at] ^ 1 << rng.randrange(8)])
                odd = rng.choice([bits, bits, rng.randbytes(n), bytes(n), b"\xff" * n, b"\x01" + bytes(n - 1)])
                changed[at : at + len(odd)] = odd[: len(changed) - at]
            return bytes(changed)

        atheris.Setup(["fuzz", *options, str(self.folder / "corpus")], one, custom_mutator=mutate)
        atheris.Fuzz()

    def _hypothesis(self, one: Callable[[bytes], None], seed: int) -> None:
        import hypothesis

        from benchmarks.fuzzing.inputs import inputs

        settings = hypothesis.settings(
            max_examples=_EXAMPLES,
            database=None,
            deadline=None,
            phases=[hypothesis.Phase.generate],
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        strategy = inputs(self.reader.kind, self.reader.seeds)
        while True:
            hypothesis.seed(seed)(settings(hypothesis.given(strategy)(one)))()
            seed += 1


def _load(instrument: bool, work: Path) -> dict[str, Reader]:
    """Import the readers once for all children, instrumented for atheris."""
    import anndata  # noqa: F401 (imported before prts, so that it is not instrumented)

    if instrument:
        import atheris

        with atheris.instrument_imports(include=["prts"]):
            from benchmarks.fuzzing.readers import readers
    else:
        from benchmarks.fuzzing.readers import readers
    return readers(work / "seeds")


def campaign(reader: Reader, engine: str, n: int, seed: int, work: Path, jobs: int) -> int:
    """Distribute inputs to processes and print the outcome; returns the number of findings."""
    began = time.perf_counter()
    parts = [Campaign(reader, engine, n // jobs + (part < n % jobs), seed, work, part) for part in range(jobs)]
    running = [part.run() for part in parts]
    while running := [run for run in running if next(run, StopIteration) is None]:
        time.sleep(0.02)
    *counts, _ = np.sum([part.tally for part in parts], axis=0).tolist()
    slowest = max(int(part.tally[_SLOWEST_MS]) for part in parts)
    print(
        f"{reader.name:14} {engine:10} {counts[_STARTED]} inputs: {counts[_ACCEPTED]} accepted, {counts[_REFUSED]} refused, "
        f"{counts[_FOUND]} findings ({time.perf_counter() - began:.0f} s, slowest input {slowest / 1000:.1f} s)",
        flush=True,
    )
    return int(counts[_FOUND])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--only", help="readers, separated by commas")
    parser.add_argument("--engine", choices=[*ENGINES, "both"], default="both")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="number of processes per reader")
    parser.add_argument("--keep", type=Path, help="use this folder and keep it")
    parser.add_argument("--replay", type=Path, help="feed this file to the reader given by --only and show the outcome")
    given = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads do not survive a fork
    memory = Path("/dev/shm")
    work = given.keep or Path(tempfile.mkdtemp(prefix="prts-fuzz-", dir=memory if memory.is_dir() else None))
    names = given.only.split(",") if given.only else list(READERS)
    if unknown := [name for name in names if name not in READERS]:
        sys.exit(f"--only: {unknown[0]} is unknown; choose from {', '.join(READERS)}")
    engines = ENGINES if given.engine == "both" else (given.engine,)
    known = _load("atheris" in engines and given.replay is None, work)
    if given.replay:
        print(*Trial(known[names[0]], work / "replay")(given.replay.read_bytes()), sep="\n")
        return
    found = sum(
        campaign(known[name], engine, given.inputs, given.seed, work, given.jobs)
        for name in names
        for engine in engines
    )
    for note in sorted((work / "findings").glob("*.txt")):
        kind, _, text = note.read_text().partition("\n")
        print(f"{note.stem}: {kind}: {text.strip().splitlines()[-1][:300]}: {note.with_suffix('')}")
    if given.keep is None and not found:
        shutil.rmtree(work)
    sys.exit(int(found > 0))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    main()
