"""Knows memory from a configuration, without weights. Imports `config` and below."""
