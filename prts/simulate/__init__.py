"""A synthetic Visium HD section with known truth."""
