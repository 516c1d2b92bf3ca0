"""Which features make which others fire, and what a model computes with them."""
