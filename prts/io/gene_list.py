"""Read lists of genes: text, tables, JSON."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prts.errors import InputError

# Identifiers come before names.
_COLUMNS = ("gene_id", "gene_ids", "ensembl_id", "id", "gene", "genes", "symbol", "gene_symbol", "gene_name", "name")
_CURE = "give one symbol or gene id per line"


def read_gene_list(path: Path) -> list[str]:
    """Read gene names or ids from a text file with one per line, a table, or JSON.

    Of a table (comma, semicolon, tab) with a header, the column of ids (`gene_id`, `id`, ...) or names (`gene`, `symbol`, ...) is read,
    otherwise the first column. JSON is a list, or an object with `gene_ids` or `genes`, such as a panel. Lines that start with # are
    skipped.

    Raises
    ------
    InputError
        If the file cannot be read or contains no genes.
    """
    text = _read_text(path)
    if text.lstrip().startswith(("[", "{")):
        names = _parse_json(path, text)
        if isinstance(names, Mapping):
            names = names.get("gene_ids", names.get("genes"))
        if not is_names(names):
            raise InputError(f"{path}: contains no gene names; give a JSON list, or an object with gene_ids or genes")
        return list(names)
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    delimiter = next((sign for sign in "\t,;" if lines and sign in lines[0]), ",")
    try:
        rows = [[cell.strip() for cell in row] for row in csv.reader(lines, delimiter=delimiter)]
    except csv.Error as error:
        raise InputError(f"{path}: cannot be read as a table ({error}); {_CURE}") from error
    header = [cell.lower() for cell in rows[0]] if rows else []
    column = next((header.index(name) for name in _COLUMNS if name in header), None)
    genes = [row[0] for row in rows] if column is None else [row[column] for row in rows[1:] if len(row) > column]
    if not any(genes):
        raise InputError(f"{path}: contains no genes; {_CURE}")
    return [gene for gene in genes if gene]


def is_names(value: object) -> bool:
    """Whether a value is a non-empty list of non-empty strings."""
    return isinstance(value, list) and len(value) > 0 and all(isinstance(name, str) and name for name in value)


def read_json(path: Path) -> Any:
    """Read a JSON file.

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
        raise InputError(f"{path}: cannot be read ({error.strerror}); check the path and its permissions") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text; save it as UTF-8") from error


def _parse_json(path: Path, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # also numbers of thousands of digits, and deeply nested lists
        raise InputError(f"{path}: not valid JSON ({error}); correct or rewrite it") from error
