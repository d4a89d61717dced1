"""The network, its losses, its Lightning part, the bundle it is saved as, and the baselines beside it."""

import prts._torchvision  # noqa: F401  (must come before the first import of torchvision)
