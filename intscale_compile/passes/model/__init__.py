"""Passes that rewrite the graph around the W4A8 linears: attention, masks, counters of a cache."""
