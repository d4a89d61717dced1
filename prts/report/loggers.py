"""Where a training run reports to: curves while it trains, test figures, the per-gene table and the figures when it is done.

Loggers are Lightning's. A run opens those that its config names, and closes them whatever happens, so that the next job of a sweep starts
its own.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from prts.errors import InputError
from prts.io.cache import lock

if TYPE_CHECKING:
    from omegaconf import DictConfig

logger = logging.getLogger(__name__)

_EXTRAS = {"tensorboard": ("tensorboard", "loggers"), "wandb": ("wandb", "loggers"), "mlflow": ("mlflow", "mlflow")}
_HPARAM_METRICS = ("val/pcc_mean", "test/pcc_mean", "test/ceiling_share", "test/auroc", "test/mcc")


class RunLoggers:
    """The loggers of one run; a context that closes them, as failed if it is left by an exception.

    Parameters
    ----------
    cfg
        The run's whole config; its node `logger` names the loggers.
    folder
        The run folder.

    Raises
    ------
    InputError
        If the package of a logger is not installed.
    """

    def __init__(self, cfg: DictConfig, folder: Path) -> None:
        self._cfg, self._folder = cfg, Path(folder)
        self._loggers: dict[str, Any] = {}
        for name in cfg.logger or {}:
            package, extra = _EXTRAS.get(name, ("", ""))
            if package and importlib.util.find_spec(package) is None:
                raise InputError(f"logger={name}: {package} is not installed; pip install 'prts[{extra}]'")

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
                if name == "wandb":  # an unfinished run would swallow the next job of a sweep
                    import wandb

                    wandb.finish(exit_code=int(failed))

    def start(self) -> list[Any]:
        """Open the loggers, note the config in each, and return them for Lightning's Trainer."""
        from hydra.utils import instantiate
        from omegaconf import OmegaConf

        import prts._torchvision  # noqa: F401  (first: Lightning imports torchvision)

        if not self._cfg.logger:
            return []
        config = OmegaConf.to_container(self._cfg, resolve=True)
        assert isinstance(config, dict)
        sweep, title = _place(self._cfg)
        for name, node in self._cfg.logger.items():
            settings = {key: value for key, value in node.items() if value is not None}
            given = {**self._defaults(name, sweep, title), **settings}
            # jobs that start at once would each set up mlflow's database
            with lock(self._root(sweep) / "mlflow.db") if name == "mlflow" else nullcontext():
                item = instantiate(given)
                item.log_hyperparams({key: value for key, value in config.items() if key != "logger"})
            self._loggers[name] = item
        return list(self._loggers.values())

    def results(self, metrics: Mapping[str, Any]) -> None:
        """Send what the run folder holds now, per_gene.csv and figures/, and the final metrics.

        Parameters
        ----------
        metrics
            As in metrics.json.
        """
        figures = sorted((self._folder / "figures").glob("*.png"))
        numbers = {
            key: float(value) for key, value in metrics.items() if isinstance(value, int | float) and value == value
        }
        senders = {"tensorboard": _to_tensorboard, "wandb": _to_wandb, "mlflow": _to_mlflow}
        for name, item in self._loggers.items():
            if name in senders:
                senders[name](item, numbers, self._folder / "per_gene.csv", figures)

    def _root(self, sweep: Path | None) -> Path:
        return sweep or self._folder

    def _defaults(self, name: str, sweep: Path | None, title: str) -> dict[str, Any]:
        if name == "wandb":
            return {"save_dir": str(self._folder), "name": title, "group": sweep.name if sweep else None}
        if name == "mlflow":
            root = self._root(sweep).absolute()
            return {
                "experiment_name": sweep.name if sweep else "prts",
                "run_name": title,
                "tracking_uri": f"sqlite:///{root / 'mlflow.db'}",
                "artifact_location": (root / "mlartifacts").as_uri(),
            }
        return {"save_dir": str(self._folder)}


def _place(cfg: DictConfig) -> tuple[Path | None, str]:
    """The folder of the sweep that this run is a job of, if any, and a name for the run."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    if not HydraConfig.initialized() or HydraConfig.get().mode is not RunMode.MULTIRUN:
        return None, str(cfg.tissue.name)
    hydra = HydraConfig.get()
    return Path(hydra.sweep.dir), f"{hydra.job.num} {hydra.job.override_dirname}".strip()


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
    """A table as TensorBoard draws text."""
    rows = [
        [f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in row]
        for row in table.itertuples(index=False)
    ]
    lines = [list(table.columns), ["---"] * len(table.columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
