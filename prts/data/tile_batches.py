"""Batches of tiles with the nuclei in them, read from the slides while an encoder is trained."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import shapely
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from prts.data.batches import Batch, OrderedBatches, ShuffledBatches
from prts.features.views import Look, random_orientation
from prts.io.nuclei import load_nuclei
from prts.io.optical_density import read_without_black

if TYPE_CHECKING:
    from prts.data.nucleus_set import NucleusSet
    from prts.data.prepared import PreparedSection
    from prts.features.encoders import Encoder
    from prts.features.tiles import TilePlan
    from prts.io.slide import Slide
    from prts.section import Section

Ints = NDArray[np.int64]

# An epoch, or None for validation, and the tiles of a batch.
Drawn = tuple[int | None, Ints]


@dataclass(frozen=True)
class Seen:
    """What a network with an encoder in it reads of some nuclei; its length is their number.

    Attributes
    ----------
    tiles
        (t, tile_px, tile_px, 3) uint8.
    polygons
        The nuclei in pixels of their tile, (b,).
    tile
        The tile of each nucleus, (b,), not descending.
    features
        All of the network's input as the encoder gives it before it is trained, (b, d).
    """

    tiles: Tensor
    polygons: NDArray[np.object_]
    tile: Ints
    features: Tensor

    def __len__(self) -> int:
        return len(self.polygons)

    def to(self, device: torch.device) -> Seen:
        """The same with its tensors on a device, where Lightning moves a batch."""
        return replace(self, tiles=self.tiles.to(device), features=self.features.to(device))


class TiledNuclei(NamedTuple):
    """Nuclei of a section and the tiles that their local features come from.

    Attributes
    ----------
    section
        The section.
    nuclei
        The nuclei.
    plan
        The tiles, planned for these nuclei in this order.
    used
        Numbers of the tiles with nuclei; a grid also has some that only give global features.
    """

    section: Section
    nuclei: NucleusSet
    plan: TilePlan
    used: Ints

    @classmethod
    def lay(cls, prepared: PreparedSection, nuclei: NucleusSet, encoder: Encoder) -> TiledNuclei:
        """Choose the tiles of some nuclei of a prepared section."""
        polygons = load_nuclei(prepared.nuclei).set_index("cell_id").loc[nuclei.cell_id].reset_index(names="cell_id")
        plan = encoder.plan(polygons, prepared.section.mpp)
        return cls(prepared.section, nuclei, plan, np.unique(plan.tile))

    def thinned(self, step: int) -> TiledNuclei:
        """The same with every so many of its tiles."""
        return self._replace(used=self.used[::step])


class TileBatches(Dataset[Batch]):
    """Tiles of one or more sections with their nuclei: `dataset[epoch, numbers]` is a `Batch` whose features are `Seen`.

    With an epoch, each tile is turned or mirrored, restained, brighter or darker and blurred, as drawn from the seed, the epoch and the
    number of the tile; the nuclei are turned with it. Slides are opened in the process that reads them.

    Parameters
    ----------
    parts
        The nuclei of each section.
    mpp
        um per pixel of the tiles.
    seed
        Seed of the changes; None: tiles are as on the slide.
    """

    def __init__(self, parts: Sequence[TiledNuclei], mpp: float, seed: int | None) -> None:
        self._parts, self._mpp, self._seed = parts, mpp, seed
        self._starts = np.cumsum([0, *(len(part.used) for part in parts)])
        self._slides: dict[tuple[int, int], Slide] = {}

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_slides": {}}  # each process opens its own

    def close(self) -> None:
        """Close the slides that this process has opened."""
        while self._slides:
            self._slides.popitem()[1].__exit__(None, None, None)

    def __getitem__(self, drawn: Drawn) -> Batch:
        epoch, numbers = drawn
        if len(numbers) == 0:  # of a process that has no tile of a batch: one without its nuclei
            return _without_nuclei(self[epoch, np.zeros(1, dtype=np.int64)])
        found = [self._tile(epoch, int(number)) for number in numbers]
        tiles, polygons, rows = zip(*found, strict=True)
        sources = np.searchsorted(self._starts, numbers, side="right") - 1
        parts = [self._parts[k].nuclei for k in sources]
        features = [part.features[at] for part, at in zip(parts, rows, strict=True)]
        counts = [part.counts[at].toarray() for part, at in zip(parts, rows, strict=True)]
        exposure = None
        if any(part.exposure is not None for part in parts):
            known = [
                np.ones(len(at), np.float32) if part.exposure is None else part.exposure[at]
                for part, at in zip(parts, rows, strict=True)
            ]
            exposure = torch.from_numpy(np.concatenate(known)[:, None])
        seen = Seen(
            torch.from_numpy(np.stack(tiles)),
            np.concatenate(polygons),
            np.repeat(np.arange(len(rows)), [len(at) for at in rows]),
            torch.from_numpy(np.concatenate(features)),
        )
        return Batch(seen, torch.from_numpy(np.concatenate(counts).astype(np.float32)), exposure)

    def _tile(self, epoch: int | None, number: int) -> tuple[NDArray[np.uint8], NDArray[np.object_], Ints]:
        """Pixels of a tile, polygons of its nuclei, and their rows."""
        source = int(np.searchsorted(self._starts, number, side="right")) - 1
        part = self._parts[source]
        tile = int(part.used[number - self._starts[source]])
        plan, slide = part.plan, self._slide(source)
        here = plan.nuclei(slice(tile, tile + 1))
        polygons, side = plan.polygons[here], plan.tile_px
        x, y = plan.origin[tile].tolist()
        if epoch is None or self._seed is None:
            slide.look = part.section.look
            return read_without_black(slide, x, y, side, side, self._mpp), polygons, plan.order[here]
        rng = np.random.default_rng((self._seed, epoch, number))
        turn, slide.look = random_orientation(rng), Look.random(rng)
        pixels = turn.pixels(read_without_black(slide, x, y, side, side, self._mpp))
        turned = shapely.transform(polygons, lambda xy: turn.places(xy, (side, side)))
        return pixels, np.asarray(turned, dtype=object), plan.order[here]

    def _slide(self, source: int) -> Slide:
        key = os.getpid(), source
        if key not in self._slides:
            self._slides[key] = self._parts[source].section.open_slide()
        return self._slides[key]


def _without_nuclei(batch: Batch) -> Batch:
    seen: Seen = batch.features
    none = replace(seen, polygons=seen.polygons[:0], tile=seen.tile[:0], features=seen.features[:0])
    return Batch(none, batch.counts[:0], None if batch.exposure is None else batch.exposure[:0])


class ShuffledTiles(Sampler[Drawn]):
    """The batches of `ShuffledBatches`, with the epoch that they are drawn in."""

    def __init__(self, order: ShuffledBatches) -> None:
        self._order, self._epoch = order, 0

    def set_epoch(self, epoch: int) -> None:
        """Set the number of the next epoch; Lightning calls this before each."""
        self._epoch = epoch
        self._order.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self) -> Iterator[Drawn]:
        epoch = self._epoch
        self._epoch += 1
        return ((epoch, numbers) for numbers in self._order)


class OrderedTiles(Sampler[Drawn]):
    """The batches of `OrderedBatches`, with tiles as they are on the slide."""

    def __init__(self, order: OrderedBatches) -> None:
        self._order = order

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self) -> Iterator[Drawn]:
        return ((None, numbers) for numbers in self._order)
