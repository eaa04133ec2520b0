"""What is compared: rules that choose visual tokens, with what becomes of those that are dropped."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch

import trim_plugin.selection.select
from benchmarks.common.given_share import EvenlySpaced
from trim_plugin import KCenter, VisualTokenProcessor
from trim_plugin.selection.merging import Merging, merge_dropped

#: Kept shares of the rules that take one, and `top_k_ratio` of the paper's rule, whose union over heads keeps more. What matters
#: most comes first: a run that is cut off has it.
SHARES = (0.35, 0.25, 0.1, 0.5, 0.15, 0.05, 0.07, 0.025)
RATIOS = (0.15, 0.25, 0.1, 0.35, 0.05, 0.02, 0.03, 0.01)
#: Cosine distances within which every token must find a kept one: the kept share follows the picture.
RADII = (0.1, 0.2, 0.05)


@dataclasses.dataclass(frozen=True)
class Rule:
    """A rule with its parameter: a `TrimConfig`'s fields, and a context to answer in."""

    family: str
    parameter: float
    settings: dict[str, Any]
    context: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext


def all_rules(quick: bool = False) -> list[Rule]:
    """The planned comparison; `quick` leaves most parameters out."""
    shares, ratios, radii = (SHARES[:2], RATIOS[:2], RADII[:1]) if quick else (SHARES, RATIOS, RADII)
    found = [Rule("exact", 1.0, {"top_k_ratio": 1.0})]
    for share, ratio in itertools.zip_longest(shares, ratios):
        if share is not None:
            found.append(Rule("k-center, merged", share, {"processors": [KCenter(share)]}))
        if ratio is not None:
            found.append(Rule("paper, merged", ratio, {"top_k_ratio": ratio}))
    found += [Rule("paper, dropped", ratio, {"top_k_ratio": ratio, "merge": False}) for ratio in ratios]
    found += [Rule("k-center radius, merged", radius, {"processors": [KCenter(radius=radius)]}) for radius in radii]
    found += [Rule("k-center, dropped", share, {"processors": [KCenter(share)], "merge": False}) for share in shares]
    for share in shares:
        found.append(Rule("evenly spaced, merged", share, {"processors": [EvenlySpaced(share)]}))
        found.append(Rule("random, merged", share, {"processors": [RandomTokens(share)]}))
    for ratio in ratios:
        found.append(Rule("paper, log size only", ratio, {"top_k_ratio": ratio}, log_size_only))
        found.append(Rule("paper, mean only", ratio, {"top_k_ratio": ratio}, mean_only))
    return found


@dataclasses.dataclass
class RandomTokens(VisualTokenProcessor):
    """Tokens drawn at random."""

    share: float
    seed: int = 0

    def __post_init__(self) -> None:
        self._generator = torch.Generator().manual_seed(self.seed)

    def __call__(self, scores: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        drawn = torch.rand(visible.shape, generator=self._generator).to(scores.device).masked_fill_(~visible, -1.0)
        kept = torch.zeros_like(visible)
        for sample, group in enumerate(visible.sum(dim=-1).tolist()):
            kept[sample, drawn[sample].topk(max(1, round(self.share * group))).indices] = True
        return scores.masked_fill(~kept[:, None], -math.inf)


class _OwnStates(Merging):
    """Kept tokens stay what they are; their sizes count."""

    kept: torch.Tensor

    def mean(self, tensor: torch.Tensor) -> torch.Tensor:
        return Merging(self.slots, self.weights * self.kept, self.width).mean(tensor)


class _NoSizes(Merging):
    """Kept tokens become their members' means; their sizes don't count."""

    @property
    def sizes(self) -> torch.Tensor:
        return super().sizes.clamp(max=1)

    def mean(self, tensor: torch.Tensor) -> torch.Tensor:
        return Merging(self.slots, self.weights, self.width).mean(tensor)


def _log_sizes_of(features: torch.Tensor, kept: torch.Tensor, *rest: torch.Tensor, **named: Any) -> Merging:
    merging = merge_dropped(features, kept, *rest, **named)
    own = _OwnStates(merging.slots, merging.weights, merging.width)
    object.__setattr__(own, "kept", kept)
    return own


def _means_of(*given: torch.Tensor, **named: Any) -> Merging:
    merging = merge_dropped(*given, **named)
    return _NoSizes(merging.slots, merging.weights, merging.width)


@contextlib.contextmanager
def log_size_only() -> Iterator[None]:
    """Within this context a kept token takes its members' log size, but not their mean."""
    with mock.patch.object(trim_plugin.selection.select, "merge_dropped", _log_sizes_of):
        yield


@contextlib.contextmanager
def mean_only() -> Iterator[None]:
    """Within this context a kept token takes its members' mean, but not their log size."""
    with mock.patch.object(trim_plugin.selection.select, "merge_dropped", _means_of):
        yield
