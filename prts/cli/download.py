"""Fetch the public sections that a tissue config names.

usage: prts download tissue=brain|lung|breast [paths.data_dir=DIR]

Fetches what is missing into the data folder, goes on where a broken download stopped, checks sums where they are known, and
unpacks only the 2 um bins. A section is 5 to 15 GB.

example: prts download tissue=lung paths.data_dir=data
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from prts.cli.app import plain
from prts.errors import InputError

if TYPE_CHECKING:
    from omegaconf import DictConfig

logger = logging.getLogger(__name__)


def main(cfg: DictConfig) -> None:
    """Download every section of a tissue that has an address."""
    from prts.data.tissue import parse_tissue
    from prts.download import download_section

    tissue = parse_tissue(plain(cfg.tissue))
    with_address = [spec for spec in tissue.sections.values() if spec.download]
    if not with_address:
        raise InputError(
            f"tissue={tissue.name}: none of its sections has a download address; brain, lung and breast have"
        )
    for spec in with_address:
        download_section(spec)
    logger.info("%s is complete: `prts train tissue=%s` can start", tissue.name, tissue.name)
