"""From bins and pixels to counts per nucleus: aggregation, quality control, gene panel, stain, artifacts."""
