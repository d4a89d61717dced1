from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def as_users_see_it(full_dpi: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are drawn here with the dpi that users get, unlike in the other tests."""
    monkeypatch.setattr("prts.report.figures_canvas._DPI", full_dpi)
