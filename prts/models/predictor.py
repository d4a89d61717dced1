"""Network, likelihood and output rule together: from features to expected UMI."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from prts.data.nucleus_set import NucleusSet
from prts.errors import InputError
from prts.models.likelihoods.base import Likelihood
from prts.models.network import PRTSNet
from prts.models.output import OutputRule

CHUNK = 4096
# An exponential of an extrapolated level has no bound. No nucleus is expected to have more than twice the most that was ever counted.
LIMIT_MULTIPLE = 2.0

Prediction = tuple[NDArray[np.float32], NDArray[np.float32]]


def highest_counts(train: Sequence[NucleusSet]) -> NDArray[np.int64]:
    """Highest count of each gene in any training nucleus, (g,), at least 1."""
    highest: NDArray[np.int64] = np.max([part.counts.max(axis=0).toarray()[0] for part in train], axis=0)
    return highest.astype(np.int64).clip(min=1)


@dataclass(frozen=True)
class Predictor:
    """Turns features into expected UMI.

    Parameters
    ----------
    net
        The network.
    likelihood
        Turns the network's outputs into UMI and P(expressed).
    rule
        Gate and threshold.
    limit
        Largest expected UMI of each gene, (g,): `highest_counts` of the training nuclei times `LIMIT_MULTIPLE`. None: no limit.
    """

    net: PRTSNet
    likelihood: Likelihood
    rule: OutputRule
    limit: Tensor | None = field(default=None, kw_only=True)

    def to(self, device: torch.device | str) -> Self:
        """The same predictor with its tensors on a device."""
        self.net.to(device)
        self.likelihood.to(device)
        return self

    @torch.inference_mode()
    def predict(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Predict nuclei.

        Parameters
        ----------
        features
            (b, d) float32 in the order of the network's input, on any device.

        Returns
        -------
        Expected UMI (b, g) after the gate, at most `limit`, and P(expressed) (b, g), both on the network's device.

        Raises
        ------
        InputError
            If the features do not have the width used in training.
        """
        if features.shape[1] != self.net.in_features:
            raise InputError(
                f"features: {features.shape[1]} wide, but the model takes {self.net.in_features}; "
                "extract them with the encoder named in its model.json"
            )
        self.net.eval()
        outputs = self.net(features.to(next(self.net.parameters()).device))
        prob = self.likelihood.prob(outputs)
        umi = self.rule.apply(self.likelihood.mean(outputs), prob)
        return umi if self.limit is None else umi.minimum(self.limit.to(umi)), prob

    def predict_chunks(self, features: NDArray[np.float32], chunk: int = CHUNK) -> Iterator[Prediction]:
        """Predict features (n, d) in memory, yielding UMI and P(expressed) of `chunk` nuclei at a time, each (b, g) float32."""
        for start in range(0, len(features), chunk):
            umi, prob = self.predict(torch.from_numpy(features[start : start + chunk]))
            yield umi.float().cpu().numpy(), prob.float().cpu().numpy()

    def predict_all(self, features: NDArray[np.float32]) -> Prediction:
        """UMI and P(expressed) of all nuclei, each (n, g) float32."""
        umi = np.empty((len(features), self.net.n_genes), np.float32)
        prob = np.empty_like(umi)
        start = 0
        for part, chance in self.predict_chunks(features):
            umi[start : start + len(part)], prob[start : start + len(part)] = part, chance
            start += len(part)
        return umi, prob
