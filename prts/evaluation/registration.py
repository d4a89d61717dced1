"""Report the shift between the bins and nuclei of each section."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prts.platforms.base import WARN_UM

if TYPE_CHECKING:
    from prts.data.prepare import PreparedTissue


def registration_figures(tissue: PreparedTissue, *, moved_back: bool) -> dict[str, float | str]:
    """The shift between the counts and nuclei of each section, and a warning if it is large and was not corrected."""
    found = {
        name: prepared.registration for name, prepared in tissue.sections.items() if prepared.registration is not None
    }
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
            f"counts of {', '.join(off)} are over {WARN_UM:g} um off the nuclei; set the `register` option to correct them"
        )
    return figures
