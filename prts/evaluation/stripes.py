"""Report the stripes of the array of each section, without and with the exposures that explain them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import h5py

if TYPE_CHECKING:
    from prts.data.prepare import PreparedTissue


def stripe_figures(tissue: PreparedTissue) -> dict[str, float | str]:
    """Stripe index of each section whose exposures were fitted, and a warning where they do not lower it and were left off."""
    from anndata.io import read_elem

    figures: dict[str, float | str] = {}
    left_off = []
    for name, prepared in tissue.sections.items():
        with h5py.File(prepared.counts) as file:
            if "array_effects" not in file["uns/prts"]:
                continue
            found = read_elem(file["uns/prts/array_effects"])
        figures[f"stripes/{name}/before"] = float(found["stripes_before"])
        figures[f"stripes/{name}/after"] = float(found["stripes_after"])
        if not found["used"]:
            left_off.append(name)
    if left_off:
        figures["warning/exposure"] = (
            f"exposures do not lower the stripe index of {', '.join(left_off)} and were left off there"
        )
    return figures
