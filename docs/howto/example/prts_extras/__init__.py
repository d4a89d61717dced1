"""Members of the registries of prts from another package."""
