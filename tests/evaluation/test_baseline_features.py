from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.sparse as sp
import shapely

from prts.data.nucleus_set import NucleusSet
from prts.errors import InputError
from prts.evaluation.baseline_features import with_morphology
from prts.features.morphology import morphology
from prts.io.nuclei import make_nuclei, write_nuclei


def nuclei_set(cell_id: list[str]) -> NucleusSet:
    n = len(cell_id)
    counts = sp.csr_matrix((n, 1), dtype=np.int32)
    ids = np.array(cell_id, dtype=object)
    return NucleusSet("s", ids, np.zeros((n, 2)), np.zeros((n, 1)), counts, np.zeros(n), np.zeros(n))


def test_shapes_are_those_of_the_named_nuclei_and_a_nucleus_without_one_is_refused(tmp_path: Path) -> None:
    radius = np.array([5.0, 8.0, 11.0])
    outlines = shapely.buffer(shapely.points([[20, 20], [60, 20], [20, 60]]), radius)
    polygons = make_nuclei(list(outlines), 0.5, cell_id=["c0", "c1", "c2"])
    write_nuclei(polygons, tmp_path / "nuclei.parquet")
    prepared = SimpleNamespace(nuclei=tmp_path / "nuclei.parquet", section=SimpleNamespace(mpp=0.5))
    tissue = SimpleNamespace(sections={"s": prepared})
    (described,) = with_morphology([nuclei_set(["c2", "c0"])], tissue)
    np.testing.assert_array_equal(described.features, morphology(polygons, 0.5)[[2, 0]])
    with pytest.raises(InputError, match=r"nuclei\.parquet: has no polygons of 1 of 2 nuclei \(cell_id 'c9'"):
        with_morphology([nuclei_set(["c1", "c9"])], tissue)
