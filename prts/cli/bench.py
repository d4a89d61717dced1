"""Rank encoders on one of your sections.

usage: prts bench section=DIR encoders=[NAME,NAME,...] ['weights={NAME: FILE}'] [n=1000] [genes=300] [units=nuclei|bins] [bin_um=8]
                  [segmentation=...] [out=FILE.csv]

Reads the features of n= nuclei or bins with each encoder (a file of configs/encoder), fits ridge regression on four fifths of the section,
and logs a table, the best first: mean PCC of log1p UMI on the last fifth with its 95% interval, width of the features, CPU seconds per
1,000 units and peak memory. All encoders see the same units, genes and split. Features are extracted anew, each encoder in a process of its
own.

example: prts bench section=data/lung/lung1 encoders=[classical,hibou_b,vit256] 'weights={vit256: vit256_small_dino.pth}'
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prts.cli.app import plain, require
from prts.errors import InputError, ParameterError, did_you_mean

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from prts.features.encoders import Encoder
    from prts.section import Section

logger = logging.getLogger(__name__)


def main(cfg: DictConfig) -> None:
    """Rank the encoders."""
    require(cfg, "section")
    from prts.api.bench import BenchSettings, bench_encoders
    from prts.cli.prepare import chosen_segmenter, with_units
    from prts.io.cache import atomic
    from prts.preprocess.counts import QCSettings

    given = plain(cfg)
    out = None if given["out"] is None else Path(given["out"])
    if out is not None and out.is_dir():
        raise InputError(f"{out}: is a folder; name a file for the table, such as {out / 'encoders.csv'}")
    weights = given["weights"] or {}
    if unused := sorted(set(weights) - set(given["encoders"])):
        raise ParameterError("", "weights", f"{unused[0]} is not among the encoders; add it, or omit its weights")
    encoders = {name: _encoder(name, weights.get(name)) for name in given["encoders"]}
    segmenter, prefer_given = chosen_segmenter(plain(with_units(cfg).segmentation))
    table = bench_encoders(
        encoders,
        _section(given),
        segmenter,
        prefer_given=prefer_given,
        settings=BenchSettings(given["n"], given["genes"], QCSettings(**given["qc"]), given["seed"]),
        cache_dir=cfg.paths.cache_dir,
    )
    for line in table.to_string(index=False, float_format="{:.3f}".format).splitlines():
        logger.info("%s", line)
    if out is not None:
        with atomic(out) as path:
            table.to_csv(path, index=False)
        logger.info("wrote %s", out)


def _section(given: dict[str, Any]) -> Section:
    from prts.section import open_section_folder, read_visium_hd

    if given["units"] == "bins":
        return read_visium_hd(given["section"], units="bins", bin_um=given["bin_um"])
    return open_section_folder(given["section"])


def _encoder(name: str, weights: str | None) -> Encoder:
    """The encoder of a config, composed with the same folders as this command."""
    from hydra import compose
    from hydra.core.hydra_config import HydraConfig
    from hydra.errors import MissingConfigException

    from prts.features.encoders import encoders

    search = [each for each in HydraConfig.get().overrides.hydra if each.startswith("hydra.searchpath=")]
    try:
        node = plain(compose("prepare", [f"encoder={name}", *search]).encoder)
    except MissingConfigException as error:
        known = error.options or []
        raise ParameterError(
            "", "encoders", f"{name!r} is not an encoder{did_you_mean(name, known)}; choose from {', '.join(known)}"
        ) from error
    node.pop("augment", None)  # belongs to training
    return encoders.build(node if weights is None else {**node, "weights": weights})
