"""Lists of genes that a user gives: text, tables, JSON."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prts.errors import InputError

_ID_COLUMNS = ("gene_id", "gene_ids", "ensembl_id", "id")
_NAME_COLUMNS = ("gene", "genes", "symbol", "gene_symbol", "gene_name", "name")


def read_gene_list(path: Path) -> list[str]:
    """Names or ids of a gene list, from text with one a line, a table, or JSON.

    A table (comma, semicolon, tab) with a header is read by its column of ids (`gene_id`, `id`, ...) or names (`gene`,
    `symbol`, ...), any other by its first column. JSON is a list, or an object with `gene_ids` or `genes`, such as a panel.
    Lines that start with # are skipped.

    Raises
    ------
    InputError
        If the file cannot be read or lists nothing.
    """
    text = _read_text(path)
    if text.lstrip().startswith(("[", "{")):
        names = _parse_json(path, text)
        if isinstance(names, Mapping):
            names = names.get("gene_ids", names.get("genes"))
        if not is_names(names):
            raise InputError(f"{path}: a JSON list of gene names, or an object with gene_ids or genes, would be right")
        return list(names)
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    delimiter = next((sign for sign in "\t,;" if lines and sign in lines[0]), ",")
    try:
        rows = [[cell.strip() for cell in row] for row in csv.reader(lines, delimiter=delimiter)]
    except csv.Error as error:
        raise InputError(
            f"{path}: cannot be read as a table ({error}); one symbol or gene id a line would be right"
        ) from error
    header = [cell.lower() for cell in rows[0]] if rows else []
    column = next((header.index(name) for name in (*_ID_COLUMNS, *_NAME_COLUMNS) if name in header), None)
    genes = [row[0] for row in rows] if column is None else [row[column] for row in rows[1:] if len(row) > column]
    if not any(genes):
        raise InputError(f"{path}: lists no gene; one symbol or gene id a line would be right")
    return [gene for gene in genes if gene]


def is_names(value: object) -> bool:
    """Whether the value is a list of at least one non-empty string."""
    return isinstance(value, list) and len(value) > 0 and all(isinstance(name, str) and name for name in value)


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises
    ------
    InputError
        If the file cannot be read or is not JSON.
    """
    return _parse_json(path, _read_text(path))


def _read_text(path: Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not UTF-8 text") from error


def _parse_json(path: Path, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # no JSON, a number of thousands of digits, or lists within lists
        raise InputError(f"{path}: is not JSON ({error})") from error
