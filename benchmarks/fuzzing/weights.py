"""Weights: torch checkpoints with any content, and safetensors with any header."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from argparse import Namespace

import torch
from hypothesis import strategies as st

from benchmarks.fuzzing.strategies import Draw, edited_json, mutated

_tensors = st.sampled_from(
    [
        torch.ones(2, 3),
        torch.tensor(1.0),
        torch.ones(0),
        torch.ones(2, dtype=torch.float16),
        torch.ones(2, dtype=torch.complex64),
        torch.ones(2, dtype=torch.int64),
        torch.ones(2, dtype=torch.bool),
        torch.ones(2, dtype=torch.float8_e4m3fn),
        torch.ones(1).expand(5, 7),
        torch.ones(3, 3).to_sparse(),
        torch.ones(2, device="meta"),
        torch.nn.Parameter(torch.ones(2)),
        torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.quint8),
    ]
)
_contents = st.recursive(
    _tensors | st.sampled_from([None, 1, 2.5, "x", b"x", (), Namespace(a=1), 10**400]),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(
            st.sampled_from(["teacher", "module.", "module.module.a", "a", "", 1, None, (1,), True]), inner, max_size=3
        )
    ),
    max_leaves=4,
)


@st.composite
def checkpoint(draw: Draw) -> bytes:
    """What torch can save, and such files with their pickle changed within a sound archive."""
    out = io.BytesIO()
    torch.save(draw(_contents), out, _use_new_zipfile_serialization=draw(st.sampled_from([True, True, False])))
    data = out.getvalue()
    if not data.startswith(b"PK") or draw(st.integers(0, 2)) == 0:
        return data
    changed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(changed, "w") as new:
        for name in old.namelist():
            body = old.read(name)
            if name.endswith("data.pkl"):
                body = draw(mutated([body, pickle.dumps({"a": [1, "b", 2.5]}, 2)]))
            elif draw(st.integers(0, 8)) == 0:
                body = draw(st.binary(max_size=8))
            new.writestr(name, body)
    return changed.getvalue()


@st.composite
def edited_safetensors(draw: Draw, seeds: list[bytes]) -> bytes:
    """A header of JSON that was changed, before the tensors' bytes."""
    data = draw(st.sampled_from(seeds))
    n = int.from_bytes(data[:8], "little")
    header = draw(edited_json([json.loads(data[8 : 8 + n])]))
    length = draw(st.sampled_from([len(header)] * 9 + [0, 1, len(header) + 1, 2**63, 2**64 - 1]))
    return length.to_bytes(8, "little") + header + draw(st.sampled_from([data[8 + n :], data[8 + n : -1], b""]))
