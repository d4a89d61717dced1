"""Loggers of a training run: curves during training, then test metrics, the per-gene table and figures.

The loggers are Lightning's. A run opens its own and closes them in any case, so that the next job of a sweep can start its own.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from prts.errors import ParameterError
from prts.extras import install_command
from prts.io.cache import lock

logger = logging.getLogger(__name__)

_EXTRAS = {"tensorboard": ("tensorboard", "loggers"), "wandb": ("wandb", "loggers"), "mlflow": ("mlflow", "mlflow")}
_HPARAM_METRICS = ("val/pcc_mean", "test/pcc_mean", "test/ceiling_share", "test/auroc", "test/mcc")


@dataclass(frozen=True)
class LoggerSpec:
    """A logger that is built when training starts.

    Attributes
    ----------
    build
        Class or function that makes a Lightning logger, such as `pytorch_lightning.loggers.CSVLogger`.
    settings
        Its arguments. Arguments that are missing get defaults that suit the run: folder, name, and group of the sweep.
    """

    build: Callable[..., Any]
    settings: Mapping[str, Any]


class RunLoggers:
    """Loggers of one run, as a context manager that closes them; as failed if an exception is raised.

    Parameters
    ----------
    loggers
        Loggers by name: csv, tensorboard, wandb, mlflow, or any other Lightning logger.
    folder
        Run folder.
    hyperparameters
        Logged by every logger.
    title
        Name of the run.
    sweep
        Folder of the sweep that the run belongs to, if any.

    Raises
    ------
    InputError
        If the package of a logger is not installed.

    Examples
    --------
    >>> from pytorch_lightning.loggers import CSVLogger  # doctest: +SKIP
    >>> with RunLoggers({"csv": LoggerSpec(CSVLogger, {"name": "csv"})}, "run/") as loggers:  # doctest: +SKIP
    ...     trainer = Trainer(logger=loggers.start())
    """

    def __init__(
        self,
        loggers: Mapping[str, LoggerSpec],
        folder: str | Path,
        *,
        hyperparameters: Mapping[str, Any] | None = None,
        title: str = "prts",
        sweep: Path | None = None,
    ) -> None:
        self._specs, self._folder = dict(loggers), Path(folder)
        self._hyperparameters, self._title, self._sweep = dict(hyperparameters or {}), title, sweep
        self._loggers: dict[str, Any] = {}
        for name in self._specs:
            package, extra = _EXTRAS.get(name, ("", ""))
            if package and importlib.util.find_spec(package) is None:
                raise ParameterError("", "logger", f"{package} is not installed; run {install_command(extra)}")

    def __enter__(self) -> RunLoggers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        failed = kind is not None
        for name, item in self._loggers.items():
            try:
                item.finalize("failed" if failed else "success")
            finally:
                if name == "wandb":  # an unfinished run would absorb the next job of a sweep
                    import wandb

                    wandb.finish(exit_code=int(failed))

    def start(self) -> list[Any]:
        """Open the loggers, log the hyperparameters, and return the loggers for Lightning's Trainer."""
        import prts._torchvision  # noqa: F401  (first: Lightning imports torchvision)

        for name, spec in self._specs.items():
            # mlflow creates its database on first use: jobs that start at the same time would collide
            with lock(self._root / "mlflow.db") if name == "mlflow" else nullcontext():
                item = spec.build(**{**self._defaults(name), **spec.settings})
                if name == "wandb":  # Lightning always passes a setting that wandb warns is deprecated
                    item._wandb_init.pop("anonymous", None)
                item.log_hyperparams(self._hyperparameters)
            self._loggers[name] = item
        return list(self._loggers.values())

    def results(self, metrics: Mapping[str, Any]) -> None:
        """Log the final metrics, per_gene.csv and figures/ of the run folder.

        Parameters
        ----------
        metrics
            Content of metrics.json.
        """
        figures = sorted((self._folder / "figures").glob("*.png"))
        numbers = {
            key: float(value) for key, value in metrics.items() if isinstance(value, int | float) and value == value
        }
        senders = {"tensorboard": _to_tensorboard, "wandb": _to_wandb, "mlflow": _to_mlflow}
        for name, item in self._loggers.items():
            if name in senders:
                senders[name](item, numbers, self._folder / "per_gene.csv", figures)

    @property
    def _root(self) -> Path:
        return self._sweep or self._folder

    def _defaults(self, name: str) -> dict[str, Any]:
        group = self._sweep.name if self._sweep else None
        if name == "wandb":
            return {"save_dir": str(self._folder), "name": self._title, "group": group}
        if name == "mlflow":
            root = self._root.absolute()
            return {
                "experiment_name": group or "prts",
                "run_name": self._title,
                "tracking_uri": f"sqlite:///{root / 'mlflow.db'}",
                "artifact_location": (root / "mlartifacts").as_uri(),
            }
        return {"save_dir": str(self._folder)}


def _to_tensorboard(item: Any, numbers: Mapping[str, float], per_gene: Path, figures: list[Path]) -> None:
    import numpy as np
    import pandas as pd
    from PIL import Image

    item.log_hyperparams(item.hparams, metrics={key: numbers[key] for key in _HPARAM_METRICS if key in numbers})
    best = pd.read_csv(per_gene).sort_values("pcc", ascending=False).head(50)
    item.experiment.add_text("best genes", _markdown(best))
    for figure in figures:
        with Image.open(figure) as image:
            image.thumbnail((1600, 1600))
            item.experiment.add_image(figure.stem, np.asarray(image.convert("RGB")), dataformats="HWC")


def _to_wandb(item: Any, numbers: Mapping[str, float], per_gene: Path, figures: list[Path]) -> None:
    import pandas as pd
    import wandb

    item.experiment.summary.update(dict(numbers))
    images = {f"figures/{figure.stem}": wandb.Image(str(figure)) for figure in figures}
    item.experiment.log({"per_gene": wandb.Table(dataframe=pd.read_csv(per_gene)), **images})


def _to_mlflow(item: Any, numbers: Mapping[str, float], per_gene: Path, figures: list[Path]) -> None:
    import pandas as pd

    item.log_metrics(dict(numbers))
    item.experiment.log_table(item.run_id, pd.read_csv(per_gene), "per_gene.json")
    for path in (per_gene, *figures):
        item.experiment.log_artifact(item.run_id, str(path))


def _markdown(table: Any) -> str:
    """A table as Markdown, which TensorBoard renders."""
    rows = [
        [f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in row]
        for row in table.itertuples(index=False)
    ]
    lines = [list(table.columns), ["---"] * len(table.columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
