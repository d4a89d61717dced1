"""Base of the encoders with patch tokens: a timm network in the right precision, from uint8 tiles to pooled vectors.

The global vector is the network's class token (or its own pooling), the local vector the mean of the patch tokens that the nucleus
overlaps. Each encoder defines where its weights come from and how its network is built.
"""

from __future__ import annotations

import copy
import logging
import subprocess
import time
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import shapely
import torch
from numpy.typing import NDArray

import prts._torchvision  # noqa: F401  (must come before timm, which imports torchvision)
from prts.errors import ParameterError
from prts.features.adapter import merge_adapter
from prts.features.encoders.base import Encoder, Floats, Polygons
from prts.features.encoders.token_settings import IMAGENET_MEAN, IMAGENET_STD, TokenSettings
from prts.features.pooling import (
    center2x2,
    channel_pairs,
    patch_overlap,
    patches_around,
    pool_local,
    pool_shared,
    tokens_at,
)
from prts.features.token_network import TokenNetwork, attend_plainly, plain_attention_is_faster, truncate
from prts.io.cache import sha256_file
from prts.precision import encoding_precision, torch_device

if TYPE_CHECKING:
    from geopandas import GeoDataFrame

    from prts.features.tiles import TilePlan

logger = logging.getLogger(__name__)

Tiles = NDArray[np.uint8] | torch.Tensor


# Compiling takes half a minute and saves 10% to 25% per tile (docs/speed.md): from here on it pays off on slow processors, too.
_COMPILE_FROM = 20_000


class TokenEncoder(Encoder):
    """An encoder around a timm network with patch tokens or a feature map.

    Parameters
    ----------
    given
        The settings.
    pair_channels
        Average adjacent channels of the local vector, instead of keeping all.
    """

    def __init__(self, given: TokenSettings, *, pair_channels: bool) -> None:
        if given.sampling == "grid" and given.stride > given.tile_px:
            raise ParameterError(
                "encoder",
                "stride",
                f"{given.stride} leaves gaps between tiles of {given.tile_px} px; choose 16 to {given.tile_px}",
            )
        self.scales = tuple(given.scales or ())
        if len(set(self.scales)) < len(self.scales):
            raise ParameterError("encoder", "scales", f"{list(self.scales)} lists one twice; give each um/px once")
        self.mpp, self.tile_px = (self.scales or (given.mpp,))[0], given.tile_px
        self.weights = None if given.weights is None else Path(given.weights)
        self.adapter = None if given.adapter is None else Path(given.adapter)
        self._mean, self._std = given.mean, given.std
        self.checkpoint_key, self.pair_channels = given.checkpoint_key, pair_channels
        self.pooling, self.layer = given.pooling, given.layer
        self.sampling, self.stride = given.sampling, given.stride
        device = torch_device(given.device)
        self.device: torch.device = device
        self.precision = encoding_precision(given.precision, device)
        self.batch_size = given.batch_size or (16 if device.type == "cpu" else 128)
        self.compile = given.compile
        self.compiled = False
        self._network: TokenNetwork | None = None
        self._compiled: TokenNetwork | None = None
        self._widths = (0, 0)

    @property
    def mean(self) -> tuple[float, ...]:
        """Mean of red, green and blue (0 to 1) that the network was trained with."""
        return tuple(map(float, self._mean if self._mean is not None else self._own_normalization()[0]))

    @property
    def std(self) -> tuple[float, ...]:
        """Standard deviation of red, green and blue that the network was trained with."""
        return tuple(map(float, self._std if self._std is not None else self._own_normalization()[1]))

    @property
    def global_width(self) -> int:
        """Width of the global vector."""
        self.load()
        return self._widths[0]

    @property
    def local_width(self) -> int:
        """Width of the local vector."""
        self.load()
        return self._widths[1]

    @cached_property
    def weights_path(self) -> Path:
        """The weights file, found or downloaded."""
        if self.weights is None:
            return self._default_weights()
        if not self.weights.is_file():
            raise ParameterError("encoder", "weights", f"{self.weights}: no such file{self._where()}")
        return self.weights

    @cached_property
    def adapter_sha256(self) -> str | None:
        """SHA-256 of the adapter; None without one."""
        if self.adapter is None:
            return None
        if not self.adapter.is_file():
            raise ParameterError("encoder", "adapter", f"{self.adapter}: no such file; check the path")
        return sha256_file(self.adapter)

    def adapted(self, adapter: Path) -> Self:
        """The same encoder with this adapter, not loaded."""
        other = copy.copy(self)
        other.adapter = Path(adapter)
        other.__dict__.pop("adapter_sha256", None)
        other._network = other._compiled = None
        return other

    def settings(self) -> dict[str, Any]:
        """Everything that affects the features."""
        return {
            "name": self.name,
            "weights_sha256": self.weights_sha256,
            "checkpoint_key": self.checkpoint_key,
            "mean": list(self.mean),
            "std": list(self.std),
            "mpp": self.mpp,
            "tile": self.tile_px,
            "pooling": self.pooling,
            "pair_channels": self.pair_channels,
            "precision": self.precision,
            "sampling": self.sampling,
            **({"stride": self.stride} if self.sampling == "grid" else {}),
            **({} if self.layer is None else {"layer": self.layer}),
            **({"scales": list(self.scales)} if self.scales else {}),
            **({} if self.adapter is None else {"adapter_sha256": self.adapter_sha256}),
        }

    def network(self) -> TokenNetwork:
        """A new network with its weights, in main memory and float32.

        Raises
        ------
        ParameterError
            If weights or adapter are missing, unreadable or for another network, or the network has no block `layer`.
        """
        network, input_size = self._build()
        if self.layer is not None:
            truncate(network, self.layer)
        if self.adapter is not None and self.adapter_sha256:
            merge_adapter(network, self.adapter)
        return TokenNetwork(network.eval().requires_grad_(False), self.mean, self.std, input_size)

    def load(self) -> None:
        """Build the network and read its weights; errors are those of `network`."""
        if self._network is not None:
            return
        tokens = self.network()
        dtype = torch.bfloat16 if self.precision == "bf16" else torch.float32
        tokens = tokens.to(device=self.device, dtype=dtype)
        if plain_attention_is_faster(self.precision, self.device):
            attend_plainly(tokens)
        with torch.inference_mode():
            pooled, patches = tokens(
                torch.zeros((1, self.tile_px, self.tile_px, 3), dtype=torch.uint8, device=self.device)
            )
        if patches.shape[1] != patches.shape[2] or patches.shape[1] < 2:
            raise ParameterError(
                "encoder",
                "",
                f"{self.name} returns {patches.shape[1]} x {patches.shape[2]} patches; expected a square grid",
            )
        width = patches.shape[3]
        if self.pair_channels and width % 2:
            raise ParameterError(
                "encoder", "pair_channels", f"{self.name} has {width} channels, an odd number; set it to false"
            )
        self._widths = (pooled.shape[1], width // 2 if self.pair_channels else width)
        self._network = tokens
        logger.info("encoder %s: %s on %s, batches of %d", self.name, self.precision, self.device, self.batch_size)

    def compile_for(self, n_tiles: int) -> None:
        """Decide whether the network runs compiled, and compile it.

        Parameters
        ----------
        n_tiles
            Total number of tiles to encode. `compile="auto"` depends on nothing else, so that a resumed run makes the same choice.

        Raises
        ------
        ParameterError
            If `compile` is true and compiling fails.
        """
        self.load()
        if self.compile == "auto":
            # On a GPU it pays off only after an hour of work, so only on request.
            self.compiled = self.device.type == "cpu" and n_tiles >= _COMPILE_FROM
        else:
            self.compiled = self.compile
        if not self.compiled or self._compiled is not None:
            return
        started = time.perf_counter()
        logger.info("encoder %s: compiling the network (half a minute, once)", self.name)
        compiled: Any = torch.compile(self._network, dynamic=False)
        shape = (self.batch_size, self.tile_px, self.tile_px, 3)
        try:
            with torch.inference_mode():
                compiled(torch.zeros(shape, dtype=torch.uint8, device=self.device))
        except (RuntimeError, OSError, subprocess.SubprocessError) as error:
            reason = str(error).strip().partition("\n")[0]
            if self.compile != "auto":
                raise ParameterError(
                    "encoder",
                    "compile",
                    f"torch cannot compile here ({reason}); install a C++ compiler, or set it to false",
                ) from error
            logger.warning("encoder %s: compiling failed (%s), continuing without it", self.name, reason)
            self.compile, self.compiled = False, False
            return
        self._compiled = compiled
        logger.info("encoder %s: compiled in %.0f s", self.name, time.perf_counter() - started)

    def plan(self, nuclei: GeoDataFrame, slide_mpp: float) -> TilePlan:
        """Lay a tile around each nucleus, or choose the tiles of the grid that the nuclei need."""
        from prts.features.grid import plan_grid

        if self.sampling == "grid":
            return plan_grid(nuclei, slide_mpp, self.mpp, self.tile_px, self.stride)
        return super().plan(nuclei, slide_mpp)

    def encode_planned(self, tiles: torch.Tensor, polygons: Polygons, tile: NDArray[np.int64]) -> tuple[Floats, Floats]:
        """Encode consecutive tiles of the plan."""
        if self.sampling == "grid":
            return self.encode_shared(tiles, polygons, tile)
        return self.encode(tiles, polygons)

    def encode(self, tiles: Tiles, polygons: Polygons) -> tuple[Floats, Floats]:
        """Encode nuclei, each at the center of its own tile.

        Parameters
        ----------
        tiles
            (b, tile_px, tile_px, 3), RGB; an array, or a tensor on any device.
        polygons
            Shapely polygons in pixels of their tile, (b,).

        Returns
        -------
        (b, global_width) and (b, local_width) float32. The vectors of a nucleus do not depend on the other nuclei, except for rounding:
        kernels may add in a different order at other positions in a batch.
        """
        self.load()
        parts = []
        for start in range(0, len(tiles), self.batch_size):
            batch = slice(start, start + self.batch_size)
            parts.append(self._encode_batch(tiles[batch], polygons[batch], None))
        return self._joined(parts)

    def encode_shared(self, tiles: Tiles, polygons: Polygons, tile: NDArray[np.int64]) -> tuple[Floats, Floats]:
        """Encode tiles, and nuclei anywhere inside them.

        Parameters
        ----------
        tiles
            (t, tile_px, tile_px, 3), RGB; as for `encode`.
        polygons
            Shapely polygons in pixels of their tile, (b,).
        tile
            The tile of each nucleus, (b,), not descending.

        Returns
        -------
        (t, global_width) and (b, local_width) float32.
        """
        self.load()
        parts = []
        for start in range(0, len(tiles), self.batch_size):
            stop = start + self.batch_size
            mine = slice(*np.searchsorted(tile, [start, stop]))
            parts.append(self._encode_batch(tiles[start:stop], polygons[mine], tile[mine] - start))
        return self._joined(parts)

    def _joined(self, parts: list[tuple[Floats, Floats]]) -> tuple[Floats, Floats]:
        if not parts:
            return np.empty((0, self._widths[0]), np.float32), np.empty((0, self._widths[1]), np.float32)
        pooled, local = zip(*parts, strict=True)
        return np.concatenate(pooled), np.concatenate(local)

    @torch.inference_mode()
    def _encode_batch(self, tiles: Tiles, polygons: Polygons, tile: NDArray[np.int64] | None) -> tuple[Floats, Floats]:
        """Vectors of a batch of tiles; `tile` is the tile of each polygon, or None if each tile has one at its center."""
        network = self._compiled if self.compiled else self._network
        assert network is not None
        n = len(tiles)
        batch = torch.as_tensor(tiles, device=self.device)
        if n < self.batch_size:
            # Always a full batch, because kernels are chosen by shape and round differently.
            batch = torch.cat([batch, batch.new_zeros((self.batch_size - n, *batch.shape[1:]))])
        pooled, patches = network(batch)
        local = self.local_vectors(patches[:n], polygons, tile)
        return pooled[:n].float().cpu().numpy(), local.cpu().numpy()

    def local_vectors(self, patches: torch.Tensor, polygons: Polygons, tile: NDArray[np.int64] | None) -> torch.Tensor:
        """Pool patch tokens.

        Parameters
        ----------
        patches
            (t, rows, columns, channels).
        polygons
            Shapely polygons in pixels of their tile, (b,).
        tile
            The tile of each nucleus, (b,), not descending; None if each tile has one at its center.

        Returns
        -------
        (b, local_width) float32.
        """
        local = self._pooled(patches, polygons, tile)
        return channel_pairs(local) if self.pair_channels else local

    def _pooled(self, patches: torch.Tensor, polygons: Polygons, tile: NDArray[np.int64] | None) -> torch.Tensor:
        patch = self.tile_px / patches.shape[1]
        if self.pooling == "bilinear":
            at = torch.from_numpy(shapely.get_coordinates(shapely.centroid(polygons)) / patch)
            which = torch.arange(len(polygons)) if tile is None else torch.from_numpy(tile)
            return tokens_at(patches, at, which)
        if tile is None:
            if self.pooling == "center2x2":
                return center2x2(patches)
            return pool_local(patches, torch.from_numpy(patch_overlap(polygons, self.tile_px, patch)))
        if self.pooling == "center2x2":
            centers = shapely.get_coordinates(shapely.centroid(polygons))
            chosen = patches_around(centers, self.tile_px, patch)
        else:
            chosen = patch_overlap(polygons, self.tile_px, patch)
        return pool_shared(patches, torch.from_numpy(chosen), torch.from_numpy(tile))

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any], weights: Path | None = None, **runtime: Any) -> TokenEncoder:
        """Rebuild an encoder from its `settings`, with its `adapter` if it has one; on a processor without bf16, it uses fp32 and warns."""
        given: dict[str, Any] = dict(
            weights=weights,
            mean=settings["mean"],
            std=settings["std"],
            checkpoint_key=settings["checkpoint_key"],
            pooling=settings["pooling"],
            layer=settings.get("layer"),
            scales=settings.get("scales"),
            # bundles from before these options existed lack them
            mpp=settings.get("mpp", 0.5),
            tile_px=settings.get("tile", 256),
            sampling=settings.get("sampling", "exact"),
            stride=settings.get("stride", 128),
            precision="auto" if settings["precision"] == "bf16" else "fp32",
            **cls._own_arguments(settings),
            **runtime,
        )
        encoder = cls(**given)
        encoder._require_weights(settings["weights_sha256"])
        if encoder.adapter_sha256 != settings.get("adapter_sha256"):
            then, here = settings.get("adapter_sha256"), encoder.adapter_sha256
            problem = f"has sha256 {here}, but the model was trained with {then}; give that file"
            raise ParameterError("encoder", "adapter", problem)
        if encoder.precision != settings["precision"]:
            logger.warning(
                "encoder: the model was trained on features in %s, which %s does not support; using %s, features differ by about 1%%",
                settings["precision"],
                encoder.device,
                encoder.precision,
            )
        return encoder

    @classmethod
    @abstractmethod
    def _own_arguments(cls, settings: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of the constructor that are not in `TokenSettings`, from stored settings."""

    @abstractmethod
    def _build(self) -> tuple[torch.nn.Module, int]:
        """The network with its weights, and the side in px to which tiles are resized first."""

    @abstractmethod
    def _default_weights(self) -> Path:
        """The weights file if none is given."""

    def _own_normalization(self) -> tuple[Sequence[float], Sequence[float]]:
        """Mean and std if none are given."""
        return IMAGENET_MEAN, IMAGENET_STD

    def _where(self) -> str:
        """Where the weights come from, for messages."""
        return ""
