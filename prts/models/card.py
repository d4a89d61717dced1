"""The model card of a bundle: README.md with the hub's front matter, written from model.json and nothing else."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from prts import __version__
from prts.extras import DISTRIBUTION
from prts.features.licenses import weights_license
from prts.io.cache import fingerprint
from prts.provenance import portable

if TYPE_CHECKING:
    from prts.models.bundle import Bundle

_UNKNOWN = "not recorded"
_METHOD = "Wen et al. 2025, *Research*, [doi:10.34133/research.0961](https://doi.org/10.34133/research.0961)"
_LISTED = 30  # predictable genes named in the card
_BASELINES = {
    "ridge": "ridge regression on the model's own features",
    "context": "color around the nucleus at seven scales, linear",
    "colour": "color of nucleus and tile, linear",
    "morphology": "shape and crowding of nuclei, linear",
    "position": "position in the section",
    "gene_mean": "the mean of each gene",
    "permuted": "the model's features, shuffled among nuclei",
}


def model_card(bundle: Bundle, repo: str, *, license: str | None = None, datasets: Sequence[str] = ()) -> str:
    """Write the card of a model. What model.json does not say is called not recorded.

    Parameters
    ----------
    bundle
        The model. Scores that an older bundle lacks are read from the metrics.json of its run, if it is still in its run folder.
    repo
        `owner/name` on the hub.
    license
        Of the model, by its identifier on the hub.
    datasets
        `owner/name` of data sets on the hub.
    """
    card = _Card(bundle, repo, license)
    parts = [
        *_front_matter(card, datasets),
        *card.title(),
        *card.use(),
        *card.data(),
        *card.scores(),
        *card.genes(),
        *card.limits(),
        *card.licenses(),
        *card.citation(),
        *card.origin(),
    ]
    return "\n".join(parts).rstrip() + "\n"


def scores_of(bundle: Bundle) -> dict[str, Any]:
    """The scores of a model, by their names in metrics.json; empty if they are not known.

    Parameters
    ----------
    bundle
        The model. For one without `scores`, they are those of the run folder around it, if the config there is the one that trained it.
    """
    recorded: dict[str, Any] = bundle.metadata.get("scores") or {}
    return recorded or _scores_of_run(bundle.folder.resolve().parent, bundle.metadata)


def _scores_of_run(run: Path, about: Mapping[str, Any]) -> dict[str, Any]:
    import yaml

    made = about.get("provenance") or {}
    try:
        config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
        metrics: dict[str, Any] = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
        kept = portable(config)
    except (OSError, ValueError, AttributeError, yaml.YAMLError):
        return {}
    return metrics if fingerprint(kept) == made.get("config_fingerprint") else {}


class _Card:
    """The sections of a card."""

    def __init__(self, bundle: Bundle, repo: str, license: str | None) -> None:
        self.bundle, self.repo, self.license = bundle, repo, license
        self.about = bundle.metadata
        self.tissue: dict[str, Any] = ((self.about.get("provenance") or {}).get("config") or {}).get("tissue") or {}
        self.sections: dict[str, dict[str, int]] = (self.about.get("split") or {}).get("sections") or {}
        self.scored = scores_of(bundle)
        segmentation = self.about["segmentation"]
        self.bin_um = segmentation["arguments"].get("bin_um", 8) if segmentation["name"] == "bins" else None
        self.units = "nuclei" if self.bin_um is None else "bins"
        self.encoder = self.about["encoder"]

    @property
    def is_simulated(self) -> bool:
        """Whether it was trained on simulated sections: their gene ids say so, too."""
        specs = self.tissue.get("sections") or {}
        simulated = any((specs.get(name) or {}).get("simulate") for name in self.about["train_sections"])
        return simulated or all(gene_id.startswith("SIMG") for gene_id in self.bundle.gene_ids)

    @property
    def weights_sha256(self) -> str | None:
        sha256: str | None = self.encoder.get("weights_sha256")
        return sha256

    def title(self) -> Iterator[str]:
        yield f"# {self.repo.partition('/')[2]}: gene expression from H&E, {self.about['species']} {self.about['tissue']}"
        yield ""
        if self.is_simulated:
            yield "> **This model was trained on simulated data. It knows no real gene or tissue and is not for real slides.**"
            yield ""
        unit = "every nucleus" if self.bin_um is None else f"every square of {self.bin_um} um"
        yield (
            f"A prts model: from an H&E image, it predicts the expected UMI count of {len(self.bundle.genes):,} genes in "
            f"{unit}, with intervals and a warning for slides unlike those it was trained on. For research only, not for diagnosis."
        )
        yield ""

    def use(self) -> Iterator[str]:
        weights = " encoder.weights=FILE" if self.about["encoder_weights"] else ""
        yield from ("## How to use it", "", "```bash", f"pip install {DISTRIBUTION}")
        yield f"prts predict bundle=hf://{self.repo} image=slide.svs out=slide.h5ad page=true{weights}"
        yield "```"
        yield ""
        yield (
            f'In Python: `prts.Model.load("hf://{self.repo}").predict("slide.svs")`. `page=true` needs the extra '
            f"`{DISTRIBUTION}[report]`."
        )
        if weights:
            yield (
                f"The encoder's weights are not part of this model: FILE is `{Path(self.about['encoder_weights']).name}` with SHA-256 "
                f"`{self.weights_sha256}`."
            )
        yield ""

    def data(self) -> Iterator[str]:
        yield from ("## What it was trained on", "", "| | |", "|---|---|")
        yield f"| species, tissue | {self.about['species']}, {self.about['tissue']} |"
        for role, said in (("train", "training"), ("val", "validation"), ("test", "test")):
            named = [f"{name} ({n[role]:,} {self.units})" for name, n in self.sections.items() if n.get(role)]
            if not self.sections and role == "train":
                named = list(self.about["train_sections"])
            yield f"| {said} sections | {', '.join(named) or _UNKNOWN} |"
        if warning := (self.about.get("split") or {}).get("warning"):
            yield f"| split | {warning} |"
        yield f"| encoder | `{self.encoder['name']}`{self._network()}, at {self.about['mpp']} um/px |"
        inputs = ", ".join(f"{block} ({self.about['input']['widths'].get(block)})" for block in self.bundle.input_use)
        yield f"| inputs (width) | {inputs} |"
        yield f"| units | {self._units()} |"
        yield f"| likelihood, seed | {self.bundle.likelihood.name}, {self.about['seed']} |"
        yield ""

    def _network(self) -> str:
        named = self.encoder.get("hub") or self.encoder.get("model_name")
        trained = "" if self.bundle.adapter is None else ", its last blocks trained with the model"
        return (f" (`{named}`)" if named else "") + trained

    def _units(self) -> str:
        if self.bin_um is not None:
            return f"square bins of {self.bin_um} um"
        name = self.about["segmentation"]["name"]
        return "nuclei that came with the sections" if name == "given" else f"nuclei found by `{name}`"

    def scores(self) -> Iterator[str]:
        role = "test" if self._number("test/pcc_mean") is not None else "val"
        yield from ("## How good it is", "")
        if self._number(f"{role}/pcc_mean") is None:
            yield from self._unscored()
            return
        sections = {name: n[role] for name, n in self.sections.items() if n.get(role)}
        where = f"{'test' if role == 'test' else 'validation'} section{'s' if len(sections) > 1 else ''}"
        yield (
            f"Mean over genes of the Pearson correlation (PCC) between log1p of predicted and measured UMI, on the {where} "
            f"{', '.join(sections)} ({sum(sections.values()):,} {self.units}). Intervals are 95%, from a bootstrap. The noise "
            "ceiling is the PCC that a perfect predictor would reach, given how few UMIs are counted; it has no interval."
        )
        yield from ("", "| | PCC | 95% interval | model minus baseline |", "|---|---|---|---|")
        yield f"| **this model** | **{self._text(f'{role}/pcc_mean')}** | {self._interval(f'{role}/pcc_mean')} | |"
        if role == "test":
            for name, said in _BASELINES.items():
                key = f"baseline/{name}"
                if self._number(f"{key}/pcc_mean") is not None:
                    beyond = f"{self._text(f'{key}/difference')} ({self._interval(f'{key}/difference')})"
                    yield f"| baseline `{name}`: {said} | {self._text(f'{key}/pcc_mean')} | | {beyond} |"
        yield f"| noise ceiling | {self._text(f'{role}/ceiling_mean')} | | |"
        yield ""
        if self.is_simulated:
            yield from ("These sections are simulated, too: the scores say nothing about real tissue.", "")

    def _unscored(self) -> Iterator[str]:
        pcc, ceiling = self.bundle.val_pcc, self.bundle.ceiling
        if not np.isfinite(pcc).any():
            yield f"Scores are {_UNKNOWN}."
        else:
            yield (
                f"On validation, the mean PCC of genes is {np.nanmean(pcc):.3f} and their mean noise ceiling {np.nanmean(ceiling):.3f}. "
                f"Scores on test sections, baselines and intervals are {_UNKNOWN}."
            )
        yield ""

    def genes(self) -> Iterator[str]:
        yield from ("## Which genes to trust", "")
        flags = self.bundle.predictable
        if flags is None:
            yield from (f"Which genes are predictable is {_UNKNOWN}.", "")
            return
        yield (
            f"{int(flags.sum()):,} of {len(flags):,} genes were predicted better than chance and than every baseline on validation. "
            'Predictions mark them in `var["predictable"]`; do not interpret the others.'
        )
        precision = self._number("test/predictable_precision")
        if precision is not None:
            yield f"On the test sections, {precision:.0%} of them were again."
        table = self.bundle.per_gene()
        best = table[table["predictable"]].sort_values("val_pcc", ascending=False)
        if len(best):
            named = ", ".join(f"{gene} ({pcc:.2f})" for gene, pcc in best["val_pcc"].head(_LISTED).items())
            more = f", and {len(best) - _LISTED:,} more in model.json" if len(best) > _LISTED else ""
            yield from ("", f"With the highest PCC on validation: {named}{more}.")
        yield ""

    def limits(self) -> Iterator[str]:
        yield from ("## Limits", "")
        if self.is_simulated:
            yield "* Simulated tissue only: use it to try the software."
        yield "* For research only, not for diagnosis."
        yield (
            "* It applies to slides like those above: same tissue, stain and scanner. On other patients and scanners it is usually worse; "
            "only test sections from there would tell how much. `prts predict` says when a slide differs; `strict=true` then refuses it."
        )
        yield "* It sees morphology only. Genes whose expression does not show in H&E cannot be predicted."
        yield '* Predictions are expected values, which vary less than counts do; `layers["lower"]` and `layers["upper"]` give the range.'
        for name, reason in (self.about.get("skipped_sections") or {}).items():
            yield f"* Section {name} was left out of training: {reason}."
        yield ""

    def licenses(self) -> Iterator[str]:
        yield from ("## Licenses", "")
        yield f"* This model: {self.license or 'not stated; ask the owner of this repository'}."
        data = "simulated by prts" if self.is_simulated else f"license {_UNKNOWN}"
        yield f"* Training data: {self.tissue.get('license') or data}."
        if self.weights_sha256 is None:
            name = self.encoder["name"]
            yield "* The model uses no encoder." if name == "none" else f"* The encoder, `{name}`, has no weights."
        else:
            known = weights_license(self.encoder)
            said = (
                f"{known}. Check the terms at their source"
                if known
                else f"license {_UNKNOWN}; ask for it where you get them"
            )
            yield f"* The encoder's weights (SHA-256 `{self.weights_sha256}`) are not included. They are needed to predict: {said}."
        yield ""

    def citation(self) -> Iterator[str]:
        yield from ("## How to cite", "")
        yield f"* The method: {_METHOD}."
        yield f"* The software: prts {self.about['versions'].get('prts', __version__)}."
        if not self.is_simulated:
            yield f"* The data: {self.tissue.get('cite') or _UNKNOWN}."
        yield ""

    def origin(self) -> Iterator[str]:
        made = self.about.get("provenance") or {}
        code = made.get("code") or {}
        commit = (
            f", commit `{code['commit']}`{' with changes' if code.get('changed') else ''}" if "commit" in code else ""
        )
        yield from ("## Origin", "")
        adapter = self.encoder.get("adapter_sha256")
        yield (
            f"* model.json: SHA-256 `{self.bundle.sha256}`; model.safetensors: `{self.about['weights_sha256']}`"
            + ("" if adapter is None else f"; adapter.safetensors, the changes of the encoder: `{adapter}`")
        )
        config = made.get("config_fingerprint", _UNKNOWN)
        yield f"* trained with prts {self.about['versions'].get('prts', _UNKNOWN)}{commit}, config `{config}`"
        versions = ", ".join(f"{name} {number}" for name, number in self.about["versions"].items() if name != "prts")
        yield f"* packages: {versions}"

    def _number(self, key: str) -> float | None:
        value = self.scored.get(key)
        return float(value) if isinstance(value, int | float) and math.isfinite(value) else None

    def _text(self, key: str) -> str:
        value = self._number(key)
        return _UNKNOWN if value is None else f"{value:.3f}"

    def _interval(self, key: str) -> str:
        low, high = self._number(f"{key}_low"), self._number(f"{key}_high")
        return _UNKNOWN if low is None or high is None else f"{low:.3f} to {high:.3f}"


def _front_matter(card: _Card, datasets: Sequence[str]) -> Iterator[str]:
    import yaml

    tags = ["spatial-transcriptomics", "histology", "gene-expression", str(card.about["species"])]
    content: dict[str, Any] = {
        **({"license": card.license} if card.license else {}),
        "library_name": "prts",
        "tags": [*tags, *(["simulated-data"] if card.is_simulated else [])],
        **({"datasets": list(datasets)} if datasets else {}),
        "metrics": ["pearsonr"],
    }
    yield from ("---", yaml.safe_dump(content, sort_keys=False).strip(), "---", "")
