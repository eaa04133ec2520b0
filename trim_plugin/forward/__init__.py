"""Knows what one forward does to a cache: steps, and the hooks that run them. Imports `cache`, `rules` and `attention`."""
