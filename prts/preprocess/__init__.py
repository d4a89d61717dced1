"""From pixels and bins to counts per nucleus: segmentation, aggregation, quality control, gene panel."""
