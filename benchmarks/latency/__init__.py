"""Prefill and decoding time, eager and compiled."""
