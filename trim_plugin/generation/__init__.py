"""Knows where transformers' `generate` meets us: registration, checks, assisted decoding. Imports `forward` and below."""
