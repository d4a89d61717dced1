"""From cached files to batches: preparation, splits, target scaling and the data module."""

import prts._torchvision  # noqa: F401  (must come before the first import of torchvision)
