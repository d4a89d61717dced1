"""Image features of each nucleus: encoders, tiles, pooling, extraction and the store."""

import prts._torchvision  # noqa: F401  (must come before the first import of torchvision)
