"""Report how far the bins of each section were from its nuclei."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prts.preprocess.register import WARN_UM

if TYPE_CHECKING:
    from prts.data.prepare import PreparedTissue


def registration_figures(tissue: PreparedTissue, *, moved_back: bool) -> dict[str, float | str]:
    """How far the bins of each section lay off its nuclei; a warning where that was too far and is left so."""
    found = {name: prepared.registration for name, prepared in tissue.sections.items()}
    figures: dict[str, float | str] = {}
    for name, section in found.items():
        figures[f"registration/{name}/confidence"] = section.confidence
        if section.measured:
            figures[f"registration/{name}/shift_um"] = section.shift_um
            figures[f"registration/{name}/rotation_deg"] = section.rotation_deg
            figures[f"registration/{name}/displacement_um"] = section.displacement_um
    off = [name for name, section in found.items() if section.displacement_um > WARN_UM]
    if off and not moved_back:
        figures["warning/registration"] = (
            f"bins of {', '.join(off)} lie over {WARN_UM:g} um off the nuclei; preprocess.register=true moves them back"
        )
    return figures
