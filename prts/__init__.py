"""Single-cell spatial gene expression from an H&E image.

>>> import prts
>>> model = prts.Model.load("outputs/demo/make/model")  # doctest: +SKIP
>>> adata = model.predict("slide.svs", nuclei="watershed")  # doctest: +SKIP

Names are imported on first use, so `import prts` takes milliseconds.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from prts._numba import provide_cache

if TYPE_CHECKING:
    from prts.api.evaluate import Scores as Scores
    from prts.api.evaluate import evaluate as evaluate
    from prts.api.model import Model as Model
    from prts.api.polygons import nuclei_of as nuclei_of
    from prts.errors import InputError as InputError
    from prts.features import encoders as encoders
    from prts.section import Section as Section
    from prts.section import read_section as read_section
    from prts.section import read_visium_hd as read_visium_hd

_PUBLIC = {
    "InputError": "prts.errors",
    "Model": "prts.api.model",
    "Scores": "prts.api.evaluate",
    "Section": "prts.section",
    "encoders": "prts.features.encoders",
    "evaluate": "prts.api.evaluate",
    "nuclei_of": "prts.api.polygons",
    "read_section": "prts.section",
    "read_visium_hd": "prts.section",
}

__all__ = sorted([*_PUBLIC, "__version__"])


provide_cache()


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            value: Any = version("prts-spatial")
        except PackageNotFoundError:  # a source tree that is not installed
            value = "0+unknown"
    elif name in _PUBLIC:
        module = importlib.import_module(_PUBLIC[name])
        value = module if name == "encoders" else getattr(module, name)
    else:
        raise AttributeError(f"module 'prts' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
