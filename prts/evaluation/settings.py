"""Settings of an evaluation."""

from __future__ import annotations

import math
from dataclasses import dataclass

from prts.errors import ParameterError


@dataclass(frozen=True)
class EvaluationSettings:
    """How confidence intervals are computed.

    Parameters
    ----------
    block_um
        Side in um of the spatial blocks that are resampled.
    bootstrap
        Number of resamples.

    Raises
    ------
    ParameterError
        If `block_um` is not a positive number or `bootstrap` is below 2.
    """

    block_um: float = 250.0
    bootstrap: int = 1000

    def __post_init__(self) -> None:
        if not isinstance(self.block_um, int | float) or not 0 < self.block_um < math.inf:
            raise ParameterError(
                "evaluation", "block_um", f"{self.block_um} must be a positive number of um, such as 250"
            )
        if not isinstance(self.bootstrap, int) or self.bootstrap < 2:
            raise ParameterError("evaluation", "bootstrap", f"{self.bootstrap} must be 2 or more, such as 1000")
