"""How unusual a nucleus is compared with the training nuclei (`obs["ood"]`), and a verdict on a slide in words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from prts.data.nucleus_set import feature_moments
from prts.models.predictor import LIMIT_MULTIPLE

if TYPE_CHECKING:
    from prts.data.nucleus_set import NucleusSet

COMPONENTS = 64
_QUANTILES = 201
_CHUNK = 4096
# A nucleus above this is called unusual; one in twenty held-out nuclei is.
STRANGE = 0.95
# Shares of unusual nuclei above which a slide is partly, or entirely, unlike the training slides.
PARTLY, _ALTOGETHER = 0.15, 0.5
# Share of nuclei on artifacts that warrants a warning: clean slides have 1% to 4%.
SPOILT = 0.1
# Share of nuclei with a gene at the model's limit that is worth mentioning: on slides like the training slides, there is none.
CUT = 0.01


class MahalanobisOOD(nn.Module):
    """Mahalanobis distance of a nucleus from the training nuclei, ranked among held-out nuclei.

    Features are standardized and projected on the leading principal components of the training nuclei. The squared distance from their
    mean is in units of the variance along each component and, for the remaining directions, of their mean variance (Mahalanobis distance
    under probabilistic PCA, Tipping and Bishop 1999).

    Parameters
    ----------
    n_features
        Width of the network's input.
    components
        Principal components kept.
    """

    mean: Tensor
    scale: Tensor
    axes: Tensor
    variance: Tensor
    quantiles: Tensor

    def __init__(self, n_features: int, components: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(n_features))
        self.register_buffer("scale", torch.ones(n_features))
        self.register_buffer("axes", torch.zeros(components, n_features))
        self.register_buffer("variance", torch.ones(components + 1))  # the last entry is for each remaining direction
        self.register_buffer("quantiles", torch.zeros(_QUANTILES))

    def settings(self) -> dict[str, Any]:
        """Constructor arguments except the number of features, JSON-like."""
        return {"components": len(self.axes)}

    @classmethod
    def fit(cls, train: Sequence[NucleusSet], held_out: Sequence[NucleusSet]) -> Self:
        """Fit the reference distribution.

        Parameters
        ----------
        train
            Training nuclei.
        held_out
            Validation nuclei, on which the distances are calibrated.
        """
        mean, scale = feature_moments(train)
        n, d = sum(map(len, train)), len(mean)
        covariance = np.zeros((d, d))
        for nuclei in train:
            for start in range(0, len(nuclei), _CHUNK):
                z = (nuclei.features[start : start + _CHUNK] - mean) / scale
                covariance += z.T @ z / n
        values, vectors = np.linalg.eigh(covariance)
        values, vectors = values[::-1], vectors[:, ::-1]
        k = min(COMPONENTS, d, int((values > 1e-6 * values[0]).sum()))
        left = max(float(values[k:].clip(0).mean()) if k < d else 0.0, 1e-6)
        found = cls(d, k)
        parts = {
            "mean": mean,
            "scale": scale,
            "axes": vectors[:, :k].T,
            "variance": np.append(values[:k], left),
        }
        for name, part in parts.items():
            setattr(found, name, torch.from_numpy(np.ascontiguousarray(part, dtype=np.float32)))
        distance = np.concatenate([found.distance(nuclei.features) for nuclei in held_out])
        levels = np.quantile(distance, np.linspace(0, 1, _QUANTILES))
        found.quantiles = torch.from_numpy(levels.astype(np.float32))
        return found

    def distance(self, features: NDArray[np.float32]) -> NDArray[np.float64]:
        """Squared distance of nuclei (n, d) from the mean of the training nuclei, (n,)."""
        mean, scale, axes, variance = (part.cpu().numpy() for part in (self.mean, self.scale, self.axes, self.variance))
        found = np.empty(len(features))
        for start in range(0, len(features), _CHUNK):
            z = (features[start : start + _CHUNK] - mean) / scale
            along = z @ axes.T
            rest = np.square(z).sum(axis=1) - np.square(along).sum(axis=1)
            found[start : start + _CHUNK] = (np.square(along) / variance[:-1]).sum(axis=1) + rest.clip(0) / variance[-1]
        return found

    def share(self, features: NDArray[np.float32]) -> NDArray[np.float32]:
        """Share of held-out nuclei that are less unusual than each nucleus (n, d), (n,) in [0, 1]: `obs["ood"]`."""
        quantiles = self.quantiles.cpu().numpy()
        shares = np.interp(self.distance(features), quantiles, np.linspace(0, 1, len(quantiles)))
        return shares.astype(np.float32)


class Verdict(NamedTuple):
    """How far a prediction can be trusted, in words, and whether it can be believed at all."""

    text: str
    believable: bool


def verdict(
    ood: NDArray[np.float32],
    predictable: NDArray[np.bool_] | None,
    artefact: NDArray[np.bool_] | None = None,
    capped: NDArray[np.integer[Any]] | None = None,
) -> Verdict:
    """Say in a few sentences how far a prediction can be trusted.

    Parameters
    ----------
    ood
        From `MahalanobisOOD.share`, (n,).
    predictable
        The bundle's flags, (g,), or None.
    artefact
        Which nuclei are on an artifact (`prts.preprocess.artefacts`), (n,), or None if that was not checked.
    capped
        Number of genes of each nucleus whose expected UMI was cut at the model's limit, (n,), or None if it has no limits.
    """
    strange = float((ood > STRANGE).mean()) if len(ood) else 0.0
    if strange < PARTLY:
        text = "the slide looks like the training slides"
    elif strange < _ALTOGETHER:
        text = "parts of the slide are unlike the training slides; treat nuclei with a high obs['ood'] with care"
    else:
        text = "the slide is unlike the training slides, and its prediction should not be believed"
    text += f": {strange:.0%} of nuclei are more unusual than 95% of held-out nuclei (5% expected)"
    if artefact is not None and len(artefact) and (spoilt := float(artefact.mean())) >= SPOILT:
        text += f". {spoilt:.0%} of nuclei are on a likely artifact; see obs['artefact']"
    if capped is not None and len(capped) and (cut := float((capped > 0).mean())) >= CUT:
        text += (
            f". In {cut:.0%} of nuclei, the expected UMI of some gene was cut at {LIMIT_MULTIPLE:g} times the highest training count; see "
            "obs['n_capped']"
        )
    if predictable is not None:
        text += f". {int(predictable.sum())} of {len(predictable)} genes were predictable on validation"
    return Verdict(text, strange < _ALTOGETHER)
