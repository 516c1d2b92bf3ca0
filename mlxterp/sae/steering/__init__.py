"""Change what a model does through features, and measure it."""
