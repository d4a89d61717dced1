"""Single-cell spatial gene expression from an H&E image."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("prts")
except PackageNotFoundError:  # a source tree that nobody installed
    __version__ = "0+unknown"
