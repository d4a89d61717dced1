"""Text of the page: scores next to baselines and ceiling, facts about the model, and warnings."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from prts.models.ood import PARTLY, SPOILT, STRANGE
from prts.preprocess.artefacts import is_artefact

# Baselines of a run (`prts.evaluation.baselines`).
_BASELINES = {
    "ridge": "ridge regression on the same inputs",
    "morphology": "ridge regression on nucleus shape and density",
    "context": "ridge regression on color around the nucleus at seven scales",
    "colour": "ridge regression on 12 color statistics of the tile",
    "position": "mean of the nearest training nuclei in this section",
    "gene_mean": "mean of each gene, the same for all nuclei",
    "permuted": "ridge regression on shuffled counts; should be about 0",
}
_COARSER = 1.05  # um/px of the image relative to the encoder's, above which the page warns
_OTHERS = {
    "pcc_median": "median PCC",
    "spot_pcc_mean": "PCC over spots",
    "auroc": "AUROC, expressed or not",
    "mcc": "MCC, expressed or not",
    "rmse_mean": "RMSE",
    "skill_mean": "skill",
    "moran_agreement": "Moran's I agreement",
}


@dataclass(frozen=True)
class ScoreRow:
    """A row of the table of scores: numbers as text, and its bar and interval in percent of the axis."""

    kind: str
    name: str
    note: str
    pcc: float
    text: str
    difference: str
    hvg50: str
    spots: str
    bar: float = 0.0
    low: float | None = None
    high: float | None = None


def section_metrics(metrics: Mapping[str, Any], section: str) -> dict[str, Any]:
    """Test metrics of one section of a run, without prefix; a run with one test section has no metrics by section."""
    own = f"test/{section}/"
    prefix = own if any(key.startswith(own) for key in metrics) else "test/"
    found = {key.removeprefix(prefix): value for key, value in metrics.items() if key.startswith(prefix)}
    mine = f"baseline/{section}/"
    prefix = mine if any(key.startswith(mine) for key in metrics) else "baseline/"
    baselines = {f"baseline/{key.removeprefix(prefix)}": v for key, v in metrics.items() if key.startswith(prefix)}
    return found | baselines


def score_table(figures: Mapping[str, Any]) -> list[ScoreRow]:
    """Scores of the model, of its baselines (best first), and the noise ceiling.

    Parameters
    ----------
    figures
        Result of `section_metrics`. Without a PCC, the table is empty.
    """
    if not _known(figures, "pcc_mean"):
        return []
    text = number(figures["pcc_mean"])
    low, high = (figures.get(f"pcc_mean_{end}") for end in ("low", "high"))
    if low is not None and high is not None:
        text += f" [{number(low)}, {number(high)}]"
    hvg50, spots = (number(figures.get(key)) for key in ("hvg50_pcc_mean", "spot_pcc_mean"))
    lines = [ScoreRow("model", "prts", "this model", figures["pcc_mean"], text, "", hvg50, spots, low=low, high=high)]
    names = [key.split("/")[1] for key in figures if key.startswith("baseline/") and key.endswith("/pcc_mean")]
    for name in sorted(names, key=lambda name: -(figures[f"baseline/{name}/pcc_mean"] or 0)):
        of = {key: figures.get(f"baseline/{name}/{key}") for key in ("pcc_mean", "hvg50_pcc_mean", "spot_pcc_mean")}
        pcc, hvg50, spots = of["pcc_mean"], number(of["hvg50_pcc_mean"]), number(of["spot_pcc_mean"])
        difference, words = _difference(figures, name), name.replace("_", " ")
        value = math.nan if pcc is None else pcc
        lines.append(
            ScoreRow("baseline", words, _BASELINES.get(name, ""), value, number(pcc), difference, hvg50, spots)
        )
    if _known(figures, "ceiling_mean"):
        ceiling = figures["ceiling_mean"]
        note = "highest PCC possible given counting noise"
        lines.append(ScoreRow("ceiling", "noise ceiling", note, ceiling, number(ceiling), "", "", ""))
    reach = max([line.high or line.pcc for line in lines if math.isfinite(line.pcc)]) * 1.02 or 1.0

    def share(value: float | None) -> float | None:
        known = value is not None and math.isfinite(value)
        return round(100 * min(max((value or 0.0) / reach, 0.0), 1.0), 2) if known else None

    return [replace(line, bar=share(line.pcc) or 0.0, low=share(line.low), high=share(line.high)) for line in lines]


def headline(figures: Mapping[str, Any]) -> str:
    """Summary of the result in one sentence."""
    if not _known(figures, "pcc_mean"):
        return ""
    words = f"Mean correlation between predicted and measured expression: {number(figures['pcc_mean'])}"
    if _known(figures, "pcc_mean_low"):
        words += f" (95% CI {number(figures['pcc_mean_low'])} to {number(figures['pcc_mean_high'])})"
    words += f", over {figures['n_genes']:,.0f} genes and {figures['n_cells']:,.0f} nuclei"
    if _known(figures, "ceiling_share"):
        words += f". This is {figures['ceiling_share']:.0%} of the maximum that counting noise allows"
    return words + "."


def other_metrics(figures: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Other metrics with their labels."""
    return [(label, number(figures[key])) for key, label in _OTHERS.items() if _known(figures, key)]


def model_facts(about: Mapping[str, Any], model: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What the model was trained on and how, as terms and descriptions.

    Parameters
    ----------
    about
        `uns["prts"]` of a prediction.
    model
        model.json of its bundle, if known.
    """
    of = {**about.get("model", {}), **model}
    nuclei = model.get("split", {}).get("sections", {})
    found = [("tissue", ", ".join(str(v) for v in (of.get("tissue"), about.get("species")) if v))]
    for role in ("train", "val"):
        named = [f"{name} ({n[role]:,} nuclei)" for name, n in nuclei.items() if n[role]]
        if not named and role == "train":
            named = [str(name) for name in of.get("train_sections", ())]
        found.append(({"train": "trained on", "val": "validated on"}[role], ", ".join(named)))
    encoder = about.get("features", {}).get("encoder", {})
    reads = f"{encoder.get('name', '')} at {encoder['mpp']:g} µm/px" if "mpp" in encoder else ""
    found.append(("image encoder", reads))
    found.append(("inputs", ", ".join(model.get("input", {}).get("use", ()))))
    linear = str(model.get("baseline") or "")
    of_older_bundle = str((model.get("loss") or {}).get("_target_", "")).rsplit(".", 1)[-1].removesuffix("Loss").lower()
    loss = str((model.get("likelihood") or {}).get("name") or of_older_bundle)
    found.append(("loss", "" if linear else loss))
    found.append(("linear model", linear))
    split = model.get("split", {}).get("split", {}).get("name", "")
    found.append(("split", str(split).replace("_", " ")))
    found.append(("seed", str(of.get("seed", ""))))
    versions = of.get("versions", {})
    found.append(("software", ", ".join(f"{name} {versions[name]}" for name in ("prts", "torch") if name in versions)))
    weights = str(of.get("weights_sha256", ""))
    found.append(("weights (SHA-256)", weights[:16] + "…" if weights else ""))
    found.append(("this slide", str(about.get("verdict", ""))))
    found.append(("orientation", _orientation(about.get("orientation", {}))))
    return [(term, words) for term, words in found if words]


def reader_warnings(
    about: Mapping[str, Any], obs: pd.DataFrame, var: pd.DataFrame, model: Mapping[str, Any], metrics: Mapping[str, Any]
) -> list[str]:
    """What to know before trusting the maps.

    Parameters
    ----------
    about
        `uns["prts"]` of the prediction.
    obs, var
        Its nuclei (`ood`, `artefact`) and genes (`predictable`); all of these columns are optional.
    model
        model.json of its bundle, if known.
    metrics
        metrics.json of the run, if there is one.
    """
    of_run = {key.removeprefix("warning/"): text for key, text in metrics.items() if key.startswith("warning/")}
    if model.get("split", {}).get("warning"):
        of_run["split"] = model["split"]["warning"]
    found = [f"{topic.capitalize()}: {text}" for topic, text in of_run.items()]
    if about.get("believable") is False:
        # first of all, since nothing else on the page matters then
        found.insert(0, f"Do not believe these maps: {about['verdict']}.")
    elif "ood" in obs and not pd.api.types.is_bool_dtype(obs["ood"]) and "verdict" in about:
        strange = float((obs["ood"] > STRANGE).mean())
        if strange >= PARTLY:
            found.append(f"Out of distribution: {about['verdict']}.")
    wanted = about.get("features", {}).get("encoder", {}).get("mpp")
    if wanted and about["mpp"] > _COARSER * wanted:
        found.append(
            f"Resolution: the image has {about['mpp']:.3g} µm/px, but the model was trained at {wanted:g} µm/px. The image was enlarged "
            f"{about['mpp'] / wanted:.2g} times, so it may lack detail that the model relies on."
        )
    if "ood" in obs and pd.api.types.is_bool_dtype(obs["ood"]) and obs["ood"].any():
        found.append(
            f"Out of distribution: {_of_nuclei(obs['ood'].to_numpy())} are unlike the training data; their predictions are "
            "extrapolations."
        )
    spoilt = is_artefact(obs)
    if spoilt.any() and spoilt.mean() >= SPOILT:
        kinds = obs["artefact"][spoilt].value_counts()
        found.append(
            f"Artifacts: {_of_nuclei(spoilt)} are on a likely artifact "
            f"({', '.join(f'{kind}: {n:,}' for kind, n in kinds.items() if n)})."
        )
    if "predictable" in var:
        grey = ~var["predictable"].fillna(False).to_numpy(dtype=bool)
        if grey.any():
            found.append(
                f"Genes: {int(grey.sum()):,} of {len(var):,} were not predictable on the validation data; they are gray in the table."
            )
    return found


def _orientation(orientation: Mapping[str, Any]) -> str:
    """How the slide was rotated and mirrored before prediction; empty if it was not."""
    angle, flip = int(orientation.get("rotate", 0)), str(orientation.get("flip", "none"))
    words = [f"rotated {angle}° counterclockwise"] if angle else []
    words += {"horizontal": ["mirrored left to right"], "vertical": ["mirrored top to bottom"]}.get(flip, [])
    return ", then ".join(words)


def _of_nuclei(which: NDArray[np.bool_]) -> str:
    return f"{int(which.sum()):,} of {len(which):,} nuclei ({which.mean():.1%})"


def number(value: Any, digits: int = 3) -> str:
    """A number as text with a true minus sign; empty if missing."""
    if value is None or not np.isfinite(value):
        return ""
    return f"{value:.{digits}f}".replace("-", "\u2212")


def _difference(figures: Mapping[str, Any], name: str) -> str:
    key = f"baseline/{name}/difference"
    if not _known(figures, key):
        return ""
    text = f"{'+' if figures[key] >= 0 else ''}{number(figures[key])}"
    if _known(figures, f"{key}_low"):
        text += f" [{number(figures[f'{key}_low'])}, {number(figures[f'{key}_high'])}]"
    return text


def _known(figures: Mapping[str, Any], key: str) -> bool:
    value = figures.get(key)
    return value is not None and bool(np.isfinite(value))
