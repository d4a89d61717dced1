"""Fixtures that several areas of the tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def prts_data() -> Path:
    """The folder of real data; tests that need it carry the mark `real` and are skipped, visibly, without it."""
    folder = os.environ.get("PRTS_DATA")
    if not folder:
        pytest.skip("PRTS_DATA is not set: it names the folder of real data")
    path = Path(folder)
    if not path.is_dir():
        pytest.fail(f"PRTS_DATA is {folder!r}, which is no folder")
    return path.resolve()
