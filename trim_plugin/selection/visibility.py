"""Which text rows may read which visual tokens, read once a forward, tile by tile; and the additive masks that say so.

Mllama's cross-attention takes masks of the shape (batch, 1, text rows, visual tokens). `_prepare_cross_attention_mask` of
transformers makes them of a mask of tiles, together with `open_rows` (its `full_text_row_masked_out_mask`), (batch, 1, text
rows, 1), which is 0 for fully masked rows. Such a row's mask is all zeros, like that of a row that sees everything.
"""

from __future__ import annotations

import dataclasses
import warnings

import torch

#: A row's entries of an additive mask are read in blocks of this many bytes.
_BLOCK_BYTES = 16 * 2**20


@dataclasses.dataclass(frozen=True)
class Visibility:
    """Who may read what in one forward, for all samples.

    A row reads all tokens of a tile or none, so a tile stands for its tokens. Lives on the CPU: what follows from it decides
    shapes, and reading it again costs nothing.

    Args:
        open: bool (batch, text rows, tiles): the row may read the tile. All False for a fully masked row.
        padding: bool (batch, text rows): rows that are padding.
        within: the batch that these samples are some of, and which; None if they are all.
    """

    open: torch.Tensor
    padding: torch.Tensor
    within: tuple[Visibility, slice] | None = dataclasses.field(default=None, repr=False, compare=False)
    #: What `reads_on` has copied, by device.
    _there: dict[torch.device, torch.Tensor] = dataclasses.field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @property
    def query_rows(self) -> torch.Tensor:
        """bool (batch, text rows): rows that may read something and are not padding; only these score."""
        return self.open.any(dim=-1) & ~self.padding

    def reads_on(self, device: torch.device) -> torch.Tensor:
        """bool (batch, text rows, tiles): the row scores and reads the tile. Copied once, for the whole batch that this is of."""
        if self.within is not None:
            whole, samples = self.within
            return whole.reads_on(device)[samples]
        if device not in self._there:
            self._there[device] = (self.open & self.query_rows[..., None]).to(device)
        return self._there[device]

    def readable_tiles(self, exact: bool = False) -> torch.Tensor:
        """What the last text row may read: bool (batch, tiles). Decoding can read nothing else.

        Padding behind the text does not count. In exact mode it does: `generate` goes on from the last row, whatever it is, and
        lets new text read what it reads. A fully masked row reads everything, as stock's mask for it, all zeros, says.
        """
        last = self.open[:, -1]
        if not exact and bool(self.padding[:, -1].any()):
            rows = torch.arange(self.padding.shape[1], device="cpu").masked_fill(self.padding, -1).amax(dim=1)
            last = self.open[torch.arange(len(rows), device="cpu"), rows] & (rows >= 0)[:, None]
        return last | ~last.any(dim=-1, keepdim=True)

    def reads_any(self, tiles: torch.Tensor, exact: bool = False) -> bool:
        """Whether a row that counts may read one of these tiles, bool (batch, some tiles); later ones don't matter."""
        counts = ~self.padding
        if exact:
            counts = torch.cat([counts[:, :-1], torch.ones_like(counts[:, -1:])], dim=1)
        return bool((self.open[..., : tiles.shape[1]] & counts[..., None] & tiles[:, None]).any())

    def groups(self, first: int = 0) -> torch.Tensor:
        """The visibility group of every tile from `first` on: tiles that the same query rows may read.

        Returns:
            int64 (batch, tiles): 0 for the group of a sample's first visible tile, and so on; −1 for tiles that no query
            row reads, and for those before `first`, which belong to earlier turns.

        Example:
            >>> rows = torch.tensor([[[True, False, True, False], [False, True, False, False]]])
            >>> Visibility(rows, torch.zeros(1, 2, dtype=torch.bool)).groups().tolist()
            [[0, 1, 0, -1]]
        """
        found = torch.full((len(self.open), self.open.shape[2]), -1, device="cpu")
        for own, rows, query in zip(found, self.open, self.query_rows, strict=True):
            columns = rows[query].T
            seen = columns.any(dim=1)
            seen[:first] = False
            if not bool(seen.any()):
                continue
            patterns, which = columns[seen].unique(dim=0, return_inverse=True)
            places = torch.arange(len(which), device="cpu")
            starts = torch.full((len(patterns),), len(which), device="cpu").scatter_reduce_(0, which, places, "amin")
            own[seen] = starts.argsort().argsort()[which]  # numbered by the first tile of each
        return found

    def of_samples(self, samples: slice) -> Visibility:
        """The same for some samples."""
        return Visibility(self.open[samples], self.padding[samples], (self, samples))


@dataclasses.dataclass(frozen=True)
class Tiles:
    """What a forward's masks say of every tile.

    Args:
        groups: int64 (batch, tiles) on the CPU, their visibility groups, see `Visibility.groups`.
        readable: bool (batch, tiles) on the CPU: what decoding can read after the forward, kept or not.
        on_device: int64 (2, batch, tiles), both on the device, copied at once.
    """

    groups: torch.Tensor
    readable: torch.Tensor
    on_device: torch.Tensor

    def of_samples(self, samples: slice) -> Tiles:
        """The same for some samples."""
        return Tiles(self.groups[samples], self.readable[samples], self.on_device[:, samples])


def of_tiles(mask: torch.Tensor, padding: torch.Tensor | None) -> Visibility:
    """Read what a model is called with, at one look at the device.

    Args:
        mask: (batch, text rows, pictures, tiles) of 0 and 1, the forward's rows of `cross_attention_mask`.
        padding: bool (batch or 1, text rows), see `padding_of`; or None.

    Example:
        >>> padding = torch.tensor([[False, True]])
        >>> seen = of_tiles(torch.tensor([[[[1, 0]], [[0, 1]]]]), padding)
        >>> seen.open.tolist(), seen.query_rows.tolist(), seen.readable_tiles().tolist()
        ([[[True, False], [False, True]]], [[True, False]], [[True, False]])
    """
    tiles = mask.flatten(2) != 0
    if padding is None:
        return Visibility(tiles.cpu(), torch.zeros(tiles.shape[:2], dtype=torch.bool, device="cpu"))
    padded = padding.to(tiles.device).expand(tiles.shape[:2])
    both = torch.cat([tiles, padded[..., None]], dim=-1).cpu()
    return Visibility(both[..., :-1], both[..., -1])


def of_additive(mask: torch.Tensor, open_rows: torch.Tensor | None, padding: torch.Tensor | None) -> Visibility:
    """Read what a text model is called with, whose caller has expanded the mask of tiles; here a token is a tile of its own.

    Args:
        mask: additive (batch, 1, text rows, visual tokens), all zeros in a fully masked row.
        open_rows: (batch, 1, text rows, 1), 0 for fully masked rows (`full_text_row_masked_out_mask`); None if there are none.
        padding: as in `of_tiles`.

    Example:
        >>> lowest = torch.finfo(torch.float32).min
        >>> mask = torch.tensor([[[[0.0, 0.0, lowest], [0.0, 0.0, 0.0]]]])
        >>> seen = of_additive(mask, torch.tensor([1.0, 0.0]).view(1, 1, 2, 1), None)
        >>> seen.open.tolist(), seen.query_rows.tolist()
        ([[[True, True, False], [False, False, False]]], [[True, False]])
    """
    batch, _, rows, tokens = mask.shape
    allowed = torch.empty(batch, rows, tokens, dtype=torch.bool, device="cpu")
    block = max(1, _BLOCK_BYTES // max(1, batch * tokens))
    for start in range(0, rows, block):
        part = slice(start, start + block)
        own = is_open(mask[:, 0, part])
        if open_rows is not None:
            own &= open_rows[:, 0, part].to(own.device) != 0
        allowed[:, part] = own.cpu()
    return Visibility(allowed, _padded(padding, batch, rows))


def of_everything(batch: int, rows: int, tokens: int, tile_tokens: int, padding: torch.Tensor | None) -> Visibility:
    """No mask was given: every row may read all of so many visual tokens. If they are not whole tiles, each is a tile of its own.

    Example:
        >>> of_everything(1, 2, tokens=15, tile_tokens=5, padding=None).groups().tolist()
        [[0, 0, 0]]
    """
    part, padded = tokens % tile_tokens, _padded(padding, batch, rows)
    return Visibility(padded.new_ones(batch, rows, tokens if part else tokens // tile_tokens), padded)


def _padded(padding: torch.Tensor | None, batch: int, rows: int) -> torch.Tensor:
    found = torch.zeros(1, rows, dtype=torch.bool, device="cpu") if padding is None else padding.cpu()
    return found.expand(batch, -1)


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
        shape = getattr(attention_mask, "shape", None)
        of = f"type {type(attention_mask).__name__}" if shape is None else f"shape {tuple(shape)}"
        raise TypeError(
            f"trim_plugin cannot read padding off an attention mask of {of}. Give the processor's, (batch, text tokens) of 0 "
            "and 1, and load the model with attn_implementation='sdpa' or 'eager'."
        )
    # As transformers reads it: a column is a token's position, what none covers is hidden. One of the new tokens alone will do.
    width = attention_mask.shape[-1]
    first = width - rows if rows <= width < past + rows else past
    own = attention_mask[..., first : first + rows]
    hidden = torch.nn.functional.pad(own == 0, (0, rows - own.shape[-1]), value=True)
    return hidden if attention_mask.ndim == 2 else _padding_of_rows(own)


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


# -- additive masks -----------------------------------------------------------------------------------------------


def is_open(mask: torch.Tensor) -> torch.Tensor:
    """Whether an additive mask lets through: anything above half the dtype's minimum."""
    return mask > torch.finfo(mask.dtype).min / 2


def take_columns(mask: torch.Tensor, columns: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """The mask of these columns, int64 (batch, kept); closed where `valid`, bool (batch, kept), is False.

    Example:
        >>> mask = torch.tensor([[[[0.0, 1.0, 2.0]]]])
        >>> take_columns(mask, torch.tensor([[2, 1]]), torch.tensor([[True, False]])).flatten().tolist()
        [2.0, -3.4028234663852886e+38]
    """
    return close(mask.gather(3, columns.to(mask.device)[:, None, None].expand(-1, 1, mask.shape[2], -1)), valid)


def close(mask: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Close an additive mask where `valid`, bool (batch, tokens), is False."""
    return mask.masked_fill(~valid.to(mask.device)[:, None, None], torch.finfo(mask.dtype).min)


def open_mask(valid: torch.Tensor, rows: int, dtype: torch.dtype) -> torch.Tensor:
    """An additive mask (batch, 1, rows, tokens) in which every row reads every valid token.

    An explicit mask is needed even if all are valid and there are several rows: `sdpa_attention_forward` takes a module without
    `is_causal` for a causal one when it gets no mask.
    """
    return close(torch.zeros(len(valid), 1, rows, valid.shape[1], dtype=dtype, device=valid.device), valid)


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


def pack(chosen: torch.Tensor, longest: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions of the chosen entries of every row, ascending, padded to the longest row.

    Args:
        chosen: bool (batch, width).
        longest: entries of a row, where that is known or should be more than the longest row's; None reads it from the device.

    Returns:
        positions int64 (batch, longest), and bool (batch, longest) that is False for padding (which points anywhere).

    Example:
        >>> positions, valid = pack(torch.tensor([[True, False, True], [False, True, False]]))
        >>> positions.tolist(), valid.tolist()
        ([[0, 2], [1, 0]], [[True, True], [True, False]])
    """
    counts = chosen.sum(dim=1)
    longest = int(counts.max()) if longest is None else longest
    positions = (~chosen).to(torch.uint8).argsort(dim=1, stable=True)[:, :longest]
    if positions.shape[1] < longest:
        positions = torch.nn.functional.pad(positions, (0, longest - positions.shape[1]))
    return positions, torch.arange(longest, device=chosen.device) < counts[:, None]


LOST_TOKENS = (
    "cross_attention_mask lets this turn's text read visual tokens that the end of an earlier turn could not read: the trimmed "
    "cache has dropped them. Give the picture again (pixel_values), or start with a new cache and the whole conversation."
)
OTHER_TILES = (
    "Earlier turns of this TrimmedCache brought tiles of {before} visual tokens, this one reads tiles of {now}. Give whole tiles "
    "in every turn, or no mask of tiles in any: what is held is counted in those of the first one."
)
_warned_without_mask = False


def warn_without_mask() -> None:
    """Say once what a picture without `cross_attention_mask` means."""
    global _warned_without_mask
    if not _warned_without_mask:
        _warned_without_mask = True
        warnings.warn(
            "A picture was given without cross_attention_mask: every text row may read every visual token. (Stock sdpa "
            "attention would read them causally, as if they were text.) The processor makes the mask.",
            stacklevel=2,
        )
