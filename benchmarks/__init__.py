"""Measurements against the tools that people would use instead. `make bench-capture` runs them."""
