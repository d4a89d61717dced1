"""Write report.html: a prediction on its tissue, in one file that works offline.

Names from the data reach the page only as JSON or escaped by jinja2, and its scripts insert them as text. A content security policy forbids
all network requests.
"""

from __future__ import annotations

import base64
import io
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import scipy.sparse as sp

from prts import __version__
from prts.errors import ParameterError, did_you_mean
from prts.io.cache import atomic
from prts.io.unit_names import unit_name
from prts.report import text
from prts.report.embed import (
    PERCENTILE,
    PROB_STEPS,
    colour_top,
    delta_blocks,
    measured_blocks,
    nucleus_columns,
    outline_blocks,
    packed,
    packed_text,
    predicted_codes,
)

if TYPE_CHECKING:
    import anndata as ad
    from numpy.typing import NDArray

logger = logging.getLogger(__name__)

MOST_GENES = 200
# Nuclei x genes on one page. Small sections show more than 200 genes, up to the first number; large sections show fewer, so that the page
# stays below the second (60,000 nuclei x 200 genes) and still opens in a browser.
_FEW_VALUES, _MOST_VALUES = 2_000_000, 12_000_000
# Pages with more values than this store predictions in 86 levels instead of 256, so that noisy ones stay below 30 MB, too.
_FINE_VALUES, _COARSE_STEP = 6_000_000, 3
_JPEG_QUALITY = 80
_FOLDER = Path(__file__).parent / "page"
_SCRIPTS = ("data.js", "outlines.js", "map.js", "link.js", "legend.js", "table.js", "region.js", "main.js")


@dataclass(frozen=True)
class MeasuredCounts:
    """Measured UMI of the predicted genes, (n_measured, n_genes), and the row of each in the prediction, (n_measured,)."""

    counts: sp.csr_matrix
    rows: NDArray[np.intp]


@dataclass(frozen=True)
class PageContent:
    """Content of a page.

    Attributes
    ----------
    prediction
        Nuclei x genes (`prts.io.prediction`). Any categorical or numeric column of `obs` can be shown on the map.
    picture
        The whole section, RGB (height, width, 3).
    measured
        Measured counts, or None.
    measured_obs
        Columns of `obs` as found in the measured counts (clusters, types), one row per predicted nucleus.
    per_gene
        per_gene.csv of the section, or None.
    metrics
        metrics.json of a run, or the scores of an evaluation (`test/...`).
    model
        model.json of the bundle, if known.
    outlines
        Polygons of the nuclei in full-resolution pixels, (n_nuclei,), shown when zoomed in; None shows points.
    """

    prediction: ad.AnnData
    picture: NDArray[np.uint8]
    measured: MeasuredCounts | None = None
    measured_obs: pd.DataFrame | None = None
    per_gene: pd.DataFrame | None = None
    metrics: Mapping[str, Any] = field(default_factory=dict)
    model: Mapping[str, Any] = field(default_factory=dict)
    outlines: NDArray[np.object_] | None = None


def write_page(out: Path, page: PageContent, *, genes: int | Sequence[str] | None = None) -> Path:
    """Write a page.

    Parameters
    ----------
    out
        The .html file.
    page
        Its content.
    genes
        Genes on the map: how many (best predicted first), or their names, which come before the best predicted. By default 200, more in
        sections of less than 10,000 nuclei and fewer in sections of more than 60,000. The table lists all genes.

    Raises
    ------
    InputError
        If a gene is not in the prediction.
    """
    from jinja2 import Environment, FileSystemLoader
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    table = gene_table(page)
    chosen = choose_genes(table, page.prediction.n_obs, genes)
    meta, blocks = _data(page, table, chosen)
    about = page.prediction.uns["prts"]
    metrics = text.section_metrics(page.metrics, str(about["section"]))
    scripts = [(_FOLDER / name).read_text(encoding="utf-8") for name in _SCRIPTS]
    environment = Environment(loader=FileSystemLoader(_FOLDER), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    content = environment.get_template("page.html").render(
        about=about,
        version=__version__,
        model_name=about.get("model", {}).get("tissue", ""),
        n_nuclei=page.prediction.n_obs,
        n_genes=page.prediction.n_vars,
        n_shown=len(chosen),
        measured=page.measured,
        percentile=PERCENTILE,
        levels=255 // _step(page.prediction.n_obs * len(chosen)),
        picture=_jpeg(page.picture),
        headline=text.headline(metrics),
        scores=text.score_table(metrics),
        others=text.other_metrics(metrics),
        training=text.model_facts(about, page.model),
        warnings=text.reader_warnings(about, page.prediction.obs, page.prediction.var, page.model, page.metrics),
        meta=_script_json(meta),
        blocks=_script_json(blocks),
        style=Markup((_FOLDER / "page.css").read_text(encoding="utf-8")),
        plotly=packed_text(get_plotlyjs()),
        scripts=[Markup(script) for script in scripts],  # own code, no data
    )
    with atomic(out) as temporary:
        temporary.write_text(content, encoding="utf-8")
    logger.info(
        "wrote %s: %d %s, %d genes on the map, %.1f MB",
        *(out, page.prediction.n_obs, unit_name(page.prediction.obs_names), len(chosen), len(content) / 1e6),
    )
    return out


def gene_table(page: PageContent) -> pd.DataFrame:
    """All genes in panel order: `gene`, the scores that are known, and `predictable` if the model provides it."""
    var = page.prediction.var
    table = pd.DataFrame({"gene": page.prediction.var_names.astype(str)})
    if page.per_gene is not None:
        tested = page.per_gene.set_index("gene").reindex(table["gene"]).reset_index(drop=True)
        for column in ("pcc", "ceiling", "mean_counts"):
            table[column] = tested[column]
    else:
        table["mean_predicted"] = np.asarray(page.prediction.X.mean(axis=0)).ravel()
    for column, source in (("val_pcc", "val_pcc"), ("val_ceiling", "ceiling")):
        if source in var and (column == "val_pcc" or page.per_gene is None):
            table[column] = var[source].to_numpy(dtype=float)
    if "predictable" in var:
        table["predictable"] = var["predictable"].fillna(False).to_numpy(dtype=bool)
    return table


def choose_genes(table: pd.DataFrame, n_nuclei: int, genes: int | Sequence[str] | None) -> NDArray[np.intp]:
    """Choose the genes that the map can show, best predicted first.

    Parameters
    ----------
    table
        Result of `gene_table`.
    n_nuclei
        Number of nuclei in the prediction.
    genes
        As for `write_page`.

    Returns
    -------
    Rows of the table.

    Raises
    ------
    InputError
        If a gene is not in the table, or a number of genes is not positive.
    """
    named = [] if genes is None or isinstance(genes, int) else list(genes)
    if isinstance(genes, int) and genes < 1:
        raise ParameterError("", "genes", f"{genes} must be a positive number, or gene names")
    n_nuclei = max(1, n_nuclei)
    most = genes if isinstance(genes, int) else max(MOST_GENES, _FEW_VALUES // n_nuclei)
    most = min(most, max(1, _MOST_VALUES // n_nuclei))
    place = pd.Series(table.index, index=table["gene"])
    for gene in named:
        if gene not in place.index:
            hint = did_you_mean(gene, table["gene"])
            raise ParameterError("", "genes", f"{gene} is not among the {len(table):,} genes of the prediction{hint}")
    score = next((table[column] for column in ("pcc", "val_pcc") if column in table), table.iloc[:, 1])
    ranked = score.sort_values(ascending=False, kind="stable", na_position="last").index
    first = [int(place[gene]) for gene in dict.fromkeys(named)]
    rows = list(dict.fromkeys([*first, *(int(row) for row in ranked)]))
    return np.array(rows[: max(most, len(first))], dtype=np.intp)


# Columns of the gene table: heading, explanation, digits.
_HEADINGS = {
    "pcc": ("PCC", "Correlation of predicted and measured log1p(UMI) over the nuclei of this section", 3),
    "ceiling": ("Ceiling", "Noise ceiling on this section: the highest PCC possible given counting noise", 3),
    "val_pcc": ("PCC val.", "PCC on the validation nuclei", 3),
    "val_ceiling": ("Ceiling val.", "Noise ceiling on the validation nuclei", 3),
    "mean_counts": ("Mean UMI", "Mean measured UMI per nucleus in this section", 2),
    "mean_predicted": ("Mean UMI", "Mean predicted UMI per nucleus", 2),
}


def _data(page: PageContent, table: pd.DataFrame, chosen: NDArray[np.intp]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Metadata that the page reads at once, and the blocks that it unpacks on demand."""
    prediction = page.prediction
    about = prediction.uns["prts"]
    n = prediction.n_obs
    umi = _dense(prediction.X, chosen)
    codes, highest = predicted_codes(umi, _step(umi.size))
    own = colour_top(np.log1p(umi))
    top, n_bytes = own, [1] * len(chosen)
    blocks: dict[str, Any] = {"predicted": [packed(column) for column in codes.T]}
    if page.measured is not None:
        counts = page.measured.counts[:, chosen]
        measured = colour_top(np.log1p(counts.toarray()))
        top = np.where(measured > 0, measured, own)
        pairs = list(measured_blocks(counts, page.measured.rows, n))
        blocks["measured"], n_bytes = [block for block, _ in pairs], [size for _, size in pairs]
    if "prob" in prediction.layers:
        steps = np.rint(_dense(prediction.layers["prob"], chosen) * PROB_STEPS)
        blocks["prob"] = delta_blocks(steps.astype(np.uint8), codes)
    for end in ("lower", "upper") if "upper" in prediction.layers else ():
        counted = np.minimum(_dense(prediction.layers[end], chosen), 255)
        blocks[end] = delta_blocks(counted.astype(np.uint8), codes)
    area = _areas(prediction)
    diameter_um = 2 * float(np.sqrt(area.median() / np.pi)) if area.notna().any() else 7.0
    diameter = diameter_um / float(about["mpp"])  # px
    columns = nucleus_columns(prediction.obs, page.measured_obs)
    blocks |= _position_blocks(prediction)
    step = diameter / 28
    if page.outlines is not None:
        blocks |= outline_blocks(page.outlines, np.asarray(prediction.obsm["spatial"], np.float32), step)
    blocks["columns"] = [column.pop("block") for column in columns]
    blocks["measured_columns"] = [column.pop("measured_block") for column in columns]
    for column, block in zip(columns, blocks["measured_columns"], strict=True):
        column["measured"] = block is not None
    xy = np.asarray(prediction.obsm["spatial"], np.float32)
    keys = [key for key in _HEADINGS if key in table]
    meta = {
        "section": str(about["section"]),
        "n": n,
        "n_measured": 0 if page.measured is None else len(page.measured.rows),
        "width": int(about["width"]),
        "height": int(about["height"]),
        "mpp": float(about["mpp"]),
        "diameter": diameter,
        "outline_step": step,
        "bounds": [*xy.min(axis=0).tolist(), *xy.max(axis=0).tolist()],
        "percentile": PERCENTILE,
        "prob_steps": PROB_STEPS,
        "interval": float(about["interval_level"]) if "upper" in prediction.layers else None,
        "genes": [
            {"name": table["gene"].iloc[row], "top": t, "own": o, "highest": h, "bytes": b}
            for row, t, o, h, b in zip(chosen, top, own, highest, n_bytes, strict=True)
        ],
        "columns": columns,
        "headings": [
            {"key": key, **dict(zip(("label", "title", "digits"), _HEADINGS[key], strict=True))} for key in keys
        ],
        "table": _rows(table, keys, chosen),
    }
    return meta, blocks


def _step(n_values: int) -> int:
    return 1 if n_values <= _FINE_VALUES else _COARSE_STEP


def _areas(prediction: ad.AnnData) -> pd.Series:
    areas: pd.Series = prediction.obs.get("area_um2", pd.Series(np.nan, index=prediction.obs_names))
    return areas


def _position_blocks(prediction: ad.AnnData) -> dict[str, str]:
    """Coordinates, areas and names of the nuclei."""
    xy = np.asarray(prediction.obsm["spatial"], np.float32)
    return {
        "x": packed(xy[:, 0]),
        "y": packed(xy[:, 1]),
        "area": packed(_areas(prediction).to_numpy(dtype=np.float32)),
        "ids": packed_text(json.dumps([str(name) for name in prediction.obs_names])),
    }


def _rows(table: pd.DataFrame, keys: Sequence[str], chosen: NDArray[np.intp]) -> list[list[Any]]:
    """Name, index on the map (-1 if not shown), predictability and scores of each gene."""
    place = np.full(len(table), -1)
    place[chosen] = np.arange(len(chosen))
    predictable = table.get("predictable", pd.Series(True, index=table.index))
    figures = table[list(keys)].astype(float).round(5).astype(object).where(table[list(keys)].notna(), None)
    return [
        [gene, at, bool(good), *row]
        for gene, at, good, row in zip(
            table["gene"], place.tolist(), predictable, figures.to_numpy().tolist(), strict=True
        )
    ]


def _dense(matrix: Any, columns: NDArray[np.intp]) -> NDArray[np.float32]:
    part = matrix[:, columns]
    return np.asarray(part.toarray() if sp.issparse(part) else part, dtype=np.float32)


def _jpeg(picture: NDArray[np.uint8]) -> str:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=_JPEG_QUALITY, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _script_json(value: Any) -> Any:
    """JSON that is safe inside a script element: ASCII without `<`, `>` and `&`."""
    from markupsafe import Markup

    encoded = json.dumps(value, allow_nan=False, separators=(",", ":"))
    for sign in "<>&":
        encoded = encoded.replace(sign, f"\\u{ord(sign):04x}")
    return Markup(encoded)
