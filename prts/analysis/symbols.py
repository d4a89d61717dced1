"""Orthologs: human and mouse symbols of the same gene."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from prts.errors import InputError


@dataclass(frozen=True)
class Orthologs:
    """Human and mouse symbols of the same genes; a gene may have several orthologs.

    Attributes
    ----------
    to_mouse, to_human
        Symbols of the other species, by symbol.
    """

    to_mouse: dict[str, list[str]]
    to_human: dict[str, list[str]]


def read_orthologs(path: Path) -> Orthologs:
    """Read a table of two columns, human and mouse symbol, without a header; rows with only one symbol are ignored.

    Raises
    ------
    InputError
        If the file is missing, or its columns are not human and mouse symbols.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file; expected a table of human and mouse symbols")
    try:
        # split below: pandas' detection of the separator takes minutes on some files that are not tables
        lines = pd.read_csv(
            path, header=None, names=[0], index_col=False, sep="\0", quoting=3, dtype=str, encoding="utf-8-sig"
        )
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise InputError(f"{path}: cannot be read as a table ({error})") from error
    cells = lines[0].dropna().astype(str).str.strip().str.split(r"\s*[\t,;]\s*|\s+", regex=True, expand=True)
    table = cells.apply(lambda column: column.str.strip('"')).replace("", None)
    if table.shape[1] != 2:
        raise InputError(f"{path}: has {table.shape[1]} columns; expected two, the human and the mouse symbol")
    pairs = table.dropna().drop_duplicates()
    pairs.columns = pd.Index(["human", "mouse"])
    upper = pairs.apply(lambda column: (column == column.str.upper()).mean() if len(column) else 0.0)
    if upper["human"] <= upper["mouse"]:
        raise InputError(
            f"{path}: the first column does not look like human symbols; expected human, then mouse, such as `CAMK2A,Camk2a`"
        )
    return Orthologs(to_mouse=_lists(pairs, "human", "mouse"), to_human=_lists(pairs, "mouse", "human"))


def _lists(pairs: pd.DataFrame, key: str, value: str) -> dict[str, list[str]]:
    return {str(name): of.tolist() for name, of in pairs.groupby(key)[value]}
