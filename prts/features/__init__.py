"""Image features of each nucleus: encoders, tiles, pooling, extraction and the store."""
