"""Turn a likelihood's mean into the UMI that prts writes, with a gate and a threshold for "expressed" chosen on validation."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from prts.data.nucleus_set import NucleusSet
from prts.errors import ParameterError
from prts.models.likelihoods.base import Likelihood
from prts.models.pearson import GenePearson

logger = logging.getLogger(__name__)

Gate = Literal["none", "soft", "hard"]

_GATES = get_args(Gate)
_BINS = 4096


@dataclass(frozen=True)
class OutputRule:
    """Turns a likelihood's mean and P(expressed) into UMI.

    Parameters
    ----------
    gate
        `none`: the mean (paper, equation 4). `soft`: P x mean (not in the paper). `hard`: 0 if P is below `threshold` or the mean is
        below `min_umi`, else the mean (released code).
    threshold
        A gene counts as expressed in a nucleus where P is at least this, with any gate.
    min_umi
        Smallest UMI that the hard gate lets through.
    scores
        Mean per-gene PCC on validation of each gate that was tried.

    Raises
    ------
    ParameterError
        If the gate is unknown, or for a threshold outside [0, 1] or a negative `min_umi`.

    Examples
    --------
    >>> rule = OutputRule("soft", threshold=0.5)
    >>> rule.apply(torch.tensor([[2.0]]), torch.tensor([[0.25]]))
    tensor([[0.5000]])
    """

    gate: str
    threshold: float
    min_umi: float = 0.5
    scores: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.gate not in _GATES:
            raise ParameterError("output", "gate", f"{self.gate!r} is not one of auto, {', '.join(_GATES)}")
        if not _is_number(self.threshold) or not 0 <= self.threshold <= 1:
            raise ParameterError("output", "threshold", f"{self.threshold!r} must be auto or a number in [0, 1]")
        if not _is_number(self.min_umi) or not 0 <= self.min_umi < float("inf"):
            raise ParameterError("output", "min_umi", f"{self.min_umi!r} must be a number of UMI, 0 or more")

    def settings(self) -> dict[str, Any]:
        """All fields, JSON-like."""
        return asdict(self)

    def apply(self, umi: Tensor, prob: Tensor) -> Tensor:
        """Apply the gate.

        Parameters
        ----------
        umi
            (b, g) mean of the likelihood.
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


@dataclass(frozen=True)
class OutputSettings:
    """Which parts of the output rule are given and which are chosen on validation.

    Parameters
    ----------
    gate
        `none`, `soft` or `hard`, or `auto` to choose.
    threshold
        In [0, 1], or `auto` to choose.
    min_umi
        Smallest UMI that the hard gate lets through.

    Raises
    ------
    ParameterError
        For the same values as `OutputRule`.
    """

    gate: str = "auto"
    threshold: str | float = "auto"
    min_umi: float = 0.5

    def __post_init__(self) -> None:
        self.rule()

    def rule(self, gate: str = "none", threshold: float = 0.5) -> OutputRule:
        """The rule, with these values in place of `auto`."""
        return OutputRule(
            gate if self.gate == "auto" else self.gate,
            threshold if self.threshold == "auto" else self.threshold,  # type: ignore[arg-type]
            self.min_umi,
        )


def choose_output(
    net: nn.Module,
    likelihood: Likelihood,
    val_sets: Sequence[NucleusSet],
    settings: OutputSettings | None = None,
    *,
    batch_size: int = 2048,
) -> OutputRule:
    """Choose gate and threshold on validation nuclei.

    The threshold is the one with the greatest Matthews correlation between P >= threshold and "at least one UMI" over all pairs of nucleus
    and gene. The gate is the one with the greatest mean per-gene PCC on log1p UMI, averaged over sections; among equals, the first of the
    likelihood's `allowed_gates`.

    Parameters
    ----------
    net
        The trained network.
    likelihood
        Its likelihood.
    val_sets
        Validation nuclei.
    settings
        Values to use instead of choosing them.
    batch_size
        Nuclei at a time.
    """
    settings = settings or OutputSettings()
    threshold = 0.5
    if settings.threshold == "auto":
        threshold = best_threshold(_histogram(net, likelihood, val_sets, batch_size))
    gates = likelihood.allowed_gates if settings.gate == "auto" else (settings.gate,)
    tried = {name: settings.rule(name, threshold) for name in gates}
    scores = _scores(net, likelihood, val_sets, tried, batch_size)
    best = max(tried, key=lambda name: scores[name])  # the first among equals
    rule = tried[best]
    logger.info("output: gate %s, threshold %.4g (validation PCC: %s)", best, rule.threshold, scores)
    return OutputRule(best, rule.threshold, rule.min_umi, scores)


def best_threshold(histogram: NDArray[np.int64]) -> float:
    """Find the threshold of greatest Matthews correlation.

    Parameters
    ----------
    histogram
        (2, bins) numbers of pairs, not expressed and expressed, by P in equal bins over [0, 1].

    Returns
    -------
    The lower edge of a bin: pairs at or above it are called expressed. 0.5 if only one class was measured or no threshold
    separates the two.
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
def _predictions(
    net: nn.Module, likelihood: Likelihood, nuclei: NucleusSet, batch_size: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Mean, P(expressed) and counts of a section, in batches."""
    device = next(net.parameters()).device
    net.eval()
    for start in range(0, len(nuclei), batch_size):
        rows = slice(start, start + batch_size)
        outputs = net(torch.from_numpy(nuclei.features[rows]).to(device))
        counts = torch.from_numpy(nuclei.counts[rows].toarray()).to(device)
        yield likelihood.mean(outputs), likelihood.prob(outputs), counts


def _histogram(
    net: nn.Module, likelihood: Likelihood, val_sets: Sequence[NucleusSet], batch_size: int
) -> NDArray[np.int64]:
    histogram = torch.zeros(2 * _BINS, dtype=torch.int64)
    for nuclei in val_sets:
        for _, prob, counts in _predictions(net, likelihood, nuclei, batch_size):
            bins = (prob * _BINS).int().clamp_(max=_BINS - 1) + _BINS * (counts > 0).int()
            histogram += torch.bincount(bins.flatten(), minlength=2 * _BINS).cpu()
    return histogram.reshape(2, _BINS).numpy()


def _scores(
    net: nn.Module,
    likelihood: Likelihood,
    val_sets: Sequence[NucleusSet],
    rules: dict[str, OutputRule],
    batch_size: int,
) -> dict[str, float]:
    by_section: dict[str, list[float]] = {name: [] for name in rules}
    for nuclei in val_sets:
        pearson = {name: GenePearson() for name in rules}
        for umi, prob, counts in _predictions(net, likelihood, nuclei, batch_size):
            measured = torch.log1p(counts.float())
            for name, rule in rules.items():
                pearson[name].update(torch.log1p(rule.apply(umi, prob)), measured)
        for name, accumulator in pearson.items():
            by_section[name].append(float(accumulator.compute().nanmean().nan_to_num()))
    return {name: float(np.mean(values)) for name, values in by_section.items()}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
