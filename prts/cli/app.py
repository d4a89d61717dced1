"""What every command shares: its Hydra config, paths taken as typed, one-line errors and the exit status.

Exit status: 0 done; 2 the input or the config is wrong (one line on stderr); 1 a bug. `PRTS_DEBUG=1` shows the traceback of both.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import logging
import os
import re
import shutil
import sys
import traceback
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prts.errors import InputError, full_disk, refusal

if TYPE_CHECKING:
    from omegaconf import DictConfig

logger = logging.getLogger(__name__)

COMMANDS = ("simulate", "prepare", "train", "predict", "evaluate", "analyze", "report", "export", "download", "doctor")

# Keys whose value is a path: taken letter for letter, so that spaces, commas, = and brackets need no quoting for Hydra.
_PATH_KEYS = frozenset(
    "image out nuclei roi bundle prediction section train_section train_nuclei run second analysis markers orthologs visium "
    "enrich.obo enrich.annotations encoder.weights segmentation.model segmentation.path panel.path paths.data_dir paths.cache_dir "
    "hydra.run.dir hydra.sweep.dir".split()
)
_FLAGS = (
    "-m",
    "--multirun",
    "--cfg",
    "-c",
    "--resolve",
    "--package",
    "-p",
    "--info",
    "-i",
    "--config-dir",
    "-cd",
    "--run",
    "-r",
)


def config_dir() -> Path:
    """The folder of the config groups: inside an installed package, or beside it in a source tree."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "configs", package.parent / "configs"):
        if (folder / "train.yaml").is_file():
            return folder
    raise FileNotFoundError(f"no configs in {package} or beside it: the installation is damaged")


def nearest(word: str, known: Iterable[str]) -> str:
    """', did you mean ...?' for a mistyped word, or nothing where no known word is near."""
    known = list(known)
    match = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if not match and "." not in word:
        # a key typed without its group, `epochs` for `trainer.max_epochs`
        match = [key for key in known if key.rsplit(".", 1)[-1] == word][:1]
    return f", did you mean {match[0]!r}?" if match else ""


def overview() -> str:
    """The text of `prts --help`."""
    lines = [f"  {name:<10}{command_help(name).splitlines()[0].rstrip('.')}" for name in COMMANDS]
    return "\n".join(
        [
            "prts: single-cell spatial gene expression from an H&E image",
            "",
            "usage: prts <command> [key=value ...]",
            "",
            *lines,
            "",
            "`prts <command> --help` says what it takes; `prts <command> --cfg job` prints its whole config.",
            "Every command takes Hydra overrides; -m runs a grid: prts train -m ablation=full,local_only,global_only",
            "",
        ]
    )


def command_help(command: str) -> str:
    """The text of `prts <command> --help`: the docstring of the command's module."""
    return inspect.cleandoc(importlib.import_module(f"prts.cli.{command}").__doc__ or "") + "\n"


def quote_paths(arguments: Sequence[str]) -> list[str]:
    """Quote the values of path keys for Hydra's grammar.

    A grid over a path key still works: with `-m`, `encoder.weights=a.pth,b.pth` is left to Hydra unless a file of that whole name exists.
    """
    multirun = any(flag in arguments for flag in ("-m", "--multirun"))
    quoted = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        plain = key.lstrip("+")
        is_path = plain in _PATH_KEYS or re.fullmatch(r"tissue\.sections\.\w+\.(image|bins|nuclei|spots)", plain)
        grid = multirun and "," in value and not Path(value).exists()
        if not (equals and is_path and value) or value in ("null", "???") or value[0] in "'\"" or "${" in value or grid:
            quoted.append(argument)
            continue
        # in Hydra's quoted strings a backslash escapes only a quote, or another backslash before a quote or the end
        escaped = re.sub(r"(\\*)('|$)", lambda m: m[1] * 2 + ("\\'" if m[2] else ""), value)
        quoted.append(f"{key}='{escaped}'")
    return quoted


def _leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    from omegaconf import DictConfig

    if isinstance(node, DictConfig):
        for key in map(str, node):
            child = node._get_node(key)
            name = f"{prefix}{key}"
            yield name, child
            yield from _leaves(child, f"{name}.")


def _groups(roots: Iterable[Path]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for root in roots:
        for file in sorted(root.rglob("*.yaml")):
            if file.parent != root and not file.stem.startswith("_"):  # those are bases of other choices
                groups.setdefault(file.parent.relative_to(root).as_posix(), []).append(file.stem)
    return groups


def _own_configs(arguments: Sequence[str]) -> Path | None:
    """The user's folder of configs, `--config-dir`, whose groups add to ours."""
    for i, argument in enumerate(arguments):
        flag, equals, value = argument.partition("=")
        if flag in ("--config-dir", "-cd"):
            folder = Path(value if equals else "".join(arguments[i + 1 : i + 2]))
            if not folder.is_dir():
                raise InputError(f"--config-dir {folder}: no such folder")
            return folder.resolve()
    return None


def _check_overrides(command: str, overrides: Sequence[str], own: Path | None) -> None:
    """Refuse unknown keys, unknown choices and values of the wrong kind in one line, before Hydra runs."""
    from hydra import compose, initialize_config_dir
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import ConfigCompositionException, OverrideParseException
    from omegaconf import AnyNode

    groups = _groups([config_dir(), own] if own else [config_dir()])
    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
    except OverrideParseException as error:
        raise InputError(
            f"{error.override}: not a valid override; write key=value, and quote a value that holds brackets or commas"
        ) from error
    values: list[Any] = []
    choices = [f"hydra.searchpath=['file://{own}']"] if own else []
    for override in parsed:
        key = override.key_or_group
        if key == "hydra" or key.startswith(("hydra.", "hydra/")):
            continue
        if key not in groups:
            values.append(override)
            continue
        options = groups[key]
        names = [override.value()] if not override.is_sweep_override() else list(override.sweep_string_iterator())
        for name in names:
            for choice in name if isinstance(name, list) else [name]:
                if str(choice) not in options:
                    raise InputError(
                        f"{key}={choice}: no such choice{nearest(str(choice), options)} (there are: {', '.join(options)})"
                    )
        if not override.is_sweep_override():
            choices.append(override.input_line or "")
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        try:
            defaults = compose(command, choices)
        except ConfigCompositionException:
            return  # an unusual combination: let Hydra itself say what is wrong with it
    leaves = dict(_leaves(defaults))
    for override in values:
        key = override.key_or_group
        if override.is_add() or override.is_force_add() or override.is_delete():
            continue
        if key not in leaves:
            near = nearest(key, [*leaves, *groups])
            raise InputError(f"{key}: no such key{near or '; `prts ' + command + ' --cfg job` prints them all'}")
        node, value = leaves[key], None if override.is_sweep_override() else override.value()
        if not isinstance(node, AnyNode) or value is None or isinstance(node._value(), str | None):
            continue
        wanted, given = type(node._value()), type(value)
        if given is not wanted and not (wanted is float and given is int) and "${" not in str(value):
            raise InputError(f"{key}={value}: takes a value of type {wanted.__name__}, such as {node._value()}")


def _input_error(error: BaseException | None) -> InputError | None:
    """The InputError behind an exception that Hydra or a worker wrapped."""
    while error is not None:
        if isinstance(error, InputError):
            return error
        error = error.__cause__ or error.__context__
    return None


def verdict(error: Exception) -> tuple[int, str]:
    """Exit status of an error, and what it says in one line: 2 where input or config are wrong, 1 for a bug."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException
    from yaml import MarkedYAMLError

    known = _input_error(error)
    if known is not None:
        return 2, str(known)
    if (place := refusal(error)) is not None:
        return 2, place
    if isinstance(error, MarkedYAMLError):
        return 2, f"{str(error.problem_mark).strip()}: is not YAML as prts reads it ({error.problem}); mend that line"
    lines = str(error).strip().splitlines() or [""]
    if isinstance(error, HydraException | OmegaConfBaseException) and error.__cause__ is None:
        return 2, _plugin_hint(lines[0]) or type(error).__name__
    return 1, f"{type(error).__name__}: {lines[0]}".removesuffix(": ")


def _plugin_hint(text: str) -> str:
    """Name the extra where a launcher or sweeper is not installed."""
    if re.search(r"hydra/(launcher|sweeper)", text) and any(name in text for name in ("joblib", "submitit", "optuna")):
        return f"{text.rstrip('.')}: needs the extra `sweeps`, pip install 'prts[sweeps]'"
    return text


def run(command: str, arguments: Sequence[str]) -> int:
    """Run a command under Hydra.

    Parameters
    ----------
    command
        One of `COMMANDS`.
    arguments
        Hydra's flags and overrides, paths unquoted.

    Returns
    -------
    The exit status.
    """
    debug = os.environ.get("PRTS_DEBUG", "") not in ("", "0")
    previous = os.environ.get("HYDRA_FULL_ERROR")
    root = logging.getLogger()
    level, handlers = root.level, root.handlers[:]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises its errors instead of printing several lines of them
    try:
        quoted = quote_paths(arguments)
        for argument in quoted:
            if argument.startswith("-") and argument.split("=")[0] not in _FLAGS:
                raise InputError(f"{argument}: no such flag{nearest(argument, _FLAGS)}; options are written key=value")
        overrides = [argument for i, argument in enumerate(quoted) if _is_override(quoted, i)]
        flags = [argument for i, argument in enumerate(quoted) if not _is_override(quoted, i)]
        _check_overrides(command, overrides, _own_configs(flags))
        return _launch(command, [*overrides, *flags])  # Hydra's parser wants all overrides in one row
    except KeyboardInterrupt:
        sys.stderr.write("prts: interrupted; what is finished is kept, and the next run goes on from there\n")
        return 130
    except Exception as error:  # noqa: BLE001  (the last frame of the program: every error becomes an exit status)
        status, text = verdict(error)
        if debug or status == 1:
            traceback.print_exc()
        if status == 1:
            text = f"this is a bug in prts ({type(error).__name__}); please report it with the lines above"
        sys.stderr.write(f"prts: {text}\n")
        return status
    finally:
        # Hydra's handlers end with the command: one left behind would write to a run folder, or a stream, that is gone
        for handler in set(root.handlers) - set(handlers):
            handler.close()
        root.handlers[:] = handlers
        root.setLevel(level)
        if previous is None:
            os.environ.pop("HYDRA_FULL_ERROR", None)
        else:
            os.environ["HYDRA_FULL_ERROR"] = previous


def _is_override(arguments: Sequence[str], i: int) -> bool:
    takes_value = ("--cfg", "-c", "--package", "-p", "--info", "-i", "--config-dir", "-cd")
    return not arguments[i].startswith("-") and not (i and arguments[i - 1] in takes_value)


def _launch(command: str, arguments: list[str]) -> int:
    """Hand over to Hydra; a multirun of `train` ends with its summary, whatever became of its jobs."""
    import hydra

    from prts.cli.jobs import RememberSweep, supervise

    main: Any = importlib.import_module(f"prts.cli.{command}").main
    refused: list[InputError] = []

    @functools.wraps(main)
    def task(cfg: DictConfig) -> Any:
        from hydra.core.hydra_config import HydraConfig
        from hydra.types import RunMode

        multirun = HydraConfig.get().mode is RunMode.MULTIRUN
        if multirun and command == "train":
            return supervise(command, cfg)
        try:
            return main(cfg)
        except Exception as error:
            known = _input_error(error)
            if known is None or multirun:
                raise
            refused.append(known)  # Hydra would print a line of its own before ours
            if command == "train":
                _remove_bare_run()

    start = hydra.main(version_base="1.3", config_path=str(config_dir()), config_name=command)(task)
    RememberSweep.forget()
    # the module's own file: Lightning starts the further processes of a DDP job as `python <argv[0]> <overrides>`
    saved, sys.argv = sys.argv, [str(sys.modules[main.__module__].__file__), *arguments]
    try:
        for chances in (2, 1, 0):
            try:
                start()
                break
            except Exception as error:
                _name_run_folder(RememberSweep.run, error)
                if RememberSweep.folder is None or not chances or not _lost_worker(error):
                    raise
                # the launcher gave up all jobs because one worker was killed: those that are done are kept, the others start again
                logger.warning("a worker was killed (%s); starting again what is not done", type(error).__name__)
                sys.argv = [sys.argv[0], *arguments, *quote_paths([f"hydra.sweep.dir={RememberSweep.folder}"])]
    finally:
        sys.argv = saved
        summary = _summarise(RememberSweep.folder)
    if refused:
        raise refused[0]
    return summary


def _name_run_folder(folder: Path | None, error: Exception) -> None:
    """Raise an InputError where Hydra found the disk full when it made the run folder; whatever lies there then is of no use."""
    full = full_disk(error)
    if folder is not None and full is not None and _input_error(error) is None:
        _remove_bare_run()
        raise InputError(f"{folder}: {full}") from error


class RunLog(logging.FileHandler):
    """The log file of a run. On a full disk its lines get lost, and the run ends with what it cannot write that matters."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (logging's name)
        """Say nothing of a full disk here."""
        if full_disk(sys.exc_info()[1]) is None:
            super().handleError(record)

    def close(self) -> None:
        """Give up the lines that found no room."""
        try:
            super().close()
        except OSError as error:
            if full_disk(error) is None:
                raise


def _lost_worker(error: BaseException) -> bool:
    from concurrent.futures import BrokenExecutor

    return isinstance(error, BrokenExecutor) or type(error).__module__.startswith("submitit.")


def _summarise(folder: Path | None) -> int:
    """Write the summary of a multirun, name the jobs that failed, and return the exit status."""
    if folder is None or not folder.is_dir():
        return 0
    from prts.report.sweep import summarise

    jobs = summarise(folder)
    failed = jobs[jobs["status"] != "done"]
    for job in failed.itertuples():
        sys.stderr.write(f"prts: job {job.job}: {job.status}: {job.reason}\n")
    sys.stderr.write(f"prts: {len(jobs) - len(failed)} of {len(jobs)} jobs done: {folder / 'summary.html'}\n")
    if failed.empty:
        return 0
    return 2 if (failed["status"] == "wrong input").all() else 1


def _remove_bare_run() -> None:
    """Remove what Hydra made for a run that ended before it had anything to keep; nothing that was there before."""
    from prts.cli.jobs import RememberSweep

    folder, before = RememberSweep.run, RememberSweep.before
    if folder is None or not folder.is_dir() or before:
        return
    if {path.name for path in folder.iterdir()} <= {".hydra", "train.log"}:
        shutil.rmtree(folder / ".hydra", ignore_errors=True)
        (folder / "train.log").unlink(missing_ok=True)
        if before is None:
            folder.rmdir()


def require(cfg: DictConfig, *keys: str) -> None:
    """Say which required key of a command is missing, with an example value, before anything else happens."""
    from omegaconf import OmegaConf

    for key in keys:
        if OmegaConf.is_missing(cfg, key) or cfg[key] is None:
            raise InputError(f"{key}: is required; write {key}=... (`prts <command> --help` shows an example)")


def plain(node: DictConfig) -> dict[str, Any]:
    """A config node as plain Python containers, interpolations resolved."""
    from omegaconf import OmegaConf

    content = OmegaConf.to_container(node, resolve=True)
    assert isinstance(content, dict)
    return {str(key): value for key, value in content.items()}
