"""The outcome of a cohort, read from the states of its slides: a table, summary.csv, and summary.html with thumbnails."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import numpy as np

from prts import __version__
from prts.cohort.claims import Claims
from prts.cohort.facts import SPOILT_COLOUR, STRANGE_COLOUR, USUAL
from prts.cohort.slides import CohortSlide
from prts.cohort.states import SlideState, now, read_state
from prts.io.cache import atomic
from prts.models.ood import ALTOGETHER, PARTLY, SPOILT

if TYPE_CHECKING:
    import pandas as pd

_FIGURES = ("nuclei", "genes", "umi_per_nucleus", "ood", "artefacts")
_TEMPLATE = Path(__file__).with_name("summary.html")


def thumbnail_path(folder: Path, name: str) -> Path:
    """The thumbnail of a slide."""
    return folder / ".thumbnails" / f"{name}.jpg"


def summarise(folder: Path, slides: Sequence[CohortSlide]) -> pd.DataFrame:
    """Write summary.csv and summary.html of a cohort, replacing earlier ones.

    Parameters
    ----------
    folder
        The cohort folder.
    slides
        Its slides.

    Returns
    -------
    One row per slide: `slide, status, error, nuclei, genes, umi_per_nucleus` (median), `ood` (share of nuclei unlike the training nuclei),
    `artefacts` (share of nuclei), `verdict, seconds, attempts, stage, image, prediction, worker, finished`, and the seconds of each stage.
    `status` is done, wrong input, failed, running, unfinished (its worker was stopped or killed) or waiting.
    """
    table = write_csv(folder, slides)
    with atomic(folder / "summary.html") as temporary:
        temporary.write_text(_page(folder, slides, table), encoding="utf-8")
    return table


def write_csv(folder: Path, slides: Sequence[CohortSlide]) -> pd.DataFrame:
    """Write summary.csv and return its table; see `summarise`."""
    table = outcomes(folder, slides)
    with atomic(folder / "summary.csv") as temporary:
        table.to_csv(temporary, index=False)
    return table


def outcomes(folder: Path, slides: Sequence[CohortSlide]) -> pd.DataFrame:
    """The outcome of each slide so far; see `summarise`."""
    import pandas as pd

    claims, rows = Claims(folder), []
    for slide in slides:
        state = read_state(folder, slide.name)
        found, status = state or SlideState(str(slide.image), {}), _status(slide, state, claims)
        done = status == "done"
        row: dict[str, Any] = {
            "slide": slide.name,
            "status": status,
            "error": found.error,
            **{key: found.result.get(key) for key in _FIGURES},
            "verdict": found.result.get("verdict", ""),
            "seconds": sum(found.seconds.values()) if found.seconds else None,
            "attempts": found.attempts,
            "stage": "" if done else found.stage,
            "image": str(slide.image),
            "prediction": f"{slide.name}.h5ad" if done else "",
            "worker": found.worker,
            "finished": found.finished,
            **{f"seconds/{stage}": value for stage, value in found.seconds.items()},
        }
        rows.append(row)
    return pd.DataFrame(rows)


def _status(slide: CohortSlide, state: SlideState | None, claims: Claims) -> str:
    if state is None:
        return "waiting"
    if state.status in ("running", "stopped"):
        return "unfinished" if state.status == "stopped" or claims.standing(slide.name) == "free" else "running"
    return state.status


def pace(folder: Path, slides: Sequence[CohortSlide]) -> str:
    """Slides done and left, slides an hour, and when the last one will be done, in words."""
    states = [state for slide in slides if (state := read_state(folder, slide.name)) is not None]
    ended = [state for state in states if state.status in ("done", "wrong input", "failed")]
    left = len(slides) - len(ended)
    text = f"{sum(state.status == 'done' for state in ended)} of {len(slides)} slides done"
    if not ended or not left:
        return text
    workers = {state.worker for state in states if state.status == "running"}
    workers.add(max(ended, key=lambda state: state.finished).worker)
    typical = [state for state in ended if state.status == "done"] or ended  # most bad slides end at once
    rates = [rate for worker in workers if (rate := _rate([state for state in typical if state.worker == worker]))]
    rates = rates or [_rate(typical)]
    hourly = float(np.mean(rates)) * len(workers)  # one that has just started is as fast as the others
    return f"{text}, {left} left, {hourly:.0f} slides/h by {_count(len(workers), 'worker')}, ETA {_time(left / hourly)}"


def _rate(ended: Sequence[SlideState]) -> float:
    """Slides an hour of a worker, from those that it has ended."""
    if not ended:
        return 0.0
    start, end = min(state.started for state in ended), max(state.finished for state in ended)
    seconds = (datetime.fromisoformat(end) - datetime.fromisoformat(start)).total_seconds()
    return 3600 * len(ended) / max(seconds, 1e-3)


def _time(hours: float) -> str:
    minutes = round(hours * 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{max(minutes, 1)} min"


def _count(n: int, what: str) -> str:
    return f"{n:,} {what}{'' if n == 1 else 's'}"


def _page(folder: Path, slides: Sequence[CohortSlide], table: pd.DataFrame) -> str:
    from jinja2 import Environment, FileSystemLoader

    environment = Environment(
        loader=FileSystemLoader(_TEMPLATE.parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    records: list[Any] = table.to_dict("records")
    rows = [_row(folder, slide, row) for slide, row in zip(slides, records, strict=True)]
    done = [row for row in rows if row["status"] == "done"]
    seconds = sum(row["seconds"] or 0 for row in done)
    return environment.get_template(_TEMPLATE.name).render(
        name=folder.resolve().name,
        done=done,
        others=[row for row in rows if row["status"] != "done"],
        n_slides=len(rows),
        n_nuclei=sum(int(row["nuclei"]) for row in done),
        n_strange=sum(row["class"] == "bad" for row in done),
        hours=_time(seconds / 3600),
        pace=pace(folder, slides),
        colours=[f"rgb{colour}" for colour in (USUAL, STRANGE_COLOUR, SPOILT_COLOUR)],
        version=__version__,
        written=now()[:16].replace("T", " "),
    )


def _row(folder: Path, slide: CohortSlide, row: dict[str, Any]) -> dict[str, Any]:
    """A row of the table with what the page shows of it."""
    row = {key: None if value != value else value for key, value in row.items()}
    picture, page = thumbnail_path(folder, slide.name), folder / f"{slide.name}.html"
    row["picture"] = row["page"] = None
    if picture.is_file() and row["status"] == "done":
        row["picture"] = "data:image/jpeg;base64," + base64.b64encode(picture.read_bytes()).decode("ascii")
    if page.is_file() and row["status"] == "done":
        row["page"] = quote(f"{slide.name}.html")
    row["class"], row["label"] = _verdict(row["ood"])
    row["spoilt"] = row["artefacts"] is not None and row["artefacts"] >= SPOILT
    row["stages"] = ", ".join(
        f"{key.removeprefix('seconds/')} {value:.1f} s"
        for key, value in row.items()
        if key.startswith("seconds/") and value
    )
    return row


def _verdict(ood: float | None) -> tuple[str, str]:
    """A class of the page's style, and a verdict in a few words."""
    if ood is None:
        return "unknown", "the model cannot tell"
    if ood < PARTLY:
        return "good", "like the training slides"
    return (
        ("partly", "parts are unlike training") if ood < ALTOGETHER else ("bad", "unlike training: do not believe it")
    )
