"""Grid extraction against exact: what each stride gains on a whole capture area, from rates measured on a part of her2st C2."""

from __future__ import annotations

from typing import Any

from benchmarks.extract import extract_seconds, make_encoder, section
from benchmarks.harness import Part, child, data_folder, interleave

NEEDS_DATA = True
STRIDES, DEFAULT = (96, 128, 192, 256), 128
NUCLEI, SIDE_MM = 60_000, 6.5


def run(quick: bool) -> Part:
    part = Part()
    strides = (128, 256) if quick else STRIDES
    size = {"n_exact": 8, "n_grid": 40, "rounds": 1} if quick else {"n_exact": 300, "n_grid": 1_500, "rounds": 1}
    timed = child(compare, data=str(data_folder()), strides=strides, **size).result
    tiles = child(tiles_of_area, strides=strides).result
    exact = NUCLEI / timed["exact"]
    area = f"{NUCLEI:,} nuclei in {SIDE_MM} x {SIDE_MM} mm"
    part.row(
        f"{area}: exact, estimated from {size['n_exact']} nuclei of her2st C2 at {timed['exact']:.1f} nuclei/s",
        f"{exact / 60:.1f} min",
    )
    for stride in strides:
        rate, n_tiles = timed["grid"][str(stride)], tiles[str(stride)]
        seconds = n_tiles / rate["tiles_a_second"]
        key = []
        if stride == DEFAULT:
            part.figures["extract/grid_speedup"] = exact / seconds
            key = ["extract/grid_speedup"]
        part.row(
            f"{area}: grid, stride {stride}, {n_tiles:,} tiles, estimated from {rate['tiles']} tiles ({size['n_grid']:,} nuclei) at "
            f"{rate['tiles_a_second']:.1f} tiles/s",
            f"{seconds / 60:.1f} min, {exact / seconds:.1f}x exact",
            keys=key,
        )
    return part


def compare(data: str, strides: list[int], n_exact: int, n_grid: int, rounds: int) -> dict[str, Any]:
    """Nuclei a second of exact extraction and tiles a second of the grid, interleaved, from slide to store."""
    from prts.features.grid import plan_grid

    slide, mpp, nuclei = section(data)
    square = _square(nuclei, n_grid)
    few = section(data, n_exact)[2]
    exact = make_encoder(data)
    grids = {str(stride): make_encoder(data, sampling="grid", stride=stride) for stride in strides}
    for encoder in (exact, *grids.values()):
        encoder.load()
    extract_seconds(slide, mpp, few[: exact.batch_size], exact)  # the first batch of a process is slower
    ways = {"exact": lambda: extract_seconds(slide, mpp, few, exact)}
    for stride, encoder in grids.items():
        ways[stride] = lambda encoder=encoder: extract_seconds(slide, mpp, square, encoder)
    seconds = interleave(ways, rounds)
    tiles = {stride: len(plan_grid(square, mpp, exact.mpp, exact.tile_px, int(stride)).origin) for stride in grids}
    return {
        "exact": n_exact / seconds["exact"],
        "grid": {stride: {"tiles": n, "tiles_a_second": n / seconds[stride]} for stride, n in tiles.items()},
    }


def tiles_of_area(strides: list[int]) -> dict[str, int]:
    """Tiles that the grid needs for nuclei all over a capture area."""
    import geopandas as gpd
    import numpy as np
    import shapely

    from prts.features.grid import plan_grid

    xy = np.random.default_rng(0).uniform(0, SIDE_MM * 1000 / 0.5, (NUCLEI, 2))
    nuclei = gpd.GeoDataFrame(geometry=shapely.buffer(shapely.points(xy), 7.0, quad_segs=4))
    return {str(stride): len(plan_grid(nuclei, 0.5, 0.5, 256, stride).origin) for stride in strides}


def _square(nuclei: Any, n: int) -> Any:
    """The n nuclei nearest to the middle of the section in the larger of their distances along x and y: a square of tissue."""
    import numpy as np

    centre = np.stack([nuclei.geometry.centroid.x, nuclei.geometry.centroid.y], axis=1)
    nearest = np.argsort(np.abs(centre - np.median(centre, axis=0)).max(axis=1), kind="stable")[:n]
    return nuclei.iloc[np.sort(nearest)].reset_index(drop=True)
