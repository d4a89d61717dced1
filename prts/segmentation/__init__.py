"""Finding nuclei in an H&E image, or reading those that another tool found."""
