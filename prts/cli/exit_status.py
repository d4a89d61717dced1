"""Exit status and one-line message of an error.

0 success; 2 the input or the config is wrong; 1 a bug in prts; 130 interrupted; 143 terminated.
"""

from __future__ import annotations

from prts.errors import InputError, ParameterError, chain, out_of_memory, refusal

INTERRUPTED = 130
TERMINATED = 143

# The config key under which the parameters of each owner are set; that of others is their own name.
_KEYS = {
    "segmenter": "segmentation",
    "likelihood": "loss",
    "network": "model.net",
    "optimizer": "model.optimizer",
    "scheduler": "model.scheduler",
    "output": "model.output",
    "section": "tissue.sections",
}


def verdict(error: BaseException) -> tuple[int, str]:
    """The exit status of an error and the line that explains it."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException
    from yaml import MarkedYAMLError

    known = input_error(error)
    if known is not None:
        return 2, in_config_terms(known)
    if (memory := device_memory(error)) is not None:
        return 2, memory
    if (place := refusal(error)) is not None:
        return 2, place
    if isinstance(error, SystemExit):
        return system_exit_status(error), f"ended early ({type(error).__name__})"
    if isinstance(error, MarkedYAMLError):
        return 2, f"{str(error.problem_mark).strip()}: is not valid YAML ({error.problem}); correct that line"
    lines = str(error).strip().splitlines() or [""]
    if isinstance(error, OmegaConfBaseException) and error.__cause__ is None:
        where = f"{error.full_key}: " if error.full_key else ""
        return 2, f"{where}{lines[0]}; `--cfg job` prints the config"
    if isinstance(error, HydraException) and error.__cause__ is None:
        return 2, lines[0] or type(error).__name__
    return 1, f"{type(error).__name__}: {lines[0]}".removesuffix(": ")


def device_memory(error: BaseException | None) -> str | None:
    """Message if a device or torch ran out of memory, else None."""
    reason = out_of_memory(error)
    if reason is None:
        return None
    return (
        f"out of memory ({reason}); lower encoder.batch_size (features) or data.batch_size (training), "
        "or use another device (encoder.device=cpu, trainer=cpu)"
    )


def input_error(error: BaseException | None) -> InputError | None:
    """The InputError behind an exception that Hydra or a worker wrapped."""
    return next((each for each in chain(error) if isinstance(each, InputError)), None)


def in_config_terms(error: InputError) -> str:
    """The message of an error, naming a parameter by its config key.

    Examples
    --------
    >>> in_config_terms(ParameterError("segmenter", "floor", "'lots' is not accepted; give a number"))
    "segmentation.floor: 'lots' is not accepted; give a number"
    """
    if not isinstance(error, ParameterError):
        return str(error)
    key = ".".join(filter(None, (_KEYS.get(error.owner, error.owner), error.name)))
    return str(InputError(f"{key}: {error.problem}"))


def system_exit_status(error: SystemExit) -> int:
    """The status of a `SystemExit`; Lightning raises one without status when it is told to terminate."""
    if type(error).__name__ == "SIGTERMException":
        return TERMINATED
    if error.code is None:
        return 0
    return error.code if isinstance(error.code, int) else 1
