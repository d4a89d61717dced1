"""What the token encoders share: a timm network in the right precision, from uint8 tiles to pooled vectors.

A token encoder's global vector is the network's class token (or its own pooling), its local vector the mean of the patch tokens that the
nucleus overlaps.
"""

from __future__ import annotations

import logging
import subprocess
import time
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import shapely
import torch
from numpy.typing import NDArray

from prts.errors import InputError
from prts.features.pooling import center2x2, channel_pairs, patch_overlap, patches_around, pool_local, pool_shared
from prts.io.cache import sha256_file
from prts.precision import computes_bf16, cpu_has

logger = logging.getLogger(__name__)

Floats = NDArray[np.float32]
Precision = Literal["auto", "bf16", "fp32"]
Sampling = Literal["exact", "grid"]
Tiles = NDArray[np.uint8] | torch.Tensor
Compile = bool | Literal["auto"]

# Compiling takes half a minute and saves a tenth to a quarter of each tile (docs/speed.md): from here on that pays on slow processors too.
_COMPILE_FROM = 20_000

# Smallest stride of the grid, px: denser tiles than patches tell nothing new.
_PATCH = 16


class _Tokens(torch.nn.Module):
    """A timm network that takes uint8 tiles and gives its pooled vector and its patch tokens, both after the last norm."""

    def __init__(self, network: torch.nn.Module, mean: Sequence[float], std: Sequence[float], input_size: int) -> None:
        super().__init__()
        self.network, self.input_size = network, input_size
        scale = 1.0 / (255.0 * torch.tensor(std, dtype=torch.float64))
        offset = -torch.tensor(mean, dtype=torch.float64) / torch.tensor(std, dtype=torch.float64)
        # Plain attributes, not buffers: they stay float32 when the weights become bfloat16.
        self.scale, self.offset = scale.float()[:, None, None], offset.float()[:, None, None]

    def forward(self, tiles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(b, 256, 256, 3) uint8 -> (b, G) and (b, rows, columns, C)."""
        pixels = tiles.permute(0, 3, 1, 2).float()
        if self.input_size != pixels.shape[-1]:
            size = (self.input_size, self.input_size)
            pixels = torch.nn.functional.interpolate(pixels, size, mode="bilinear", antialias=True)
        pixels = pixels * self.scale.to(tiles.device) + self.offset.to(tiles.device)
        network: Any = self.network
        features = network.forward_features(pixels.to(next(network.parameters()).dtype))
        return network.forward_head(features, pre_logits=True), self._patch_tokens(features)

    def _patch_tokens(self, features: torch.Tensor) -> torch.Tensor:
        if features.ndim == 4:
            channels_last = getattr(self.network, "output_fmt", "NCHW") == "NHWC"
            return features if channels_last else features.permute(0, 2, 3, 1)
        if features.ndim == 3:
            patches = features[:, getattr(self.network, "num_prefix_tokens", 0) :]
            grid = round(patches.shape[1] ** 0.5)
            if grid * grid == patches.shape[1]:
                return patches.reshape(len(patches), grid, grid, -1)  # row by row, as the patch embedding flattens them
        raise InputError(
            f"encoder.model_name: {type(self.network).__name__} gives features of shape {tuple(features.shape[1:])}, "
            "which are no square grid of patch tokens; choose a network with patch tokens or a feature map"
        )


class TokenEncoder:
    """What the token encoders share: where weights come from and how the network is built is theirs."""

    name: str
    tile_px = 256
    mpp = 0.5

    def __init__(
        self,
        *,
        weights: str | Path | None,
        mean: Sequence[float] | None,
        std: Sequence[float] | None,
        checkpoint_key: str | None,
        pooling: str,
        pair_channels: bool,
        sampling: Sampling,
        stride: int,
        precision: Precision,
        device: str,
        batch_size: int | None,
        compile: Compile,
    ) -> None:
        if pooling not in ("nucleus", "center2x2"):
            raise InputError(f"encoder.pooling: {pooling!r} is unknown; it is nucleus (paper) or center2x2 (released)")
        for key, value in (("mean", mean), ("std", std)):
            if value is not None and len(value) != 3:
                raise InputError(
                    f"encoder.{key}: {list(value)} are not three numbers, one each for red, green and blue"
                )
        if std is not None and min(std) <= 0:
            raise InputError(f"encoder.std: {list(std)} must be above 0")
        if sampling not in ("exact", "grid"):
            raise InputError(
                f"encoder.sampling: {sampling!r} is unknown; it is exact (a tile around each nucleus) or grid (a tile every "
                "encoder.stride px)"
            )
        if not (isinstance(stride, int) and _PATCH <= stride <= self.tile_px):
            raise InputError(
                f"encoder.stride: {stride!r} is no whole number from {_PATCH} to {self.tile_px} px, the side of a tile"
            )
        if batch_size is not None and batch_size < 1:
            raise InputError(f"encoder.batch_size: {batch_size} is not at least 1")
        if compile not in ("auto", True, False):
            raise InputError(f"encoder.compile: {compile!r} is unknown; auto, true or false")
        self.weights = None if weights is None else Path(weights)
        self._mean, self._std = mean, std
        self.checkpoint_key, self.pooling, self.pair_channels = checkpoint_key, pooling, pair_channels
        self.sampling, self.stride = sampling, stride
        self.device = torch_device(device)
        self.precision = _precision(precision, self.device)
        self.batch_size = batch_size or (16 if self.device.type == "cpu" else 128)
        self.compile = compile
        self.compiled = False
        self._network: _Tokens | None = None
        self._compiled: _Tokens | None = None
        self._widths = (0, 0)

    @property
    def mean(self) -> tuple[float, ...]:
        """Mean of red, green and blue (0 to 1) that the network was trained with."""
        return tuple(map(float, self._mean if self._mean is not None else self._own_normalisation()[0]))

    @property
    def std(self) -> tuple[float, ...]:
        """Standard deviation of red, green and blue that the network was trained with."""
        return tuple(map(float, self._std if self._std is not None else self._own_normalisation()[1]))

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
            raise InputError(f"encoder.weights: {self.weights}: no such file{self._where()}")
        return self.weights

    @cached_property
    def weights_sha256(self) -> str:
        """SHA-256 of the weights file."""
        return sha256_file(self.weights_path)

    def settings(self) -> dict[str, Any]:
        """Everything that changes the features."""
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
        }

    def load(self) -> None:
        """Build the network and read its weights.

        Raises
        ------
        InputError
            If the weights are missing, unreadable or for another network.
        """
        if self._network is not None:
            return
        network, input_size = self._build()
        tokens = _Tokens(network.eval().requires_grad_(False), self.mean, self.std, input_size)
        dtype = torch.bfloat16 if self.precision == "bf16" else torch.float32
        tokens = tokens.to(device=self.device, dtype=dtype)
        if _plain_attention_is_faster(self.precision, self.device):
            attend_plainly(tokens)
        with torch.inference_mode():
            pooled, patches = tokens(
                torch.zeros((1, self.tile_px, self.tile_px, 3), dtype=torch.uint8, device=self.device)
            )
        if patches.shape[1] != patches.shape[2] or patches.shape[1] < 2:
            raise InputError(
                f"encoder: {self.name} gives {patches.shape[1]} x {patches.shape[2]} patches; a square grid is wanted"
            )
        width = patches.shape[3]
        if self.pair_channels and width % 2:
            raise InputError(
                f"encoder: channels cannot be paired, {self.name} has {width}, an odd number; switch pairing off"
            )
        self._widths = (pooled.shape[1], width // 2 if self.pair_channels else width)
        self._network = tokens
        logger.info("encoder %s: %s on %s, batches of %d", self.name, self.precision, self.device, self.batch_size)

    def compile_for(self, n_tiles: int) -> None:
        """Settle whether the network runs compiled: `compiled`, which rounds otherwise than the plain network.

        Parameters
        ----------
        n_tiles
            How many tiles are to be encoded in all; with `compile="auto"` it depends on nothing else that a run could differ in.

        Raises
        ------
        InputError
            If compiling is asked for and fails.
        """
        self.load()
        if self.compile == "auto":
            # On a GPU an hour of compiled work would be needed to tell: there only where it is asked for.
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
                raise InputError(
                    f"encoder.compile: torch cannot compile here ({reason}); it needs a C++ compiler; or set encoder.compile=false"
                ) from error
            logger.warning("encoder %s: goes on without compiling, which fails here (%s)", self.name, reason)
            self.compile, self.compiled = False, False
            return
        self._compiled = compiled
        logger.info("encoder %s: compiled in %.0f s", self.name, time.perf_counter() - started)

    def encode(self, tiles: Tiles, polygons: NDArray[np.object_]) -> tuple[Floats, Floats]:
        """Global and local vectors of some nuclei, whatever their number and order.

        Parameters
        ----------
        tiles
            (b, 256, 256, 3), RGB; an array, or a tensor on any device.
        polygons
            Shapely polygons in pixels of their tile, (b,).

        Returns
        -------
        (b, global_width) and (b, local_width) float32.
        """
        self.load()
        parts = []
        for start in range(0, len(tiles), self.batch_size):
            batch = slice(start, start + self.batch_size)
            parts.append(self._encode_batch(tiles[batch], polygons[batch], None))
        return self._joined(parts)

    def encode_shared(
        self, tiles: Tiles, polygons: NDArray[np.object_], tile: NDArray[np.int64]
    ) -> tuple[Floats, Floats]:
        """Global vectors of tiles, and local vectors of nuclei that lie anywhere in them.

        Parameters
        ----------
        tiles
            (t, 256, 256, 3), RGB; as for `encode`.
        polygons
            Shapely polygons in pixels of their tile, (b,).
        tile
            The tile of each nucleus, (b,), rising.

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
    def _encode_batch(
        self, tiles: Tiles, polygons: NDArray[np.object_], tile: NDArray[np.int64] | None
    ) -> tuple[Floats, Floats]:
        """Vectors of a batch of tiles; `tile` says which the polygons lie in, None: one in the middle of each."""
        network = self._compiled if self.compiled else self._network
        assert network is not None
        n = len(tiles)
        batch = torch.as_tensor(tiles, device=self.device)
        if n < self.batch_size:
            # Always a full batch: kernels are chosen by shape, and another kernel rounds otherwise.
            batch = torch.cat([batch, batch.new_zeros((self.batch_size - n, *batch.shape[1:]))])
        pooled, patches = network(batch)
        local = self._local(patches[:n], polygons, tile)
        if self.pair_channels:
            local = channel_pairs(local)
        return pooled[:n].float().cpu().numpy(), local.cpu().numpy()

    def _local(
        self, patches: torch.Tensor, polygons: NDArray[np.object_], tile: NDArray[np.int64] | None
    ) -> torch.Tensor:
        patch = self.tile_px / patches.shape[1]
        if tile is None:
            if self.pooling == "center2x2":
                return center2x2(patches)
            return pool_local(patches, torch.from_numpy(patch_overlap(polygons, self.tile_px, patch)))
        if self.pooling == "center2x2":
            centres = shapely.get_coordinates(shapely.centroid(polygons))
            chosen = patches_around(centres, self.tile_px, patch)
        else:
            chosen = patch_overlap(polygons, self.tile_px, patch)
        return pool_shared(patches, torch.from_numpy(chosen), torch.from_numpy(tile))

    def _build(self) -> tuple[torch.nn.Module, int]:
        """The network with its weights, and the side in px that tiles are brought to before it."""
        raise NotImplementedError

    def _default_weights(self) -> Path:
        """What to read where no file is given."""
        raise NotImplementedError

    def _own_normalisation(self) -> tuple[Sequence[float], Sequence[float]]:
        """Mean and std where none are given."""
        raise NotImplementedError

    def _where(self) -> str:
        """Where the weights come from, for messages."""
        return ""


def torch_device(device: str) -> torch.device:
    """The device that `encoder.device` names; `auto` is CUDA if there is one.

    Raises
    ------
    InputError
        If torch knows no such device or has none.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise InputError(f"encoder.device: {device!r} is no device of torch; auto, cpu or cuda") from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"encoder.device: {device} is asked for, but torch sees no CUDA device; auto or cpu")
    return chosen


def attend_plainly(network: torch.nn.Module) -> None:
    """Let timm's attention be two matrix products and a softmax, instead of torch's fused kernel."""
    module: Any
    for module in network.modules():
        if hasattr(module, "fused_attn"):  # timm's switch
            module.fused_attn = False


def _plain_attention_is_faster(precision: str, device: torch.device) -> bool:
    """Whether attention as plain products beats the fused kernel.

    In bf16 that one is fast on AMX and on GPUs only: with AVX-512 alone it is slower than the products (docs/speed.md).
    """
    return precision == "bf16" and device.type == "cpu" and not cpu_has("_is_amx_tile_supported")


def _precision(precision: Precision, device: torch.device) -> Literal["bf16", "fp32"]:
    """Settle `auto`: bf16 where the processor has instructions for it (half the time), not where it is emulated."""
    if precision not in ("auto", "bf16", "fp32"):
        raise InputError(f"encoder.precision: {precision!r} is unknown; auto, bf16 or fp32")
    if precision != "auto":
        return precision
    return "bf16" if computes_bf16(device) else "fp32"
