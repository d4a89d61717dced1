"""From the network's two outputs to the UMI that prts writes: the gate, and the threshold of "expressed", chosen on validation."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from prts.data.nucleus_set import NucleusSet
from prts.data.targets import Scaler
from prts.errors import InputError
from prts.evaluation.streaming import GenePearson

logger = logging.getLogger(__name__)

GATES = ("none", "soft", "hard")
_BINS = 4096


@dataclass(frozen=True)
class OutputRule:
    """How UMI come from the denormalised level and P(expressed).

    Parameters
    ----------
    gate
        `none`: the level (paper, equation 4). `soft`: P x level (ours). `hard`: 0 where P is below `threshold` or the level below
        `min_umi`, else the level (released code).
    threshold
        A gene counts as expressed in a nucleus where P reaches this, whatever the gate.
    min_umi
        Smallest UMI that the hard gate lets through.
    scores
        Mean per-gene PCC on validation of each gate that was tried.
    """

    gate: str
    threshold: float
    min_umi: float = 0.5
    scores: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.gate not in GATES:
            raise InputError(f"model.output.gate: {self.gate!r} is not one of auto, {', '.join(GATES)}")
        if not 0 <= self.threshold <= 1:
            raise InputError(f"model.output.threshold: {self.threshold} must be auto or lie in [0, 1]")

    def settings(self) -> dict[str, Any]:
        """All fields, JSON-like."""
        return asdict(self)

    def apply(self, umi: Tensor, prob: Tensor) -> Tensor:
        """Gate denormalised levels.

        Parameters
        ----------
        umi
            (b, g) denormalised level.
        prob
            (b, g) P(expressed).

        Returns
        -------
        (b, g) expected UMI.
        """
        if self.gate == "none":
            return umi
        if self.gate == "soft":
            return prob * umi
        return umi.masked_fill((prob < self.threshold) | (umi < self.min_umi), 0.0)


def choose_output(
    net: nn.Module,
    scaler: Scaler,
    val_sets: Sequence[NucleusSet],
    *,
    gates: Sequence[str] = GATES,
    gate: str = "auto",
    threshold: str | float = "auto",
    min_umi: float = 0.5,
    batch_size: int = 2048,
) -> OutputRule:
    """Choose gate and threshold on validation nuclei.

    The threshold is the one with the greatest Matthews correlation between P >= threshold and "at least one UMI" over all pairs of nucleus
    and gene. The gate is the one with the greatest mean per-gene PCC on log1p UMI, averaged over sections; of equals, the first of
    `gates`.

    Parameters
    ----------
    net
        The trained network.
    scaler
        Its target scaling.
    val_sets
        Validation nuclei.
    gates
        Gates to choose among: those of the loss.
    gate
        `auto`, or the gate to use without choosing.
    threshold
        `auto`, or the threshold to use without choosing.
    min_umi
        Smallest UMI that the hard gate lets through.
    batch_size
        Nuclei at a time.

    Raises
    ------
    InputError
        For an unknown gate or a threshold outside [0, 1].
    """
    if threshold != "auto" and not isinstance(threshold, int | float):
        raise InputError(f"model.output.threshold: {threshold!r} must be auto or a number in [0, 1]")
    chosen = 0.5 if threshold == "auto" else float(threshold)
    OutputRule("none" if gate == "auto" else gate, chosen)  # refuse bad values before any work
    if threshold == "auto":
        chosen = best_threshold(_histogram(net, scaler, val_sets, batch_size))
    tried = {name: OutputRule(name, chosen, min_umi) for name in (gates if gate == "auto" else (gate,))}
    scores = _scores(net, scaler, val_sets, tried, batch_size)
    best = max(tried, key=lambda name: scores[name])  # the first of equals
    logger.info("output: gate %s, threshold %.4g (validation PCC: %s)", best, chosen, scores)
    return OutputRule(best, chosen, min_umi, scores)


def best_threshold(histogram: NDArray[np.int64]) -> float:
    """The threshold of greatest Matthews correlation.

    Parameters
    ----------
    histogram
        (2, bins) numbers of pairs that are not expressed and expressed, by P in equal bins over [0, 1].

    Returns
    -------
    The lower edge of a bin: pairs from it upwards are called expressed. 0.5 where only one class was measured or no threshold tells
    the two apart.
    """
    counts = histogram.astype(np.float64)
    called = counts[:, ::-1].cumsum(axis=1)[:, ::-1]
    false_positive, true_positive = called
    negatives, positives = counts.sum(axis=1)
    numerator = true_positive * (negatives - false_positive) - false_positive * (positives - true_positive)
    total = true_positive + false_positive
    denominator = np.sqrt(total) * np.sqrt(positives) * np.sqrt(negatives) * np.sqrt(positives + negatives - total)
    if positives == 0 or negatives == 0:
        return 0.5
    mcc = np.divide(numerator, denominator, out=np.zeros_like(numerator), where=denominator > 0)
    return float(np.argmax(mcc) / counts.shape[1]) if mcc.max() > 0 else 0.5


@torch.inference_mode()
def _outputs(
    net: nn.Module, scaler: Scaler, nuclei: NucleusSet, batch_size: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Denormalised level, P(expressed) and counts of a section, in batches."""
    device = next(net.parameters()).device
    net.eval()
    for start in range(0, len(nuclei), batch_size):
        rows = slice(start, start + batch_size)
        level, logit = net(torch.from_numpy(nuclei.features[rows]).to(device))
        counts = torch.from_numpy(nuclei.counts[rows].toarray()).to(device)
        yield scaler.inverse(level), logit.sigmoid(), counts


def _histogram(net: nn.Module, scaler: Scaler, val_sets: Sequence[NucleusSet], batch_size: int) -> NDArray[np.int64]:
    histogram = torch.zeros(2 * _BINS, dtype=torch.int64)
    for nuclei in val_sets:
        for _, prob, counts in _outputs(net, scaler, nuclei, batch_size):
            bins = (prob * _BINS).int().clamp_(max=_BINS - 1) + _BINS * (counts > 0).int()
            histogram += torch.bincount(bins.flatten(), minlength=2 * _BINS).cpu()
    return histogram.reshape(2, _BINS).numpy()


def _scores(
    net: nn.Module, scaler: Scaler, val_sets: Sequence[NucleusSet], rules: dict[str, OutputRule], batch_size: int
) -> dict[str, float]:
    by_section: dict[str, list[float]] = {name: [] for name in rules}
    for nuclei in val_sets:
        pearson = {name: GenePearson() for name in rules}
        for umi, prob, counts in _outputs(net, scaler, nuclei, batch_size):
            measured = torch.log1p(counts.float())
            for name, rule in rules.items():
                pearson[name].update(torch.log1p(rule.apply(umi, prob)), measured)
        for name, accumulator in pearson.items():
            by_section[name].append(float(accumulator.compute().nanmean().nan_to_num()))
    return {name: float(np.mean(values)) for name, values in by_section.items()}
