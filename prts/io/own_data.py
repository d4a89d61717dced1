"""HDF5 files that hold their own data: a link could make a file that is handed around read another one of its reader's machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py

from prts.errors import InputError


def require_own_data(path: Path) -> None:
    """Refuse an HDF5 file with soft or external links, or datasets that lie in other files.

    Raises
    ------
    InputError
        If it has any, or cannot be read.
    """
    links: list[str] = []

    def look(name: str, link: Any) -> None:
        if not isinstance(link, h5py.HardLink):
            links.append(name)

    def lies_elsewhere(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset) and (item.is_virtual or item.external):
            links.append(name)

    try:
        with h5py.File(path, "r") as file:
            file.visititems_links(look)
            if not links:
                file.visititems(lies_elsewhere)
    except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:
        raise InputError(f"{path}: not HDF5, or damaged ({error}); get a complete copy") from error
    if links:
        raise InputError(f"{path}: {links[0]} is a link to elsewhere; a file that holds its own data is needed")
