"""Check the folder of a result before any work is done."""

from __future__ import annotations

from pathlib import Path

from prts.errors import ParameterError


def check_out_folder(out: Path | str, contents: str) -> Path:
    """Refuse a file where a folder is to be written.

    Parameters
    ----------
    out
        The folder; it need not exist.
    contents
        What will be written to it, for the message.

    Raises
    ------
    ParameterError
        If it is a file.
    """
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise ParameterError("", "out", f"{out} is a file; give a folder for {contents}")
    return out
