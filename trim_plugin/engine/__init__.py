"""Knows how many requests are answered at once on one model. Imports `asking`, `pictures`, `planning` and below."""
