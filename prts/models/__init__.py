"""Networks and linear models, likelihoods, training, bundles and prediction."""

import prts._torchvision  # noqa: F401  (must come before the first import of torchvision)
