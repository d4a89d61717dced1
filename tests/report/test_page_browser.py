"""report.html in headless Chromium: what is drawn is what was predicted, and nothing is asked of any network."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import shapely

from prts.report.html import MeasuredCounts, PageContent, write_page

pytestmark = pytest.mark.slow

N, SIDE = 400, 4000
EVIL = "</script><script>document.title='evil'</script>"
GENES = ["Plp1", "Ttr", "NAN", EVIL]


@dataclass
class Opened:
    """A page of a browser, what it complained of, and what it asked for."""

    tab: Any
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def js(self, code: str, argument: Any = None) -> Any:
        return self.tab.evaluate(code, argument)

    def settle(self) -> None:
        """Wait until the map has drawn what it was last asked for."""
        self.js("() => prts.map.render()")

    def wait(self, condition: str, argument: Any = None) -> None:
        self.tab.wait_for_function(condition, arg=argument)

    def drawn(self, panel: int) -> np.ndarray:
        """The values that plotly draws in a panel, NaN where a nucleus has none."""
        return np.array(
            self.js(
                "i => { const {x, marker} = prts.map.div._fullData[i]; return Array.from(marker.color, (v, k) => isNaN(x[k]) ? null : v) }",
                panel,
            ),
            dtype=float,
        )


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with sync_api.sync_playwright() as play:
        own = Path(play.chromium.executable_path)
        path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
        if path is None and not own.is_file():
            pytest.skip("no Chromium: `playwright install chromium`, or that of the system")
        # --no-sandbox: in a container the tests may run as root
        chromium = play.chromium.launch(
            executable_path=path or str(own), args=["--no-sandbox", "--enable-unsafe-swiftshader"]
        )
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def section() -> dict[str, Any]:
    """Nuclei on a grid; Ttr is measured and predicted on the left half only, all else is noise."""
    rng = np.random.default_rng(0)
    side = int(np.sqrt(N))
    xy = (np.stack(np.meshgrid(np.arange(side), np.arange(side)), -1).reshape(-1, 2) + 0.5) * SIDE / side
    umi = rng.gamma(2, 0.3, (N, len(GENES))).astype(np.float32)
    left = xy[:, 0] < SIDE / 2
    umi[:, 1] = np.where(left, 5, 0.1) + rng.uniform(0, 0.05, N)
    counts = rng.poisson(umi).astype(np.int32)
    rows = np.flatnonzero(np.arange(N) % 10 != 3)
    about = {"section": "s <1>", "image": "a.tif", "width": SIDE, "height": SIDE, "mpp": 0.5, "species": "human"}
    about["interval_level"] = 0.9
    about["features"] = {"encoder": {"name": "classical", "mpp": 0.5}}
    prediction = ad.AnnData(
        sp.csr_matrix(umi),
        obs=pd.DataFrame(
            {"area_um2": rng.uniform(20, 80, N), "type": pd.Categorical(np.where(left, "neuron", EVIL))},
            index=[f"n{i}" for i in range(N)],
        ),
        var=pd.DataFrame({"val_pcc": [0.2, 0.5, np.nan, 0.1], "predictable": [True, True, False, True]}, index=GENES),
        obsm={"spatial": xy},
        layers={"prob": 1 - np.exp(-umi), "lower": np.floor(umi / 2), "upper": np.ceil(umi * 2)},
        uns={"prts": about},
    )
    per_gene = pd.DataFrame(
        {
            "gene": GENES,
            "pcc": [0.3, 0.6, np.nan, -0.1],
            "ceiling": [0.5, 0.8, np.nan, 0.2],
            "mean_counts": counts.mean(axis=0),
        }
    )
    picture = np.full((400, 400, 3), (238, 210, 224), np.uint8)
    measured = MeasuredCounts(sp.csr_matrix(counts[rows]), rows)
    metrics = {"test/pcc_mean": 0.3, "test/n_genes": 4, "test/n_cells": N}
    half = np.array([30, 20])
    outlines = shapely.box(*(xy - half).T, *(xy + half).T)
    page = PageContent(prediction, picture, measured, per_gene=per_gene, metrics=metrics, outlines=outlines)
    return {"page": page, "umi": umi, "counts": counts, "rows": rows, "xy": xy, "left": left}


@pytest.fixture(scope="module")
def file(section: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_page(tmp_path_factory.mktemp("page") / "report.html", section["page"])


def visit(browser: Any, file: Path, width: int = 1366, height: int = 900) -> Opened:
    opened = Opened(browser.new_page(viewport={"width": width, "height": height}))
    opened.tab.set_default_timeout(60_000)  # a busy machine draws WebGL slowly
    opened.tab.on("console", lambda m: opened.complaints.append(m.text) if m.type == "error" else None)
    opened.tab.on("pageerror", lambda error: opened.complaints.append(str(error)))
    opened.tab.on("request", lambda request: opened.requests.append(request.url))
    opened.tab.goto(file.as_uri(), wait_until="commit")
    opened.wait("() => typeof prts !== 'undefined' && prts.ready")
    return opened


def complaints(opened: Opened, file: Path) -> list[str]:
    """Errors of the console, and requests for anything but the file itself and what is in it."""
    return opened.complaints + [
        url for url in opened.requests if not url.startswith(("data:", "blob:")) and url != file.as_uri()
    ]


@pytest.fixture(scope="module")
def laptop(browser: Any, file: Path) -> Iterator[Opened]:
    page = visit(browser, file)
    yield page
    page.tab.close()


START = """async gene => {
  const set = (id, value) => {
    const e = document.getElementById(id);
    e.value = value; e.dispatchEvent(new Event('input')); e.dispatchEvent(new Event('change'));
  };
  await prts.region.clear();
  Object.assign(prts.map.state, {view: 'both', own: false, colour: 'expression', extra: [null, null]});
  document.querySelector('#views input[value=both]').checked = true;
  document.querySelector('#drag input[value=pan]').click();
  document.getElementById('own').checked = false;
  set('opacity', 85); set('colour', 'expression'); set('filter', '');
  await prts.choose(gene);
  await prts.map.reset();
}"""


@pytest.fixture
def opened(laptop: Opened, file: Path) -> Iterator[Opened]:
    """The page on a laptop, as it opens: Ttr, measured beside predicted, the whole section."""
    laptop.js(START, 0)
    yield laptop
    assert complaints(laptop, file) == []


def test_choosing_a_gene_draws_its_measured_and_predicted_values(opened, section):
    for gene in ("Plp1", "NAN", "Ttr"):
        opened.tab.fill("#gene", gene)
        opened.tab.press("#gene", "Enter")
        opened.wait("gene => prts.map.panels()[0].label === gene", gene)
        opened.settle()
        column = GENES.index(gene)
        umi, counts = section["umi"][:, column], section["counts"][:, column].astype(float)
        counts[np.setdiff1d(np.arange(N), section["rows"])] = np.nan
        np.testing.assert_allclose(opened.drawn(0), np.log1p(counts), atol=1e-6)
        np.testing.assert_allclose(opened.drawn(1), np.log1p(umi), atol=np.log1p(umi.max()) / 500)
        tops = opened.js("() => [0, 1].map(i => prts.map.div._fullData[i].marker.cmax)")
        assert tops == pytest.approx([np.percentile(np.log1p(counts[section["rows"]]), 99)] * 2)
        assert opened.tab.get_attribute(f"#genes tr.chosen button >> text={gene}", "aria-pressed") == "true"
    assert "Ttr: log1p(UMI), 0 to 99th percentile of measured nuclei" in opened.tab.inner_text("#legend")
    assert opened.tab.input_value("#gene") == "Ttr"


def test_own_colours_end_at_each_maps_own_percentile_and_the_legend_says_so(opened, section):
    opened.tab.check("#own")
    opened.settle()
    tops = opened.js("() => [0, 1].map(i => prts.map.div._fullData[i].marker.cmax)")
    assert tops[1] == pytest.approx(np.percentile(np.log1p(section["umi"][:, 1]), 99))
    assert tops[0] == pytest.approx(np.percentile(np.log1p(section["counts"][section["rows"], 1]), 99))
    assert "percentile of predicted nuclei" in opened.tab.inner_text("#legend")


def test_probability_and_a_column_of_nuclei_can_be_shown(opened, section):
    opened.tab.select_option("#colour", "prob")
    opened.settle()
    np.testing.assert_allclose(opened.drawn(1), 1 - np.exp(-section["umi"][:, 1]), atol=0.011)
    measured = opened.drawn(0)[section["rows"]]
    np.testing.assert_array_equal(measured, section["counts"][section["rows"], 1] > 0)
    opened.tab.select_option("#colour", "interval")
    opened.settle()
    umi = section["umi"][:, 1]
    np.testing.assert_array_equal(opened.drawn(0), np.ceil(umi * 2) - np.floor(umi / 2))
    opened.tab.select_option("#colour", label="type")
    opened.settle()
    labels = opened.js("() => prts.map.panels()[0].labels")
    np.testing.assert_array_equal([labels[int(code)] == "neuron" for code in opened.drawn(0)], section["left"])
    assert opened.js("() => prts.map.div.data.length") == 1
    opened.tab.click(".kinds button >> text=neuron")
    opened.settle()
    np.testing.assert_array_equal(np.isnan(opened.drawn(0)), section["left"])
    assert opened.tab.title() == "s <1>: expression predicted"  # EVIL, a category and a gene, stayed text
    assert EVIL in opened.tab.inner_text("#legend")


def ranges(opened: Opened) -> dict[str, list[float]]:
    return opened.js(
        "() => Object.fromEntries(['xaxis', 'xaxis2', 'yaxis', 'yaxis2'].map(a => [a, prts.map.div._fullLayout[a].range.slice()]))"
    )


SPAN = "prts.map.div._fullLayout.xaxis2.range"


def test_linked_views_zoom_and_move_together(opened):
    before = ranges(opened)
    box = opened.tab.locator("#frame").bounding_box()
    right = box["x"] + box["width"] * 0.75, box["y"] + box["height"] / 2
    opened.tab.mouse.move(*right)
    for _ in range(3):  # about a tenth each
        opened.tab.mouse.wheel(0, -100)
    opened.wait(f"b => {SPAN}[1] - {SPAN}[0] < 0.9 * (b[1] - b[0])", before["xaxis2"])
    opened.settle()
    opened.tab.wait_for_timeout(
        500
    )  # Plotly draws anew when the wheel has been still for a while, which would end a drag
    zoomed = ranges(opened)
    opened.tab.mouse.down()
    opened.tab.mouse.move(right[0] + 60, right[1] + 40, steps=4)
    opened.tab.mouse.up()
    opened.wait(f"b => {SPAN}[0] < b[0]", zoomed["xaxis2"])
    opened.settle()
    moved = ranges(opened)
    assert moved["yaxis2"][1] < zoomed["yaxis2"][1]
    for now in (zoomed, moved):
        assert now["xaxis"] == pytest.approx(now["xaxis2"])
        assert now["yaxis"] == pytest.approx(now["yaxis2"])


def test_the_map_is_moved_and_zoomed_by_keyboard(opened):
    before = ranges(opened)["xaxis"]
    opened.tab.focus("#frame")
    opened.tab.keyboard.press("ArrowRight")
    opened.wait(f"b => {SPAN}[0] > b[0]", before)
    opened.tab.keyboard.press("+")
    opened.wait(f"b => {SPAN}[1] - {SPAN}[0] < 0.8 * (b[1] - b[0])", before)
    opened.tab.keyboard.press("0")
    opened.wait(f"b => Math.abs({SPAN}[0] - b[0]) < 1e-6 * (b[1] - b[0])", before)


def test_nuclei_keep_their_size_on_the_tissue(opened):
    def across() -> float:
        opened.settle()
        return opened.js(f"() => prts.map.div._fullData[0].marker.size * ({SPAN}[1] - {SPAN}[0])")

    opened.js("() => prts.map.zoom(0.2)")
    first = across()
    opened.js("() => prts.map.zoom(0.5)")
    assert across() == pytest.approx(first, rel=0.06)


def test_the_table_is_sorted_and_drives_the_map_by_keyboard(opened):
    names = "() => Array.from(document.querySelectorAll('#genes tbody button'), b => b.textContent)"
    assert opened.js(names) == ["Ttr", "Plp1", EVIL, "NAN"]  # as it opens: PCC from the highest, unknown last
    header = opened.tab.locator("#genes thead button", has_text="Gene")
    header.focus()
    opened.tab.keyboard.press("Enter")
    assert opened.js(names) == [EVIL, "NAN", "Plp1", "Ttr"]
    assert opened.tab.get_attribute("#genes thead th:first-child", "aria-sort") == "ascending"
    opened.tab.keyboard.press("Space")
    assert opened.js(names) == ["Ttr", "Plp1", "NAN", EVIL]
    assert opened.tab.get_attribute("#genes thead th:first-child", "aria-sort") == "descending"
    assert opened.tab.locator("#genes thead th[aria-sort]").count() == 1
    opened.tab.locator("#genes thead button", has_text="PCC").first.press("Enter")
    opened.tab.keyboard.press("Enter")
    assert opened.js(names) == [EVIL, "Plp1", "Ttr", "NAN"]
    opened.tab.locator("#genes tbody button", has_text="Plp1").press("Enter")
    opened.wait("() => prts.map.panels()[0].label === 'Plp1'")
    assert opened.tab.input_value("#gene") == "Plp1"
    assert "grey" in opened.tab.locator("#genes tr", has_text="NAN").get_attribute("class")
    opened.tab.fill("#filter", "tt")
    assert opened.tab.locator("#genes tbody tr:visible").count() == 1
    for button in opened.tab.locator("button:visible, input:visible, select:visible").all():
        assert button.evaluate("e => (e.textContent || e.ariaLabel || e.labels?.[0]?.textContent || '').trim()") != ""


def test_the_focus_is_seen(opened):
    opened.tab.focus("#gene")
    opened.tab.keyboard.press("Tab")
    style = opened.js(
        "() => { const s = getComputedStyle(document.activeElement); return [document.activeElement.id, s.outlineStyle, s.outlineWidth] }"
    )
    assert style == ["colour", "solid", "3px"]


def drag(opened: Opened, corners: list[tuple[float, float]]) -> None:
    """Draw with the mouse over shares of the left view."""
    box = opened.tab.locator("#overlay .panel").first.bounding_box()
    at = [(box["x"] + box["width"] * x, box["y"] + box["height"] * y) for x, y in corners]
    opened.tab.mouse.move(*at[0])
    opened.tab.mouse.down()
    for point in at[1:]:
        opened.tab.mouse.move(*point, steps=5)
    opened.tab.mouse.up()
    opened.wait("() => prts.region.result()")


@pytest.mark.parametrize(
    ("tool", "corners"),
    [
        ("drawrect", [(0.05, 0.2), (0.45, 0.8)]),
        ("drawclosedpath", [(0.1, 0.2), (0.45, 0.2), (0.45, 0.8), (0.1, 0.8), (0.1, 0.22)]),
    ],
)
def test_a_region_lists_the_genes_that_mark_it(opened, section, tool, corners):
    opened.tab.locator(f"#drag input[value={tool}]").check(force=True)
    drag(opened, corners)
    polygon = np.array(opened.js("() => prts.map.state.polygon"))
    from shapely import Polygon, contains_xy

    inside = contains_xy(Polygon(polygon), *section["xy"].astype(np.float32).T)
    assert 40 < inside.sum() < 160
    found = opened.js("() => ({n: prts.region.result().n, rows: prts.region.ranked()})")
    assert found["n"] == inside.sum()
    best = found["rows"][0]
    assert opened.js("gene => prts.meta.genes[gene].name", best["gene"]) == "Ttr"
    umi = section["umi"][:, 1]
    assert best["predicted"]["inside"] == pytest.approx(umi[inside].mean(), rel=0.02)
    assert best["predicted"]["outside"] == pytest.approx(umi[~inside].mean(), rel=0.02)
    level = np.log1p(umi)
    effect = (level[inside].mean() - level[~inside].mean()) / level.std()
    assert best["predicted"]["effect"] == pytest.approx(effect, abs=0.02)
    known = np.isin(np.arange(N), section["rows"])
    assert best["measured"]["inside"] == pytest.approx(section["counts"][inside & known, 1].mean())
    assert opened.tab.inner_text("#region tbody tr:first-child th") == "Ttr"
    opened.tab.select_option("#region select >> nth=0", "up")
    assert opened.tab.inner_text("#region tbody tr:last-child th") == "Ttr"
    opened.tab.select_option("#region select >> nth=0", "down")
    assert opened.js("() => prts.map.div.layout.shapes.map(s => s.xref)") == ["x", "x2"]  # the outline is in both views
    opened.tab.click("#clear")
    opened.wait("() => prts.map.div.layout.shapes.length === 0")
    assert opened.tab.locator("#region").is_hidden()


def test_a_region_can_be_chosen_without_a_mouse(opened, section):
    before = ranges(opened)["xaxis"]
    opened.tab.press("#zoom-in", "Enter")
    opened.wait(f"b => {SPAN}[1] - {SPAN}[0] < 0.8 * (b[1] - b[0])", before)
    opened.tab.press("#select-view", "Enter")
    opened.wait("() => prts.region.result()")
    across = ranges(opened)
    (x0, x1), (y1, y0) = across["xaxis"], across["yaxis"]
    x, y = section["xy"].T
    assert opened.js("() => prts.region.result().n") == ((x > x0) & (x < x1) & (y > y0) & (y < y1)).sum()


def test_a_nucleus_tells_its_id_area_and_values(opened, section):
    place = opened.js(
        "i => { const {xaxis, yaxis} = prts.map.div._fullLayout, [x, y] = [prts.map.div._fullData[1].x[i], prts.map.div._fullData[1].y[i]];"
        "const box = prts.map.div.getBoundingClientRect(), x2 = prts.map.div._fullLayout.xaxis2;"
        "return [box.left + x2._offset + x2.l2p(x), box.top + yaxis._offset + yaxis.l2p(y)] }",
        42,
    )
    opened.tab.mouse.move(place[0] - 30, place[1] - 30)
    opened.tab.mouse.move(*place, steps=3)
    opened.wait("() => document.getElementById('tooltip').textContent.includes('n42')")
    text = opened.tab.inner_text("#tooltip")
    assert "nucleus n42" in text
    assert f"{section['page'].prediction.obs['area_um2'].iloc[42]:.0f} µm²" in text
    assert f"{section['counts'][42, 1]} UMI" in text
    assert float(re.search(r"predicted\s+([\d.]+) UMI", text)[1]) == pytest.approx(section["umi"][42, 1], abs=0.08)
    assert opened.tab.locator(".ring").count() == 2  # the same nucleus in both views


def test_opacity_reaches_the_nuclei(opened):
    opened.tab.locator("#opacity").fill("30")
    opened.settle()
    assert opened.js("() => prts.map.div._fullData[0].marker.opacity") == 0.3


def test_a_picture_is_saved(opened, tmp_path):
    from PIL import Image

    with opened.tab.expect_download() as download:
        opened.tab.click("#png")
    assert download.value.suggested_filename == "s_1_Ttr_both.png"
    download.value.save_as(tmp_path / "map.png")
    picture = np.asarray(Image.open(tmp_path / "map.png").convert("RGB"))
    frame = opened.tab.locator("#frame").bounding_box()
    assert picture.shape[1] == pytest.approx(2 * frame["width"], abs=6)
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 100  # tissue, nuclei, titles: no blank sheet


def test_without_measured_counts_the_image_stands_beside_the_prediction(browser, section, tmp_path):
    page = section["page"]
    alone = PageContent(page.prediction, page.picture)
    file = write_page(tmp_path / "alone.html", alone)
    opened = visit(browser, file)
    assert opened.js("() => prts.map.panels().map(p => p.what)") == ["image", "predicted"]
    assert opened.tab.locator("#views input").count() == 2
    assert complaints(opened, file) == []
    opened.tab.close()


def test_a_phone_shows_one_column(browser, file):
    opened = visit(browser, file, 390, 844)
    assert opened.js("() => document.documentElement.scrollWidth") <= 390
    map_box, table_box = (opened.tab.locator(name).bounding_box() for name in ("#frame", "#gene-scroll"))
    assert table_box["y"] > map_box["y"] + map_box["height"]
    tops = opened.js("() => ['yaxis', 'yaxis2'].map(a => prts.map.div._fullLayout[a]._offset)")
    assert tops[1] > tops[0] + 100  # predicted below measured
    assert complaints(opened, file) == []
    opened.tab.close()


def test_zooming_in_shows_outlines_in_the_color_of_the_value(opened, section):
    assert opened.js("() => prts.outlines.shown()") is False
    x, y = section["xy"][42]
    opened.js("([x, y]) => prts.map.center(x, y)", [x, y])
    opened.js("() => prts.map.zoom(0.1)")
    opened.wait("() => prts.outlines.shown() && prts.map.div._fullData[1].marker.opacity === 0")
    opened.settle()
    corner = opened.js("() => { const {x, y} = prts.map.nuclei(); return prts.outlines.ring(42, x, y) }")
    np.testing.assert_allclose(np.sort(np.abs(np.array(corner) - [x, y]), axis=0)[0], [30, 20], atol=0.5)
    # inside the corner of the box, where a round point would not reach
    pixel = opened.js(
        """([x, y]) => {
          const {xaxis2, yaxis2} = prts.map.div._fullLayout, canvas = prts.outlines.canvas, f = window.devicePixelRatio;
          const at = [xaxis2._offset + xaxis2.l2p(x + 27), yaxis2._offset + yaxis2.l2p(y + 17)].map(v => Math.round(v * f));
          return Array.from(canvas.getContext('2d').getImageData(...at, 1, 1).data);
        }""",
        [x, y],
    )
    assert pixel[3] > 100 and max(pixel[:3]) > 0
    opened.js("() => prts.map.reset()")
    opened.wait("() => !prts.outlines.shown() && prts.map.div._fullData[1].marker.opacity > 0")


def test_the_address_brings_gene_view_and_region_back(browser, opened, file):
    opened.js("async () => { await prts.choose(1); await prts.map.zoom(0.4); await prts.map.selectView(); }")
    opened.wait("() => location.hash.includes('region=') && location.hash.includes('Plp1')")
    address = opened.js("() => location.href")
    tab = browser.new_page(viewport={"width": 1366, "height": 900})
    tab.set_default_timeout(60_000)
    tab.goto(address, wait_until="commit")
    tab.wait_for_function(
        "() => typeof prts !== 'undefined' && prts.ready && !document.getElementById('region').hidden"
    )
    assert tab.evaluate("() => prts.map.panels()[0].label") == "Plp1"
    assert tab.evaluate("() => prts.map.state.range.x") == pytest.approx(
        opened.js("() => prts.map.state.range.x"), abs=2
    )
    assert not tab.evaluate("() => document.getElementById('overview').hidden")
    tab.goto(file.as_uri() + "#gene=nothing&color=column:none&view=upside&at=1,2&region=3", wait_until="commit")
    tab.reload(wait_until="commit")
    tab.wait_for_function("() => typeof prts !== 'undefined' && prts.ready")
    assert tab.evaluate("() => prts.map.panels()[0].label") == "Ttr"  # as it opens without an address
    tab.close()


def test_selected_nuclei_are_saved(opened, section, tmp_path):
    opened.js("() => prts.map.select([[0, 0], [1000, 0], [1000, 1000], [0, 1000]])")
    opened.wait("() => !document.getElementById('region').hidden")
    within = np.flatnonzero((section["xy"] < 1000).all(axis=1))
    for name in ("CSV", "GeoJSON"):
        with opened.tab.expect_download() as download:
            opened.tab.click(f"text=Save {name}")
        download.value.save_as(tmp_path / name)
    table = pd.read_csv(tmp_path / "CSV", keep_default_na=False)
    assert table["cell_id"].tolist() == [f"n{i}" for i in within]
    assert table["type"].unique().tolist() == ["neuron"]
    np.testing.assert_allclose(table["Ttr"], section["umi"][within, 1], rtol=0.02, atol=0.02)
    assert EVIL in table.columns
    features = json.loads((tmp_path / "GeoJSON").read_text(encoding="utf-8"))["features"]
    assert [feature["id"] for feature in features] == table["cell_id"].tolist()
    found = shapely.polygons([feature["geometry"]["coordinates"][0] for feature in features])
    assert shapely.area(found) == pytest.approx(60 * 40, rel=0.03)
    assert features[0]["properties"]["classification"] == {"name": "neuron"}


def test_three_genes_mix_as_red_green_and_blue(opened, section):
    opened.js(
        "() => { const e = document.getElementById('colour'); e.value = 'genes'; e.dispatchEvent(new Event('change')) }"
    )
    opened.tab.fill("#gene2", "Plp1")
    opened.tab.dispatch_event("#gene2", "change")
    opened.wait("() => prts.map.panels()[1].label === 'Ttr, Plp1'")
    red, green, blue = np.array(
        [color[4:-1].split(",") for color in opened.js("() => prts.map.panels()[1].colours")], dtype=int
    ).T
    level = np.log1p(section["umi"])
    assert np.corrcoef(green, np.minimum(level[:, 0], np.percentile(level[:, 0], 99)))[0, 1] > 0.9
    assert red[section["left"]].min() > red[~section["left"]].max()
    assert (blue == 0).all()
    assert opened.tab.locator("#legend .channel").all_inner_texts() == ["Ttr", "Plp1"]


def test_the_table_is_one_tab_stop(opened):
    assert opened.tab.locator("#genes [tabindex='0']").count() == 1
    opened.tab.focus("#genes [tabindex='0']")
    opened.tab.keyboard.press("Home")
    assert opened.js("() => document.activeElement.closest('thead') !== null")
    names = opened.js("() => Array.from(document.querySelectorAll('#genes tbody button'), b => b.textContent)")
    for name in names[:2]:
        opened.tab.keyboard.press("ArrowDown")
        assert opened.js("() => document.activeElement.textContent") == name
    assert opened.tab.locator("#genes [tabindex='0']").count() == 1
    opened.tab.keyboard.press("Tab")
    assert opened.js("() => document.activeElement.closest('#genes') === null")
    # a filter that hides the gene that was the stop leaves another
    opened.tab.focus("#genes tbody [tabindex='0'], #genes [tabindex='0']")
    opened.tab.keyboard.press("ArrowDown")
    opened.tab.fill("#filter", names[1])
    assert opened.tab.locator("#genes [tabindex='0']").all_inner_texts() == [names[1]]
    opened.tab.fill("#filter", "")


def test_dark_mode_and_paper(browser, file):
    dark = browser.new_context(color_scheme="dark", viewport={"width": 1366, "height": 900}).new_page()
    dark.goto(file.as_uri(), wait_until="commit")
    dark.wait_for_function("() => typeof prts !== 'undefined' && prts.ready", timeout=60_000)
    background, ink = dark.evaluate(
        "() => { const s = getComputedStyle(document.body); return [s.backgroundColor, s.color] }"
    )
    brightness = [sum(int(part) for part in re.findall(r"\d+", color)[:3]) for color in (background, ink)]
    assert brightness[0] < 150 and brightness[1] > 600
    dark.evaluate("() => window.dispatchEvent(new Event('beforeprint'))")
    dark.emulate_media(media="print")
    zoom, width = dark.evaluate(
        "() => { const f = document.getElementById('frame'); return [f.style.zoom, prts.map.div._fullLayout.width] }"
    )
    assert float(zoom) * width == pytest.approx(690, abs=2)  # an A4 sheet without its margins
    assert not dark.locator("#controls").is_visible()
    assert dark.evaluate("() => getComputedStyle(document.body).color") == "rgb(27, 31, 36)"  # dark ink on white paper
    dark.context.close()
