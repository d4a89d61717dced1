"""The code that the documentation shows."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "docs/examples/predict_slide.py"


def test_the_readme_shows_the_tested_example() -> None:
    assert f"```python\n{EXAMPLE.read_text()}```" in (ROOT / "README.md").read_text()
    assert "{literalinclude} examples/predict_slide.py" in (ROOT / "docs/start.md").read_text()


@pytest.mark.slow
@pytest.mark.real
def test_a_slide_is_predicted_and_drawn_in_five_lines(
    prts_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    import prts
    from prts.simulate.section import simulate_section

    monkeypatch.setenv("PRTS_CACHE", str(tmp_path / "cache"))
    train, val = (
        prts.read_visium_hd(simulate_section(tmp_path / name, cells=300, genes=200, seed=seed))
        for name, seed in [("train", 1), ("val", 2)]
    )
    model = prts.Model(prts.encoders.classical(tile_px=64))  # quicker than 256
    model.train([train], validation=[val], nuclei="watershed", genes=20, max_epochs=1)
    model.save(tmp_path / "outputs/demo/make/model")
    (tmp_path / "CMU-1-Small-Region.svs").symlink_to(prts_data / "images/CMU-1-Small-Region.svs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plt, "show", lambda *_, **__: None)

    names = runpy.run_path(str(EXAMPLE))

    adata = names["adata"]
    assert adata.n_obs > 2000 and adata.n_vars == 20
    titles = [axis.get_title() for axis in plt.gcf().axes]
    assert set(adata.var["val_pcc"].nlargest(3).index) <= set(titles)


def test_python_blocks_parse() -> None:
    pages = [ROOT / "README.md", *(page for page in (ROOT / "docs").rglob("*.md") if "_build" not in page.parts)]
    blocks = [code for page in pages for code in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S)]

    assert blocks
    for code in blocks:
        compile(code, "<docs>", "exec")
