"""Names for features, and how well they hold."""
