"""Platforms that measure expression: each yields counts per nucleus."""
