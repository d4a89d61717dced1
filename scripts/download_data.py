"""Fetch the public sections of one or more tissues, or list where they come from.

usage: python scripts/download_data.py [TISSUE ...] [--data-dir DIR] [--list]

Without arguments, fetches every tissue that has a download address. Existing files are skipped, and interrupted downloads resume. A section
is 5 to 15 GB.

example: python scripts/download_data.py brain lung --data-dir /scratch/prts
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import yaml

from prts.data.tissue import SectionSpec, parse_tissue
from prts.download import download_section
from prts.errors import InputError

TISSUES = Path(__file__).resolve().parents[1] / "configs/tissue"


def main(argv: list[str] | None = None) -> int:
    """Run the script and return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tissues", nargs="*", metavar="TISSUE", help="default: all with a download address")
    parser.add_argument("--data-dir", type=Path, default=Path(os.environ.get("PRTS_DATA", "data")))
    parser.add_argument("--list", action="store_true", help="print the addresses and exit")
    given = parser.parse_args(argv)
    try:
        found = {name: sections(name, given.data_dir) for name in given.tissues or _known()}
        for name, specs in found.items():
            if given.tissues and not specs:
                raise InputError(f"{name}: has no download address; choose from {', '.join(_downloadable())}")
            for spec in specs:
                _list(name, spec) if given.list else download_section(spec)
    except InputError as error:
        print(f"download_data: {error}", file=sys.stderr)
        return 2
    return 0


def sections(tissue: str, data_dir: Path) -> list[SectionSpec]:
    """The sections of a tissue that have a download address."""
    path = TISSUES / f"{tissue}.yaml"
    if not path.is_file():
        raise InputError(f"{tissue}: no such tissue; choose from {', '.join(_downloadable())}")
    config = yaml.safe_load(path.read_text(encoding="utf-8").replace("${paths.data_dir}", str(data_dir)))
    config.pop("defaults", None)
    return [spec for spec in parse_tissue(config).sections.values() if spec.download]


def _known() -> list[str]:
    return sorted(path.stem for path in TISSUES.glob("*.yaml"))


def _downloadable() -> list[str]:
    return [name for name in _known() if "download:" in (TISSUES / f"{name}.yaml").read_text(encoding="utf-8")]


def _list(tissue: str, spec: SectionSpec) -> None:
    node = spec.download or {}
    for url in node["urls"]:
        name = url.rsplit("/", 1)[-1]
        checksum = next(
            (f"{kind} {node[kind][name]}" for kind in ("sha256", "md5") if name in (node.get(kind) or {})), "-"
        )
        print(tissue, spec.name, url, checksum, sep="\t")


if __name__ == "__main__":
    sys.exit(main())
