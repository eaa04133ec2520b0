"""Which text rows may read which visual tokens, read off the masks that Mllama makes."""

from __future__ import annotations

import dataclasses

import torch

from trim_plugin.attention.masks import is_open

# Rows of a mask are looked at in blocks of this many bytes, so that a long prompt with many images needs little scratch.
_BLOCK_BYTES = 16 * 2**20


@dataclasses.dataclass(frozen=True)
class Visibility:
    """Who may read what in one forward, for all samples.

    A mask's columns come in runs (a tile's patches share one column), so a run stands for its tokens. Lives on the CPU: what
    follows from it decides shapes.

    Args:
        rows: bool (batch, text rows, runs): the row may read the run's tokens. A blind row's entries are all False.
        voters: bool (batch, text rows): rows that are neither blind nor padding.
        lengths: int64 (runs,): visual tokens in each run.
    """

    rows: torch.Tensor
    voters: torch.Tensor
    lengths: torch.Tensor

    def spread(self, runs: torch.Tensor) -> torch.Tensor:
        """Turn a value for every run, (..., runs), into one for every visual token, (..., tokens).

        Example:
            >>> rows = torch.ones(1, 1, 2, dtype=torch.bool)
            >>> seen = Visibility(rows, rows[..., 0], torch.tensor([2, 1]))
            >>> seen.spread(torch.tensor([5, 7])).tolist()
            [5, 5, 7]
        """
        return runs.repeat_interleave(self.lengths, dim=-1)

    @property
    def visible(self) -> torch.Tensor:
        """bool (batch, tokens): visible to at least one voter."""
        return self.spread((self.rows & self.voters[..., None]).any(dim=1))

    def groups(self, first_token: int = 0) -> list[list[torch.Tensor]]:
        """The visibility groups of every sample, in the order of their first token.

        Args:
            first_token: tokens before this one belong to no group (they were selected in an earlier turn).

        Returns:
            For every sample a list of bool (tokens,): the tokens that the same voters may read.

        Example:
            >>> rows = torch.tensor([[[True, False, True], [False, True, False]]])
            >>> seen = Visibility(rows, rows.any(-1), torch.tensor([1, 2, 1]))
            >>> [group.tolist() for group in seen.groups()[0]]
            [[True, False, False, True], [False, True, True, False]]
        """
        old = torch.arange(int(self.lengths.sum())) < first_token
        found = []
        for rows, voters in zip(self.rows, self.voters, strict=True):
            columns = rows[voters].T
            patterns = columns.unique(dim=0) if columns.numel() else columns[:0]
            groups = [self.spread((columns == pattern).all(dim=1)) & ~old for pattern in patterns if pattern.any()]
            groups = [group for group in groups if bool(group.any())]
            found.append(sorted(groups, key=lambda group: int(group.int().argmax())))
        return found


def group_ids(groups: list[list[torch.Tensor]], tokens: int) -> torch.Tensor:
    """int64 (batch, tokens): the number of every token's visibility group in its sample; −1 where it has none.

    Args:
        groups: what `Visibility.groups` returns.
        tokens: visual tokens of a sample.

    Example:
        >>> group_ids([[torch.tensor([True, False, False]), torch.tensor([False, False, True])]], 3)
        tensor([[ 0, -1,  1]])
    """
    ids = torch.full((len(groups), tokens), -1)
    for own, members in zip(ids, groups, strict=True):
        for number, group in enumerate(members):
            own[group] = number
    return ids


def read_visibility(mask: torch.Tensor, open_rows: torch.Tensor | None, padding: torch.Tensor | None) -> Visibility:
    """Read the visibility off what a cross-attention decoder layer is called with.

    Args:
        mask: additive (batch, 1, rows, tokens), 0 where a row may read, as `_prepare_cross_attention_mask` of transformers
            makes it: a blind row is all zeros there.
        open_rows: (batch, 1, rows, 1), 0 for blind rows (`full_text_row_masked_out_mask`); None if no row is blind.
        padding: bool (batch, rows), True for padding; None if there is none.

    Example:
        >>> lowest = torch.finfo(torch.float32).min
        >>> mask = torch.tensor([[[[0.0, 0.0, lowest], [0.0, 0.0, 0.0]]]])
        >>> seen = read_visibility(mask, torch.tensor([1.0, 0.0]).view(1, 1, 2, 1), None)
        >>> seen.lengths.tolist(), seen.rows.tolist(), seen.voters.tolist()
        ([2, 1], [[[True, False], [False, False]]], [[True, False]])
    """
    batch, _, rows, tokens = mask.shape
    starts = _run_starts(mask)
    allowed = is_open(mask[:, 0][..., starts]).cpu()
    if open_rows is not None:
        allowed &= (open_rows.reshape(batch, rows, 1) != 0).cpu()
    voters = allowed.any(dim=-1)
    if padding is not None:
        voters &= ~padding.cpu()
    ends = torch.cat([starts[1:].cpu(), torch.tensor([tokens])])
    return Visibility(allowed, voters, ends - starts.cpu())


def padding_of(attention_mask: torch.Tensor | None, past: int, rows: int) -> torch.Tensor | None:
    """Read which of a forward's text tokens are padding off the attention mask that the text model is called with.

    Args:
        attention_mask: None (no padding), (batch, text tokens so far or more) of 0/1, or a mask that the caller has made for the
            layers: (batch, heads or 1, rows, text tokens so far or more), bool or additive.
        past: text tokens before this forward.
        rows: text tokens of this forward.

    Returns:
        bool (batch, rows), True for padding; None if nothing says that there is any.

    Raises:
        TypeError: a mask of another kind, for instance flex attention's.

    Example:
        >>> padding_of(torch.tensor([[0, 1, 1, 0]]), past=1, rows=3).tolist()
        [[False, False, True]]
    """
    if attention_mask is None:
        return None
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.ndim not in (2, 4):
        of = f"type {type(attention_mask).__name__}"
        if isinstance(attention_mask, torch.Tensor):
            of = f"shape {tuple(attention_mask.shape)}"
        raise TypeError(
            f"trim_plugin cannot read padding off an attention mask of {of}. Give the processor's, (batch, text tokens) of 0 "
            "and 1, and load the model with attn_implementation='sdpa' or 'eager'."
        )
    # As transformers reads it: a column is a token's position. A mask of the new tokens alone says as much here.
    first = past if attention_mask.shape[-1] >= past + rows else attention_mask.shape[-1] - rows
    own = attention_mask[..., first : first + rows]
    return own == 0 if attention_mask.ndim == 2 else _padding_of_rows(own)


def _padding_of_rows(own: torch.Tensor) -> torch.Tensor:
    """bool (batch, rows): padding among rows, of what they see of each other, (batch, heads or 1, rows, rows).

    A text row sees itself. Who makes a mask by hand may let padding see itself and nothing else, so that no softmax is empty:
    a row that has nothing to do with any other is padding, too, where others have to do with each other.
    """
    sees = own if own.dtype == torch.bool else is_open(own) if own.is_floating_point() else own != 0
    sees = sees.any(dim=1)
    itself = sees.diagonal(dim1=1, dim2=2)
    alone = itself & (sees.sum(dim=1) == 1) & (sees.sum(dim=2) == 1)
    together = (itself & ~alone).any(dim=1, keepdim=True)
    return ~itself | (alone & together)


def _run_starts(mask: torch.Tensor) -> torch.Tensor:
    """Indices at which a mask's column differs from the one before, in any row of any sample."""
    batch, _, rows, tokens = mask.shape
    changes = torch.zeros(max(tokens - 1, 0), dtype=torch.bool, device=mask.device)
    block = max(1, _BLOCK_BYTES // max(1, tokens))
    for sample in range(batch):
        for row in range(0, rows, block):
            part = mask[sample, 0, row : row + block]
            changes |= (part[:, 1:] != part[:, :-1]).any(dim=0)
    first = torch.zeros(1, dtype=torch.long, device=mask.device)
    return torch.cat([first, changes.nonzero()[:, 0] + 1])
