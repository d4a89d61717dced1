"""Predictions in the formats of other tools: SpatialData, QuPath GeoJSON, Parquet, CSV."""
