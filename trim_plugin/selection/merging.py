"""What becomes of the visual tokens that a rule drops: each joins the kept token that it resembles most.

Dropping tokens renormalises the softmax over what is left: with dropped attention mass m the output moves by m · (mean of the
dropped − mean of the kept). A kept token that carries the mean of its members, and log(number of members) on its attention
logit, takes up that mass instead. Sources: proportional attention, ToMe (Bolya et al. 2023, arXiv 2210.09461, section 3).
"""

from __future__ import annotations

import dataclasses
import math

import torch

#: float32 values that a block takes, 32 MiB: bounds scratch whatever the number of tokens and their width, and needs few
#: launches.
BLOCK_VALUES = 8 * 2**20


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

    @property
    def sizes(self) -> torch.Tensor:
        """int64 (batch, width): how many visual tokens each slot stands for; 1 in slots that are padding."""
        sizes = self.weights.new_zeros(len(self.weights), self.width)
        return sizes.scatter_add_(1, self.slots, self.weights).clamp_(min=1)

    def mean(self, tensor: torch.Tensor) -> torch.Tensor:
        """The members' means, weighted by what they stand for and summed in float32.

        Works in blocks of features and tokens: scratch beyond the result stays under 64 MiB.

        Args:
            tensor: (batch, ..., tokens, features): visual states, keys or values.

        Returns:
            (batch, ..., width, features) in the tensor's dtype; a slot with one member of size 1 holds it unchanged.
        """
        rows = tensor.movedim(-2, 1)  # (batch, tokens, heads or features, ...)
        batch, _, across, *rest = rows.shape
        means = rows.new_empty(batch, self.width, across, *rest)
        step = max(1, BLOCK_VALUES // max(1, 2 * batch * self.width * math.prod(rest)))
        for first in range(0, across, step):
            means[:, :, first : first + step] = self._mean_of(rows[:, :, first : first + step])
        return means.movedim(1, -2)

    def _mean_of(self, rows: torch.Tensor) -> torch.Tensor:
        """float32 (batch, width, ...): the means of (batch, tokens, ...)."""
        batch, tokens, *rest = rows.shape
        slots, weights = self.slots.to(rows.device), self.weights.to(rows.device)
        targets = slots + torch.arange(batch, device=rows.device)[:, None] * self.width
        sums = torch.zeros(batch * self.width, *rest, dtype=torch.float32, device=rows.device)
        block = max(1, BLOCK_VALUES // max(1, 2 * batch * math.prod(rest)))
        for start in range(0, tokens, block):
            part = slice(start, start + block)
            weight = weights[:, part].reshape(batch, -1, *[1] * len(rest))
            # Filled, since a token that is part of nothing need not be finite.
            weighted = (rows[:, part].float() * weight).masked_fill_(weight == 0, 0.0)
            sums.index_add_(0, targets[:, part].reshape(-1), weighted.flatten(0, 1))
            del weighted  # before the next block takes its place
        sums /= self.sizes.to(rows.device).view(-1, *[1] * len(rest))
        return sums.view(batch, self.width, *rest)


def merge_dropped(
    states: torch.Tensor, kept: torch.Tensor, groups: torch.Tensor, sizes: torch.Tensor, positions: torch.Tensor
) -> Merging:
    """Let every dropped token join the kept token of its visibility group that is most like it.

    Similarity is the cosine of what is given as states: visual states or, better, the first cross-attention layer's keys of all
    heads, one after the other; equal ones prefer the lower index. Works in blocks: scratch stays under
    64 MiB, no matrix of all tokens × all kept tokens exists, and nothing waits for a number from the device. For a page of the
    11B model, 6,404 tokens to 641 by keys of width 1,024: 8.4 GFLOP, 0.06 % of its prefill, in 100 operations.

    Args:
        states: (batch, tokens, width), what tokens are compared by.
        kept: bool (batch, tokens), the tokens that the rule kept.
        groups: int64 (batch, tokens), the visibility group of every token; −1 for tokens that nobody reads, which join nothing.
        sizes: int64 (batch, tokens), how many visual tokens each stands for already.
        positions: int64 (batch, slots), the kept tokens, ascending, and padding; see `masks.pack`.

    Example:
        >>> states = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.1, 0.9]]])
        >>> kept = torch.tensor([[True, True, False]])
        >>> ones = torch.ones(1, 3, dtype=torch.long)
        >>> merge_dropped(states, kept, 0 * ones, ones, torch.tensor([[0, 1]])).slots.tolist()
        [[0, 1, 1]]
    """
    own = (kept.long().cumsum(dim=1) - 1).clamp_(min=0)
    # As precise under autocast, and nothing to be remembered for gradients: which tokens are alike has none.
    with torch.no_grad(), torch.autocast(states.device.type, enabled=False):
        nearest = _most_alike(states, kept, groups, positions)
    slots = torch.where(kept, own, nearest)
    part_of_one = kept | (groups >= 0)
    return Merging(slots, sizes * part_of_one, positions.shape[1])


def _most_alike(
    states: torch.Tensor, kept: torch.Tensor, groups: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """int64 (batch, tokens): the slot of the kept token of the same group with the highest cosine."""
    batch, tokens, width = states.shape
    is_real = torch.arange(positions.shape[1], device=kept.device) < kept.sum(dim=1, keepdim=True)
    kept_groups = groups.gather(1, positions).masked_fill(~is_real, -2)  # −2: no token is of this group
    best_slot = torch.empty(batch, tokens, dtype=torch.long, device=states.device)
    per_sample = max(
        1, BLOCK_VALUES // max(1, positions.shape[1] * width)
    )  # samples whose kept tokens are laid out at a time
    for first in range(0, batch, per_sample):
        some = slice(first, first + per_sample)
        best_slot[some] = _most_alike_of(states[some], groups[some], positions[some], kept_groups[some])
    return best_slot


def _most_alike_of(
    states: torch.Tensor, groups: torch.Tensor, positions: torch.Tensor, kept_groups: torch.Tensor
) -> torch.Tensor:
    """The same for a few samples.

    As many kept tokens at a time as their features take a block, as many tokens as their cosines do.
    """
    batch, tokens, width = states.shape
    nearest, best = torch.zeros_like(groups), None
    chosen_block = min(positions.shape[1], max(16, BLOCK_VALUES // (batch * width)))
    block = max(16, BLOCK_VALUES // (batch * max(chosen_block, width)))
    for first in range(0, positions.shape[1], chosen_block):
        chosen = positions[:, first : first + chosen_block]
        features = states.gather(1, chosen[..., None].expand(-1, -1, width)).float()
        features = torch.nn.functional.normalize(features, dim=-1).transpose(1, 2)
        their_groups = kept_groups[:, None, first : first + chosen_block]
        values, indices = [], []
        for start in range(0, tokens, block):
            part = slice(start, start + block)
            # The token's own length scales all of its cosines alike, so it is left out.
            alike = torch.bmm(states[:, part].float(), features)
            value, index = alike.masked_fill_(groups[:, part, None] != their_groups, -torch.inf).max(dim=-1)
            del alike  # before the next block takes its place
            values.append(value)
            indices.append(index)
        value, index = torch.cat(values, dim=1), torch.cat(indices, dim=1)
        if best is None:
            best, nearest = value, index
        else:
            better = value > best
            best, nearest = torch.where(better, value, best), torch.where(better, index + first, nearest)
    return nearest
