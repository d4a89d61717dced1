"""Export predictions to other tools: SpatialData, QuPath GeoJSON, Parquet, CSV."""
