"""A trained model as a folder: `model.safetensors` (its tensors) and `model.json` (everything else). No pickle, no code.

If the encoder was trained, too, the changes of its weights are in `adapter.safetensors`.

A bundle has everything that prediction needs except the encoder's weights, which it identifies by SHA-256. It refers to the likelihood by
its registered name, so opening an untrusted bundle never imports code named in the file.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from prts import __version__
from prts.data.slide_scale import SlideScale
from prts.errors import InputError
from prts.io.cache import atomic, sha256_file
from prts.models.bundle_description import (
    ADAPTER,
    FORMAT_VERSION,
    GIVEN_KEYS,
    OWN_KEYS,
    WITH_ADAPTER,
    Description,
    edited,
    read_description,
)
from prts.models.hub import as_on_hub, is_reference, pull
from prts.models.likelihoods import Likelihood, likelihoods
from prts.models.network import PRTSNet
from prts.models.ood import MahalanobisOOD
from prts.models.output import OutputRule
from prts.models.predictor import Predictor
from prts.models.shipped_baselines import ShippedBaselines
from prts.models.uncertainty import CountIntervals

ARCHITECTURES: dict[str, type[PRTSNet]] = {"mlp": PRTSNet}

_PACKAGES = ("torch", "timm", "pytorch-lightning", "numpy", "scipy", "anndata", "scanpy", "stardist")


@dataclass(frozen=True)
class Bundle(Predictor):
    """A trained model, ready to predict.

    Parameters
    ----------
    net, likelihood, rule
        The network in evaluation mode, its likelihood, and its gate and threshold.
    metadata
        All of `model.json`.
    folder
        Folder it was read from.
    ood
        Scores how unusual a nucleus is; None in bundles of older versions.
    baselines
        Fitted on the same nuclei as the model; None in bundles of older versions.
    slide_scale
        Matches the features of a slide to training before they are used; None if they are used as they are.
    origin
        `hf://owner/name@commit` of a bundle from the hub; None for any other.
    """

    metadata: dict[str, Any]
    folder: Path
    ood: MahalanobisOOD | None = None
    baselines: ShippedBaselines | None = None
    slide_scale: SlideScale | None = None
    origin: str | None = None

    @property
    def sha256(self) -> str:
        """SHA-256 of `model.json`, which contains the hash of the weights: it identifies the model."""
        return sha256_file(self.folder / "model.json")

    @property
    def adapter(self) -> Path | None:
        """The trained changes of the encoder's weights; None if the encoder is used as it is."""
        return None if self.metadata["encoder"].get("adapter_sha256") is None else self.folder / ADAPTER

    @property
    def files(self) -> list[Path]:
        """The files that make up the model."""
        others = [] if self.adapter is None else [self.adapter]
        return [self.folder / "model.json", self.folder / "model.safetensors", *others]

    @property
    def genes(self) -> list[str]:
        """Names of the genes, in the order of the output."""
        return [gene["name"] for gene in self.metadata["genes"]]

    @property
    def gene_ids(self) -> list[str]:
        """Ids of the genes."""
        return [gene["id"] for gene in self.metadata["genes"]]

    @property
    def input_use(self) -> tuple[str, ...]:
        """Feature blocks in the order of the network's input."""
        return tuple(self.metadata["input"]["use"])

    @property
    def input_widths(self) -> dict[str, int]:
        """Width of each feature block."""
        return dict(self.metadata["input"]["widths"])

    @property
    def val_pcc(self) -> NDArray[np.float64]:
        """(g,) PCC of each gene on validation; NaN if it was constant or is unknown."""
        return self._per_gene("pcc")

    @property
    def ceiling(self) -> NDArray[np.float64]:
        """(g,) noise ceiling of each gene's PCC on validation; NaN if unknown."""
        return self._per_gene("ceiling")

    @property
    def predictable(self) -> NDArray[np.bool_] | None:
        """(g,) genes predicted better than chance and the baselines on validation; None in bundles of older versions."""
        flags = self.metadata["validation"].get("predictable")
        return None if flags is None else np.array(flags, dtype=bool)

    @property
    def intervals(self) -> CountIntervals | None:
        """Intervals of counts, calibrated on validation; None in bundles of older versions."""
        settings = self.metadata.get("intervals")
        return None if settings is None else CountIntervals.from_settings(settings)

    def per_gene(self) -> pd.DataFrame:
        """How well each gene was predicted on validation: `gene_id, val_pcc, ceiling` and, where known, `predictable`, by gene."""
        table = pd.DataFrame(
            {"gene_id": self.gene_ids, "val_pcc": self.val_pcc, "ceiling": self.ceiling},
            index=pd.Index(self.genes, name="gene"),
        )
        if self.predictable is not None:
            table["predictable"] = self.predictable
        return table

    def _per_gene(self, name: str) -> NDArray[np.float64]:
        values = self.metadata["validation"].get(name)
        if values is None:
            return np.full(len(self.metadata["genes"]), np.nan)
        return np.array([math.nan if value is None else value for value in values], dtype=np.float64)


def save_bundle(
    folder: Path,
    *,
    net: PRTSNet,
    likelihood: Likelihood,
    rule: OutputRule,
    genes: Sequence[tuple[str, str]],
    metadata: Mapping[str, Any],
    ood: MahalanobisOOD | None = None,
    baselines: ShippedBaselines | None = None,
    slide_scale: SlideScale | None = None,
    adapter: Path | None = None,
) -> None:
    """Write a bundle, whole or not at all.

    Parameters
    ----------
    folder
        Where to write; an older bundle there is replaced.
    net
        The trained network.
    likelihood
        Its likelihood, fitted.
    rule
        Its output rule.
    genes
        (name, id) in the order of the output.
    metadata
        `encoder` (settings with weights sha256 and normalization), `encoder_weights` (the file, or None), `mpp`, `tile`, `pooling`,
        `input` (`use`, `widths`), `segmentation` (`name`, `arguments`), `qc`, `tissue`, `species`, `train_sections`, `split`, `seed`,
        `validation` (`pcc` and `ceiling`, one value per gene or None), and anything else worth keeping. Values are JSON-like; NaN is
        written as null.
    ood
        Scores how unusual a nucleus is.
    baselines
        Fitted on the same nuclei as the model.
    slide_scale
        What features of each slide were matched to, exactly if the `scale` of `input` is `slide`.
    adapter
        The adapter of the encoder, exactly if its settings name one.

    Raises
    ------
    ValueError
        If `metadata` lacks a key, or the parts do not belong together.
    """
    missing, taken = sorted(set(GIVEN_KEYS) - set(metadata)), sorted(set(metadata) & set(OWN_KEYS))
    if missing or taken:
        raise ValueError(f"bundle metadata: missing {missing}, reserved {taken}")
    if not len(genes) == net.n_genes == likelihood.n_genes:
        raise ValueError(
            f"bundle: {len(genes)} genes, a network of {net.n_genes} and a likelihood of {likelihood.n_genes}"
        )
    if (slide_scale is not None) != (metadata["input"].get("scale") == "slide"):
        raise ValueError("bundle: `slide_scale` and the `scale` of the input do not belong together")
    if (adapter is not None) != (metadata["encoder"].get("adapter_sha256") is not None):
        raise ValueError("bundle: `adapter` and the settings of the encoder do not belong together")
    kinds = {kind: name for name, kind in ARCHITECTURES.items()}
    with atomic(Path(folder)) as temporary:
        temporary.mkdir()
        weights = temporary / "model.safetensors"
        save_file(_tensors(_parts(net, likelihood, ood, baselines, slide_scale)), weights)
        if adapter is not None:
            shutil.copyfile(adapter, temporary / ADAPTER)
        description = {
            "format_version": FORMAT_VERSION if adapter is None else WITH_ADAPTER,
            "genes": [{"name": name, "id": gene_id} for name, gene_id in genes],
            "architecture": {"name": kinds[type(net)], **net.settings()},
            "likelihood": likelihood.settings(),
            "output": rule.settings(),
            "ood": None if ood is None else ood.settings(),
            "baselines": None if baselines is None else baselines.widths,
            **metadata,
            "weights_sha256": sha256_file(weights),
            "versions": versions(),
        }
        _write_description(temporary / "model.json", description)


def add_scores(bundle: Bundle, scores: Mapping[str, Any]) -> Bundle:
    """Write the scores of a model, named as in metrics.json, into its model.json; nothing that predicts changes.

    Parameters
    ----------
    bundle
        The model, in its folder.
    scores
        Its scores.

    Returns
    -------
    The model with its new metadata.
    """
    metadata = {**bundle.metadata, "scores": dict(scores)}
    with atomic(bundle.folder / "model.json") as temporary:
        _write_description(temporary, metadata)
    return replace(bundle, metadata=metadata)


def _write_description(path: Path, description: Mapping[str, Any]) -> None:
    text = json.dumps(_jsonable(description), indent=1, ensure_ascii=False, allow_nan=False)
    path.write_text(text, encoding="utf-8")


def load_bundle(place: Path | str) -> Bundle:
    """Open a bundle and check it.

    Parameters
    ----------
    place
        Folder written by `save_bundle`, or `hf://owner/name[@revision]`, which is downloaded first.

    Raises
    ------
    InputError
        If a file is missing or damaged or has another format version, the two files do not belong together, its likelihood comes from
        a package that is not installed, or it cannot be downloaded.
    """
    if isinstance(place, str) and is_reference(place):
        folder, origin = pull(place)
        with as_on_hub(folder, origin):
            return replace(load_bundle(folder), origin=origin)
    folder = Path(place)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; a bundle is the folder `model` of a training run")
    path = folder / "model.json"
    metadata, about = read_description(path)
    net, likelihood, rule, ood, baselines, slide_scale = _build(path, metadata, about)
    _load_weights(folder / "model.safetensors", about, _parts(net, likelihood, ood, baselines, slide_scale))
    if ADAPTER in about.files():
        _check_adapter(folder / ADAPTER, about.files()[ADAPTER])
    net.eval()
    limit = None if about.limits is None else torch.tensor(about.limits.highest) * float(about.limits.multiple)
    return Bundle(net, likelihood, rule, metadata, folder, ood, baselines, slide_scale, limit=limit)


def _build(
    path: Path, metadata: dict[str, Any], about: Description
) -> tuple[PRTSNet, Likelihood, OutputRule, MahalanobisOOD | None, ShippedBaselines | None, SlideScale | None]:
    """Build everything with tensors, without allocating memory (the weights file provides it), and the rule."""
    if about.architecture.name not in ARCHITECTURES:
        raise InputError(
            f"{path}: architecture {about.architecture.name!r} is not one of {', '.join(ARCHITECTURES)}; use a newer prts"
        )
    if about.likelihood.name not in likelihoods:
        raise InputError(
            f"{path}: likelihood {about.likelihood.name!r} is not one of {', '.join(likelihoods.names())}; "
            "install the package that provides it"
        )
    width = sum(about.input.widths.get(block, 0) for block in about.input.use)
    architecture = {key: value for key, value in metadata["architecture"].items() if key != "name"}
    try:
        with torch.device("meta"):
            net = ARCHITECTURES[about.architecture.name](**architecture)
            likelihood = likelihoods.build(metadata["likelihood"])
            likelihood.allocate(len(about.genes))
            ood = None if about.ood is None else MahalanobisOOD(width, about.ood.components)
            baselines = None if about.baselines is None else ShippedBaselines(about.baselines, len(about.genes))
            slide_scale = SlideScale(width) if about.input.scale == "slide" else None
        rule = OutputRule(**metadata["output"])
        per_gene: list[Sequence[Any] | None] = [
            about.validation.pcc,
            about.validation.ceiling,
            about.validation.predictable,
        ]
        if about.intervals is not None:
            CountIntervals.from_settings(metadata["intervals"])
            per_gene += [about.intervals.scale, about.intervals.dispersion, about.intervals.mass]
        if about.limits is not None:
            per_gene.append(about.limits.highest)
    except (TypeError, ValueError, ArithmeticError, RuntimeError, InputError) as error:
        raise edited(path, str(error)) from error
    if {len(about.genes), *(len(values) for values in per_gene if values is not None)} != {net.n_genes}:
        raise InputError(f"{path}: lists {len(about.genes)} genes for a network of {net.n_genes}; the file was edited")
    if len({gene.name for gene in about.genes}) < len(about.genes):
        raise InputError(f"{path}: lists a gene twice; names must be unique")
    if net.outputs != likelihood.outputs:
        raise edited(path, f"{list(net.outputs)} are not the outputs of likelihood {about.likelihood.name}")
    if len(set(about.input.use)) < len(about.input.use) or width != net.in_features:
        raise InputError(
            f"{path}: feature blocks {about.input.use} of {about.input.widths} do not add up to the network's {net.in_features} inputs; "
            "the file was edited"
        )
    return net, likelihood, rule, ood, baselines, slide_scale


def _load_weights(path: Path, about: Description, parts: Mapping[str, nn.Module]) -> None:
    try:
        tensors = load_file(path)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; a bundle holds model.json and model.safetensors") from None
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: is damaged or cut short ({error}); copy the bundle again") from error
    if about.format_version < 3:
        prefix = "likelihood.scaler." if about.likelihood.name == "paper" else "likelihood."
        tensors = {
            name if not name.startswith("scaler.") else f"{prefix}{name.removeprefix('scaler.')}": tensor
            for name, tensor in tensors.items()
        }
    expected = _tensors(parts)
    for problem, names in (
        ("lacks", expected.keys() - tensors.keys()),
        ("has unknown", tensors.keys() - expected.keys()),
    ):
        if names:
            first, *rest = sorted(names)
            more = f" and {len(rest)} more" if rest else ""
            raise InputError(f"{path}: {problem} {first}{more}; it does not belong to the model.json next to it")
    for name, tensor in expected.items():
        if tensors[name].shape != tensor.shape or tensors[name].dtype != tensor.dtype:
            raise InputError(
                f"{path}: {name} is {tensors[name].dtype} {tuple(tensors[name].shape)}, model.json asks for "
                f"{tensor.dtype} {tuple(tensor.shape)}; the two files do not belong together"
            )
    if sha256_file(path) != about.weights_sha256:
        raise InputError(f"{path}: its SHA-256 differs from the one in model.json; get a complete copy of the bundle")
    for prefix, module in parts.items():
        state = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        module.load_state_dict(state, assign=True)


def _check_adapter(path: Path, sha256: str) -> None:
    if not path.is_file():
        raise InputError(f"{path}: no such file; this model has trained its encoder, so copy {path.name}, too")
    if sha256_file(path) != sha256:
        raise InputError(f"{path}: its SHA-256 differs from the one in model.json; get a complete copy of the bundle")


def _parts(
    net: nn.Module,
    likelihood: nn.Module,
    ood: nn.Module | None,
    baselines: nn.Module | None,
    slide_scale: nn.Module | None,
) -> dict[str, nn.Module]:
    """Everything with tensors, by name prefix."""
    parts = {
        "net.": net,
        "likelihood.": likelihood,
        "ood.": ood,
        "baselines.": baselines,
        "slide_scale.": slide_scale,
    }
    return {prefix: module for prefix, module in parts.items() if module is not None}


def _tensors(parts: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    return {
        f"{prefix}{name}": tensor.contiguous()
        for prefix, module in parts.items()
        for name, tensor in module.state_dict().items()
    }


def versions() -> dict[str, str]:
    """Versions of prts and of the packages that compute."""
    found = {"prts": __version__}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue  # an extra that is not installed
    return found


def _jsonable(value: Any) -> Any:
    """Plain JSON types. NaN and infinities, which JSON lacks, become null."""
    if isinstance(value, Mapping):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | list | tuple):
        return [_jsonable(item) for item in (value.tolist() if isinstance(value, np.ndarray) else value)]
    if isinstance(value, np.generic):
        return _jsonable(value.item())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value) if isinstance(value, Path) else value
