"""Download the public sections of a tissue.

usage: prts download tissue=brain|lung|breast|colon|prostate|xenium_breast|xenium_lung [paths.data_dir=DIR]

Downloads missing files to the data folder, resumes interrupted downloads, verifies checksums if known, and unpacks only the 2 um bins of
Visium HD and the tables of Xenium. Expect 5 to 25 GB per section.

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
    """Download every section that has an address."""
    from prts.data.tissue import parse_tissue
    from prts.download import download_section

    tissue = parse_tissue(plain(cfg.tissue))
    with_address = [spec for spec in tissue.sections.values() if spec.download]
    if not with_address:
        known = "brain, lung, breast, colon, prostate, xenium_breast or xenium_lung"
        raise InputError(f"tissue={tissue.name}: its sections have no download address; choose {known}")
    for spec in with_address:
        download_section(spec)
    logger.info("%s is complete; run `prts train tissue=%s`", tissue.name, tissue.name)
