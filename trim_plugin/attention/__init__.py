"""Knows masks, visibility and attention scores: tensors only. Imports nothing of the package."""
