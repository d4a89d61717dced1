"""`prts prepare -m` with one tissue: a section is a job, and the panel comes after."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from prts.cli.check import check
from prts.cli.config import compose
from prts.cli.hydra_errors import explained
from prts.cli.overrides import MULTIRUN, quoted


def prepare_by_section(
    overrides: Sequence[str],
    flags: Sequence[str],
    folders: Sequence[Path],
    launch: Callable[[str, Sequence[str], Sequence[str], Sequence[Path]], int],
) -> int:
    """Check all sections, prepare each in a job of its own, and then choose the panel here.

    Parameters
    ----------
    overrides, flags, folders
        As for `prts.cli.hydra_main.launch`.
    launch
        That function.

    Returns
    -------
    The exit status.

    Raises
    ------
    InputError
        If sections cannot be used and none may be left out; it names all of them.
    """
    from prts.cli.prepare import tissue_settings
    from prts.data.prepare import check_sections

    # Hydra's own keys say how jobs are started
    ours = [each for each in overrides if not each.lstrip("+~").startswith(("hydra.", "hydra/"))]
    try:
        cfg = compose("prepare", ours, folders)
    except Exception as error:
        raise explained(error, "prepare", ours, folders) from error
    check("prepare", cfg)
    names = check_sections(*tissue_settings(cfg))
    # each job gets a folder with its log, as those of training do
    jobs = [f"section={','.join(map(quoted, names))}", "hydra.output_subdir=.hydra", "hydra/job_logging=run"]
    status = launch("prepare", [*overrides, *jobs], flags, folders)
    if status == 0 or (status == 2 and cfg.skip_bad):
        status = launch("prepare", ours, [flag for flag in flags if flag not in MULTIRUN], folders)
    return status
