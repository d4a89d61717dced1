"""Resolve `precision=auto`: bfloat16 where the processor has instructions for it."""

from __future__ import annotations

import torch


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
