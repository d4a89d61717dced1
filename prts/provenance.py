"""Provenance of bundles and predictions: the code and the files that made them."""

from __future__ import annotations

import functools
import hashlib
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prts import __version__
from prts.io.cache import file_identity

if TYPE_CHECKING:
    from prts.section import Section


# Paths on this machine and loggers: they do not affect the model.
_LOCAL = ("paths", "logger", "resume")


def portable(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a config that affects the model."""
    return {key: value for key, value in config.items() if key not in _LOCAL}


@functools.cache
def code() -> dict[str, Any]:
    """Version of this prts and, in a git checkout, its commit and whether files have changed since."""
    checkout = Path(__file__).resolve().parents[1]
    found: dict[str, Any] = {"version": __version__}
    if not (checkout / ".git").exists():
        return found

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(checkout), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        found["commit"] = git("rev-parse", "HEAD")
        found["changed"] = bool(git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.SubprocessError):
        pass  # git is not installed, or the checkout belongs to another user: the version is all we have
    return found


def identity(path: Path) -> dict[str, Any]:
    """Identity of a file on any machine: its name, size, and the SHA-256 of its first and last MiB; of a folder, of all its files."""
    found = file_identity(path)
    if path.is_dir():
        listed = "".join(f"{name} {each['sha256']}\n" for name, each in sorted(found.items()))
        size = sum(each["size"] for each in found.values())
        return {"name": path.name, "size": size, "sha256_of_ends": hashlib.sha256(listed.encode()).hexdigest()}
    return {"name": path.name, "size": found["size"], "sha256_of_ends": found["sha256"]}


def section_files(section: Section) -> dict[str, Any]:
    """Identities of the files of a section."""
    files = {"image": section.image, "nuclei": section.nuclei}
    if section.measurement is not None:
        files |= section.measurement.files
    return {key: identity(path) for key, path in files.items() if path is not None and path.exists()}
