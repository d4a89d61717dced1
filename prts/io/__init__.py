"""Reading and writing: slides, Visium HD folders, nuclei, spots, predictions, and the cache they land in."""
