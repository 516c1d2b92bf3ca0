"""Which features of one layer make which of a later one fire, over a dataset."""
