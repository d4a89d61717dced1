"""How good a prediction is, against what, and how good it could be."""
