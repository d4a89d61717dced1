"""Cohorts from the command line and from Python: bad slides, killed workers, what is repeated and what is not."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy.sparse import csr_matrix

import prts
from prts.cli.app import run
from prts.cli.cohort import plan_multirun
from prts.cohort import facts, worker
from prts.cohort.claims import this_process
from prts.cohort.cohort import open_cohort
from prts.cohort.states import SlideState, read_state
from prts.cohort.summary import pace
from prts.errors import InputError
from prts.io.nuclei import load_nuclei
from prts.io.prediction import spatial_uns

ROOT = Path(__file__).resolve().parents[2]
BAD = ("photograph", "truncated")
GOOD = tuple(f"s{k}" for k in range(10))


def arguments(files: Any, out: Path, slides: Path | None = None, **more: object) -> list[str]:
    given = {"bundle": files.model, "slides": slides or files.slides, "out": out, "mpp": 0.5, "page": "false"}
    return [f"{key}={value}" for key, value in {**given, "paths.cache_dir": out.parent / "cache", **more}.items()]


def states(out: Path) -> dict[str, SlideState]:
    names = [path.name.removesuffix(".state.json") for path in out.glob("*.state.json")]
    return {name: state for name in sorted(names) if (state := read_state(out, name)) is not None}


def kill_a_busy_worker(out: Path, launched: subprocess.Popen[str]) -> str:
    """Stop a worker, see that it has a slide in hand, and kill it; returns the slide."""
    for _ in range(12_000):
        assert launched.poll() is None, launched.communicate()
        for name, state in states(out).items():
            if state.status != "running" or name in BAD:
                continue
            pid = int(state.worker.split()[-1])
            os.kill(pid, signal.SIGSTOP)
            again = read_state(out, name)
            if again is not None and again.status == "running":
                os.kill(pid, signal.SIGKILL)
                return name
            os.kill(pid, signal.SIGCONT)
        time.sleep(0.05)
    raise AssertionError("no worker was busy")


@pytest.mark.slow
def test_a_killed_worker_costs_its_slide_one_attempt_and_nothing_else(
    files: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two workers by joblib, one killed in the middle; the same command again; an undisturbed run to compare with."""
    out = tmp_path / "disturbed" / "out"
    multirun = ["-m", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "worker=range(2)"]
    command = [sys.executable, "-m", "prts.cli.main", "predict", *arguments(files, out), *multirun]
    launched = subprocess.Popen(
        command,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    killed = kill_a_busy_worker(out, launched)
    said = launched.communicate()[1]
    assert launched.returncode == 2, said  # the other worker went on and took the slide over
    assert "prts: 10 of 12 slides done" in said and "prts: 1 worker ended early: killed: by SIGKILL" in said
    for name in BAD:
        assert f"prts: {name}: wrong input: " in said
    after = states(out)
    assert [name for name in GOOD if after[name].attempts != 1] == [killed] and after[killed].attempts == 2
    assert not list(out.glob(".*.claim-*")) and not list(out.rglob("*.tmp*"))

    written = {path: path.stat().st_mtime_ns for path in out.glob("*.h5ad")}
    assert len(written) == 10
    assert run("predict", arguments(files, out)) == 2
    assert {path: path.stat().st_mtime_ns for path in out.glob("*.h5ad")} == written
    again = states(out)
    assert {name: again[name].attempts - after[name].attempts for name in again} == dict.fromkeys(
        GOOD, 0
    ) | dict.fromkeys(BAD, 1)
    capsys.readouterr()

    monkeypatch.setattr(worker, "cores_given", lambda: 2)  # the next slide is segmented meanwhile
    assert run("predict", arguments(files, tmp_path / "undisturbed" / "out")) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "wrong input" in line]
    assert [line.split(":")[1].strip() for line in errors] == list(BAD)
    for name in GOOD:
        mine, other = (ad.read_h5ad(tmp_path / way / "out" / f"{name}.h5ad") for way in ("disturbed", "undisturbed"))
        assert mine.n_obs > 20 and list(mine.obs_names) == list(other.obs_names)
        for key in ("X", "prob"):
            a, b = (each.X.toarray() if key == "X" else each.layers[key] for each in (mine, other))
            np.testing.assert_array_equal(a, b)
        pd.testing.assert_frame_equal(mine.obs, other.obs)
        a, b = (load_nuclei(tmp_path / way / "out" / f"{name}.nuclei.parquet") for way in ("disturbed", "undisturbed"))
        assert a.geometry.geom_equals(b.geometry).all()
    x = {name: ad.read_h5ad(out / f"{name}.h5ad").layers["prob"].sum() for name in GOOD}
    assert len(set(x.values())) > 5  # the slides do differ


def test_what_is_outdated_is_named_and_done_again(
    files: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    model = prts.Model.load(files.model)
    slides = files.few(tmp_path / "in", "s0.tif", "s1.tif", "s2.tif", "s3.tif")
    given: dict[str, Any] = {"out": tmp_path / "out", "cache_dir": tmp_path / "cache", "page": False}

    def redone(**other: Any) -> dict[str, int]:
        before = {name: state.attempts for name, state in states(given["out"]).items()}
        table = model.predict_many(other.pop("slides", slides), **{**given, "mpp": 0.5, **other})
        assert (table["status"] == "done").all()
        now = states(given["out"])
        return {
            name: now[name].attempts - before.get(name, 0) for name in now if now[name].attempts != before.get(name)
        }

    with caplog.at_level(logging.WARNING, "prts"):
        assert redone() == {"s0": 1, "s1": 1, "s2": 1, "s3": 1}
        assert redone() == {}
        shutil.copy(slides / "s0.tif", slides / "s1.tif")
        (tmp_path / "out" / "s2.h5ad").unlink()
        os.utime(slides / "s3.tif", (5, 5))  # a copy of the same slide has another time
        assert not caplog.messages
        assert redone() == {"s1": 1, "s2": 1}
        assert "s1: is outdated (image changed); predicting it again" in caplog.messages
        assert "s2: is outdated (s2.h5ad is missing); predicting it again" in caplog.messages
        caplog.clear()
        table = pd.DataFrame({"image": sorted(slides.iterdir()), "rotate": [0, 90, None, None]})
        assert redone(slides=table) == {"s1": 1}
        assert caplog.messages == ["s1: is outdated (rotate changed); predicting it again"]
    csv = pd.read_csv(tmp_path / "out" / "summary.csv")
    assert csv["attempts"].tolist() == [1, 3, 2, 1]
    assert (csv["nuclei"] == [ad.read_h5ad(tmp_path / "out" / name).n_obs for name in csv["prediction"]]).all()


def test_a_crash_is_recorded_and_the_others_go_on(
    files: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    slides = files.few(tmp_path / "in", "s0.tif", "s1.tif", "s2.tif", "photograph.tif")

    def crash(out: Path) -> dict[str, Any]:
        if out.stem == "s1":
            raise ZeroDivisionError("by\nzero")
        return facts.read_facts(out)

    monkeypatch.setattr(worker, "read_facts", crash)
    assert run("predict", arguments(files, tmp_path / "out", slides)) == 1
    said = capsys.readouterr().err.splitlines()
    assert "prts: s1: failed: ZeroDivisionError: by" in said
    assert said[-1].startswith("prts: 2 of 4 slides done: ")
    state = states(tmp_path / "out")["s1"]
    assert (state.status, state.stage) == ("failed", "page") and "in crash" in state.traceback
    monkeypatch.undo()
    assert run("predict", arguments(files, tmp_path / "out", slides)) == 2
    assert states(tmp_path / "out")["s1"].status == "done"


def interrupt(out: Path) -> None:
    raise KeyboardInterrupt


def terminate(out: Path) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(("end", "status"), [(interrupt, 130), (terminate, 143)])
def test_an_interrupted_worker_gives_its_slides_up(
    files: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: Any, status: int
) -> None:
    slides, out = files.few(tmp_path / "in", "s0.tif", "s1.tif"), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(worker, "cores_given", lambda: 2)  # the second slide is in hand, too
        patch.setattr(worker, "read_facts", end)
        assert run("predict", arguments(files, out, slides)) == status
    assert {name: state.status for name, state in states(out).items()} == dict.fromkeys(("s0", "s1"), "stopped")
    assert not list(out.glob(".*.claim-*"))
    assert run("predict", arguments(files, out, slides)) == 0
    assert [(state.status, state.lost) for state in states(out).values()] == [("done", 0)] * 2


def test_a_slide_that_kills_its_workers_does_not_kill_them_all(files: Any, tmp_path: Path) -> None:
    slides, out = files.few(tmp_path / "in", "s0.tif"), tmp_path / "out"
    cohort = open_cohort(slides, out, files.bundle, page=False)
    inputs = cohort.inputs(cohort.slides[0])
    SlideState("s0.tif", inputs, stage="features", attempts=3, lost=2, worker="node7 1").write(out, "s0")
    table = worker.predict_cohort(cohort, cache_dir=tmp_path / "cache")
    assert table["status"].tolist() == ["failed"]
    assert table["error"][0].startswith("3 workers ended in stage features without a word, as if killed")
    assert states(out)["s0"].attempts == 3


def test_a_slide_of_another_worker_is_left_alone(
    files: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slides, out = files.few(tmp_path / "in", "s0.tif", "s1.tif"), tmp_path / "out"
    assert run("predict", arguments(files, out, slides, slides_per_job=1)) == 0
    assert "prts: 1 of 2 slides done, 1 left (run the same command again" in capsys.readouterr().err
    SlideState("s1.tif", {}, worker="node7 1").write(out, "s1")
    (out / ".s1.claim-1").write_text(json.dumps({**this_process(), "pid": os.getppid()}))
    assert run("predict", arguments(files, out, slides)) == 0
    assert "prts: 1 of 2 slides done, 1 in the hands of other workers" in capsys.readouterr().err
    assert states(out)["s1"].worker == "node7 1"


def test_the_summary_says_what_is_in_the_files(files: Any, tmp_path: Path) -> None:
    """A name that is HTML, a page for each slide, and figures that add up."""
    slides = files.few(tmp_path / "in", "s0.tif", "photograph.tif")
    (slides / "s0.tif").rename(slides / "a<b>&c 1.tif")
    model = prts.Model.load(files.model)
    table = model.predict_many(slides, tmp_path / "out", mpp=0.5, cache_dir=tmp_path / "cache").set_index("slide")
    done, bad = table.loc["a<b>&c 1"], table.loc["photograph"]
    adata = ad.read_h5ad(tmp_path / "out" / done["prediction"])
    assert done["umi_per_nucleus"] == pytest.approx(np.median(adata.X.toarray().sum(axis=1)), rel=1e-5)
    assert done["artefacts"] == pytest.approx((adata.obs["artefact"] != "none").mean())
    assert pd.isna(bad["nuclei"]) and "H&E" in bad["error"] and bad["attempts"] == 1
    page = (tmp_path / "out" / "summary.html").read_text(encoding="utf-8")
    assert "<b>&c" not in page and "a&lt;b&gt;&amp;c 1" in page
    assert 'href="a%3Cb%3E%26c%201.html"' in page and (tmp_path / "out" / "a<b>&c 1.html").is_file()
    assert page.count("data:image/jpeg") == 1 and f"{adata.n_obs:,} nuclei" in page


def test_the_thumbnail_shows_each_kind_of_nucleus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three nuclei on a white slide of 1,200 x 600 px: usual, unlike training, and one of those on an artifact."""
    monkeypatch.setattr(facts, "_ROWS", 2)
    adata = ad.AnnData(
        csr_matrix(np.array([[1, 2], [0, 0], [4, 0]], np.float32)),
        obs=pd.DataFrame(
            {"ood": [0.5, 0.99, 0.99], "artefact": pd.Categorical(["none", "none", "pen"])}, index=list("abc")
        ),
        obsm={"spatial": np.array([[200.0, 100], [600, 300], [1199.9, 599.9]])},
        uns={
            "prts": {"mpp": 0.5, "width": 1200, "height": 600, "verdict": "fine"},
            "spatial": spatial_uns("s", np.full((300, 600, 3), 255, np.uint8), 1200, 10.0),
        },
    )
    adata.write_h5ad(tmp_path / "s.h5ad")
    facts.write_thumbnail(tmp_path / "s.h5ad", tmp_path / "s.jpg")
    picture = np.asarray(Image.open(tmp_path / "s.jpg")).astype(int)
    assert picture.shape == (160, 320, 3)
    for x, y, colour in ((53, 26, facts.USUAL), (160, 80, facts.STRANGE_COLOUR), (319, 159, facts.SPOILT_COLOUR)):
        assert np.abs(picture[y, x] - (0.8 * np.array(colour) + 0.2 * 255)).max() < 60, (x, y)
    assert (picture > 240).all(axis=2).mean() > 0.99
    found = facts.read_facts(tmp_path / "s.h5ad")
    assert (found["nuclei"], found["genes"], found["umi_per_nucleus"]) == (3, 2, 3.0)
    assert found["ood"] == pytest.approx(2 / 3) and found["artefacts"] == pytest.approx(1 / 3)
    assert found["artefact_kinds"] == {"pen": 1}


def test_pace_is_slides_an_hour_of_all_workers(files: Any, tmp_path: Path) -> None:
    slides = open_cohort(files.slides, tmp_path / "out", files.bundle).slides
    for name, status, node in (
        ("s0", "done", "a"),
        ("s1", "done", "b"),
        ("s2", "running", "a"),
        ("s3", "running", "b"),
    ):
        started, finished = "2026-01-01T10:00:00+00:00", "2026-01-01T10:06:00+00:00"
        state = SlideState(name, {}, status, worker=node, started=started, finished=finished)  # type: ignore[arg-type]
        state.write(tmp_path / "out", name)
    # two workers, 6 min a slide: 20 an hour, so 10 more take half an hour
    assert pace(tmp_path / "out", slides) == "2 of 12 slides done, 10 left, 20 slides/h by 2 workers, ETA 30 min"


def spoil(case: str, files: Any, tmp_path: Path) -> dict[str, object]:
    """Arguments of a command that must be refused."""
    table = tmp_path / "slides.csv"
    if case == "columns":
        table.write_text("image,magnification\na.svs,20\n")
    elif case == "duplicates":
        table.write_text("image,out\na.svs,x.h5ad\nb.svs,x.h5ad\n")
    elif case == "empty":
        (tmp_path / "none").mkdir()
        return {"slides": tmp_path / "none"}
    elif case == "state":
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "s3.state.json").write_text('{"format": 7}')
        return {}
    elif case == "folder":
        return {"out": "/proc/none/out"}
    elif case == "file":
        (tmp_path / "out").touch()
        return {}
    elif case == "image":
        return {"image": "a.svs"}
    elif case == "nuclei":
        return {"nuclei": "n.parquet"}
    return {"slides": table}


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("columns", "slides.csv: has an unknown column 'magnification'; the columns are image, out,"),
        ("duplicates", "slides.csv: line 2, line 3 would all write x.h5ad; list them"),
        ("empty", "none: contains no image"),
        (
            "state",
            "s3.state.json: is a state file of another version of prts (format 7; this one reads 1); give another",
        ),
        ("folder", "/proc/none/out: cannot be written (No such file or directory); give another `out` folder"),
        ("file", "out is a file; give a folder for the predictions of a cohort"),
        ("image", "image: and slides are mutually exclusive"),
        ("nuclei", "nuclei: belong to one slide"),
    ],
)
def test_a_wrong_cohort_is_refused_before_any_work(
    files: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str, words: str
) -> None:
    given = arguments(files, tmp_path / "out")
    more = spoil(case, files, tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert (
        run(
            "predict",
            [each for each in given if each.split("=")[0] not in more] + [f"{k}={v}" for k, v in more.items()],
        )
        == 2
    )
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1
    assert [path for path in sorted(tmp_path.rglob("*")) if path not in before and path.name != "out"] == []
    assert not (tmp_path / "out").is_dir() or len(list((tmp_path / "out").iterdir())) == (case == "state")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["image=a.svs,b.svs", "out=one.h5ad"],
            "out='one.h5ad': 2 jobs would write it; predict a list of slides with slides=",
        ),
        (["image=a.svs", "out=one.h5ad", "worker=range(3)"], "out='one.h5ad': 3 jobs would write it"),
        (
            ["slides=in", "out=o", "stain=none,macenko"],
            "stain: has several values, and all workers of a cohort need the same",
        ),
        (["slides=in", "out=a,b"], "out: has several values"),
        (
            ["slides=in", "out=a", "hydra.sweep.dir=x"],
            "hydra.sweep.dir: is the folder workers in `out` for many slides",
        ),
    ],
)
def test_a_multirun_whose_jobs_would_disturb_each_other_is_refused(
    overrides: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("predict", ["-m", "bundle=model", *overrides]) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1


def test_a_multirun_of_workers(files: Any, tmp_path: Path) -> None:
    given = [*arguments(files, tmp_path / "out"), "slides_per_job=5"]
    cohort, overrides = plan_multirun(given, [])
    assert cohort is not None and len(cohort.slides) == 12
    sweep = f"hydra.sweep.dir='{tmp_path / 'out' / 'workers'}'"
    assert overrides == [*given, sweep, "worker=range(3)"]
    assert plan_multirun([*given, "worker=range(2)"], [])[1] == [*given, "worker=range(2)", sweep]
    with pytest.raises(InputError, match="no such folder"):
        plan_multirun([*arguments(files, tmp_path / "out", tmp_path / "nothing"), "worker=range(2)"], [])
    single = ["image=a.svs", "bundle=m", "stain=none,macenko", "out='p-${stain}.h5ad'"]
    assert plan_multirun(single, []) == (None, single)
