"""Rules that choose visual tokens, to be compared with the paper's."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch

import trim_plugin.forward.prefill
from benchmarks.common.given_share import EvenlySpaced
from trim_plugin import BestOfCells, TopKPerHead, VisualTokenProcessor


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
class HalfEven(VisualTokenProcessor):
    """Half of the budget evenly spaced, the other half the best of what is left."""

    share: float

    def __call__(self, scores: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        even = (EvenlySpaced(self.share / 2)(scores, visible) > -math.inf).any(dim=1)
        return _keep_best(scores, scores.amax(dim=1).masked_fill(even, math.inf), visible, self.share)


@dataclasses.dataclass
class DrawnByScore(VisualTokenProcessor):
    """Tokens drawn at random without replacement, in proportion to their mean score."""

    share: float
    seed: int = 0

    def __post_init__(self) -> None:
        self._generator = torch.Generator().manual_seed(self.seed)

    def __call__(self, scores: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        drawn = torch.rand(visible.shape, generator=self._generator).clamp(min=1e-9).to(scores.device)
        weights = scores.mean(dim=1).clamp(min=1e-12).log()  # Gumbel's trick
        return _keep_best(scores, weights - (-drawn.log()).log(), visible, self.share)


@dataclasses.dataclass
class CellsOnBudget(VisualTokenProcessor):
    """`BestOfCells` with as many tokens as `TopKPerHead(ratio)` keeps of the same group, or a part of them."""

    ratio: float
    part: float = 1.0

    def __call__(self, scores: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        kept = (TopKPerHead(self.ratio)(scores, visible) > -math.inf).any(dim=1).sum(dim=-1)
        # Half a token less, so that rounding up gives the budget itself.
        shares = (self.part * kept - 0.5).clamp(min=0.5) / visible.sum(dim=-1)
        chosen = [BestOfCells(float(shares[i]))(scores[i : i + 1], visible[i : i + 1]) for i in range(len(scores))]
        return torch.cat(chosen)


@contextlib.contextmanager
def last_row_votes() -> Iterator[None]:
    """Within this context only the prompt's last row votes; processors get its attention as scores."""
    scored = trim_plugin.forward.prefill.visual_token_scores

    def of_last_row(queries: torch.Tensor, keys: torch.Tensor, visibility: Any, *rest: Any) -> torch.Tensor:
        last = visibility.voters.clone()
        rows = torch.arange(last.shape[1])
        last &= rows == (last * rows).amax(dim=1, keepdim=True)
        return scored(queries, keys, dataclasses.replace(visibility, voters=last), *rest)

    with mock.patch.object(trim_plugin.forward.prefill, "visual_token_scores", of_last_row):
        yield


@contextlib.contextmanager
def value_norms_weigh() -> Iterator[None]:
    """Within this context every score is weighed by the norm of the token's value in that head: what is seen, not where."""
    choose, scored = trim_plugin.forward.prefill.Prefill._choose, trim_plugin.forward.prefill.visual_token_scores

    def choose_weighed(self: Any, layer: Any, hidden_states: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        norms = self._cache.layers[layer.layer_idx].values.float().norm(dim=-1)

        def weighed(*args: Any) -> torch.Tensor:
            scores = scored(*args)
            return scores * norms.repeat_interleave(scores.shape[1] // norms.shape[1], dim=1)

        with mock.patch.object(trim_plugin.forward.prefill, "visual_token_scores", weighed):
            return choose(self, layer, hidden_states, keys)

    with mock.patch.object(trim_plugin.forward.prefill.Prefill, "_choose", choose_weighed):
        yield
