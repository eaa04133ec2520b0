"""Rules that choose visual tokens, to be compared with the paper's."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch

import trim_plugin.prefill
from trim_plugin import VisualTokenProcessor


def _keep_best(scores: torch.Tensor, ranking: torch.Tensor, visible: torch.Tensor, share: float) -> torch.Tensor:
    """All heads keep the tokens with the largest `ranking` (batch, tokens): a given share of the visible ones."""
    kept = torch.zeros_like(visible)
    ranking = ranking.masked_fill(~visible, -math.inf)
    for sample, group in enumerate(visible.sum(dim=-1).tolist()):
        best = ranking[sample].sort(descending=True, stable=True).indices[: max(1, round(share * group))]
        kept[sample, best] = True
    return scores.masked_fill(~kept[:, None], -math.inf)


@dataclasses.dataclass
class HeadMean(VisualTokenProcessor):
    """The tokens with the highest mean score over the heads."""

    share: float

    def __call__(self, scores: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        return _keep_best(scores, scores.mean(dim=1), visible, self.share)


@dataclasses.dataclass
class HeadMax(VisualTokenProcessor):
    """The tokens with the highest score of any head: a budget that sharp heads use more of."""

    share: float

    def __call__(self, scores: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        return _keep_best(scores, scores.amax(dim=1), visible, self.share)


@dataclasses.dataclass
class BestRank(VisualTokenProcessor):
    """The tokens that rank best in any head, to an exact budget: the paper's union, with k chosen to fit a share."""

    share: float

    def __call__(self, scores: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        ranks = scores.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        return _keep_best(scores, -ranks.amin(dim=1).float() + scores.mean(dim=1) * 1e-3, visible, self.share)


@dataclasses.dataclass
class SharpnessWeighted(VisualTokenProcessor):
    """Mean over the heads, each weighted by how far its attention is from even."""

    share: float

    def __call__(self, scores: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        attention = scores.clamp(min=0.0)
        attention = attention / attention.sum(dim=-1, keepdim=True).clamp(min=1e-30)
        entropy = -(attention * attention.clamp(min=1e-30).log()).sum(dim=-1, keepdim=True)
        even = visible.sum(dim=-1).float().log()[:, None, None].clamp(min=1e-6)
        return _keep_best(scores, (attention * (1 - entropy / even).clamp(min=0.0)).mean(dim=1), visible, self.share)


@dataclasses.dataclass
class RandomTokens(VisualTokenProcessor):
    """Tokens drawn at random."""

    share: float
    seed: int = 0

    def __post_init__(self) -> None:
        self._generator = torch.Generator().manual_seed(self.seed)

    def __call__(self, scores: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        drawn = torch.rand(visible.shape, generator=self._generator).to(scores.device)
        return _keep_best(scores, drawn, visible, self.share)


@dataclasses.dataclass
class EvenlySpaced(VisualTokenProcessor):
    """Every n-th visible token: a uniform grid, which also serves where a benchmark needs a given share."""

    share: float

    def __call__(self, scores: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        order = visible.long().cumsum(dim=-1) * self.share
        kept = visible & (order.floor() > (order - self.share).floor())
        # At least one token of every group.
        kept |= visible & (visible.long().cumsum(dim=-1) == 1) & ~kept.any(dim=-1, keepdim=True)
        return scores.masked_fill(~kept[:, None], -math.inf)


@contextlib.contextmanager
def last_row_votes() -> Iterator[None]:
    """Within this context only the prompt's last row votes; processors get its attention as scores."""
    scored = trim_plugin.prefill.visual_token_scores

    def of_last_row(queries: torch.Tensor, keys: torch.Tensor, visibility: Any, scaling: float) -> torch.Tensor:
        last = visibility.voters.clone()
        rows = torch.arange(last.shape[1])
        last &= rows == (last * rows).amax(dim=1, keepdim=True)
        return scored(queries, keys, dataclasses.replace(visibility, voters=last), scaling)

    with mock.patch.object(trim_plugin.prefill, "visual_token_scores", of_last_row):
        yield
