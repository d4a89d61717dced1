"""A folder in which numba can cache what it compiles, where neither the packages nor the home folder can be written, as in containers."""

from __future__ import annotations

import os
import sysconfig
from pathlib import Path


def provide_cache() -> None:
    """Point numba to a temporary folder if it would find none; it must not be imported before."""
    if os.environ.get("NUMBA_CACHE_DIR") or any(_is_writable(place) for place in _usual()):
        return
    import tempfile  # rarely needed, and slow to import

    user = os.getuid() if hasattr(os, "getuid") else "user"
    folder = Path(tempfile.gettempdir()) / f"prts-numba-{user}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        if not _is_own(folder):  # numba runs what it finds there
            folder = Path(tempfile.mkdtemp(prefix="prts-numba-"))
    except OSError:
        return
    os.environ["NUMBA_CACHE_DIR"] = str(folder)


def _usual() -> list[Path]:
    """Where numba looks itself: next to the packages, and in the user's cache."""
    places = [Path(sysconfig.get_paths()["purelib"])]
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~")  # noqa: PTH111  (raises nothing without a home)
    if not home.startswith("~"):
        places.append(Path(home))
    return places


def _is_writable(place: Path) -> bool:
    while not place.exists() and place != place.parent:
        place = place.parent
    return os.access(place, os.W_OK)


def _is_own(folder: Path) -> bool:
    about = folder.lstat()
    return not folder.is_symlink() and (
        not hasattr(os, "getuid") or (about.st_uid == os.getuid() and not about.st_mode & 0o077)
    )
