"""Whether a nucleus looks like those a model has learnt from: `obs["ood"]`, and a verdict on a slide in words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from prts.data.nucleus_set import feature_moments

if TYPE_CHECKING:
    from prts.data.nucleus_set import NucleusSet

COMPONENTS = 64
_QUANTILES = 201
_CHUNK = 4096
# A nucleus is called strange above this: so are one in twenty held-out nuclei.
STRANGE = 0.95
# Shares of strange nuclei from which a slide is partly, or altogether, unlike those of training.
PARTLY, _ALTOGETHER = 0.15, 0.5
# Share of nuclei on artefacts that is worth a word: clean slides have 1 to 4 %.
SPOILT = 0.1


class MahalanobisOOD(nn.Module):
    """How unusual the features of a nucleus are among held-out nuclei of the model's own tissue.

    Features are standardised and projected on the leading principal components of the training nuclei. The squared distance from their
    mean, in units of the variance along each component and, for what the components leave over, of its mean variance (Mahalanobis distance
    under probabilistic PCA, Tipping and Bishop 1999), is compared with that of validation nuclei.

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
        self.register_buffer(
            "variance", torch.ones(components + 1)
        )  # the last: of each direction beside the components
        self.register_buffer("quantiles", torch.zeros(_QUANTILES))

    def settings(self) -> dict[str, Any]:
        """What it takes to make another of the same shape."""
        return {"components": len(self.axes)}

    @classmethod
    def fit(cls, train: Sequence[NucleusSet], held_out: Sequence[NucleusSet]) -> Self:
        """Learn what is usual.

        Parameters
        ----------
        train
            Training nuclei.
        held_out
            Nuclei that the distances are calibrated on: those of validation.
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
        """Share of held-out nuclei that are less unusual than each nucleus (n, d): `obs["ood"]`, (n,) in [0, 1]."""
        quantiles = self.quantiles.cpu().numpy()
        shares = np.interp(self.distance(features), quantiles, np.linspace(0, 1, len(quantiles)))
        return shares.astype(np.float32)


def verdict(
    ood: NDArray[np.float32], predictable: NDArray[np.bool_] | None, artefact: NDArray[np.bool_] | None = None
) -> str:
    """What to think of a prediction, in a sentence or two.

    Parameters
    ----------
    ood
        Of `MahalanobisOOD.share`, (n,).
    predictable
        The bundle's flags, (g,); None where it has none.
    artefact
        Which nuclei lie on an artefact (`prts.preprocess.artefacts`), (n,); None where nobody looked.
    """
    strange = float((ood > STRANGE).mean()) if len(ood) else 0.0
    if strange < PARTLY:
        text = "the slide looks like those the model learnt from"
    elif strange < _ALTOGETHER:
        text = "parts of the slide are unlike those the model learnt from; obs['ood'] says which nuclei, take them with care"
    else:
        text = "the slide is unlike those the model learnt from, and its prediction should not be believed"
    text += f": {strange:.0%} of nuclei are stranger than 95% of held-out ones (5% would be usual)"
    if artefact is not None and len(artefact) and (spoilt := float(artefact.mean())) >= SPOILT:
        text += f". {spoilt:.0%} of nuclei lie on what looks like an artefact; obs['artefact'] says which"
    if predictable is not None:
        text += f". Of {len(predictable)} genes, {int(predictable.sum())} were predictable on validation"
    return text
