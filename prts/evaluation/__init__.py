"""Scoring predictions: metrics, intervals, noise ceiling, baselines, and whole runs."""
