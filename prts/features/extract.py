"""Features of every nucleus of a slide, in chunks that survive a kill."""

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
from prts.errors import InputError
from prts.features.chunk_store import Parts
from prts.features.grid import plan_grid
from prts.features.store import Rows, write_store
from prts.features.tiles import TILE, TilePlan, cut_tiles, plan_tiles
from prts.features.tokens import TokenEncoder
from prts.io.cache import file_identity, fingerprint
from prts.progress import track

if TYPE_CHECKING:
    from geopandas import GeoDataFrame

    from prts.features.encoders import Encoder
    from prts.io.slide import Slide

logger = logging.getLogger(__name__)

T = TypeVar("T")

# Tiles. What a kill can cost: about 15 s of a ViT on two CPU cores.
CHUNK = 512
# Batches cut ahead of the encoder, so that the reading of a band hides behind the encoding of the one before.
_BATCHES_AHEAD = 8


def extract(
    slide: Slide, nuclei: GeoDataFrame, encoder: Encoder, out: Path, *, provenance: Mapping[str, Any] | None = None
) -> None:
    """Extract the features of all nuclei into a store.

    Finished chunks lie in `<out>.parts/` until the store is complete; a run that was killed goes on from them and ends with the same
    bytes as one that was not. Parts of other nuclei, another encoder or another image are thrown away.

    Parameters
    ----------
    slide
        The image.
    nuclei
        The nuclei, polygons in full-resolution pixels.
    encoder
        What turns tiles into vectors; a token encoder with `sampling` set to `grid` shares them among nuclei (`prts.features.grid`).
    out
        The store to write.
    provenance
        JSON-like, kept as the store's attribute `provenance`.

    Raises
    ------
    InputError
        If there are no nuclei, a nucleus lies outside the tile around its own centroid, or the encoder's weights are not right.
    """
    if len(nuclei) == 0:
        raise InputError(f"{out.name}: there are no nuclei to extract features of")
    started = time.perf_counter()
    settings = encoder.settings()
    plan = _plan(slide, nuclei, encoder)
    cell_ids = nuclei["cell_id"].to_numpy(dtype=object)[plan.order]
    _check_reach(plan, cell_ids)
    encoder.load()  # before anything is written: the weights may be wrong
    if isinstance(encoder, TokenEncoder):
        encoder.compile_for(len(plan.origin))
    chunks = _Chunks(plan, encoder)
    identity = _identity(slide, nuclei, encoder)
    parts = Parts(out.with_name(f"{out.name}.parts"), chunks.sizes, identity)
    todo = parts.missing()
    if todo:
        _encode(slide, plan, encoder, chunks, parts, todo, f"features {out.stem}")
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
    logger.info("%s: %d nuclei in %.1f s (%.1f nuclei/s, %d tiles)", out.name, done, seconds, done / seconds, n_tiles)


def _plan(slide: Slide, nuclei: GeoDataFrame, encoder: Encoder) -> TilePlan:
    if isinstance(encoder, TokenEncoder) and encoder.sampling == "grid":
        return plan_grid(nuclei, slide.mpp, encoder.mpp, encoder.stride)
    return plan_tiles(nuclei, slide.mpp, encoder.mpp)


def _check_reach(plan: TilePlan, cell_ids: NDArray[np.object_]) -> None:
    """A ring-shaped polygon wider than a tile can miss the tile around its centroid; no patch would be its own."""
    reaches = shapely.relate_pattern(plan.polygons, shapely.box(0, 0, TILE, TILE), "T********")
    if len(outside := np.flatnonzero(~reaches)):
        raise InputError(
            f"nuclei: cell_id {cell_ids[outside[0]]!r} does not reach the {TILE} px tile around its own centroid; "
            "a nucleus is a compact polygon some 10 um wide"
        )


def _identity(slide: Slide, nuclei: GeoDataFrame, encoder: Encoder) -> str:
    """Fingerprint of everything that the numbers, their order and their rounding follow from."""
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
            "compiled": isinstance(encoder, TokenEncoder) and encoder.compiled,
            "version": __version__,
        }
    )


class _Chunks:
    """The tiles of a plan, some hundred at a time. A chunk holds their global vectors and the local vectors of the nuclei in them."""

    def __init__(self, plan: TilePlan, encoder: Encoder) -> None:
        n = len(plan.origin)
        self.plan, self.widths = plan, (encoder.global_width, encoder.local_width)
        self.tiles = [slice(start, min(start + CHUNK, n)) for start in range(0, n, CHUNK)]
        self.nuclei = [plan.nuclei(tiles) for tiles in self.tiles]

    @property
    def sizes(self) -> list[int]:
        """How many numbers each chunk has."""
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
        # In the order of the corners, whatever tiles came first: the same sum to the last bit.
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


def _encode(
    slide: Slide, plan: TilePlan, encoder: Encoder, chunks: _Chunks, parts: Parts, todo: list[int], description: str
) -> None:
    """Encode the missing chunks, batch by batch, while another thread cuts the tiles of the next batches."""
    # Batches never span chunks: a resumed run forms the same ones.
    batches = [
        (k, slice(start, min(start + encoder.batch_size, chunks.tiles[k].stop)))
        for k in todo
        for start in range(chunks.tiles[k].start, chunks.tiles[k].stop, encoder.batch_size)
    ]
    pooled: list[NDArray[np.float32]] = []
    local: list[NDArray[np.float32]] = []
    device = encoder.device if isinstance(encoder, TokenEncoder) else None
    cut = cut_tiles(slide, encoder.mpp, plan, [batch for _, batch in batches], device)
    with contextlib.closing(_ahead(cut, _BATCHES_AHEAD)) as groups:
        pairs = zip(batches, groups, strict=True)
        for (k, batch), tiles in track(pairs, description, total=len(batches)):
            for vectors, of in zip((pooled, local), _vectors(encoder, plan, tiles, batch), strict=True):
                vectors.append(of.ravel())
            if batch.stop == chunks.tiles[k].stop:
                parts.write(k, np.concatenate(pooled + local))
                pooled, local = [], []


def _vectors(
    encoder: Encoder, plan: TilePlan, tiles: torch.Tensor, batch: slice
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Global vectors of a batch of tiles and local vectors of the nuclei in them."""
    nuclei = plan.nuclei(batch)
    if not isinstance(encoder, TokenEncoder):
        return encoder.encode(tiles.numpy(), plan.polygons[nuclei])
    if encoder.sampling == "grid":
        return encoder.encode_shared(tiles, plan.polygons[nuclei], plan.tile[nuclei] - batch.start)
    return encoder.encode(tiles, plan.polygons[nuclei])


def _ahead(items: Iterator[T], n: int) -> Generator[T]:
    """The same items, up to n of them made beforehand in a thread of their own."""
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="tiles") as pool:
        pending = deque(pool.submit(next, items, None) for _ in range(n))
        try:
            while (item := pending.popleft().result()) is not None:
                pending.append(pool.submit(next, items, None))
                yield item
        finally:
            pool.shutdown(cancel_futures=True)
