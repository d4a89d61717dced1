"""Likelihoods: each knows its loss, its targets and how the network's outputs become expected UMI.

| likelihood | the level is | gates | expected UMI |
|---|---|---|---|
| paper, released | the count, scaled as `target` says | none, soft, hard | the level scaled back, then the gate |
| poisson | the log of the expected UMI | none | exp(level) |
| poisson, offset=library | the log of the gene's share of the panel's UMI | none | the share times the mean training depth |
| hurdle | the log rate of a Poisson count known not to be 0 | soft | P(expressed) times the mean of such a count |
| hurdle, level=lognormal | the mean log of a count that is not 0 | soft | P(expressed) times the mean of such a count |

To add one, subclass `prts.models.likelihoods.base.Likelihood` in a new module of this package, or in your own package under the entry point
`prts.likelihoods`.
"""

from prts.models.likelihoods.base import Likelihood
from prts.registry import Registry

likelihoods: Registry[Likelihood] = Registry("likelihood", package=__name__, group="prts.likelihoods")

__all__ = ["Likelihood", "likelihoods"]
