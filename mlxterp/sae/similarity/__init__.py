"""Which features are alike, within a coder and between coders."""
