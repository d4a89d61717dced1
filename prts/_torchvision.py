"""Let a CPU build of torch live beside a CUDA build of torchvision.

PyPI serves torchvision for Linux built for CUDA only. Beside a CPU torch its compiled part cannot load, and `import torchvision` raises
RuntimeError ("operator torchvision::nms does not exist") where timm, torchmetrics and Lightning expect ImportError or success. Declaring
the two operators that the import registers fake kernels for is enough: transforms and all that prts needs then work; nms itself does not,
and nothing here calls it.

Importing this module does that, and does nothing where torchvision's own operators load.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)

# Kept alive: the operators vanish with the library object that defined them.
_library: torch.library.Library | None = None


def _compiled_part_loads() -> bool:
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return True  # nothing to mend
    for extension in Path(spec.origin).parent.glob("_C*"):
        try:
            torch.ops.load_library(extension)  # type: ignore[no-untyped-call]
        except OSError:
            return False
        return True
    return False


if torch.version.cuda is None and not hasattr(torch.ops.torchvision, "nms") and not _compiled_part_loads():
    _library = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
    for _schema in _SCHEMAS:
        _library.define(_schema)  # type: ignore[no-untyped-call]
