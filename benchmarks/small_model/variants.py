"""The models that this folder trains: what differs between them, and nothing else.

``coarse`` ships with the package. ``fine`` sees the same scenes at twice the resolution through patches of the same size, so that
a digit covers four times as many of them, and its text model has grouped heads, as the real Llama-3.2-Vision has.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Variant:
    """A model's resolution and heads."""

    name: str
    scale: int
    """How many times the coarse scenes' resolution its scenes have."""
    key_value_heads: int
    """Key-value heads of the text model, for 8 query heads."""
    patch: int = 5
    """Side of a patch in pixels."""

    @property
    def tile(self) -> int:
        """Side of a tile in pixels."""
        return 40 * self.scale

    @property
    def patches(self) -> int:
        """Visual tokens a tile: its patches and the class token."""
        return (self.tile // self.patch) ** 2 + 1


COARSE = Variant("coarse", scale=1, key_value_heads=8)
FINE = Variant("fine", scale=2, key_value_heads=2)
VARIANTS = {variant.name: variant for variant in (COARSE, FINE)}
