"""GeoJSON as segmentation tools write it, feature by feature: also gzipped, with a byte order mark, or as a bare list or collection.

The JSON of HoVer-Net and CellViT, whose cells have a `contour`, is read in the same way.
"""

from __future__ import annotations

import codecs
import gzip
import json
import re
import zlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TextIO

from prts.errors import InputError
from prts.progress import track

if TYPE_CHECKING:
    from pathlib import Path

_CHUNK = 1 << 20
_SPACE = re.compile(r"[ \t\r\n\x1e]*")  # \x1e: between the features of a GeoJSON text sequence
_DECODER = json.JSONDecoder()
_GEOMETRIES = ("Polygon", "MultiPolygon", "GeometryCollection", "Point", "MultiPoint", "LineString", "MultiLineString")


def encoding_of(head: bytes) -> str:
    """The encoding of a text by its byte order mark: UTF-16 with one, else UTF-8."""
    return "utf-16" if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"


def read_text(path: Path) -> str:
    """Text of a UTF-8 or UTF-16 file, gzipped or not, without its byte order mark.

    Raises
    ------
    InputError
        If it cannot be read, or is not text.
    """
    try:
        data = path.read_bytes()
        data = gzip.decompress(data) if data.startswith(b"\x1f\x8b") else data
        return data.decode(encoding_of(data))
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise _not_text(path, error) from error


def read_features(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the features of a GeoJSON file, each with a mapping as its `properties`, and hold one at a time.

    A bare geometry is a feature without properties; a geometry collection of the whole file is one feature per geometry.

    Raises
    ------
    InputError
        If the file is not GeoJSON.
    """
    try:
        with _open_text(path) as file:
            for item in _items(_Values(_chunks(file, path))):
                feature = _feature(item)
                if feature is None:
                    raise InputError(f"{path}: JSON, but not GeoJSON; give a FeatureCollection or a list of features")
                if not isinstance(feature["properties"], dict):
                    raise InputError(
                        f"{path}: not GeoJSON: the properties of a feature must be an object; export it again"
                    )
                yield feature
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise _not_text(path, error) from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: looks like GeoJSON but cannot be parsed ({error}); export it again") from error


def _open_text(path: Path) -> TextIO:
    with path.open("rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    with gzip.open(path) if packed else path.open("rb") as file:
        encoding = encoding_of(file.read(2))
    return gzip.open(path, "rt", encoding=encoding) if packed else path.open(encoding=encoding)


def _not_text(path: Path, error: Exception) -> InputError:
    cure = "save it as UTF-8" if isinstance(error, UnicodeDecodeError) else "get a complete copy"
    return InputError(f"{path}: cannot be read as text ({error}); {cure}")


def _chunks(file: TextIO, path: Path) -> Iterator[str]:
    chunks = iter(lambda: file.read(_CHUNK), "")
    return track(chunks, f"read {path.name}", total=-(-path.stat().st_size // _CHUNK))


class _Values:
    """The values of a JSON text that arrives in chunks, parsed one by one."""

    def __init__(self, chunks: Iterator[str]) -> None:
        self._chunks = chunks
        self._text, self._at = "", 0
        self._before, self._ended = 0, False

    def peek(self) -> str:
        """The next character that is not white space; empty at the end."""
        while True:
            self._at = _SPACE.match(self._text, self._at).end()  # type: ignore[union-attr]
            if self._at < len(self._text) or self._ended:
                return self._text[self._at : self._at + 1]
            self._more()

    def take(self, expected: str) -> str:
        """Pass a character, one of those that are expected."""
        found = self.peek()
        if not found or found not in expected:
            what = repr(found) if found else "the end"
            instead = " or ".join(expected) or "the end"
            raise ValueError(f"{what} at character {self._before + self._at} instead of {instead}")
        self._at += 1
        return found

    def value(self) -> Any:
        """Pass a value."""
        self.peek()
        while True:
            try:
                found, end = _DECODER.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                if self._ended:
                    raise ValueError(f"{error.msg} at character {self._before + error.pos}") from error
            else:
                if end < len(self._text) or self._ended:  # or a number may go on
                    self._at = end
                    return found
            self._more()

    def elements(self) -> Iterator[Any]:
        """Pass an array, element by element."""
        self.take("[")
        if self.peek() == "]":
            self.take("]")
            return
        while True:
            yield self.value()
            if self.take(",]") == "]":
                return

    def _more(self) -> None:
        # twice as much each time, or a long value would be parsed from its start for every chunk
        left = len(self._text) - self._at
        parts, n_new = [self._text[self._at :]], 0
        while n_new < max(left, 1) and not self._ended:
            part = next(self._chunks, "")
            parts.append(part)
            n_new += len(part)
            self._ended = not part
        self._before += self._at
        self._text, self._at = "".join(parts), 0


def _items(values: _Values) -> Iterator[Any]:
    """What may be features: those of the document, or of one document after the other (newline-delimited GeoJSON)."""
    yield from _document(values)
    while values.peek() == "{":
        yield from _document(values)
    if values.peek():
        values.take("")


def _document(values: _Values) -> Iterator[Any]:
    """The elements of a list or collection, or the document itself."""
    if values.peek() == "[":
        yield from values.elements()
    elif values.peek() != "{":
        yield values.value()
    else:
        values.take("{")
        document: dict[str, Any] = {}
        is_collection = False
        while values.peek() != "}":
            key = values.value()
            values.take(":")
            if key in ("features", "geometries", "cells") and values.peek() == "[":
                is_collection = True
                yield from (_cell(item, document.get("type_map")) for item in values.elements())
            elif key == "nuc" and values.peek() == "{":
                is_collection = True
                yield from (_cell({"id": name, **item}, {}) for name, item in values.value().items())
            else:
                document[key] = values.value()
            if values.peek() != "}":
                values.take(",")
        values.take("}")
        if not is_collection:
            yield document


def _cell(item: Any, types: Any) -> Any:
    """A cell with a `contour`, as HoVer-Net and CellViT write them in their own JSON, as a feature; anything else as it is."""
    if not isinstance(item, dict) or "contour" not in item:
        return item
    contour, kind = item["contour"], item.get("type")
    ring = [*contour, contour[0]] if isinstance(contour, list) and contour else []
    named = types.get(str(kind), kind) if isinstance(types, dict) else kind
    about = {"id": item.get("id"), "score": item.get("type_prob"), "class": None if named is None else str(named)}
    return {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [ring]}, "properties": about}


def _feature(item: Any) -> dict[str, Any] | None:
    if not isinstance(item, dict):
        return None
    if item.get("type") == "Feature":
        return {**item, "properties": item.get("properties") or {}}
    if item.get("type") in _GEOMETRIES:
        other = {key: value for key, value in item.items() if key not in ("type", "coordinates", "geometries")}
        return {"type": "Feature", "geometry": item, "properties": other}
    return None
