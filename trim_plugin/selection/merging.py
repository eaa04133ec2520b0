"""What becomes of the visual tokens that a rule drops: each joins the kept token that it resembles most.

Dropping tokens renormalises the softmax over what is left: with dropped attention mass m the output moves by m · (mean of the
dropped − mean of the kept). A kept token that carries the mean of its members, and log(number of members) on its attention
logit, takes up that mass instead. Sources: proportional attention, ToMe (Bolya et al. 2023, arXiv 2210.09461, section 3).
"""

from __future__ import annotations

import dataclasses
import functools
import math

import torch

from trim_plugin.selection.precision import full_float32

#: float32 values that all that exists beside the result at a time takes, 52 MiB: bounds scratch whatever the number of tokens and
#: their width, and needs few launches.
BLOCK_VALUES = 13 * 2**20


@dataclasses.dataclass(frozen=True)
class Merging:
    """Which kept token every visual token becomes part of. Kept tokens are packed: a sample's n-th is in slot n.

    Args:
        slots: int64 (batch, tokens), the slot of the kept token that a token joins; kept tokens join themselves.
        weights: int64 (batch, tokens), how many visual tokens a token stands for already; 0 where it is part of nothing.
        width: slots of a sample.

    Example:
        >>> joined = Merging(torch.tensor([[0, 0, 1]]), torch.tensor([[1, 1, 1]]), 2)
        >>> joined.sizes.tolist()
        [[2, 1]]
        >>> joined.mean(torch.tensor([[[1.0], [3.0], [5.0]]])).tolist()
        [[[2.0], [5.0]]]
    """

    slots: torch.Tensor
    weights: torch.Tensor
    width: int

    @functools.cached_property
    def sizes(self) -> torch.Tensor:
        """int64 (batch, width): how many visual tokens each slot stands for; 1 in slots that are padding."""
        sizes = self.weights.new_zeros(len(self.weights), self.width)
        return sizes.scatter_add_(1, self.slots, self.weights).clamp_(min=1)

    @functools.cached_property
    def _members(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """All samples' tokens, slot after slot; what each is of its slot; and where each slot begins. Tokens that are part of
        nothing are in a slot of their own, a sample's last."""
        slots = self.slots.masked_fill(self.weights == 0, self.width)
        share = self.weights.float() / self.sizes.gather(1, self.slots)
        if len(slots) > 1:
            slots = slots + torch.arange(len(slots), device=slots.device)[:, None] * (self.width + 1)
        ordered, order = slots.flatten().sort(stable=True)
        starts = torch.searchsorted(ordered, torch.arange(len(slots) * (self.width + 1), device=slots.device))
        return order, share.flatten()[order], starts

    def mean(self, tensor: torch.Tensor) -> torch.Tensor:
        """The members' means, weighted by what they stand for and summed in float32, always in the same order.

        Works in blocks of heads and features, three launches each: scratch beyond the result stays under 64 MiB.

        Args:
            tensor: (batch, ..., tokens, features): visual states, keys or values.

        Returns:
            (batch, ..., width, features) in the tensor's dtype; a slot with one member of size 1 holds it unchanged.
        """
        rows = tensor.movedim(-2, 1)  # (batch, tokens, heads or features, ...)
        batch, tokens, across, *rest = rows.shape
        members = [part.to(rows.device) for part in self._members]
        means = rows.new_empty(batch, self.width, across, *rest)
        each = max(1, math.prod(rest)) * (
            tokens + self.width + 1
        )  # float32 values of one sample, for one of what is across
        step = max(1, BLOCK_VALUES // (batch * each))
        some = min(batch, max(1, BLOCK_VALUES // each))
        for start in range(0, batch, some):
            own = self._of_samples(members, slice(start, min(start + some, batch)), tokens)
            for first in range(0, across, step):
                place = (slice(start, start + some), slice(None), slice(first, first + step))
                means[place] = self._mean_of(rows[place], *own)
        return means.movedim(1, -2)

    def _of_samples(self, members: list[torch.Tensor], samples: slice, tokens: int) -> list[torch.Tensor]:
        """`_members` of a few samples alone."""
        if samples.stop - samples.start == len(self.slots):
            return members
        own = slice(samples.start * tokens, samples.stop * tokens)
        slots = slice(samples.start * (self.width + 1), samples.stop * (self.width + 1))
        return [members[0][own] - own.start, members[1][own], members[2][slots] - own.start]

    def _mean_of(
        self, rows: torch.Tensor, order: torch.Tensor, share: torch.Tensor, starts: torch.Tensor
    ) -> torch.Tensor:
        """float32 (samples, width, ...): the means of (samples, tokens, ...)."""
        samples, tokens, *rest = rows.shape
        wide = rows.to(torch.float32, memory_format=torch.contiguous_format).reshape(samples * tokens, -1)
        # Not index_add_: on a GPU it adds in any order.
        means = torch.nn.functional.embedding_bag(order, wide, starts, mode="sum", per_sample_weights=share)
        return means.view(samples, self.width + 1, *rest)[:, : self.width]


def merge_dropped(
    states: torch.Tensor,
    kept: torch.Tensor,
    groups: torch.Tensor,
    sizes: torch.Tensor,
    positions: torch.Tensor,
    *,
    others: torch.Tensor | None = None,
    one_group: bool = False,
) -> Merging:
    """Let every dropped token join the kept token of its visibility group that is most like it.

    Similarity is the cosine of what is given as states: visual states or, better, the first cross-attention layer's keys of all
    heads, one after the other; equal ones prefer the lower index. Works in blocks: scratch stays under
    64 MiB, no matrix of all tokens × all kept tokens exists, and nothing waits for a number from the device. For a page of the
    11B model, 6,404 tokens to 641 by keys of width 1,024: 7.6 GFLOP, 0.06 % of its prefill.

    Args:
        states: (batch, tokens, width), what tokens are compared by.
        kept: bool (batch, tokens), the tokens that the rule kept.
        groups: int64 (batch, tokens), the visibility group of every token; −1 for tokens that nobody reads, which join nothing.
        sizes: int64 (batch, tokens), how many visual tokens each stands for already.
        positions: int64 (batch, slots), the kept tokens, ascending, and padding; see `masks.pack`.
        others: int64 (batch, some), among these are all dropped tokens; None: they may be anywhere.
        one_group: whether the samples have one visibility group each and keep equally many tokens.

    Example:
        >>> states = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.1, 0.9]]])
        >>> kept = torch.tensor([[True, True, False]])
        >>> ones = torch.ones(1, 3, dtype=torch.long)
        >>> merge_dropped(states, kept, 0 * ones, ones, torch.tensor([[0, 1]])).slots.tolist()
        [[0, 1, 1]]
    """
    with full_float32(states.device):
        nearest = _most_alike(states, kept, None if one_group else groups, positions, others)
    if others is not None:
        nearest = torch.zeros_like(groups).scatter_(1, others, nearest)
    slots = torch.where(kept, kept.cumsum(dim=1) - 1, nearest)
    return Merging(slots, sizes * (kept | (groups >= 0)), positions.shape[1])


def _most_alike(
    states: torch.Tensor,
    kept: torch.Tensor,
    groups: torch.Tensor | None,
    positions: torch.Tensor,
    others: torch.Tensor | None,
) -> torch.Tensor:
    """int64 (batch, tokens or others): the slot of the kept token of the same group with the highest cosine.

    Groups None: every slot is a token of the group.
    """
    batch, tokens, width = states.shape
    slots, asked = positions.shape[1], tokens if others is None else others.shape[1]
    kept_groups = None
    if groups is not None:
        is_real = torch.arange(slots, device=kept.device) < kept.sum(dim=1, keepdim=True)
        kept_groups = groups.gather(1, positions).masked_fill_(~is_real, -2)  # −2: no token is of this group
    # Samples and kept tokens at a time: a quarter for their features, which are float32 twice while they are made.
    some = max(1, BLOCK_VALUES // 4 // max(1, slots * width))
    few = slots if some > 1 else min(slots, max(16, BLOCK_VALUES // 4 // width))
    found = []
    for start in range(0, batch, some):
        own = slice(start, start + some)
        best: torch.Tensor | None = None
        nearest = positions
        for first in range(0, slots, few):
            part = slice(first, first + few)
            features = states[own].gather(1, positions[own, part, None].expand(-1, -1, width)).float()
            features = torch.nn.functional.normalize(features, dim=-1).transpose(1, 2)
            theirs = None if kept_groups is None else kept_groups[own, None, part]
            value, index = _most_alike_of(
                states[own],
                features,
                None if groups is None else groups[own],
                theirs,
                None if others is None else others[own],
                asked,
            )
            if best is None:
                best, nearest = value, index
            else:
                better = value > best
                best, nearest = torch.where(better, value, best), torch.where(better, index + first, nearest)
        found.append(nearest)
    return found[0] if len(found) == 1 else torch.cat(found)


def _most_alike_of(
    states: torch.Tensor,
    features: torch.Tensor,
    groups: torch.Tensor | None,
    their_groups: torch.Tensor | None,
    others: torch.Tensor | None,
    asked: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The highest cosine with `features`, (batch, width, slots), and its place, of as many tokens at a time as fit."""
    batch, width, slots = features.shape
    # A token's float32 values: its features, as they are where they are gathered, its cosines, and which of these count.
    each = width + (0 if others is None else width // 2) + slots + slots // 4
    block = max(16, BLOCK_VALUES * 3 // 4 // (batch * each))
    values, indices = [], []
    for start in range(0, asked, block):
        part = slice(start, start + block)
        rows, own = states[:, part], None if groups is None else groups[:, part]
        if others is not None:
            chosen = others[:, part]
            rows = states.gather(1, chosen[..., None].expand(-1, -1, width))
            own = None if groups is None else groups.gather(1, chosen)
        # The token's own length scales all of its cosines alike, so it is left out.
        alike = torch.bmm(rows.float(), features)
        if own is not None and their_groups is not None:
            alike.masked_fill_(own[..., None] != their_groups, -torch.inf)
        value, index = alike.max(dim=-1)
        del alike, rows  # before the next block takes its place
        values.append(value)
        indices.append(index)
    if len(values) == 1:
        return values[0], indices[0]
    return torch.cat(values, dim=1), torch.cat(indices, dim=1)
