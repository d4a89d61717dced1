"""Unusual numbers and words, and mutated bytes and text, for all formats."""

from __future__ import annotations

import copy
import json
import struct
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

Draw = Callable[[st.SearchStrategy[Any]], Any]

NUMBERS = [
    0,
    1,
    -1,
    2,
    3,
    0.5,
    -0.5,
    255,
    256,
    65_536,
    2**31 - 1,
    2**31,
    -(2**31),
    2**32,
    2**53,
    2**63 - 1,
    2**63,
    2**64,
]
NUMBERS += [1e-300, 1e300, 1e308, float("nan"), float("inf"), float("-inf"), 10**400]
WORDS = [
    "",
    " ",
    "a",
    "ENSG1",
    "Plp1",
    "a/b",
    "../../etc/passwd",
    "\0",
    "\n",
    "\x1b[31m",
    "é",
    "\U0001f600",
    "nan",
    "None",
    "1",
    "x" * 5000,
]
_SCALARS = [None, True, False, *NUMBERS, *WORDS]

scalar = st.sampled_from(_SCALARS)
arbitrary = st.recursive(
    scalar | st.floats() | st.integers() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)

GEOMETRIES = [
    None,
    {},
    {"type": "Polygon"},
    {"type": "Polygon", "coordinates": []},
    {"type": "Polygon", "coordinates": [[]]},
    {"type": "Polygon", "coordinates": [[[1, 1], [9, 1], [9, 9]]]},
    {"type": "Polygon", "coordinates": [[[1, 1], [9, 1], [9, 9], [1, 2]]]},
    {"type": "Polygon", "coordinates": [[[1, 1], [9, 9], [9, 1], [1, 9], [1, 1]]]},
    {"type": "Polygon", "coordinates": [[[1, 1, 5], [9, 1], [9, 9, 1], [1, 1]]]},
    {"type": "Polygon", "coordinates": [[[1, 1], [1, 1], [1, 1], [1, 1]]]},
    {"type": "Polygon", "coordinates": [[[1e308, 1], [-1e308, 1], [9, 1e308], [1e308, 1]]]},
    {"type": "Polygon", "coordinates": [[["1", 1], [9, 1], [9, 9], ["1", 1]]]},
    {"type": "Polygon", "coordinates": [[1, 2], [3, 4]]},
    {"type": "Polygon", "coordinates": {"a": 1}},
    {"type": "Polygon", "coordinates": "abcd"},
    {"type": "MultiPolygon", "coordinates": [[[[1, 1], [9, 1], [9, 9], [1, 1]]], [[[1, 1], [9, 1], [9, 9], [1, 1]]]]},
    {"type": "Point", "coordinates": [1, 1]},
    {"type": "LineString", "coordinates": [[1, 1]]},
    {"type": "GeometryCollection", "geometries": []},
    {"type": "GeometryCollection", "geometries": [{"type": "GeometryCollection", "geometries": [{"type": "Point"}]}]},
    {"type": "Feature", "geometry": None},
    {"type": ["Polygon"], "coordinates": 1},
]
TEXTS = [
    b"",
    b"null",
    b"[]",
    b"{}",
    b"[" * 100_000,
    b"[" * 900 + b"]" * 900,
    b'{"a":' * 50_000,
    b'{"type":"FeatureCollection","features":' + b"[" * 3000 + b"]" * 3000 + b"}",
    b"9" * 5000,
    b"1e999999",
    b'{"bin_size_um": 2, "bin_size_um": []}',
    b'"\\ud800"',
    b"\xef\xbb\xbf{}",
    b"\xff\xfe{\0}\0",
    b"\0" * 100,
    b"nan",
    b"a,b\n" * 3000,
    b'"' + b"x" * 200_000,
]


@st.composite
def mutated(draw: Draw, seeds: list[bytes]) -> bytes:
    """A sound file with bits flipped, parts cut out, repeated or taken from another, and runs of one byte put in."""
    data = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        n = draw(st.sampled_from([1, 2, 4, 8, 64, 1024]))
        how = draw(st.sampled_from(["flip", "fill", "cut", "truncate", "insert", "splice", "number"]))
        if how == "flip" and data:
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif how == "fill":
            data[at : at + n] = bytes([draw(st.sampled_from([0, 1, 127, 128, 255]))]) * min(n, len(data) - at)
        elif how == "cut":
            del data[at : at + n]
        elif how == "truncate":
            del data[at:]
        elif how == "insert":
            data[at:at] = bytes([draw(st.integers(0, 255))]) * n
        elif how == "splice":
            other = draw(st.sampled_from(seeds))
            place = draw(st.integers(0, len(other)))
            data[at : at + n] = other[place : place + n]
        else:
            value = draw(st.sampled_from([0, 1, 255, 65_535, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1]))
            data[at : at + 8] = struct.pack(draw(st.sampled_from("<>")) + "Q", value)[: len(data) - at]
    return bytes(data)


def encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def dump(value: Any) -> bytes:
    return encoded(json.dumps(value))


def _places(node: Any) -> list[tuple[Any, Any]]:
    """Every container of a document with every key of it."""
    keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else []
    return [place for key in keys for place in ((node, key), *_places(node[key]))]


@st.composite
def edited_json(draw: Draw, documents: list[Any], more: st.SearchStrategy[Any] | None = None) -> bytes:
    document = copy.deepcopy(draw(st.sampled_from(documents)))
    odd = scalar | arbitrary if more is None else scalar | arbitrary | more
    for _ in range(draw(st.integers(1, 3))):
        places = _places(document)
        if not places:
            break
        node, key = draw(st.sampled_from(places))
        how = draw(st.sampled_from(["set", "set", "set", "delete", "repeat", "wrap"]))
        if how == "set":
            node[key] = copy.deepcopy(draw(odd))
        elif how == "delete":
            del node[key]
        elif how == "wrap":
            node[key] = [node[key]]
        elif isinstance(node, list):
            node.append(copy.deepcopy(node[key]))
        else:
            node[draw(st.text(max_size=3))] = node[key]
    return dump(document)


_WKT = [
    "POLYGON EMPTY",
    "POLYGON Z ((1 1 1, 9 1 1, 9 9 1, 1 1 1))",
    "POLYGON ((1 1, 9 1, 9 9, 1 1), EMPTY)",
    "POLYGON ((1 1, 2 2))",
]
_WKT += [
    "POLYGON ((nan nan, 1 1, 2 2, nan nan))",
    "POLYGON ((inf 1, 9 1, 9 9, inf 1))",
    "MULTIPOLYGON (((1 1, 9 1, 9 9, 1 1)), EMPTY)",
]
_WKT += [
    "CURVEPOLYGON (CIRCULARSTRING (0 0, 4 0, 4 4, 0 4, 0 0))",
    "GEOMETRYCOLLECTION (POINT (1 1))",
    "POLYGON ((1e308 1, -1e308 1, 9 1e308, 1e308 1))",
]
_CELLS = [*_WKT, *WORDS, "-1", "1.5", "1e400", "GO:0007409", '"', "'", "#", "!", ";", ",", "\t", "\r", "|"]


@st.composite
def edited_text(draw: Draw, texts: list[str]) -> bytes:
    """A table with cells, lines and separators exchanged."""
    text = draw(st.sampled_from(texts))
    separator = max("\t,", key=text.count)
    rows = [line.split(separator) for line in text.split("\n")]
    for _ in range(draw(st.integers(1, 3))):
        row = draw(st.integers(0, len(rows) - 1))
        how = draw(st.sampled_from(["cell", "cell", "cell", "insert", "drop", "repeat", "header"]))
        cell = draw(st.sampled_from(_CELLS) | st.text(max_size=4))
        if how == "cell":
            rows[row][draw(st.integers(0, len(rows[row]) - 1))] = cell
        elif how == "insert":
            rows.insert(row, [cell])
        elif how == "drop" and len(rows) > 1:
            del rows[row]
        elif how == "repeat":
            rows.insert(row, rows[row])
        elif how == "header":
            rows[0] = [*rows[0], cell]
    joined = draw(st.sampled_from([separator, separator, separator, ",", ";", "\t"]))
    return encoded(draw(st.sampled_from(["\n", "\n", "\r\n", "\r"])).join(joined.join(row) for row in rows))
