"""GeoJSON is read feature by feature, whatever the chunks in which its text arrives."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prts.errors import InputError
from prts.io import geojson
from prts.io.geojson import read_features
from prts.io.nuclei import read_nuclei

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
FEATURES = st.lists(
    st.fixed_dictionaries(
        {"properties": st.dictionaries(st.text(max_size=5), VALUES, max_size=3)},
        optional={
            "id": st.integers() | st.text(max_size=5),
            "geometry": st.just({"type": "Point", "coordinates": [1, -2.5e-7]}),
        },
    ),
    max_size=6,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    features=FEATURES,
    chunk=st.sampled_from([1, 2, 5, 64, 1 << 20]),
    wrap=st.sampled_from(["list", "collection", "last"]),
    indent=st.sampled_from([None, 2]),
    encoding=st.sampled_from(["utf-8", "utf-8-sig"]),
    packed=st.booleans(),
)
def test_features_equal_those_of_the_whole_document(
    tmp_path: Path, features: Any, chunk: int, wrap: str, indent: int | None, encoding: str, packed: bool
) -> None:
    features = [{"type": "Feature", **feature} for feature in features]
    document = {
        "list": features,
        "collection": {"type": "FeatureCollection", "features": features, "name": [1]},
        "last": {"name": {"features": 7}, "features": features},
    }[wrap]
    data = json.dumps(document, indent=indent, ensure_ascii=False).encode(encoding)
    (tmp_path / "f.geojson").write_bytes(gzip.compress(data) if packed else data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(geojson, "_CHUNK", chunk)
        assert list(read_features(tmp_path / "f.geojson")) == features


@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('[{"type":"Feature"}', "the end at character 19 instead of , or ]"),
        ('{"features":[1]}', "not GeoJSON"),
        ('{"type":"FeatureCollection","features":{}}', "not GeoJSON"),
        ('{"type":"FeatureCollection","features":[]} x', "'x' at character 43 instead of the end"),
        ('{"a" 1}', "'1' at character 5 instead of :"),
        ('[{"type":"Feature","properties":[1]}]', "properties of a feature must be an object"),
        ("[" * 100_000, "recursion"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, words: str, chunk: int
) -> None:
    if len(text) > 1000 and chunk < 1 << 20:
        pytest.skip("slow by the character")
    monkeypatch.setattr(geojson, "_CHUNK", chunk)
    (tmp_path / "f.geojson").write_text(text)
    with pytest.raises(InputError, match=words):
        list(read_features(tmp_path / "f.geojson"))


def test_a_file_of_many_cells_is_never_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """QuPath's cells with their measurements; the document as Python objects takes more than ten times its size."""
    monkeypatch.setattr(geojson, "_CHUNK", 1 << 15)
    monkeypatch.setattr("prts.io.nuclei_geojson._AT_ONCE", 20)
    n, names = 800, [f"Nucleus: measurement {i}" for i in range(10)]
    with (tmp_path / "cells.geojson").open("w") as file:
        for i in range(n):
            x, y = 30 + 40 * (i % 64), 30 + 40 * (i // 64)
            ring = [[x + dx + 0.25, y + dy + 0.125] for dx in range(-7, 8) for dy in (-abs(dx), 7)][:24]
            cell = {
                "type": "Feature",
                "id": f"00000000-0000-4000-8000-{i:012d}",
                "geometry": {
                    "type": "Polygon",
                    "coordinates": [[[x - 9, y - 9], [x + 9, y - 9], [x, y + 9], [x - 9, y - 9]]],
                },
                "nucleusGeometry": {"type": "Polygon", "coordinates": [[*ring, ring[0]]]},
                "properties": {"objectType": "cell", "measurements": dict.fromkeys(names, i / 7)},
            }
            file.write(("," if i else "[") + json.dumps(cell))
        file.write("]")
    size = (tmp_path / "cells.geojson").stat().st_size
    tracemalloc.start()
    features = read_features(tmp_path / "cells.geojson")
    assert sum(feature["properties"]["objectType"] == "cell" for feature in features) == n
    streamed = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert streamed < size / 4, (streamed, size)
    assert len(read_nuclei(tmp_path / "cells.geojson", mpp=0.5, width=5000, height=5000)) == n
