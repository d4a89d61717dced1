"""Train the models that are shared on the hub, and write their cards.

For each name, FOLDER/<name> is the bundle with its README.md, ready for `prts push bundle=FOLDER/<name> repo=owner/name`, and
FOLDER/runs/<name> the run that made it; a finished run is not repeated. `kidney` needs the sections and encoder weights in $PRTS_DATA.

example: python scripts/make_release_bundles.py release demo kidney
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import NamedTuple

from prts.cli.main import main as prts


class Release(NamedTuple):
    """What is trained, and the license of the model."""

    overrides: tuple[str, ...]
    license: str


RELEASES = {
    "demo": Release(("tissue=demo",), "apache-2.0"),
    # data: CC BY 4.0; weights of the encoder (DINOv2, not in the bundle): Apache 2.0
    "kidney": Release(("tissue=kidney", "experiment=bins"), "cc-by-4.0"),
}


def make(name: str, folder: Path, owner: str) -> None:
    """Train a model, unless that is done, and write its bundle and card."""
    release, run, bundle = RELEASES[name], folder / "runs" / name, folder / name
    if not (run / "metrics.json").is_file():
        _done(prts(["train", *release.overrides, f"hydra.run.dir={run}"]))
    shutil.rmtree(bundle, ignore_errors=True)
    shutil.copytree(run / "model", bundle)
    _done(prts(["push", f"bundle={bundle}", f"repo={owner}/prts-{name}", f"license={release.license}", "dry_run=true"]))


def _done(status: int) -> None:
    if status:
        raise SystemExit(status)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="+", choices=tuple(RELEASES))
    parser.add_argument("--owner", default="owner", help="owner of the repositories, for the commands in the cards")
    given = parser.parse_args()
    for each in given.names:
        make(each, given.folder, given.owner)
