"""Figures, interactive pages, summaries of sweeps, and loggers."""
