"""Check the installation, accelerator, folders and model, and print a fix for each failure.

usage: prts doctor [bundle=DIR] [paths.data_dir=DIR] [paths.cache_dir=DIR]

Prints PASS, WARN or FAIL for versions, optional extras, GPU, and the data and cache folders. With bundle=DIR it also checks the model's
encoder weights, package versions and origin. The exit status is 2 if a check fails.

example: prts doctor bundle=outputs/demo/make/model
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prts import __version__
from prts.errors import InputError
from prts.extras import EXTRAS, install_command, missing_modules

if TYPE_CHECKING:
    from omegaconf import DictConfig

Check = tuple[str, str, str]  # PASS, WARN or FAIL; what was checked; a sentence

_MIN_FREE_GB = 20


def _software() -> Iterator[Check]:
    yield "PASS", "python", sys.version.split()[0]
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}"
        for name in ("torch", "torchvision", "timm", "anndata", "geopandas", "pytorch-lightning", "scanpy")
        if _has_package(name)
    )
    yield "PASS", "packages", versions
    for extra, (_, use) in EXTRAS.items():
        missing = ", ".join(missing_modules(extra))
        if not missing:
            yield "PASS", f"extra {extra}", use
        else:
            yield "WARN", f"extra {extra}", f"{missing} not installed ({use}); run {install_command(extra)}"


def _hardware() -> Iterator[Check]:
    import torch

    import prts._torchvision as torchvision_schemas

    if torch.cuda.is_available():
        yield "PASS", "accelerator", torch.cuda.get_device_name(0)
    elif torch.version.cuda is not None:
        yield "WARN", "accelerator", "torch is built for CUDA but finds no GPU; check the driver with nvidia-smi"
    else:
        yield "WARN", "accelerator", f"none; CPU build of torch, {os.cpu_count()} cores"
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError) as error:
        yield "FAIL", "torchvision", f"cannot be imported ({error}); install the build that matches torch"
    else:
        shim = torchvision_schemas._library is not None
        yield "PASS", "torchvision", "CUDA build with a CPU torch; prts works around it" if shim else "matches torch"


def _folders(cfg: DictConfig) -> Iterator[Check]:
    data = Path(cfg.paths.data_dir)
    if data.is_dir():
        yield "PASS", "data", str(data.resolve())
    else:
        yield "WARN", "data", f"{data} is not a folder; set PRTS_DATA, or run `prts download tissue=lung`"
    cache = Path(cfg.paths.cache_dir)
    place = next(folder for folder in (cache, *cache.resolve().parents) if folder.is_dir())
    free_gb = shutil.disk_usage(place).free / 1e9
    if not os.access(place, os.W_OK):
        yield "FAIL", "cache", f"{place} is not writable; set PRTS_CACHE to a folder that is"
    elif free_gb < _MIN_FREE_GB:
        yield (
            "WARN",
            "cache",
            f"{place.resolve()}: {free_gb:.0f} GB free; a Visium HD section takes about {_MIN_FREE_GB} GB",
        )
    else:
        yield "PASS", "cache", f"{cache.resolve()}: {free_gb:.0f} GB free"


def _bundle(cfg: DictConfig) -> Iterator[Check]:
    from prts.features.encoders import weights_status
    from prts.models.bundle import load_bundle

    try:
        bundle = load_bundle(cfg.bundle)
    except InputError as error:
        yield "FAIL", "bundle", str(error)
        return
    about = bundle.metadata
    trained = f"{len(bundle.genes)} genes, trained on {about['tissue']} {', '.join(about['train_sections'])}"
    yield "PASS", "bundle", f"{cfg.bundle}: {trained}"
    found, text = weights_status(about["encoder"], about["encoder_weights"])
    yield "PASS" if found else "WARN", "weights", text
    yield _segmentation(about["segmentation"])
    yield from _provenance(about)


def _segmentation(recorded: dict[str, Any]) -> Check:
    """Whether the segmenter of training can be used here."""
    from prts.segmentation import segmenters

    name, what = str(recorded["name"]), "bundle segmentation"
    if name in ("given", "polygons"):
        return "PASS", what, "trained on given nuclei: predict needs them, or a segmenter"
    if name not in segmenters:
        return "WARN", what, f"{name} is not installed: choose another segmenter ({', '.join(segmenters.names())})"
    extra = segmenters[name].extra
    if extra is not None and (missing_modules(extra) if extra in EXTRAS else importlib.util.find_spec(extra) is None):
        return "WARN", what, f"{name} needs {install_command(extra)}"
    return "PASS", what, name


def _provenance(about: dict[str, Any]) -> Iterator[Check]:
    """Compare how the bundle was made with this installation."""
    known = {"flags of predictable genes": about["validation"].get("predictable"), "intervals": about.get("intervals")}
    known |= {"obs['ood']": about.get("ood"), "a check of um/px": about.get("nuclei")}
    missing = [name for name, value in known.items() if value is None]
    if missing:
        text = f"format version {about['format_version']}, without {', '.join(missing)}; train again to get them"
        yield "WARN", "bundle trust", text
    else:
        yield "PASS", "bundle trust", f"format version {about['format_version']}, with {', '.join(known)}"

    here = {name: importlib.metadata.version(name) for name in about["versions"] if _has_package(name)}
    here["prts"] = __version__
    other = [
        f"{name} {then} (here: {here.get(name, 'not installed')})"
        for name, then in about["versions"].items()
        if here.get(name) != then
    ]
    yield (
        ("WARN", "bundle packages", f"made with {', '.join(other)}")
        if other
        else ("PASS", "bundle packages", "same versions as here")
    )

    made = about.get("provenance")
    if made is None:
        yield "WARN", "bundle origin", "code, config and data are not recorded; it was trained with an older prts"
        return
    code = made["code"]
    commit = f", commit {code['commit'][:12]}{' with changes' if code['changed'] else ''}" if "changed" in code else ""
    data = "; ".join(f"{name}: {', '.join(files)}" for name, files in made["data"].items())
    from prts.io.cache import fingerprint

    changed = fingerprint(made["config"]) != made["config_fingerprint"]
    yield (
        (
            "FAIL",
            "bundle origin",
            "model.json was edited: its config is not the one that trained it; use an unchanged copy",
        )
        if changed
        else (
            "PASS",
            "bundle origin",
            f"prts {code['version']}{commit}, config {made['config_fingerprint']}, data {data}",
        )
    )


def _has_package(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def main(cfg: DictConfig) -> None:
    """Print one line per check; fail if a check fails."""
    from rich.console import Console
    from rich.text import Text

    checks = [*_software(), *_hardware(), *_folders(cfg)]
    if cfg.bundle is not None:
        checks += _bundle(cfg)
    console, colors = Console(), {"PASS": "green", "WARN": "yellow", "FAIL": "red"}
    for status, what, text in checks:
        # as Text: rich would read [stardist] in a string as markup and drop it
        console.print(Text.assemble((status, colors[status]), f"  {what:<19} ", text), soft_wrap=True)
    failed = [what for status, what, _ in checks if status == "FAIL"]
    if failed:
        raise InputError(f"doctor: {', '.join(failed)} failed; the lines above say how to fix it")
