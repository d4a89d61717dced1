"""Extract features of every nucleus of a slide, in chunks, so that a killed run can resume."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import time
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import shapely
import torch
from numpy.typing import NDArray

from prts import __version__
from prts.errors import InputError, out_of_memory
from prts.features.chunk_store import Parts
from prts.features.store import Rows, write_store
from prts.features.tiles import TilePlan, cut_tiles
from prts.io.cache import file_identity, fingerprint
from prts.io.unit_names import unit_name
from prts.progress import track

if TYPE_CHECKING:
    from geopandas import GeoDataFrame

    from prts.features.encoders import Encoder
    from prts.features.encoders.base import Floats, Polygons
    from prts.io.slide import Slide

logger = logging.getLogger(__name__)

T = TypeVar("T")

# In tiles. At most this much is lost when a run is killed: about 15 s of a ViT on two CPU cores.
CHUNK = 512
# Batches cut ahead of the encoder, so that a band is read while the previous one is encoded.
_BATCHES_AHEAD = 8


def extract(
    slide: Slide, nuclei: GeoDataFrame, encoder: Encoder, out: Path, *, provenance: Mapping[str, Any] | None = None
) -> None:
    """Extract the features of all nuclei into a store.

    Finished chunks are kept in `<out>.parts/` until the store is complete. A killed run resumes from them and, on the same machine, ends
    with the same bytes as an uninterrupted run, because it forms the same batches. With other batches, or on another processor, features
    differ by rounding. Parts of other nuclei, another encoder or another image are discarded.

    Parameters
    ----------
    slide
        The image.
    nuclei
        The nuclei, polygons in full-resolution pixels.
    encoder
        Turns tiles into vectors, and decides which tiles the nuclei need (`Encoder.plan`).
    out
        The store to write.
    provenance
        Stored as JSON in the attribute `provenance` of the store.

    Raises
    ------
    InputError
        If there are no nuclei, a nucleus is outside the tile around its own centroid, or the encoder's weights are wrong.
    """
    if len(nuclei) == 0:
        raise InputError(f"{out.name}: no nuclei to extract features from; check the nuclei file or the segmentation")
    started = time.perf_counter()
    settings = encoder.settings()
    plan = encoder.plan(nuclei, slide.mpp)
    cell_ids = nuclei["cell_id"].to_numpy(dtype=object)[plan.order]
    _check_reach(plan, cell_ids)
    encoder.load()  # before anything is written, in case the weights are wrong
    encoder.compile_for(len(plan.origin))
    chunks = _Chunks(plan, encoder)
    identity = _identity(slide, nuclei, encoder)
    parts = Parts(out.with_name(f"{out.name}.parts"), chunks.sizes, identity)
    todo = parts.missing()
    if todo:
        _encode(slide, plan, encoder, chunks, parts, todo)
    write_store(
        out,
        cell_ids,
        plan.spatial,
        chunks.widths,
        (chunks.features(parts, k) for k in range(len(chunks.tiles))),
        {
            "encoder": encoder.name,
            "weights_sha256": encoder.weights_sha256,
            "mpp": encoder.mpp,
            "tile": encoder.tile_px,
            "pooling": encoder.pooling,
            "sampling": settings.get("sampling", "exact"),
            "stride": settings.get("stride"),
            "precision": settings.get("precision", "fp32"),
            "settings": settings,
            "provenance": dict(provenance or {}),
        },
    )
    parts.delete()
    done, n_tiles = chunks.count(todo)
    seconds = time.perf_counter() - started
    units = unit_name(nuclei["cell_id"].to_numpy())
    logger.info(
        "%s: %s features of %d %s in %.1f s (%.1f %s/s, %d tiles)",
        slide.name, encoder.name, done, units, seconds, done / seconds, units, n_tiles,
    )  # fmt: skip


def _check_reach(plan: TilePlan, cell_ids: NDArray[np.object_]) -> None:
    """Refuse a ring-shaped polygon that misses the tile around its centroid, and so overlaps no patch."""
    side = plan.tile_px
    reaches = shapely.relate_pattern(plan.polygons, shapely.box(0, 0, side, side), "T********")
    if len(outside := np.flatnonzero(~reaches)):
        raise InputError(
            f"nuclei: cell_id {cell_ids[outside[0]]!r} does not reach the {side} px tile around its own centroid; "
            "give nuclei as compact polygons, about 10 um wide"
        )


def _identity(slide: Slide, nuclei: GeoDataFrame, encoder: Encoder) -> str:
    """Fingerprint of everything that affects the values, their order or their rounding."""
    digest = hashlib.sha256(json.dumps(nuclei["cell_id"].tolist()).encode())
    _, coordinates, offsets = shapely.to_ragged_array(np.asarray(nuclei.geometry.array, dtype=object))
    for array in (coordinates, *offsets):
        digest.update(np.ascontiguousarray(array).data)
    image = {"mpp": slide.mpp, "width": slide.width, "height": slide.height, "file": file_identity(slide.path)}
    return fingerprint(
        {
            "nuclei": digest.hexdigest(),
            "encoder": encoder.settings(),
            "slide": image,
            "chunk": CHUNK,
            "batch_size": encoder.batch_size,
            "compiled": encoder.compiled,
            "version": __version__,
        }
    )


class _Chunks:
    """The tiles of a plan in chunks of a few hundred. A chunk has their global vectors and the local vectors of the nuclei in them."""

    def __init__(self, plan: TilePlan, encoder: Encoder) -> None:
        n = len(plan.origin)
        self.plan, self.widths = plan, (encoder.global_width, encoder.local_width)
        self.tiles = [slice(start, min(start + CHUNK, n)) for start in range(0, n, CHUNK)]
        self.nuclei = [plan.nuclei(tiles) for tiles in self.tiles]

    @property
    def sizes(self) -> list[int]:
        """Number of values in each chunk."""
        return [self._n_global(k) + _length(nuclei) * self.widths[1] for k, nuclei in enumerate(self.nuclei)]

    def count(self, chunks: Sequence[int]) -> tuple[int, int]:
        """Nuclei and tiles of some chunks."""
        return sum(_length(self.nuclei[k]) for k in chunks), sum(_length(self.tiles[k]) for k in chunks)

    def features(self, parts: Parts, k: int) -> Rows:
        """Features of a chunk's nuclei; their global vectors may come from tiles of other chunks too."""
        nuclei = self.nuclei[k]
        wanted, index = np.unique(self.plan.around[nuclei], return_inverse=True)
        vectors = np.empty((len(wanted), self.widths[0]), dtype=np.float32)
        for source in np.unique(wanted // CHUNK):
            here = wanted // CHUNK == source
            vectors[here] = self._vectors(parts, source)[wanted[here] - source * CHUNK]
        # In the order of the corners, not of the tiles, so that sums are identical to the last bit.
        index, weight = index.reshape(self.plan.around[nuclei].shape), self.plan.weight[nuclei]
        pooled = weight[:, :1] * vectors[index[:, 0]]
        for corner in range(1, weight.shape[1]):
            pooled += weight[:, corner, None] * vectors[index[:, corner]]
        local = parts.read(k)[self._n_global(k) :].reshape(-1, self.widths[1])
        return Rows(pooled, local)

    def _vectors(self, parts: Parts, k: int) -> NDArray[np.float32]:
        """Global vectors of a chunk's tiles."""
        return parts.read(k)[: self._n_global(k)].reshape(-1, self.widths[0])

    def _n_global(self, k: int) -> int:
        return _length(self.tiles[k]) * self.widths[0]


def _length(part: slice) -> int:
    return int(part.stop - part.start)


def _encode(slide: Slide, plan: TilePlan, encoder: Encoder, chunks: _Chunks, parts: Parts, todo: list[int]) -> None:
    """Encode the missing chunks, batch by batch, while another thread cuts the tiles of the next batches."""
    # Batches never span chunks: a resumed run forms the same ones.
    batches = [
        (k, slice(start, min(start + encoder.batch_size, chunks.tiles[k].stop)))
        for k in todo
        for start in range(chunks.tiles[k].start, chunks.tiles[k].stop, encoder.batch_size)
    ]
    pooled: list[NDArray[np.float32]] = []
    local: list[NDArray[np.float32]] = []
    encode = _WithinMemory(encoder)
    cut = cut_tiles(slide, encoder.mpp, plan, [batch for _, batch in batches], encoder.device)
    with contextlib.closing(_ahead(cut, _BATCHES_AHEAD)) as groups:
        pairs = zip(batches, groups, strict=True)
        for (k, batch), tiles in track(pairs, "features", total=len(batches)):
            nuclei = plan.nuclei(batch)
            made = encode(tiles, plan.polygons[nuclei], plan.tile[nuclei] - batch.start)
            for vectors, of in zip((pooled, local), made, strict=True):
                vectors.append(of.ravel())
            if batch.stop == chunks.tiles[k].stop:
                parts.write(k, np.concatenate(pooled + local))
                pooled, local = [], []


class _WithinMemory:
    """`Encoder.encode_planned` in parts of a batch that fit into the memory of the device, halved whenever it is full."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder, self._at_once = encoder, encoder.batch_size

    def __call__(self, tiles: torch.Tensor, polygons: Polygons, tile: NDArray[np.int64]) -> tuple[Floats, Floats]:
        parts: list[tuple[Floats, Floats]] = []
        start = 0
        while start < len(tiles):
            stop = min(start + self._at_once, len(tiles))
            here = slice(*np.searchsorted(tile, [start, stop]))
            made = self._encoded(tiles[start:stop], polygons[here], tile[here] - start)
            if made is not None:
                parts.append(made)
                start = stop
        if len(parts) == 1:
            return parts[0]
        return np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])

    def _encoded(
        self, tiles: torch.Tensor, polygons: Polygons, tile: NDArray[np.int64]
    ) -> tuple[Floats, Floats] | None:
        """The vectors; None if the device is full, after which half as many tiles are tried."""
        try:
            return self._encoder.encode_planned(tiles, polygons, tile)
        except RuntimeError as error:
            if len(tiles) < 2 or (reason := out_of_memory(error)) is None:
                raise
        self._at_once = len(tiles) // 2
        logger.warning(
            "out of memory with %d tiles at a time (%s); goes on with %d, set `encoder.batch_size` to that to start with it",
            *(len(tiles), reason, self._at_once),
        )
        _free_memory(self._encoder.device)
        return None


def _free_memory(device: torch.device | None) -> None:
    """Give back what torch keeps for later."""
    if device is not None and device.type == "cuda":
        torch.cuda.empty_cache()
    elif device is not None and device.type == "mps":
        torch.mps.empty_cache()


def _ahead(items: Iterator[T], n: int) -> Generator[T]:
    """The same items, with up to n prepared ahead in another thread."""
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="tiles") as pool:
        pending = deque(pool.submit(next, items, None) for _ in range(n))
        try:
            while (item := pending.popleft().result()) is not None:
                pending.append(pool.submit(next, items, None))
                yield item
        finally:
            pool.shutdown(cancel_futures=True)
