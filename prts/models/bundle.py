"""A trained model as a folder: `model.safetensors` (every tensor) and `model.json` (everything else). No pickle, no code.

A bundle holds all that prediction needs but the encoder's weights, which it names with their SHA-256. Architectures and scalers are named,
never imported from what the file says, so that opening a stranger's bundle runs nothing of theirs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from prts.data.targets import SCALERS, Scaler
from prts.errors import InputError
from prts.features.feature_reader import BLOCKS
from prts.io.cache import atomic, sha256_file
from prts.io.mpp import is_plausible
from prts.models.network import PRTSNet
from prts.models.ood import MahalanobisOOD
from prts.models.output import OutputRule
from prts.models.predictor import Predictor
from prts.models.uncertainty import CountIntervals

# 2: tensors of what is usual (`ood`), beside those of network and scaler
FORMAT_VERSION = 2
READABLE = (1, 2)

ARCHITECTURES: dict[str, type[PRTSNet]] = {"mlp": PRTSNet}

# What the caller of `save_bundle` must say.
GIVEN_KEYS = (
    "encoder",
    "encoder_weights",
    "mpp",
    "tile",
    "pooling",
    "input",
    "loss",
    "segmentation",
    "qc",
    "tissue",
    "species",
    "train_sections",
    "split",
    "seed",
    "validation",
)
OWN_KEYS = ("format_version", "genes", "architecture", "target", "output", "weights_sha256", "versions")

# What prediction goes on with, checked here so that it cannot fail hours later.
_KINDS: dict[str, type | tuple[type, ...]] = {
    "genes": list,
    "encoder": dict,
    "encoder_weights": (str, type(None)),
    "segmentation": dict,
    "qc": dict,
    "tissue": str,
    "species": str,
    "train_sections": list,
    "validation": dict,
    "weights_sha256": str,
    "versions": dict,
    "stain": (dict, type(None)),
    "nuclei": (dict, type(None)),
    "provenance": dict,
}

_PACKAGES = ("prts", "torch", "timm", "pytorch-lightning", "numpy", "scipy", "anndata", "scanpy", "stardist")


@dataclass(frozen=True)
class Bundle(Predictor):
    """A trained model, ready to predict.

    Parameters
    ----------
    net, scaler, rule
        The network in evaluation mode, what turns its levels into UMI, and its gate and threshold.
    metadata
        All of `model.json`.
    ood
        What says how unusual a nucleus is; None where the bundle does not know.
    """

    metadata: dict[str, Any]
    ood: MahalanobisOOD | None = None

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
        """Feature blocks in the order in which the network takes them."""
        return tuple(self.metadata["input"]["use"])

    @property
    def input_widths(self) -> dict[str, int]:
        """Width of each feature block."""
        return dict(self.metadata["input"]["widths"])

    @property
    def val_pcc(self) -> NDArray[np.float64]:
        """(g,) PCC of each gene on validation, NaN where it was constant or unknown."""
        return self._per_gene("pcc")

    @property
    def ceiling(self) -> NDArray[np.float64]:
        """(g,) noise ceiling of each gene's PCC on validation, NaN where unknown."""
        return self._per_gene("ceiling")

    @property
    def predictable(self) -> NDArray[np.bool_] | None:
        """(g,) genes that were predicted on validation beyond chance and the baselines; None where an older bundle does not say."""
        flags = self.metadata["validation"].get("predictable")
        return None if flags is None else np.array(flags, dtype=bool)

    @property
    def intervals(self) -> CountIntervals | None:
        """Intervals of counts, calibrated on validation; None where an older bundle has none."""
        settings = self.metadata.get("intervals")
        return None if settings is None else CountIntervals.from_settings(settings)

    def _per_gene(self, name: str) -> NDArray[np.float64]:
        values = _numbers(self.metadata["validation"].get(name))
        return np.full(len(self.metadata["genes"]), np.nan) if values is None else values


def _numbers(values: Sequence[float | None] | None) -> NDArray[np.float64] | None:
    """Numbers of JSON, whose null is NaN."""
    if values is None:
        return None
    return np.array([math.nan if value is None else value for value in values], dtype=np.float64)


def save_bundle(
    folder: Path,
    *,
    net: PRTSNet,
    scaler: Scaler,
    rule: OutputRule,
    genes: Sequence[tuple[str, str]],
    metadata: Mapping[str, Any],
    ood: MahalanobisOOD | None = None,
) -> None:
    """Write a bundle, whole or not at all.

    Parameters
    ----------
    folder
        Where; an older bundle there is replaced.
    net
        The trained network.
    scaler
        Its target scaling.
    rule
        Its output rule.
    genes
        (name, id) in the order of the output.
    metadata
        `encoder` (settings with weights sha256 and normalisation), `encoder_weights` (the file, or None), `mpp`, `tile`, `pooling`,
        `input` (`use`, `widths`), `loss`, `segmentation` (`name`, `arguments`), `qc`, `tissue`, `species`, `train_sections`, `split`,
        `seed`, `validation` (`pcc` and `ceiling`, one value per gene or None), and anything else worth keeping. Values are JSON-like;
        NaN is written as null.
    ood
        What says how unusual a nucleus is.

    Raises
    ------
    ValueError
        If `metadata` lacks a key, or the parts do not belong together.
    """
    missing = [key for key in GIVEN_KEYS if key not in metadata]
    if missing or set(metadata) & set(OWN_KEYS):
        raise ValueError(
            f"bundle metadata: missing {missing}, not for the caller {sorted(set(metadata) & set(OWN_KEYS))}"
        )
    if not len(genes) == net.n_genes == scaler.n_genes:
        raise ValueError(f"bundle: {len(genes)} genes, a network of {net.n_genes} and a scaler of {scaler.n_genes}")
    kinds = {kind: name for name, kind in ARCHITECTURES.items()}
    with atomic(Path(folder)) as temporary:
        temporary.mkdir()
        weights = temporary / "model.safetensors"
        save_file(_tensors(net, scaler, ood), weights)
        description = {
            "format_version": FORMAT_VERSION,
            "genes": [{"name": name, "id": gene_id} for name, gene_id in genes],
            "architecture": {"name": kinds[type(net)], **net.settings()},
            "target": {"name": scaler.name},
            "output": rule.settings(),
            "ood": None if ood is None else ood.settings(),
            **metadata,
            "weights_sha256": sha256_file(weights),
            "versions": _versions(),
        }
        text = json.dumps(_jsonable(description), indent=1, ensure_ascii=False, allow_nan=False)
        (temporary / "model.json").write_text(text, encoding="utf-8")


def load_bundle(folder: Path) -> Bundle:
    """Open a bundle and check it.

    Parameters
    ----------
    folder
        What `save_bundle` wrote.

    Raises
    ------
    InputError
        If a file is missing or damaged, of another format version, or the two files do not belong together.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; a bundle is the folder `model` of a training run")
    metadata = _read_description(folder / "model.json")
    net, scaler, rule, ood = _build(folder / "model.json", metadata)
    _load_weights(folder / "model.safetensors", net, scaler, ood, metadata["weights_sha256"])
    net.eval()
    return Bundle(net, scaler, rule, metadata, ood)


def _read_description(path: Path) -> dict[str, Any]:
    try:
        metadata = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; a bundle holds model.json and model.safetensors") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: is no readable JSON ({error})") from error
    if not isinstance(metadata, dict) or "format_version" not in metadata:
        raise InputError(f"{path}: has no format_version, so it describes no prts model")
    if metadata["format_version"] not in READABLE:
        raise InputError(
            f"{path}: is of format version {metadata['format_version']!r}, this prts reads {READABLE[0]} to {READABLE[-1]}; "
            f"use the prts that wrote it ({_writer(metadata)}) or train again"
        )
    missing = [key for key in (*OWN_KEYS, *GIVEN_KEYS) if key not in metadata]
    if missing:
        raise InputError(f"{path}: lacks {', '.join(missing)}; the file was edited or cut short")
    wrong = [key for key, kind in _KINDS.items() if key in metadata and not isinstance(metadata[key], kind)]
    if not isinstance(metadata["mpp"], int | float) or not is_plausible(metadata["mpp"]):
        wrong.append("mpp")
    if wrong:
        raise InputError(
            f"{path}: is not laid out as prts writes it ({wrong[0]} is {str(metadata[wrong[0]])[:40]!r}); the file was edited"
        )
    return metadata


def _build(path: Path, metadata: dict[str, Any]) -> tuple[PRTSNet, Scaler, OutputRule, MahalanobisOOD | None]:
    """Network, scaler and what is usual without memory behind their tensors (the weights file brings it), and the rule."""
    try:
        settings = dict(metadata["architecture"])
        kind, scaling = settings.pop("name"), metadata["target"]["name"]
        genes = [(str(gene["name"]), str(gene["id"])) for gene in metadata["genes"]]
        use, widths = metadata["input"]["use"], metadata["input"]["widths"]
        width = sum(int(widths[block]) for block in use)
        per_gene = [_numbers(metadata["validation"].get(name)) for name in ("pcc", "ceiling", "predictable")]
        if (intervals := metadata.get("intervals")) is not None:
            found = CountIntervals.from_settings(intervals)
            per_gene += [found.scale, found.dispersion, found.mass]
        if any(values.ndim != 1 for values in per_gene if values is not None):
            raise ValueError("one number per gene is needed")
        lengths = {len(genes), *(len(values) for values in per_gene if values is not None)}
        if kind in ARCHITECTURES and scaling in SCALERS:
            with torch.device("meta"):
                net = ARCHITECTURES[kind](**settings)
                scaler = SCALERS[scaling](len(genes))
                usual = metadata.get("ood")
                ood = None if usual is None else MahalanobisOOD(width, int(usual["components"]))
            rule = OutputRule(**metadata["output"])
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError, RuntimeError, InputError) as error:
        raise InputError(f"{path}: is not laid out as prts writes it ({type(error).__name__}: {error})") from error
    for what, name, known in (("architecture", kind, ARCHITECTURES), ("target", scaling, SCALERS)):
        if name not in known:
            raise InputError(f"{path}: {what} {name!r} is not one of {', '.join(known)}; use a newer prts")
    if lengths != {net.n_genes}:
        raise InputError(f"{path}: lists {len(genes)} genes beside a network of {net.n_genes}; the file was edited")
    if len({name for name, _ in genes}) < len(genes):
        raise InputError(f"{path}: lists a gene twice; names must be unique")
    if not set(use) <= set(BLOCKS) or len(set(use)) < len(use) or width != net.in_features:
        raise InputError(
            f"{path}: feature blocks {use} of {widths} do not add up to the network's {net.in_features} inputs; the file was edited"
        )
    return net, scaler, rule, ood


def _load_weights(path: Path, net: nn.Module, scaler: nn.Module, ood: nn.Module | None, sha256: str) -> None:
    try:
        tensors = load_file(path)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; a bundle holds model.json and model.safetensors") from None
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: is damaged or cut short ({error}); copy the bundle again") from error
    expected = _tensors(net, scaler, ood)
    for problem, names in (
        ("lacks", expected.keys() - tensors.keys()),
        ("has unknown", tensors.keys() - expected.keys()),
    ):
        if names:
            raise InputError(f"{path}: {problem} {_first(names)}; it does not belong to the model.json beside it")
    for name, tensor in expected.items():
        if tensors[name].shape != tensor.shape or tensors[name].dtype != tensor.dtype:
            raise InputError(
                f"{path}: {name} is {tensors[name].dtype} {tuple(tensors[name].shape)}, model.json asks for "
                f"{tensor.dtype} {tuple(tensor.shape)}; the two files do not belong together"
            )
    if sha256_file(path) != sha256:
        raise InputError(
            f"{path}: has another SHA-256 than model.json says; it was damaged or comes from another bundle"
        )
    for prefix, module in _parts(net, scaler, ood):
        state = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        module.load_state_dict(state, assign=True)


def _parts(net: nn.Module, scaler: nn.Module, ood: nn.Module | None) -> list[tuple[str, nn.Module]]:
    parts = [("net.", net), ("scaler.", scaler), ("ood.", ood)]
    return [(prefix, module) for prefix, module in parts if module is not None]


def _tensors(net: nn.Module, scaler: nn.Module, ood: nn.Module | None) -> dict[str, Tensor]:
    return {
        f"{prefix}{name}": tensor.contiguous()
        for prefix, module in _parts(net, scaler, ood)
        for name, tensor in module.state_dict().items()
    }


def _first(names: set[str]) -> str:
    first, *rest = sorted(names)
    return f"{first} and {len(rest)} more" if rest else first


def _writer(metadata: Mapping[str, Any]) -> str:
    versions = metadata.get("versions")
    return f"prts {versions['prts']}" if isinstance(versions, dict) and "prts" in versions else "unknown version"


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue  # an extra that is not installed
    return found


def _jsonable(value: Any) -> Any:
    """Plain JSON types; NaN and infinities, which JSON has not, become null."""
    if isinstance(value, Mapping):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | list | tuple):
        return [_jsonable(item) for item in (value.tolist() if isinstance(value, np.ndarray) else value)]
    if isinstance(value, np.generic):
        return _jsonable(value.item())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value) if isinstance(value, Path) else value
