"""A few broken files for every reader; `benchmarks/fuzz.py` tries ten thousands."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.fuzz import READERS, Trial  # noqa: E402

EXAMPLES = 15

pytestmark = pytest.mark.nightly


@pytest.fixture(scope="module")
def readers(tmp_path_factory: pytest.TempPathFactory) -> dict:
    from benchmarks.fuzzing.readers import readers

    return readers(tmp_path_factory.mktemp("seeds"))


def test_all_readers_are_tried(readers: dict) -> None:
    assert tuple(readers) == READERS


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", READERS)
def test_any_file_is_read_or_refused_in_one_line(readers: dict, name: str, tmp_path: Path) -> None:
    from benchmarks.fuzzing.inputs import inputs, mutated

    reader = readers[name]
    trial = Trial(reader, tmp_path)
    for seed in reader.seeds:
        assert trial(seed) == ("accepted", "")

    # the same inputs in every run: new findings belong to the benchmark, not to an unrelated pull request
    @settings(
        max_examples=EXAMPLES,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(mutated(reader.seeds) | inputs(reader.kind, reader.seeds))
    def check(data: bytes) -> None:
        what, text = trial(data)
        assert what in ("accepted", "refused"), text

    check()


def test_a_finding_is_reported(readers: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trial = Trial(readers["panel"], tmp_path)
    monkeypatch.setattr("prts.io.gene_list.json.loads", lambda text: text.no_such_thing)
    assert trial(b"[]")[0].startswith("AttributeError gene_list.py:")
