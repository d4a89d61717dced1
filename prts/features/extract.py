"""Features of every nucleus of a slide, in chunks that survive a kill."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import shutil
import time
from collections import deque
from collections.abc import Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import shapely
from numpy.typing import NDArray

from prts import __version__
from prts.errors import InputError
from prts.features.store import Rows, write_store
from prts.features.tiles import TILE, TilePlan, cut_tiles, plan_tiles
from prts.io.cache import atomic, file_identity, fingerprint
from prts.progress import track

if TYPE_CHECKING:
    from geopandas import GeoDataFrame

    from prts.features.encoders import Encoder
    from prts.io.slide import Slide

logger = logging.getLogger(__name__)

T = TypeVar("T")

# What a kill can cost: about 15 s of a ViT on two CPU cores.
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
        What turns tiles into vectors.
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
    plan = plan_tiles(nuclei, slide.mpp, encoder.mpp)
    cell_ids = nuclei["cell_id"].to_numpy(dtype=object)[plan.order]
    _check_reach(plan, cell_ids)
    settings = encoder.settings()
    encoder.load()  # before anything is written: the weights may be wrong
    parts = _Parts(
        out.with_name(f"{out.name}.parts"), len(plan.order), _identity(slide, nuclei, settings, encoder.batch_size)
    )
    todo = parts.missing()
    if todo:
        _encode(slide, plan, encoder, parts, todo, f"features {out.stem}")
    write_store(
        out,
        cell_ids,
        plan.spatial,
        (encoder.global_width, encoder.local_width),
        (Rows(part[:, : encoder.global_width], part[:, encoder.global_width :]) for part in parts.read()),
        {
            "encoder": encoder.name,
            "weights_sha256": encoder.weights_sha256,
            "mpp": encoder.mpp,
            "tile": encoder.tile_px,
            "pooling": encoder.pooling,
            "precision": settings.get("precision", "fp32"),
            "settings": settings,
            "provenance": dict(provenance or {}),
        },
    )
    parts.delete()
    done = sum(rows.stop - rows.start for rows in map(parts.rows, todo))
    seconds = time.perf_counter() - started
    logger.info("%s: %d nuclei in %.1f s (%.1f nuclei/s)", out.name, done, seconds, done / seconds)


def _check_reach(plan: TilePlan, cell_ids: NDArray[np.object_]) -> None:
    """A ring-shaped polygon wider than a tile can miss the tile around its centroid; no patch would be its own."""
    reaches = shapely.relate_pattern(plan.polygons, shapely.box(0, 0, TILE, TILE), "T********")
    if len(outside := np.flatnonzero(~reaches)):
        raise InputError(
            f"nuclei: cell_id {cell_ids[outside[0]]!r} does not reach the {TILE} px tile around its own centroid; "
            "a nucleus is a compact polygon some 10 um wide"
        )


def _identity(slide: Slide, nuclei: GeoDataFrame, settings: dict[str, Any], batch_size: int) -> str:
    """Fingerprint of everything that the numbers, their order and their rounding follow from."""
    digest = hashlib.sha256(json.dumps(nuclei["cell_id"].tolist()).encode())
    _, coordinates, offsets = shapely.to_ragged_array(np.asarray(nuclei.geometry.array, dtype=object))
    for array in (coordinates, *offsets):
        digest.update(np.ascontiguousarray(array).data)
    image = {"mpp": slide.mpp, "width": slide.width, "height": slide.height, "file": file_identity(slide.path)}
    return fingerprint(
        {
            "nuclei": digest.hexdigest(),
            "encoder": settings,
            "slide": image,
            "chunk": CHUNK,
            "batch_size": batch_size,
            "version": __version__,
        }
    )


class _Parts:
    """The chunks that are done: `<k>.npy` (m, global + local) float32 in a folder that knows what it belongs to."""

    def __init__(self, folder: Path, n: int, identity: str) -> None:
        self.folder, self.n = folder, n
        label = folder / "fingerprint"
        if folder.is_dir() and not (label.is_file() and label.read_text() == identity):
            logger.info("%s: left by a run with other inputs or settings, starting afresh", folder)
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with atomic(label) as temporary:
            temporary.write_text(identity)

    def rows(self, k: int) -> slice:
        return slice(k * CHUNK, min((k + 1) * CHUNK, self.n))

    def missing(self) -> list[int]:
        n_chunks = -(-self.n // CHUNK)
        todo = [k for k in range(n_chunks) if not self._readable(k)]
        if len(todo) < n_chunks:
            logger.info("%s: %d of %d chunks were done before", self.folder, n_chunks - len(todo), n_chunks)
        return todo

    def write(self, k: int, rows: NDArray[np.float32]) -> None:
        with atomic(self._path(k)) as temporary:
            np.save(temporary, rows)

    def read(self) -> Iterator[NDArray[np.float32]]:
        for k in range(-(-self.n // CHUNK)):
            yield np.load(self._path(k))

    def delete(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, k: int) -> Path:
        return self.folder / f"{k:06d}.npy"

    def _readable(self, k: int) -> bool:
        # A power cut, unlike a kill, can leave a file that was renamed before its content reached the disk.
        rows = self.rows(k)
        with contextlib.suppress(OSError, ValueError, EOFError):
            return bool(len(np.load(self._path(k), mmap_mode="r")) == rows.stop - rows.start)
        return False


def _encode(slide: Slide, plan: TilePlan, encoder: Encoder, parts: _Parts, todo: list[int], description: str) -> None:
    """Encode the missing chunks, batch by batch, while another thread cuts the tiles of the next batches."""
    # Batches never span chunks: a resumed run forms the same ones.
    batches = [
        (k, slice(start, min(start + encoder.batch_size, parts.rows(k).stop)))
        for k in todo
        for start in range(parts.rows(k).start, parts.rows(k).stop, encoder.batch_size)
    ]
    done: list[NDArray[np.float32]] = []
    cut = cut_tiles(slide, encoder.mpp, plan, [batch for _, batch in batches])
    with contextlib.closing(_ahead(cut, _BATCHES_AHEAD)) as groups:
        pairs = zip(batches, groups, strict=True)
        for (k, batch), tiles in track(pairs, description, total=len(batches)):
            done.append(np.concatenate(encoder.encode(tiles, plan.polygons[batch]), axis=1))
            if batch.stop == parts.rows(k).stop:
                parts.write(k, np.concatenate(done))
                done = []


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
