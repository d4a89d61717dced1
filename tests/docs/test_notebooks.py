"""The tutorials as the site shows them; `pytest --nbmake notebooks` runs them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).resolve().parents[2] / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_fit_to_be_shown(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    outputs = [output for cell in json.loads(text)["cells"] for output in cell.get("outputs", [])]

    assert not [output for output in outputs if output["output_type"] == "error"]
    # warnings of other packages, and folders of the machine that ran it
    assert not [output for output in outputs if output.get("name") == "stderr"]
    assert not re.search(r"/(tmp|home|root|Users)/", text)
    assert len(text) < 1_000_000


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_tutorials_use_the_python_api(path: Path) -> None:
    code = "\n".join(
        "".join(cell["source"]) for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"
    )

    assert "import prts" in code
    assert "prts.cli" not in code and "hydra" not in code
