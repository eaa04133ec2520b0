"""Every method of choosing visual tokens: its setting, and the same rule restated one token at a time."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from trim_plugin import KCenter, TopPPerHead, VisualTokenProcessor

from .restatement import Rule


def top_k(ratio: float) -> Rule:
    """Every head keeps its best tokens; of equal ones the first."""

    def rule(scores: torch.Tensor, members: list[int], states: torch.Tensor) -> set[int]:
        count = max(1, math.ceil(ratio * len(members)))
        kept = set()
        for row in scores.tolist():
            ranking = sorted(range(len(members)), key=lambda place: (-row[place], place))
            kept |= {members[place] for place in ranking[:count]}
        return kept

    return rule


def top_p(mass: float) -> Rule:
    """Every head keeps its best tokens until they hold the mass."""

    def rule(scores: torch.Tensor, members: list[int], states: torch.Tensor) -> set[int]:
        kept = set()
        for row in scores.tolist():
            ranking = sorted(range(len(members)), key=lambda place: (-row[place], place))
            held = 0.0
            for place in ranking:
                if held > 0.0 and held >= mass * sum(row):
                    break
                kept.add(members[place])
                held += row[place]
        return kept

    return rule


def k_center(kept_share: float | None = None, radius: float | None = None) -> Rule:
    """The token most like the mean, then always the one that is least like those chosen so far."""

    def rule(scores: torch.Tensor, members: list[int], states: torch.Tensor) -> set[int]:
        unit = torch.nn.functional.normalize(states[members].double(), dim=-1)
        chosen = [int((unit @ unit.mean(dim=0)).argmax())]
        count = len(members) if kept_share is None else max(1, math.ceil(kept_share * len(members) - 1e-9))
        while len(chosen) < count:
            nearest = (unit @ unit[chosen].T).amax(dim=1)
            nearest[chosen] = math.inf
            if radius is not None and float(nearest.min()) >= 1.0 - radius:
                break
            chosen.append(int(nearest.argmin()))
        return {members[place] for place in chosen}

    return rule


def every_third(scores: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    """A user's function: the first, fourth, seventh ... token of a group."""
    return scores.masked_fill((visible.long().cumsum(dim=-1) % 3 != 1)[:, None], -math.inf)


def longest_states(scores: torch.Tensor, visible: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    """A user's function that looks at the states: those of more than mean length, for the first head only."""
    lengths = states.norm(dim=-1).masked_fill(~visible, 0.0)
    long = lengths >= lengths.sum(dim=-1, keepdim=True) / visible.sum(dim=-1, keepdim=True)
    kept = torch.full_like(scores, -math.inf)
    kept[:, 0] = scores[:, 0].masked_fill(~(long & visible), -math.inf)
    return kept


longest_states.needs_states = True


class ButTheFirst(VisualTokenProcessor):
    """A stage of a chain: all but a group's first token, unless that is all there is."""

    def __call__(self, scores: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        first = visible & (visible.long().cumsum(dim=-1) == 1) & (visible.sum(dim=-1, keepdim=True) > 1)
        return scores.masked_fill(first[:, None], -math.inf)


def _every_third(scores: torch.Tensor, members: list[int], states: torch.Tensor) -> set[int]:
    return set(members[::3])


def _longest(scores: torch.Tensor, members: list[int], states: torch.Tensor) -> set[int]:
    lengths = {token: float(states[token].double().norm()) for token in members}
    return {token for token in members if lengths[token] >= sum(lengths.values()) / len(members)}


def _but_the_first(then: Callable[..., set[int]]) -> Rule:
    def rule(scores: torch.Tensor, members: list[int], states: torch.Tensor) -> set[int]:
        rest = slice(1 if len(members) > 1 else 0, None)
        return then(scores[:, rest], members[rest], states)

    return rule


#: name -> (fields of `TrimConfig`, the rule restated; None: nothing is dropped that decoding could read)
METHODS: dict[str, tuple[dict, Rule | None]] = {
    "exact": ({"top_k_ratio": 1.0}, None),
    "top-k 0.4": ({"top_k_ratio": 0.4}, top_k(0.4)),
    "top-k 0.1": ({"top_k_ratio": 0.1}, top_k(0.1)),
    "top-p": ({"processors": [TopPPerHead(0.5)]}, top_p(0.5)),
    "k-center share": ({"processors": [KCenter(0.25)]}, k_center(kept_share=0.25)),
    "k-center radius": ({"processors": [KCenter(radius=0.5)]}, k_center(radius=0.5)),
    "a function": ({"processors": [every_third]}, _every_third),
    "a function of states": ({"processors": [longest_states]}, _longest),
    "a chain": ({"processors": [ButTheFirst(), KCenter(0.3)]}, _but_the_first(k_center(0.3))),
}
