"""Negative binomial counts with a dispersion per gene."""

import torch
from torch import nn

from prts.models.likelihoods import likelihoods
from prts.models.likelihoods.base import MAX_LOG_UMI, Likelihood, cross_entropy


@likelihoods.register("negative_binomial")
class NegativeBinomial(Likelihood):
    """lambda_1 x negative log-likelihood of the counts under a log link + lambda_2 x binary cross-entropy."""

    allowed_gates = ("none",)  # exp(level) is the expected UMI already
    target = "log_rate"

    def __init__(self, lambda_1: float = 1.0, lambda_2: float = 1.0) -> None:
        super().__init__(lambda_1, lambda_2)

    def allocate(self, n_genes):
        """One dispersion per gene, trained along with the network."""
        self.log_theta = nn.Parameter(torch.zeros(n_genes))
        return super().allocate(n_genes)

    def loss(self, outputs, counts):
        """From the network's outputs and raw UMI, (b, g) each."""
        level, logit = outputs
        level, log_theta = level.clamp(max=MAX_LOG_UMI), self.log_theta
        theta = log_theta.exp()
        log_total = torch.logaddexp(level, log_theta)  # log(mean + theta)
        likelihood = (
            torch.lgamma(counts + theta)
            - torch.lgamma(theta)
            - torch.lgamma(counts + 1)
            + theta * (log_theta - log_total)
            + counts * (level - log_total)
        )
        reg, binary = -likelihood.mean(), cross_entropy(logit, counts)
        return {"loss": self.lambda_1 * reg + self.lambda_2 * binary, "reg": reg, "bin": binary}

    def mean(self, outputs):
        """Expected UMI, (b, g)."""
        return outputs[0].clamp(max=MAX_LOG_UMI).exp()
