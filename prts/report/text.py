"""What a page says in words and figures: scores beside baselines and ceiling, what the model learnt from, what to beware of."""

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

# What each baseline of a run is, in a few words (`prts.evaluation.baselines`).
_BASELINES = {
    "ridge": "ridge regression on the same inputs",
    "morphology": "ridge regression on nucleus shape and crowding",
    "colour": "ridge regression on 12 colour statistics of the tile",
    "position": "mean of the nearest training nuclei of this section",
    "gene_mean": "the mean of each gene, everywhere the same",
    "permuted": "ridge regression on shuffled counts: must be about 0",
}
_COARSER = 1.05  # um/px over those the encoder reads, from which the image is enlarged
_OTHERS = {
    "pcc_median": "median PCC",
    "spot_pcc_mean": "PCC over spots",
    "auroc": "AUROC of “expressed”",
    "mcc": "MCC of “expressed”",
    "rmse_mean": "RMSE",
    "skill_mean": "skill",
    "moran_agreement": "agreement of Moran's I",
}


@dataclass(frozen=True)
class Score:
    """A line of the table of scores: figures as text, and the ends of its bar in per cent of the axis."""

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


def of_section(metrics: Mapping[str, Any], section: str) -> dict[str, Any]:
    """The test figures of one section of a run without their prefix; of a run with one test section these are all there are."""
    own = f"test/{section}/"
    prefix = own if any(key.startswith(own) for key in metrics) else "test/"
    found = {key.removeprefix(prefix): value for key, value in metrics.items() if key.startswith(prefix)}
    mine = f"baseline/{section}/"
    prefix = mine if any(key.startswith(mine) for key in metrics) else "baseline/"
    beside = {f"baseline/{key.removeprefix(prefix)}": v for key, v in metrics.items() if key.startswith(prefix)}
    return found | beside


def scores(figures: Mapping[str, Any]) -> list[Score]:
    """The model, its baselines from the best down, and the noise ceiling.

    Parameters
    ----------
    figures
        Of `of_section`. Without a PCC in it there is nothing to tell.
    """
    if not _known(figures, "pcc_mean"):
        return []
    text = number(figures["pcc_mean"])
    low, high = (figures.get(f"pcc_mean_{end}") for end in ("low", "high"))
    if low is not None and high is not None:
        text += f" [{number(low)}, {number(high)}]"
    hvg50, spots = (number(figures.get(key)) for key in ("hvg50_pcc_mean", "spot_pcc_mean"))
    lines = [Score("model", "prts", "this model", figures["pcc_mean"], text, "", hvg50, spots, low=low, high=high)]
    names = [key.split("/")[1] for key in figures if key.startswith("baseline/") and key.endswith("/pcc_mean")]
    for name in sorted(names, key=lambda name: -(figures[f"baseline/{name}/pcc_mean"] or 0)):
        of = {key: figures.get(f"baseline/{name}/{key}") for key in ("pcc_mean", "hvg50_pcc_mean", "spot_pcc_mean")}
        pcc, hvg50, spots = of["pcc_mean"], number(of["hvg50_pcc_mean"]), number(of["spot_pcc_mean"])
        difference, words = _difference(figures, name), name.replace("_", " ")
        value = math.nan if pcc is None else pcc
        lines.append(Score("baseline", words, _BASELINES.get(name, ""), value, number(pcc), difference, hvg50, spots))
    if _known(figures, "ceiling_mean"):
        ceiling = figures["ceiling_mean"]
        note = "what counting noise leaves to a perfect predictor"
        lines.append(Score("ceiling", "noise ceiling", note, ceiling, number(ceiling), "", "", ""))
    reach = max([line.high or line.pcc for line in lines if math.isfinite(line.pcc)]) * 1.02 or 1.0

    def share(value: float | None) -> float | None:
        known = value is not None and math.isfinite(value)
        return round(100 * min(max((value or 0.0) / reach, 0.0), 1.0), 2) if known else None

    return [replace(line, bar=share(line.pcc) or 0.0, low=share(line.low), high=share(line.high)) for line in lines]


def headline(figures: Mapping[str, Any]) -> str:
    """The result in one sentence."""
    if not _known(figures, "pcc_mean"):
        return ""
    words = f"Mean correlation of predicted and measured expression over {figures['n_genes']:,.0f} genes in "
    words += f"{figures['n_cells']:,.0f} nuclei: {number(figures['pcc_mean'])}"
    if _known(figures, "pcc_mean_low"):
        words += f" (95 % interval {number(figures['pcc_mean_low'])} to {number(figures['pcc_mean_high'])})"
    if _known(figures, "ceiling_share"):
        words += f", {figures['ceiling_share']:.0%} of what counting noise allows"
    return words + "."


def others(figures: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Further figures, each with its name."""
    return [(label, number(figures[key])) for key, label in _OTHERS.items() if _known(figures, key)]


def training(about: Mapping[str, Any], model: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What the model learnt from and how, as terms and their descriptions.

    Parameters
    ----------
    about
        `uns["prts"]` of a prediction.
    model
        model.json of its bundle, as far as known.
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
    found.append(("loss", "" if linear else str((model.get("likelihood") or {}).get("name", ""))))
    found.append(("linear model", linear))
    split = model.get("split", {}).get("split", {}).get("name", "")
    found.append(("split", str(split).replace("_", " ")))
    found.append(("seed", str(of.get("seed", ""))))
    versions = of.get("versions", {})
    found.append(("software", ", ".join(f"{name} {versions[name]}" for name in ("prts", "torch") if name in versions)))
    weights = str(of.get("weights_sha256", ""))
    found.append(("weights (SHA-256)", weights[:16] + "…" if weights else ""))
    found.append(("this slide", str(about.get("verdict", ""))))
    found.append(("slide was read", _turned(about.get("orientation", {}))))
    return [(term, words) for term, words in found if words]


def warnings(
    about: Mapping[str, Any], obs: pd.DataFrame, var: pd.DataFrame, model: Mapping[str, Any], metrics: Mapping[str, Any]
) -> list[str]:
    """What a reader must know before trusting the maps.

    Parameters
    ----------
    about
        `uns["prts"]` of the prediction.
    obs, var
        Its nuclei (`ood`, `artefact`) and genes (`predictable`), as far as those columns are there.
    model
        model.json of its bundle, as far as known.
    metrics
        metrics.json of the run, if it is one.
    """
    found = []
    told = {key.removeprefix("warning/"): text for key, text in metrics.items() if key.startswith("warning/")}
    if model.get("split", {}).get("warning"):
        told["split"] = model["split"]["warning"]
    found += [f"{about_what.capitalize()}: {text}" for about_what, text in told.items()]
    if "ood" in obs and not pd.api.types.is_bool_dtype(obs["ood"]) and "verdict" in about:
        strange = float((obs["ood"] > STRANGE).mean())
        if strange >= PARTLY:
            found.append(f"Out of distribution: {about['verdict']}.")
    wanted = about.get("features", {}).get("encoder", {}).get("mpp")
    if wanted and about["mpp"] > _COARSER * wanted:
        found.append(
            f"Resolution: the image has {about['mpp']:.3g} µm/px, the model reads {wanted:g}: it was enlarged "
            f"{about['mpp'] / wanted:.2g} times, and detail that the model knows from training may be missing."
        )
    if "ood" in obs and pd.api.types.is_bool_dtype(obs["ood"]) and obs["ood"].any():
        found.append(
            f"{_of_nuclei(obs['ood'].to_numpy())} look unlike anything in training (out of distribution): "
            "their predictions are extrapolations."
        )
    spoilt = is_artefact(obs)
    if spoilt.any() and spoilt.mean() >= SPOILT:
        kinds = obs["artefact"][spoilt].value_counts()
        found.append(
            f"{_of_nuclei(spoilt)} lie on what looks like an artefact "
            f"({', '.join(f'{n:,} {kind}' for kind, n in kinds.items() if n)})."
        )
    if "predictable" in var:
        grey = ~var["predictable"].fillna(False).to_numpy(dtype=bool)
        if grey.any():
            found.append(
                f"{int(grey.sum()):,} of {len(var):,} genes were not predictable on validation; they are grey in the table."
            )
    return found


def _turned(orientation: Mapping[str, Any]) -> str:
    """How a prediction says that its slide was read, in words; nothing where it lay upright."""
    angle, flip = int(orientation.get("rotate", 0)), str(orientation.get("flip", "none"))
    words = [f"turned by {angle}° counter-clockwise"] if angle else []
    words += {"horizontal": ["mirrored left to right"], "vertical": ["mirrored top to bottom"]}.get(flip, [])
    return ", then ".join(words)


def _of_nuclei(which: NDArray[np.bool_]) -> str:
    return f"{int(which.sum()):,} of {len(which):,} nuclei ({which.mean():.1%})"


def number(value: Any, digits: int = 3) -> str:
    """A figure as text with a true minus sign; nothing where there is none."""
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
