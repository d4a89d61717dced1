"""Hypothesis strategies that keep the structure of a format and change its contents."""

from __future__ import annotations

import json

from hypothesis import strategies as st

from benchmarks.fuzzing.containers import edited_h5, edited_parquet
from benchmarks.fuzzing.images import picture, tiff
from benchmarks.fuzzing.strategies import GEOMETRIES, TEXTS, arbitrary, dump, edited_json, edited_text, encoded, mutated
from benchmarks.fuzzing.weights import checkpoint, edited_safetensors


def inputs(kind: str, seeds: list[bytes]) -> st.SearchStrategy[bytes]:
    """The strategy of a kind of structure, made from sound files."""
    if kind in ("json", "geojson"):
        documents = [json.loads(seed) for seed in seeds if seed[:1] in b"{["]
        edited = edited_json(documents, st.sampled_from(GEOMETRIES) if kind == "geojson" else None)
        return edited | arbitrary.map(dump) | st.sampled_from(TEXTS)
    if kind == "text":
        return (
            edited_text([seed.decode() for seed in seeds]) | st.text(max_size=40).map(encoded) | st.sampled_from(TEXTS)
        )
    return {
        "h5": edited_h5,
        "parquet": edited_parquet,
        "tiff": tiff,
        "picture": picture,
        "pickle": lambda _: checkpoint(),
        "safetensors": edited_safetensors,
        "bytes": mutated,
    }[kind](seeds)
