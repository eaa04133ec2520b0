"""Knows what is held: layers, the record of their tokens, batch operations, bytes. Imports `config` and `attention`."""
