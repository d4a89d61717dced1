"""HDF5 and parquet files with a valid structure and wrong contents."""

from __future__ import annotations

import io
import json
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st

from benchmarks.fuzzing.strategies import NUMBERS, WORDS, Draw, arbitrary, dump, edited_json

_DTYPES = [
    "i1",
    "u1",
    "i4",
    "u4",
    "i8",
    "u8",
    "f2",
    "f4",
    "f8",
    ">i4",
    "c8",
    "?",
    "S5",
    "S0",
    "V3",
    "O",
    "vlen",
    "ref",
    "enum",
    "compound",
]


@st.composite
def _odd_array(draw: Draw, length: int) -> tuple[Any, Any]:
    """Values, and the dtype that h5py is to store them by."""
    name = draw(st.sampled_from(_DTYPES))
    shape = draw(st.sampled_from([(), (0,), (1,), (length,), (length,), (length,), (length + 1,), (length, 2), (2, 0)]))
    if name in ("O", "S5"):
        text = np.full(shape, draw(st.sampled_from([w for w in WORDS if "\0" not in w])), dtype=object)
        return (
            (text, h5py.string_dtype())
            if name == "O"
            else (np.char.encode(text.astype(str), "utf-8").astype("S5"), None)
        )
    if name in ("vlen", "ref"):
        dtype = h5py.vlen_dtype(np.int32) if name == "vlen" else h5py.ref_dtype
        return None, (shape, dtype)
    if name == "compound":
        return np.zeros(shape, [("a", "i4"), ("b", "f8")]), None
    if name == "enum":
        return None, (shape, h5py.enum_dtype({"FALSE": 0, "TRUE": 1}, "i1"))
    if name == "S0":
        return h5py.Empty("S1"), None
    if name == "V3":
        return np.zeros(shape, "V3"), None
    with np.errstate(all="ignore"):
        value = draw(st.sampled_from([n for n in NUMBERS if n != 10**400]))
        value = (
            float(value)
            if np.dtype(name).kind in "fc"
            else int(np.nan_to_num(value)) % 2 ** (8 * np.dtype(name).itemsize)
        )
        return np.full(shape, np.array(value).astype(name)), None


def _objects(file: h5py.File) -> list[str]:
    names: list[str] = []
    file.visit(names.append)
    return names


@st.composite
def edited_h5(draw: Draw, seeds: list[bytes]) -> bytes:
    """A sound HDF5 file with objects, values and attributes exchanged."""
    with tempfile.NamedTemporaryFile(suffix=".h5") as scratch:
        Path(scratch.name).write_bytes(draw(st.sampled_from(seeds)))
        with h5py.File(scratch.name, "r+") as file:
            for _ in range(draw(st.integers(1, 2))):
                if names := _objects(file):
                    try:
                        _edit_h5(draw, file, draw(st.sampled_from(names)))
                    except (OSError, RuntimeError, KeyError, ValueError, TypeError):
                        break  # not all of it can be written, above all not after an earlier edit
        return Path(scratch.name).read_bytes()


def _edit_h5(draw: Draw, file: h5py.File, name: str) -> None:
    target = file[name]
    actions = ["replace", "replace", "delete", "group", "attribute", "attribute", "huge", "soft", "cycle", "extra"]
    if isinstance(target, h5py.Dataset) and target.dtype.kind in "iuf" and 0 < target.size < 1000:
        actions += ["value", "value", "value", "value"]
    how = draw(st.sampled_from(actions))
    length = target.shape[0] if isinstance(target, h5py.Dataset) and target.shape else 3
    if how == "value":
        flat = target[()].reshape(-1)
        with np.errstate(all="ignore"):
            odd = draw(st.sampled_from([n for n in NUMBERS if n != 10**400]))
            odd = odd if flat.dtype.kind == "f" else int(np.nan_to_num(odd)) % 2 ** (8 * flat.dtype.itemsize - 1)
            at = draw(st.integers(0, len(flat) - 1))
            flat[at] = np.array(odd if draw(st.booleans()) or flat.dtype.kind == "u" else -odd).astype(flat.dtype)
        target[()] = flat.reshape(target.shape)
    elif how == "attribute":
        known = [*target.attrs, "encoding-type", "encoding-version", "shape", "column-order", "_index", "categories"]
        key = draw(st.sampled_from(known))
        words = [
            "array",
            "csr_matrix",
            "csc_matrix",
            "dataframe",
            "dict",
            "categorical",
            "null",
            "string",
            "nullable-integer",
            "0.1.0",
            *WORDS,
        ]
        value = draw(
            st.sampled_from([w for w in words if "\0" not in w])
            | st.sampled_from([[3, 3], [-1, 2], 1, 2.5, [2**62, 2**62]])
        )
        if draw(st.integers(0, 3)) == 0:
            target.attrs.pop(key, None)
        else:
            target.attrs[key] = value
    elif how == "extra":
        parent = target if isinstance(target, h5py.Group) else target.parent
        odd_name = draw(st.sampled_from(["x", "é", "\x1b", "_index", "data", "__categories"]))
        if odd_name not in parent:
            parent[odd_name] = 1.5
    else:
        attributes = dict(target.attrs)
        parent, leaf = target.parent, name.rsplit("/", 1)[-1]
        del parent[leaf]
        if how == "group":
            parent.create_group(leaf).attrs.update(attributes)
        elif how == "soft":
            parent[leaf] = draw(
                st.sampled_from([h5py.SoftLink("/"), h5py.SoftLink("/no"), h5py.ExternalLink("/etc/passwd", "/")])
            )
        elif how == "cycle":
            parent[leaf] = draw(st.sampled_from([parent, file]))
        elif how == "huge":
            shape = draw(st.sampled_from([(2**40,), (2**31,), (2**28,), (2**20, 2**20), (length, 2**40)]))
            dtype = draw(st.sampled_from(["i4", "f8", "S21", h5py.string_dtype()]))
            parent.create_dataset(leaf, shape, dtype, chunks=(1024,) if len(shape) == 1 else (1, 1024)).attrs.update(
                attributes
            )
        elif how == "replace":
            values, kind = draw(_odd_array(length))
            if values is None:
                made = parent.create_dataset(leaf, kind[0], kind[1])
            elif isinstance(values, h5py.Empty):
                made = parent.create_dataset(leaf, data=values)
            else:
                made = parent.create_dataset(leaf, data=values, dtype=kind)
            made.attrs.update(attributes)


def _arrow_column(name: str, n: int, value: float) -> pa.Array:
    if name == "text":
        return pa.array([["a", "", "1", "POLYGON EMPTY"][i % 4] for i in range(n)])
    if name == "list":
        return pa.array([[1.0, 2.0]] * n)
    if name == "struct":
        return pa.array([{"x": 1.0, "y": 2.0}] * n)
    if name == "null":
        return pa.nulls(n)
    if name == "dictionary":
        return pa.array(["a"] * n).dictionary_encode()
    if name == "binary":
        return pa.array(
            [[b"", b"\x01", b"\x01\x03\0\0\0\xff\xff\xff\xff", b"\0" * 30][i % 4] for i in range(n)], pa.binary()
        )
    if name == "decimal":
        return pa.array([1] * n).cast(pa.decimal128(38, 2))
    if name == "time":
        return pa.array([1] * n, pa.timestamp("us", tz="UTC"))
    if name == "gaps":
        return pa.array([None, *range(1, n)][:n], pa.int64())
    if name == "range":
        return pa.array(
            [np.arange(n), np.arange(n)[::-1], np.arange(n) // 2][int(value) % 3 if np.isfinite(value) else 0]
        )
    dtype = np.dtype(name)
    with np.errstate(all="ignore"):
        whole = int(np.nan_to_num(value)) % 2 ** (8 * dtype.itemsize)
        return pa.array(np.full(n, np.array(value if dtype.kind == "f" else whole).astype(dtype)))


_COLUMNS = ["text", "list", "struct", "null", "dictionary", "binary", "decimal", "time", "gaps", "range"]
_COLUMNS += ["i1", "u1", "i4", "u4", "i8", "u8", "f2", "f4", "f8", "?"]


@cache
def _table(data: bytes) -> pa.Table:
    return pq.read_table(pa.BufferReader(data))


@st.composite
def edited_parquet(draw: Draw, seeds: list[bytes]) -> bytes:
    """A sound table with columns and metadata exchanged."""
    table = _table(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(1, 2))):
        at = draw(st.integers(0, table.num_columns - 1))
        how = draw(
            st.sampled_from(["set", "set", "set", "drop", "rename", "repeat", "rows", "metadata", "no metadata"])
        )
        if how == "set":
            value = draw(st.sampled_from([n for n in NUMBERS if n != 10**400]))
            column = _arrow_column(draw(st.sampled_from(_COLUMNS)), table.num_rows, float(value))
            table = table.set_column(at, table.column_names[at], column)
        elif how == "drop" and table.num_columns > 1:
            table = table.remove_column(at)
        elif how == "rename":
            names = table.column_names
            names[at] = draw(st.sampled_from([*names, *(w for w in WORDS if "\0" not in w)]))
            table = table.rename_columns(names)
        elif how == "repeat":
            table = table.append_column(table.column_names[at], table.column(at))
        elif how == "rows":
            n = draw(st.sampled_from([0, 1, 2, 2 * table.num_rows]))
            table = table.take(np.arange(n) % table.num_rows) if table.num_rows else table
        elif how == "metadata" and table.schema.metadata:
            metadata = dict(table.schema.metadata)
            key = draw(st.sampled_from(sorted(metadata)))
            try:
                metadata[key] = draw(edited_json([json.loads(metadata[key])]) | arbitrary.map(dump))
            except ValueError:  # arrow's own schema, which is no JSON
                metadata[key] = draw(st.binary(max_size=8))
            table = table.replace_schema_metadata(metadata)
        elif how == "no metadata":
            table = table.replace_schema_metadata(None)
    out = io.BytesIO()
    pq.write_table(table, out, compression=draw(st.sampled_from(["snappy", "none"])))
    return out.getvalue()
