"""Keep the visual tokens that cover a picture: no token is far from a kept one. Needs no attention, so no prompt."""

from __future__ import annotations

import functools
import math

import torch

from trim_plugin.arithmetic import FEATURES, share
from trim_plugin.selection.precision import full_float32
from trim_plugin.selection.processors import VisualTokenProcessor
from trim_plugin.selection.visibility import pack

#: float32 values of states that are copied at a time.
BLOCK_VALUES = 2**20
#: Steps between two looks at the distances, where a radius and not a share says when to stop.
STEPS = 64


class KCenter(VisualTokenProcessor):
    """Greedy k-center choice over the visual states: each next token is the one that is least like all chosen so far.

    Distances are cosine distances of the uncentred visual states; the first token is the one most like the group's mean. Made
    for merging (`TrimConfig(merge=True)`), where a kept token stands for those that resemble it. Sources: Gonzalez 1985
    (farthest-point clustering); core-sets, Sener and Savarese, arXiv 1708.00489; DivPrune, arXiv 2503.02175.

    Cost for a group of N tokens of which K are kept: one product of N × width × 256 values, then K steps of N × 256, five small
    operations each; no N × K matrix exists, and no step waits for a number from the device (with a radius, every 64th). For a
    page of the 11B model, 6,404 tokens to 641: 15.5 GFLOP, 0.1 % of its prefill's 13.8 TFLOP, in 3,500 operations that touch
    5.0 GiB (`python -m benchmarks latency --merging` counts and times them). A GPU pays for the launches, not the arithmetic.
    Scratch: 256 float32 values a token, and at most 64 MiB beside them.

    Args:
        kept_share: share of a visibility group's visible tokens that is kept, rounded up, in (0, 1].
        radius: instead of a share: keep as many as it takes until no token is further than this, in (0, 1], from a kept one.

    Raises:
        ValueError: neither or both are given, or one is not a number in (0, 1].

    Example:
        >>> states = torch.tensor([[[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]]])
        >>> scores, visible = torch.ones(1, 1, 4), torch.ones(1, 4, dtype=torch.bool)
        >>> KCenter(0.5)(scores, visible, states)
        tensor([[[-inf, 1., 1., -inf]]])
    """

    needs_states = True

    def __init__(self, kept_share: float | None = None, *, radius: float | None = None) -> None:
        if (kept_share is None) == (radius is None):
            raise ValueError(
                "KCenter takes either kept_share or radius, for instance KCenter(0.1) or KCenter(radius=0.2)."
            )
        self.kept_share = None if kept_share is None else share("kept_share", kept_share)
        self.radius = None if radius is None else share("radius", radius)

    def __call__(self, scores: torch.Tensor, visible: torch.Tensor, states: torch.Tensor | None = None) -> torch.Tensor:
        """Keep the chosen tokens for all heads; shapes as in `VisualTokenProcessor.__call__`.

        Raises:
            TypeError: no `states` were given.
        """
        if states is None:
            raise TypeError("KCenter needs the visual states as a third argument.")
        left = visible & (scores != -math.inf).any(dim=1)
        return scores.masked_fill(~self.choose(states, left)[:, None], -math.inf)

    def choose(self, states: torch.Tensor, members: torch.Tensor) -> torch.Tensor:
        """The tokens to keep, without any prompt.

        Args:
            states: (batch, tokens, width), visual states.
            members: bool (batch, tokens), the tokens to choose among.

        Returns:
            bool (batch, tokens).
        """
        with full_float32(states.device):
            return self._chosen(states, members)

    def _chosen(self, states: torch.Tensor, members: torch.Tensor) -> torch.Tensor:
        positions, valid = pack(members)
        features = _features(states, positions)
        if self.kept_share is None:
            order, wanted = _until_covered(features, valid, 1.0 - float(self.radius or 0.0))
        else:
            counts = _rounded_up(self.kept_share, members.shape[1], members.device)[valid.sum(dim=1)]
            order = _farthest_first(features, valid, int(counts.max()))[0]
            wanted = torch.arange(order.shape[1], device=order.device) < counts[:, None]
        chosen = torch.zeros_like(members)
        # Slots beyond a sample's count repeat its first token, so that scattering needs no loop.
        tokens = positions.gather(1, torch.where(wanted, order, order[:, :1]))
        return chosen.scatter_(1, tokens, True) & members

    @property
    def arguments(self) -> dict[str, float | None]:
        """What makes an equal one."""
        return {"kept_share": self.kept_share} if self.radius is None else {"radius": self.radius}

    def __repr__(self) -> str:
        return f"KCenter({self.kept_share})" if self.radius is None else f"KCenter(radius={self.radius})"


@functools.lru_cache(maxsize=16)
def _rounded_up(kept_share: float, most: int, device: torch.device) -> torch.Tensor:
    """int64 (most + 1,): tokens to keep of every number of them. A table, so that 0.1 of 260 tokens are 26 whatever a device's
    float32 makes of it; some have no float64."""
    return torch.tensor([max(1, math.ceil(kept_share * count - 1e-9)) for count in range(most + 1)], device=device)


def _features(states: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """float32 (batch, packed tokens, features) of length 1: the states, or a random projection that keeps their distances."""
    batch, _, width = states.shape
    projection = _projection(width, states.device) if width > FEATURES else None
    found = states.new_empty(*positions.shape, min(width, FEATURES), dtype=torch.float32)
    block = max(1, BLOCK_VALUES // (batch * width))
    for start in range(0, positions.shape[1], block):
        part = slice(start, start + block)
        rows = states.gather(1, positions[:, part, None].expand(-1, -1, width)).float()
        rows = torch.nn.functional.normalize(rows, dim=-1)
        found[:, part] = rows if projection is None else torch.nn.functional.normalize(rows @ projection, dim=-1)
    return found


@functools.lru_cache(maxsize=4)
def _projection(width: int, device: torch.device) -> torch.Tensor:
    """The same Gaussian matrix (width, `FEATURES`) everywhere: which tokens are kept must not depend on a seed or a device."""
    drawn = torch.randn(width, FEATURES, generator=torch.Generator().manual_seed(0))
    return (drawn / math.sqrt(FEATURES)).to(device)


def _farthest_first(
    features: torch.Tensor, valid: torch.Tensor, steps: int, nearest: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose `steps` tokens of every sample one after the other, each least like those before.

    Args:
        features: float32 (batch, tokens, features), of length 1.
        valid: bool (batch, tokens); others are never chosen while a valid one is left.
        steps: tokens to choose.
        nearest: how like the most alike chosen token each token is, (batch, tokens), to go on from; None to begin.

    Returns:
        int64 (batch, steps), and `nearest` as it is now: inf for what was chosen or is not valid.
    """
    if nearest is None:
        mean = torch.bmm(valid[:, None].float(), features)
        alike = torch.bmm(features, mean.transpose(1, 2))[..., 0]
        current = alike.masked_fill_(~valid, -torch.inf).argmax(dim=1, keepdim=True)
        nearest = torch.full_like(features[..., 0], -torch.inf).masked_fill_(~valid, torch.inf)
    else:
        nearest = nearest.clone()
        current = nearest.argmin(dim=1, keepdim=True)
    order = []
    for _ in range(steps):
        order.append(current)
        chosen = features.gather(1, current[..., None].expand(-1, -1, features.shape[-1]))
        torch.maximum(nearest, torch.bmm(features, chosen.transpose(1, 2))[..., 0], out=nearest)
        nearest.scatter_(1, current, torch.inf)
        current = nearest.argmin(dim=1, keepdim=True)
    return torch.cat(order, dim=1), nearest


def _until_covered(features: torch.Tensor, valid: torch.Tensor, alike: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose until every token is at least `alike` to a chosen one: the order, and which of it each sample wants."""
    order, nearest = _farthest_first(features, valid, 1)
    orders, wanted = [order], [torch.ones_like(order, dtype=torch.bool)]
    while bool((nearest.amin(dim=1) < alike).any()):
        for _ in range(STEPS):
            wanted.append(nearest.amin(dim=1, keepdim=True) < alike)
            order, nearest = _farthest_first(features, valid, 1, nearest)
            orders.append(order)
    return torch.cat(orders, dim=1), torch.cat(wanted, dim=1)
