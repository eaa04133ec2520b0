"""A rule that keeps a given share, where it does not matter which tokens are kept."""

from __future__ import annotations

import dataclasses
import math

import torch

from trim_plugin import VisualTokenProcessor


@dataclasses.dataclass
class EvenlySpaced(VisualTokenProcessor):
    """Every n-th visible token: a uniform grid. Time and memory depend on the share alone."""

    share: float

    def __call__(self, scores: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        order = visible.long().cumsum(dim=-1) * self.share
        kept = visible & (order.floor() > (order - self.share).floor())
        # At least one token of every group.
        kept |= visible & (visible.long().cumsum(dim=-1) == 1) & ~kept.any(dim=-1, keepdim=True)
        return scores.masked_fill(~kept[:, None], -math.inf)
