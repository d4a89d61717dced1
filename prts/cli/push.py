"""Upload a trained model with a model card to the Hugging Face hub.

usage: prts push bundle=DIR repo=owner/name [private=true] [revision=BRANCH] [message=TEXT] [license=cc-by-4.0]
                 [datasets=[owner/name]] [dry_run=true]

Uploads model.json, model.safetensors (with a trained encoder, adapter.safetensors, too) and the card, README.md, in one commit. The card
says what model.json knows: data, licenses, scores next to baselines and noise ceiling, predictable genes, limits, how to use and cite it.
dry_run=true writes it to DIR/README.md and uploads nothing; a README.md in DIR, edited or not, is uploaded as it is. Log in with
`hf auth login` first. A new repository is private unless private=false. The weights of the encoder are never uploaded. model.json contains
names and paths of the training files: read it first.

Others use the model as bundle=hf://owner/name or bundle=hf://owner/name@revision, in any command and in `prts.Model.load`.

example: prts push bundle=outputs/demo/make/model repo=owner/name dry_run=true
example: prts push bundle=outputs/demo/make/model repo=owner/name license=cc-by-4.0 private=false
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from prts.cli.app import require
from prts.errors import InputError

if TYPE_CHECKING:
    from omegaconf import DictConfig

logger = logging.getLogger(__name__)


def main(cfg: DictConfig) -> None:
    """Write the card and upload the bundle."""
    require(cfg, "bundle", "repo")
    from prts.io.cache import atomic
    from prts.models.bundle import load_bundle
    from prts.models.card import model_card
    from prts.models.hub import check_repository, is_reference, push

    if is_reference(cfg.bundle):
        raise InputError(f"{cfg.bundle}: is on the hub already; give the folder of a bundle")
    repo, bundle = check_repository(cfg.repo), load_bundle(cfg.bundle)
    path = bundle.folder / "README.md"
    if path.is_file():
        logger.info("%s is used as it is; delete it to get a new card", path)
        card = path.read_bytes()
    else:
        card = model_card(bundle, repo, license=cfg.license, datasets=cfg.datasets or ()).encode()
    if cfg.dry_run:
        if not path.is_file():
            with atomic(path) as temporary:
                temporary.write_bytes(card)
        logger.info("%s: the card; nothing was uploaded", path)
        return
    origin, private = push(
        repo,
        {**{file.name: file for file in bundle.files}, path.name: card},
        private=cfg.private,
        revision=cfg.revision,
        message=cfg.message or f"Upload a prts model of {bundle.metadata['tissue']}, SHA-256 {bundle.sha256[:12]}",
    )
    logger.info("uploaded as bundle=%s (%s)", origin, "private" if private else "public")
