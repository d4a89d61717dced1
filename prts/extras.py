"""Optional dependencies: what each extra adds, whether it is installed, and the command that installs it."""

from __future__ import annotations

import importlib.util
from typing import NamedTuple

from prts.errors import InputError

DISTRIBUTION = "prts-spatial"
"""Name to install; `prts` itself is another project."""


class Extra(NamedTuple):
    """Modules that an extra provides, and what they are for."""

    modules: tuple[str, ...]
    use: str


EXTRAS = {
    "train": Extra(
        ("pytorch_lightning", "scanpy", "sklearn", "matplotlib", "plotly"),
        "prts prepare, train and evaluate; own models",
    ),
    "report": Extra(("matplotlib", "plotly"), "prts report: figures and the page"),
    "analysis": Extra(
        ("scanpy", "sklearn", "igraph", "pynndescent", "matplotlib", "decoupler", "goatools", "gseapy"),
        "prts analyze: clusters, cell types, gene sets",
    ),
    "stardist": Extra(
        ("stardist", "csbdeep", "tensorflow"), "segmentation=stardist, the default segmenter of real tissues"
    ),
    "spatial": Extra(("spatialdata",), "SpatialData in and out"),
    "sweeps": Extra(
        tuple(f"hydra_plugins.hydra_{name}" for name in ("joblib_launcher", "optuna_sweeper", "submitit_launcher")),
        "hydra/launcher=joblib and submitit, sweep=optuna",
    ),
    "loggers": Extra(("tensorboard", "wandb"), "logger=tensorboard and wandb"),
    "lazyslide": Extra(
        ("lazyslide", "lazyslide_models", "wsidata"), "prts.api.lazyslide: models for slides in LazySlide"
    ),
    "mlflow": Extra(("mlflow",), "logger=mlflow"),
}


def install_command(extra: str) -> str:
    """The command that installs an extra.

    Examples
    --------
    >>> install_command("report")
    "pip install 'prts-spatial[report]'"
    """
    return f"pip install '{DISTRIBUTION}[{extra}]'"


def missing_modules(extra: str) -> list[str]:
    """Modules of an extra that are not installed."""
    return [module for module in EXTRAS[extra].modules if not _is_installed(module)]


def require_extra(extra: str, what: str) -> None:
    """Check that an extra is installed, before work starts.

    Parameters
    ----------
    extra
        One of `EXTRAS`.
    what
        The command, key or object that needs it.

    Raises
    ------
    InputError
        If one of its modules is missing.
    """
    if missing := missing_modules(extra):
        verb = "is" if len(missing) == 1 else "are"
        raise InputError(f"{what}: {', '.join(missing)} {verb} not installed; run {install_command(extra)}")


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its package is missing
        return False
