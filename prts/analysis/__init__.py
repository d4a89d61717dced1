"""What a predicted or measured section shows: clusters, their names, what their genes do, and how the two agree."""
