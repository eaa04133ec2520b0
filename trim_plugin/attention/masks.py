"""Reading and cutting the additive masks of Mllama's cross-attention: (batch, 1, text rows, visual tokens).

`_prepare_cross_attention_mask` of transformers makes them, together with `open_rows` (its `full_text_row_masked_out_mask`),
(batch, 1, text rows, 1), which is 0 for blind rows. A blind row's mask is all zeros, like that of a row that sees everything.
"""

from __future__ import annotations

import torch


def is_open(mask: torch.Tensor) -> torch.Tensor:
    """Whether an additive mask lets through: anything above half the dtype's minimum."""
    return mask > torch.finfo(mask.dtype).min / 2


def last_row_reads(mask: torch.Tensor, padding: torch.Tensor | None = None) -> torch.Tensor:
    """What the last text row may read. A blind row reads everything: stock's mask for it is all zeros.

    Args:
        mask: additive (batch, 1, rows, tokens).
        padding: bool (batch or 1, rows), True for rows that are no text; None: the last row is text.

    Returns:
        bool (batch, tokens); all True for a sample without text.

    Example:
        >>> mask = torch.tensor([[[[0.0, torch.finfo(torch.float32).min], [0.0, 0.0]]]])
        >>> last_row_reads(mask).tolist(), last_row_reads(mask, torch.tensor([[False, True]])).tolist()
        ([[True, True]], [[True, False]])
    """
    if padding is None:
        return is_open(mask[:, 0, -1])
    rows = torch.arange(mask.shape[2], device=mask.device)
    last = torch.where(padding.to(mask.device), -1, rows).amax(dim=1).expand(len(mask))
    samples = torch.arange(len(mask), device=mask.device)
    return is_open(mask[samples, 0, last]) | (last < 0)[:, None]


def take_columns(mask: torch.Tensor, columns: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """The mask of these columns, int64 (batch, kept); closed where `valid`, bool (batch, kept), is False.

    Example:
        >>> mask = torch.tensor([[[[0.0, 1.0, 2.0]]]])
        >>> take_columns(mask, torch.tensor([[2, 1]]), torch.tensor([[True, False]])).flatten().tolist()
        [2.0, -3.4028234663852886e+38]
    """
    taken = mask.gather(3, columns.to(mask.device)[:, None, None].expand(-1, 1, mask.shape[2], -1))
    return close(taken, valid)


def take_square(mask: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """The mask (batch, 1, tokens, tokens) of a self-attention among these positions alone, int64 (batch, slots).

    Example:
        >>> take_square(torch.arange(9.0).view(1, 1, 3, 3), torch.tensor([[0, 2]])).tolist()
        [[[[0.0, 2.0], [6.0, 8.0]]]]
    """
    positions = positions.to(mask.device)
    samples = torch.arange(len(mask), device=mask.device)[:, None, None]
    # Indices are broadcast, not laid out: nothing wider than the result exists.
    return mask[samples, 0, positions[:, :, None], positions[:, None, :]][:, None]


def close(mask: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Close an additive mask where `valid`, bool (batch, tokens), is False."""
    return mask.masked_fill(~valid.to(mask.device)[:, None, None], torch.finfo(mask.dtype).min)


def open_mask(valid: torch.Tensor, rows: int, dtype: torch.dtype) -> torch.Tensor:
    """An additive mask (batch, 1, rows, tokens) in which every row reads every valid token.

    An explicit mask is needed even if all are valid and there are several rows: `sdpa_attention_forward` takes a module without
    `is_causal` for a causal one when it gets no mask.
    """
    batch, tokens = valid.shape
    return close(torch.zeros(batch, 1, rows, tokens, dtype=dtype, device=valid.device), valid)


def add_log_sizes(mask: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """The mask with log(size) added to every column: a token that stands for n others is read as n equal tokens would be.

    Args:
        mask: additive (batch, 1, rows, tokens).
        sizes: int64 (batch, tokens), how many visual tokens each stands for.

    Example:
        >>> add_log_sizes(torch.zeros(1, 1, 1, 2), torch.tensor([[1, 20]])).flatten().tolist()
        [0.0, 2.995732307434082]
    """
    # Added in float32 at least and cast once; clamped, since a closed column must not become -inf.
    wide = torch.promote_types(mask.dtype, torch.float32)
    summed = mask.to(wide) + sizes.to(mask.device, wide).log()[:, None, None]
    return summed.clamp_(min=torch.finfo(mask.dtype).min).to(mask.dtype)


def check_columns(mask: torch.Tensor, total: int) -> None:
    """Raise `ValueError` unless the mask covers exactly `total` visual tokens."""
    if mask.shape[-1] != total:
        raise ValueError(
            f"cross_attention_mask covers {mask.shape[-1]} visual tokens, but the pictures of this conversation are {total}. "
            "Give a mask over all images so far, earlier turns included: the processor makes it from the whole conversation."
        )


def reads_any(
    mask: torch.Tensor, open_rows: torch.Tensor | None, tokens: torch.Tensor, padding: torch.Tensor | None = None
) -> torch.Tensor:
    """0-dim bool: a row that is neither blind nor padding may read one of `tokens`, bool (batch, tokens).

    The mask's later columns don't matter. `padding` is bool (batch or 1, rows), or None if there is none.
    """
    reads = is_open(mask[..., : tokens.shape[1]]) & tokens.to(mask.device)[:, None, None]
    if open_rows is not None:
        reads &= open_rows.to(mask.device) != 0
    if padding is not None:
        reads &= ~padding.to(mask.device)[:, None, :, None]
    return reads.any()


def pack(chosen: torch.Tensor, multiple: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions of the chosen entries of every row, ascending, padded to the longest row.

    Args:
        chosen: bool (batch, width).
        multiple: the longest row is rounded up to a multiple of this.

    Returns:
        positions int64 (batch, longest), and bool (batch, longest) that is False for padding (which points anywhere).

    Example:
        >>> positions, valid = pack(torch.tensor([[True, False, True], [False, True, False]]))
        >>> positions.tolist(), valid.tolist()
        ([[0, 2], [1, 0]], [[True, True], [True, False]])
    """
    counts = chosen.sum(dim=1)
    longest = -(-int(counts.max()) // multiple) * multiple
    positions = (~chosen).to(torch.uint8).argsort(dim=1, stable=True)[:, :longest]
    if positions.shape[1] < longest:
        positions = torch.nn.functional.pad(positions, (0, longest - positions.shape[1]))
    return positions, torch.arange(longest, device=chosen.device) < counts[:, None]


LOST_TOKENS = (
    "cross_attention_mask lets this turn's text read visual tokens that the end of an earlier turn could not read: the trimmed "
    "cache has dropped them. Give the picture again (pixel_values), or start with a new cache and the whole conversation."
)
