"""Make a CUDA build of torchvision importable with a CPU build of torch.

For Linux, PyPI has only CUDA builds of torchvision. With a CPU build of torch their compiled part cannot be loaded, and
`import torchvision` raises RuntimeError ("operator torchvision::nms does not exist"), while timm, torchmetrics and Lightning only handle
ImportError (pytorch/vision #9077). It is enough to declare the two operators for which that import registers fake kernels. Everything that
prts uses then works; nms does not, and prts does not use it.

Importing this module does so, unless the operators of torchvision load.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)

# Kept alive: the operators disappear with the library object that defines them.
_library: torch.library.Library | None = None


def _compiled_part_loads() -> bool:
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return True  # nothing to fix
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
