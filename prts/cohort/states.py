"""The state of each slide of a cohort: one JSON file next to its prediction, replaced as a whole."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from prts.errors import InputError
from prts.io.cache import atomic, fingerprint

FORMAT = 1
Status = Literal["running", "done", "wrong input", "failed", "stopped"]


@dataclass
class SlideState:
    """What is known of a slide.

    Attributes
    ----------
    image
        The image.
    inputs
        Everything that affects the prediction: identity of the files, the model, settings.
    status
        `running`, `done`, `wrong input` (an error of the slide or its settings), `failed` (a crash), or `stopped` (its worker was
        interrupted).
    stage
        The stage that is running, or that ended the attempt.
    attempts
        How often it was started.
    lost
        How many workers in a row ended without a word, as if killed, while they worked on it.
    seconds
        Wall time of each stage of the last attempt.
    error, traceback
        Why it failed.
    worker
        Machine and process.
    started, finished
        Of the last attempt, UTC in ISO format.
    versions
        Of prts and the libraries that compute.
    files
        Size in bytes of each file of the prediction, by suffix.
    result
        Figures for the summary (`prts.cohort.facts`).
    """

    image: str
    inputs: dict[str, Any]
    status: Status = "running"
    stage: str = ""
    attempts: int = 0
    lost: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    error: str = ""
    traceback: str = ""
    worker: str = ""
    started: str = ""
    finished: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    files: dict[str, int] = field(default_factory=dict)
    result: dict[str, Any] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """Eight hex digits that identify the inputs."""
        return fingerprint(self.inputs)

    def write(self, folder: Path, name: str) -> None:
        """Write the state of a slide, replacing an earlier one."""
        content = {"format": FORMAT, "slide": name, "fingerprint": self.fingerprint, **asdict(self)}
        with atomic(state_path(folder, name)) as temporary:
            temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def state_path(folder: Path, name: str) -> Path:
    """The state file of a slide."""
    return folder / f"{name}.state.json"


def read_state(folder: Path, name: str) -> SlideState | None:
    """Read the state of a slide; None if it was never started.

    Raises
    ------
    InputError
        If the file was written by another version of prts, or is something else.
    """
    path = state_path(folder, name)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error}); delete it to predict the slide again") from error
    found = content.get("format") if isinstance(content, dict) else None
    if found != FORMAT:
        raise InputError(
            f"{path}: is a state file of another version of prts (format {found}; this one reads {FORMAT}); give another `out` folder, "
            "or delete it to predict the slide again"
        )
    known = {item.name for item in fields(SlideState)}
    try:
        return SlideState(**{key: value for key, value in content.items() if key in known})
    except TypeError as error:
        raise InputError(f"{path}: is incomplete ({error}); delete it to predict the slide again") from error


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Names of the inputs that differ: `bundle`, `image`, `mpp`."""
    flat = [{**inputs, **inputs.get("settings", {})} for inputs in (before, now)]
    keys = dict.fromkeys(key for each in flat for key in each if key != "settings")
    return [key for key in keys if flat[0].get(key) != flat[1].get(key)]


def now() -> str:
    """The time in UTC, ISO format."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")
