"""Why heads look where they look."""
