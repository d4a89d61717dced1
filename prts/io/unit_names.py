"""What the units of a table are called: bins have barcodes, and everything else is a nucleus."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    import pandas as pd
    from numpy.typing import NDArray

BARCODE = re.compile(r"s_(\d{3})um_(\d{5})_(\d{5})-1")
"""Barcode of a bin: its side (um), row and column."""


def unit_name(cell_id: Sequence[str] | NDArray[np.object_] | pd.Index) -> str:
    """What units with these names are called in messages.

    Examples
    --------
    >>> unit_name(["s_008um_00012_00034-1"]), unit_name(["nucleus_000001"])
    ('bins', 'nuclei')
    """
    return "bins" if len(cell_id) and BARCODE.fullmatch(str(cell_id[0])) else "nuclei"
