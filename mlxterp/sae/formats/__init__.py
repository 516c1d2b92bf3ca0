"""Files of other libraries: one module reads, and where it makes sense writes, each format."""
