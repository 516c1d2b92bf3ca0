"""Benchmark tasks on features: what they say, and how much of that is more than chance."""
