"""The interface of an encoder, and what all encoders share.

To add an encoder, derive from `Encoder`, set the two widths and write `encode`; everything else has a default. This module imports neither
torch nor timm.
"""

from __future__ import annotations

import copy
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, TypeVar, get_type_hints

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from prts.arguments import check_settings
from prts.errors import ParameterError
from prts.io.cache import sha256_file

if TYPE_CHECKING:
    import torch
    from geopandas import GeoDataFrame

    from prts.features.tiles import TilePlan

Floats = NDArray[np.float32]
Polygons = NDArray[np.object_]

Mpp = Annotated[float, Field(ge=0.05, le=5.0)]

D = TypeVar("D")
E = TypeVar("E", bound="type[Encoder]")


class WeightsStatus(NamedTuple):
    """Whether an encoder's weights are on this machine, and a sentence on where they are or how to get them."""

    found: bool
    text: str


@dataclass(frozen=True, kw_only=True)
class TileSettings:
    """The tile that an encoder sees.

    Parameters
    ----------
    mpp
        um per pixel of the tile; the slide is rescaled to it.
    tile_px
        Side of the tile in pixels.
    """

    mpp: Mpp = 0.5
    tile_px: Annotated[int, Field(ge=32, le=1024)] = 256


class Encoder(ABC):
    """The interface that extraction, bundles and the command line need from an encoder.

    The defaults describe an encoder that runs in main memory, needs no weights, and sees one tile around each nucleus.

    Attributes
    ----------
    name
        Set by `@encoders.register(name)`.
    mpp, tile_px
        um per pixel of the tile and its side in pixels.
    scales
        um per pixel of several tiles whose vectors are concatenated, each of `tile_px`; empty for one tile at `mpp`. The widths are those
        of one tile.
    pooling
        How the local vector is made; recorded in stores and bundles.
    batch_size
        Tiles that extraction passes at a time.
    device
        Where extraction puts the tiles for `encode_planned`; None for main memory.
    compiled
        Whether the network runs compiled, which rounds differently.

    Examples
    --------
    >>> import numpy as np
    >>> class MeanColor(Encoder):
    ...     global_width, local_width = 3, 3
    ...
    ...     def encode(self, tiles, polygons):
    ...         return tiles.mean(axis=(1, 2), dtype=np.float32), tiles[:, 128, 128].astype(np.float32)
    >>> MeanColor().encode(np.zeros((2, 256, 256, 3), np.uint8), np.empty(2, object))[0].shape
    (2, 3)
    """

    name: str = ""
    mpp: float = TileSettings.mpp
    tile_px: int = TileSettings.tile_px
    scales: tuple[float, ...] = ()
    pooling: str = "nucleus"
    batch_size: int = 32
    device: torch.device | None = None
    compiled: bool = False

    @property
    @abstractmethod
    def global_width(self) -> int:
        """Width of the global vector; may load the weights."""

    @property
    @abstractmethod
    def local_width(self) -> int:
        """Width of the local vector; may load the weights."""

    @property
    def weights_path(self) -> Path | None:
        """The weights file; None for an encoder without weights."""
        return None

    @cached_property
    def weights_sha256(self) -> str | None:
        """SHA-256 of the weights file; None for an encoder without weights."""
        return None if self.weights_path is None else sha256_file(self.weights_path)

    @abstractmethod
    def encode(self, tiles: NDArray[np.uint8], polygons: Polygons) -> tuple[Floats, Floats]:
        """Encode nuclei, each at the center of its own tile.

        Parameters
        ----------
        tiles
            (b, tile_px, tile_px, 3), RGB.
        polygons
            Shapely polygons in pixels of their tile, (b,).

        Returns
        -------
        (b, global_width) and (b, local_width) float32.
        """

    def settings(self) -> dict[str, Any]:
        """Everything that affects the features, as JSON.

        An encoder with more arguments adds them under the names of its constructor, and a `version` to increase whenever the same
        arguments give different features.
        """
        return {
            "name": self.name,
            "weights_sha256": self.weights_sha256,
            "mpp": self.mpp,
            "tile": self.tile_px,
            "pooling": self.pooling,
            "precision": "fp32",
        }

    def at(self, mpp: float) -> Encoder:
        """The same encoder with a single tile at this um/px. It shares the network, if that is loaded."""
        one = copy.copy(self)
        one.mpp, one.scales = mpp, ()
        return one

    def load(self) -> None:  # noqa: B027 (a default, not an abstract method)
        """Read the weights; does nothing after the first call."""

    def compile_for(self, n_tiles: int) -> None:  # noqa: B027
        """Decide whether to compile the network, given the number of tiles to encode."""

    def plan(self, nuclei: GeoDataFrame, slide_mpp: float) -> TilePlan:
        """Choose the tiles that the nuclei need: one around each.

        Parameters
        ----------
        nuclei
            Nuclei in full-resolution pixels.
        slide_mpp
            um per full-resolution pixel.
        """
        from prts.features.tiles import plan_tiles

        return plan_tiles(nuclei, slide_mpp, self.mpp, self.tile_px)

    def encode_planned(self, tiles: torch.Tensor, polygons: Polygons, tile: NDArray[np.int64]) -> tuple[Floats, Floats]:
        """Encode consecutive tiles of the plan; override it along with `plan` or `device`.

        Parameters
        ----------
        tiles
            (t, tile_px, tile_px, 3) uint8, on `device`.
        polygons
            The nuclei whose local vector comes from these tiles, in pixels of their tile, (b,).
        tile
            The tile of each nucleus, (b,), not descending.

        Returns
        -------
        (t, global_width) and (b, local_width) float32.
        """
        return self.encode(tiles.numpy(), polygons)

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any], weights: Path | None = None, **runtime: Any) -> Encoder:
        """Rebuild an encoder from its `settings`.

        By default, each argument of the constructor takes the setting of the same name; `tile_px` takes `tile`.

        Parameters
        ----------
        settings
            What `settings` returned.
        weights
            The weights file, for encoders that need one.
        runtime
            `device`, `batch_size` and `compile`; those that the constructor does not have are ignored.

        Raises
        ------
        ParameterError
            If the same encoder cannot be rebuilt.
        """
        given = {**settings, "tile_px": settings.get("tile", TileSettings.tile_px), "weights": weights, **runtime}
        parameters = inspect.signature(cls).parameters
        encoder = cls(**{key: value for key, value in given.items() if key in parameters})
        encoder._require_weights(settings.get("weights_sha256"))
        for key, here in encoder.settings().items():
            if key not in settings or settings[key] != here:
                then = settings.get(key, "not recorded")
                raise ParameterError(
                    "encoder",
                    "",
                    f"the {key} of the {encoder.name} features is {here} in this installation, and {then} in the model; predict with the "
                    "version that trained the model, or train again",
                )
        return encoder

    def _require_weights(self, sha256: str | None) -> None:
        if self.weights_sha256 != sha256:
            raise ParameterError(
                "encoder",
                "weights",
                f"{self.weights_path} has sha256 {self.weights_sha256}, but the model was trained with {sha256}; give that file",
            )

    @classmethod
    def weights_status(cls, settings: Mapping[str, Any], file: str | None = None) -> WeightsStatus:
        """Whether the weights for these settings are on this machine.

        Parameters
        ----------
        settings
            What `settings` returned.
        file
            The weights file used in training, or None.
        """
        sha256 = settings.get("weights_sha256")
        if sha256 is None:
            return WeightsStatus(True, f"the encoder {cls.name} needs none")
        if file is not None and Path(file).is_file() and sha256_file(Path(file)) == sha256:
            return WeightsStatus(True, f"{cls.name}: {file}")
        found = cls.find_weights(settings)
        if found is not None and sha256_file(found) == sha256:
            return WeightsStatus(True, f"{cls.name}: {found}")
        called = "" if file is None else f" ({Path(file).name})"
        return WeightsStatus(False, f"{cls.name}: the file{called} with sha256 {sha256} {cls.weights_hint(settings)}")

    @classmethod
    def find_weights(cls, settings: Mapping[str, Any]) -> Path | None:
        """The usual path of the weights for these settings, if they are on this machine."""
        return None

    @classmethod
    def weights_hint(cls, settings: Mapping[str, Any]) -> str:
        """How to get missing weights; completes the sentence 'the file with sha256 ...'."""
        return "is not here; give it at prediction as the encoder's weights"


def checked(encoder: type[Encoder], kind: type[D], **given: Any) -> D:
    """Make the settings of an encoder, a dataclass, from untyped values.

    Raises
    ------
    ParameterError
        If a name is unknown, or a value has the wrong type or is out of range.
    """
    return kind(**check_settings(encoder, given, "encoder"))


def signature_of(kind: type) -> Callable[[E], E]:
    """Class decorator: replace `**settings` in the constructor's signature by the fields of a dataclass.

    `help()`, editors and the check of config keys then see every setting with its type and default.
    """

    def add(cls: E) -> E:
        own = inspect.signature(cls.__init__, eval_str=True).parameters.values()
        named = [p for p in own if p.name != "self" and p.kind is not inspect.Parameter.VAR_KEYWORD]
        taken = {parameter.name for parameter in named}
        hints = get_type_hints(kind, include_extras=True)
        rest = [
            parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=hints[parameter.name])
            for parameter in inspect.signature(kind).parameters.values()
            if parameter.name not in taken
        ]
        cls.__signature__ = inspect.Signature([*named, *rest])  # type: ignore[attr-defined]
        return cls

    return add
