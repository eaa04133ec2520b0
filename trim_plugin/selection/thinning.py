"""Fewer patches of a picture inside the vision tower: which stay, and which of these every other one joins.

Three kinds of tokens run through the tower, and only tokens of one kind are merged: patches of real tiles, which all read
everything; padding (whole padding tiles, and the few tokens that fill every tile up), which reads real tiles alone; and the class
tokens of real tiles, which stay alone.
"""

from __future__ import annotations

import torch

from trim_plugin.arithmetic import PADDING_SHARE
from trim_plugin.selection.k_center import KCenter, raise_if_nan
from trim_plugin.selection.merging import Merging, merge_dropped
from trim_plugin.selection.visibility import pack

#: The kinds of tokens in `kinds_of_tokens`.
PATCH, PADDING, CLASS = 0, 1, 2


def kinds_of_tokens(tiles: torch.Tensor, patches: int, tokens: int) -> torch.Tensor:
    """What every token of the tower is: `PATCH`, `PADDING` or `CLASS`.

    Args:
        tiles: bool (pictures, tiles), True for real tiles.
        patches: tokens of a tile, its class token counted, what fills it up left out.
        tokens: tokens of a picture, what fills tiles up counted.

    Returns:
        int64 (pictures, tokens).

    Example:
        >>> kinds_of_tokens(torch.tensor([[True, False]]), patches=3, tokens=8).tolist()
        [[2, 0, 0, 1, 1, 1, 1, 1]]
    """
    pictures, most = tiles.shape
    kinds = torch.full((pictures, most, tokens // most), PATCH, device=tiles.device)
    kinds[:, :, 0] = CLASS
    kinds[:, :, patches:] = PADDING
    kinds[~tiles] = PADDING
    return kinds.flatten(1)


def merge_alike(
    states: torch.Tensor, kinds: torch.Tensor, kept_share: float
) -> tuple[Merging, torch.Tensor, torch.Tensor]:
    """Merge tokens that are alike, all tiles of a picture together.

    Args:
        states: (pictures, tokens, width).
        kinds: int64 (pictures, tokens) on the CPU, see `kinds_of_tokens`: what is there to choose from is counted there.
        kept_share: share of the real tiles' patches that stay, rounded up.

    Returns:
        The merging; int64 (pictures, slots), the token that stands for each slot; and bool (pictures, slots), False for slots
        that are there because another picture has more.

    Example:
        >>> states = torch.tensor([[[1.0, 1.0], [1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]]])
        >>> merging, positions, _ = merge_alike(states, torch.tensor([[2, 0, 0, 0, 0]]), 0.5)
        >>> positions.tolist(), merging.sizes.tolist()
        ([[0, 2, 3]], [[1, 2, 2]])
    """
    on_device = kinds.to(states.device)
    nan_flags: list[torch.Tensor] = []
    kept, left = on_device == CLASS, (kinds == CLASS).sum(dim=1)
    # A picture may have no real tile, and nothing needs to be padding: of no members none are chosen.
    for kind, rule in ((PATCH, KCenter(kept_share)), (PADDING, KCenter(PADDING_SHARE))):
        counts = (kinds == kind).sum(dim=1).tolist()
        kept |= rule.choose(states, on_device == kind, sizes=[[count] for count in counts], nan_flags=nan_flags)
        left += torch.tensor([rule.keeps(count) for count in counts], device="cpu")
    raise_if_nan(nan_flags)
    positions, valid = pack(kept, longest=int(left.max()))
    return merge_dropped(states, kept, on_device, torch.ones_like(on_device), positions), positions, valid
