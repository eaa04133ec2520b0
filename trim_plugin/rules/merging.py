"""What becomes of the visual tokens that a rule drops: each joins the kept token that it resembles most.

Dropping tokens renormalises the softmax over what is left: with dropped attention mass m the output moves by m · (mean of the
dropped − mean of the kept). A kept token that carries the mean of its members, and log(number of members) on its attention
logit, takes up that mass instead. Sources: proportional attention, ToMe (Bolya et al. 2023, arXiv 2210.09461, section 3).
"""

from __future__ import annotations

import dataclasses

import torch

#: Tokens and kept tokens whose similarities are looked at together: bounds scratch, whatever the number of tokens.
BLOCK = 1024
#: float32 values that a block of tokens may take while means are summed up.
BLOCK_VALUES = 4 * 2**20


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

        Args:
            tensor: (batch, ..., tokens, features): visual states, keys or values.

        Returns:
            (batch, ..., width, features) in the tensor's dtype; a slot with one member holds it unchanged.
        """
        rows = tensor.movedim(-2, 1)  # (batch, tokens, ..., features)
        batch, tokens, *rest = rows.shape
        slots, weights = self.slots.to(tensor.device), self.weights.to(tensor.device)
        targets = slots + torch.arange(batch, device=tensor.device)[:, None] * self.width
        sums = torch.zeros(batch * self.width, *rest, dtype=torch.float32, device=tensor.device)
        block = max(1, BLOCK_VALUES // max(1, batch * rows[0, 0].numel()))
        for start in range(0, tokens, block):
            part = slice(start, start + block)
            weight = weights[:, part].reshape(batch, -1, *[1] * len(rest))
            weighted = torch.where(weight > 0, rows[:, part].float() * weight, 0.0)
            sums.index_add_(0, targets[:, part].reshape(-1), weighted.flatten(0, 1))
        sums /= self.sizes.to(tensor.device).view(-1, *[1] * len(rest))
        return sums.view(batch, self.width, *rest).movedim(1, -2).to(tensor.dtype)


def merge_dropped(
    states: torch.Tensor, kept: torch.Tensor, groups: torch.Tensor, sizes: torch.Tensor, positions: torch.Tensor
) -> Merging:
    """Let every dropped token join the kept token of its visibility group that is most like it.

    Similarity is the cosine of what is given as states: visual states or, better, the first cross-attention layer's keys of all
    heads, one after the other; equal ones prefer the lower index. Works in blocks: scratch stays under
    64 MiB, no matrix of all tokens × all kept tokens exists, and nothing waits for a number from the device.

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
    slots = torch.where(kept, own, _most_alike(states, kept, groups, positions))
    part_of_one = kept | (groups >= 0)
    return Merging(slots, sizes * part_of_one, positions.shape[1])


def _most_alike(
    states: torch.Tensor, kept: torch.Tensor, groups: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """int64 (batch, tokens): the slot of the kept token of the same group with the highest cosine."""
    batch, tokens, _ = states.shape
    slots = positions.shape[1]
    is_real = torch.arange(slots, device=kept.device) < kept.sum(dim=1, keepdim=True)
    kept_groups = groups.gather(1, positions).masked_fill(~is_real, -2)  # −2: no token is of this group
    nearest = torch.zeros(batch, tokens, dtype=torch.long, device=states.device)
    best = torch.full((batch, tokens), -torch.inf, device=states.device)
    block = max(16, BLOCK // batch)
    for first in range(0, slots, block):
        chosen = positions[:, first : first + block]
        features = states.gather(1, chosen[..., None].expand(-1, -1, states.shape[-1])).float()
        features = torch.nn.functional.normalize(features, dim=-1).transpose(1, 2)
        their_groups = kept_groups[:, None, first : first + block]
        for start in range(0, tokens, block):
            part = slice(start, start + block)
            # The token's own length scales all of its cosines alike, so it is left out.
            alike = states[:, part].float() @ features
            alike.masked_fill_(groups[:, part, None] != their_groups, -torch.inf)
            value, index = alike.max(dim=-1)
            better = value > best[:, part]
            best[:, part] = torch.where(better, value, best[:, part])
            nearest[:, part] = torch.where(better, index + first, nearest[:, part])
    return nearest
