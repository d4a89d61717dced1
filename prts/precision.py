"""Resolve `device=auto`, and `precision=auto`: bfloat16 where the processor has instructions for it."""

from __future__ import annotations

from typing import Literal

import torch

from prts.errors import ParameterError


def computes_bf16(device: torch.device) -> bool:
    """Whether the device has instructions for bfloat16. Elsewhere it is emulated and slower than float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return device.type == "cpu" and any(cpu_has(probe) for probe in probes)


def cpu_has(probe: str) -> bool:
    """Result of a probe of `torch.cpu`; false if this torch lacks the probe."""
    return bool(getattr(torch.cpu, probe, bool)())


def training_precision(precision: str | int | None, device: torch.device) -> str | int | None:
    """Resolve the precision of training.

    Parameters
    ----------
    precision
        `auto`: `bf16-mixed` where the device computes bfloat16, else `32-true`. Other values are Lightning's and returned as they are.
    device
        Device of the training.
    """
    if precision != "auto":
        return precision
    return "bf16-mixed" if computes_bf16(device) else "32-true"


def torch_device(device: str) -> torch.device:
    """The torch device with this name; `auto` is CUDA if available.

    Raises
    ------
    ParameterError
        If torch does not know the device or cannot use it.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ParameterError(
            "encoder", "device", f"{device!r} is not a torch device; choose auto, cpu or cuda"
        ) from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ParameterError("encoder", "device", f"{device}: torch finds no CUDA device; choose auto or cpu")
    return chosen


def encoding_precision(precision: Literal["auto", "bf16", "fp32"], device: torch.device) -> Literal["bf16", "fp32"]:
    """Resolve `auto` of an encoder: bf16 if the processor has instructions for it (twice as fast), but not if it would be emulated."""
    if precision != "auto":
        return precision
    return "bf16" if computes_bf16(device) else "fp32"
