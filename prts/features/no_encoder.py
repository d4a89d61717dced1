"""In place of an encoder, for a model whose input needs none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from prts.features.context import MPP
from prts.features.encoders.base import Encoder, Polygons
from prts.features.feature_reader import STORED

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray


class NoEncoder(Encoder):
    """Reads nothing; bundles record it as `none`, with the um/px at which the context is read."""

    name = "none"
    mpp = MPP
    global_width = 0
    local_width = 0

    def encode(self, tiles: NDArray[np.uint8], polygons: Polygons) -> NoReturn:
        """Never called: extraction is skipped."""
        raise NotImplementedError("a model without an encoder has no features to extract")

    def settings(self) -> dict[str, Any]:
        """What bundles record."""
        return {"name": self.name, "weights_sha256": None, "mpp": self.mpp, "tile": None, "pooling": None}

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any], weights: Path | None = None, **runtime: Any) -> NoEncoder:
        """There is only one."""
        return cls()


def needed_encoder(encoder: Encoder, use: Sequence[str]) -> Encoder:
    """The encoder if any of these blocks comes from it, else `NoEncoder`."""
    return encoder if any(block in STORED for block in use) else NoEncoder()
