"""The description of a bundle, `model.json`: its fields and types, and how files of older formats are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from prts.errors import InputError
from prts.io.mpp import is_plausible

# 2: tensors of `ood`. 3: `likelihood` in place of `target` and `loss`. 4: with an adapter of the encoder, which older versions would ignore
FORMAT_VERSION = 3
WITH_ADAPTER = 4
READABLE = (1, 2, 3, 4)

ADAPTER = "adapter.safetensors"

# Meaning of `target` in formats 1 and 2.
_LIKELIHOODS: dict[Any, dict[str, str]] = {
    **{target: {"name": "paper", "target": target} for target in ("minmax", "log1p", "counts")},
    "log_rate": {"name": "poisson", "offset": "none"},
    "log_share": {"name": "poisson", "offset": "library"},
    "log_truncated": {"name": "hurdle", "level": "poisson"},
    "log_positive": {"name": "hurdle", "level": "lognormal"},
}


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", arbitrary_types_allowed=True)


class _Gene(_Part):
    name: str
    id: str


class _Input(_Part):
    use: list[Literal["local", "global", "morphology", "context"]]
    widths: dict[str, int]
    scale: Literal["training", "slide"] = "training"


class _Validation(_Part):
    pcc: list[float | None] | None = None
    ceiling: list[float | None] | None = None
    predictable: list[bool] | None = None


class _Named(_Part):
    name: str


class _OOD(_Part):
    components: int = Field(ge=0)


class _Intervals(_Part):
    level: float
    scale: list[float]
    dispersion: list[float]
    mass: list[float]


class _Limits(_Part):
    multiple: float = Field(gt=0)
    highest: list[int]


class _Given(_Part):
    """Metadata that the caller of `save_bundle` provides."""

    encoder: dict[str, Any]
    encoder_weights: str | None
    mpp: float
    tile: Any
    pooling: Any
    input: _Input
    segmentation: dict[str, Any]
    qc: dict[str, Any]
    tissue: str
    species: str
    train_sections: list[str]
    split: Any
    seed: Any
    validation: _Validation
    intervals: _Intervals | None = None
    limits: _Limits | None = None
    stain: dict[str, Any] | None = None
    nuclei: dict[str, Any] | None = None
    scores: dict[str, Any] | None = None
    provenance: dict[str, Any] = Field(default_factory=dict)


class Description(_Given):
    """model.json."""

    format_version: int
    genes: list[_Gene]
    architecture: _Named
    likelihood: _Named
    output: dict[str, Any]
    ood: _OOD | None = None
    baselines: dict[str, int] | None = None
    weights_sha256: str
    versions: dict[str, Any]

    def files(self) -> dict[str, str]:
        """Name and SHA-256 of the files next to model.json."""
        adapter = self.encoder.get("adapter_sha256")
        return {"model.safetensors": self.weights_sha256, **({} if adapter is None else {ADAPTER: str(adapter)})}


# Metadata that the caller of `save_bundle` must provide, and must not.
GIVEN_KEYS = tuple(name for name, each in _Given.model_fields.items() if each.is_required())
OWN_KEYS = tuple(name for name in Description.model_fields if name not in _Given.model_fields)


def read_description(path: Path) -> tuple[dict[str, Any], Description]:
    """Read and check model.json.

    Returns
    -------
    Its contents in the newest format, and the same with the types that bundles rely on.

    Raises
    ------
    InputError
        If the file is missing, damaged, edited or of another format version.
    """
    metadata = _read_json(path)
    return metadata, _validate(path, metadata)


def edited(path: Path, detail: str) -> InputError:
    """The error for a file with a layout that prts does not write."""
    return InputError(f"{path}: is not laid out as prts writes it ({detail}); the file was edited")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        metadata = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; a bundle holds model.json and model.safetensors") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not readable as JSON ({error}); copy the bundle again") from error
    if not isinstance(metadata, dict) or "format_version" not in metadata:
        raise InputError(f"{path}: has no format_version, so it does not describe a prts model")
    if metadata["format_version"] not in READABLE:
        versions = metadata.get("versions")
        writer = f"prts {versions['prts']}" if isinstance(versions, dict) and "prts" in versions else "version unknown"
        raise InputError(
            f"{path}: has format version {str(metadata['format_version'])[:40]}, this prts reads {READABLE[0]} to {READABLE[-1]}; "
            f"use the prts that wrote it ({writer}) or train again"
        )
    if metadata["format_version"] < 3:
        target = metadata.pop("target", None)
        name = target.get("name") if isinstance(target, dict) else None
        if not isinstance(name, str) or name not in _LIKELIHOODS:
            raise InputError(
                f"{path}: target {str(name)[:40]!r} is not one of {', '.join(_LIKELIHOODS)}; the file was edited"
            )
        metadata["likelihood"] = _LIKELIHOODS[name]
    return metadata


def _validate(path: Path, metadata: dict[str, Any]) -> Description:
    try:
        about = Description.model_validate(metadata)
    except (ValidationError, RecursionError, ArithmeticError) as error:
        found = error.errors(include_url=False) if isinstance(error, ValidationError) else []
        if missing := [str(each["loc"][0]) for each in found if each["type"] == "missing" and len(each["loc"]) == 1]:
            raise InputError(f"{path}: lacks {', '.join(missing)}; the file was edited or cut short") from None
        where, value = (found[0]["loc"], found[0]["input"]) if found else (("",), error)
        raise edited(path, f"{'.'.join(map(str, where))} is {str(value)[:40]!r}") from None
    if not is_plausible(about.mpp):
        raise edited(path, f"mpp is {about.mpp}")
    return about
