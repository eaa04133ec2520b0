"""Makes a new record out of held ones: other sources in other width classes, for batches, joins and later turns."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from trim_plugin.arithmetic import classify
from trim_plugin.cache.kept import KeptTokens, Uploaded, first_places, take, width_class
from trim_plugin.selection.select import Columns

#: A width class put together from held ones: (which cache, which of its classes, rows; None for all of them) in order.
ClassParts = list[tuple[int, int, slice | torch.Tensor | None]]
#: The same before the rows have been copied to the device.
_Run = tuple[int, int, Callable[[], slice | torch.Tensor | None]]


def padded_columns(kept: KeptTokens) -> Columns:
    """All sources' tokens side by side, in the sources' order: what a later turn goes on from.

    The record holds them: they are not to be changed.
    """
    found: Columns = kept.once("padded columns", kept.device, lambda: _padded_columns(kept))
    return found


def _padded_columns(kept: KeptTokens) -> Columns:
    parts, width = side_by_side(kept, kept.device), kept.width
    index, sizes, valid = (_assembled([kept], parts, name, width) for name in ("index", "sizes", "valid"))
    return Columns(
        index=index,
        valid=valid,
        sizes=sizes,
        group=torch.full_like(index, -1),
        readable=valid,  # nothing else is held
        first_new=width,
        tile_tokens=kept.tile_tokens,
    )


def side_by_side(kept: KeptTokens, device: torch.device) -> ClassParts:
    """All sources in their order, as one class; rows are told where they are read."""

    def made() -> ClassParts:
        uploaded = Uploaded(device)
        runs = _runs([(0, source) for source in range(kept.sources)], [kept], uploaded)
        return [(record, number, rows()) for record, number, rows in runs]

    found: ClassParts = kept.once("side by side", device, made)
    return found


def regrouped(
    records: Sequence[KeptTokens], sources: Sequence[tuple[int, int]], order: Sequence[int], bucket: int
) -> tuple[KeptTokens, list[tuple[ClassParts, int]]]:
    """Other sources in other classes, put together from what one or several records hold.

    Args:
        records: what there is.
        sources: the new sources: (number of the record, source there).
        order: the source of every sample of the new batch.
        bucket: as for the class.

    Returns:
        The record, and for every class the parts of which layers put it together, and its width.
    """
    copies = [0] * len(sources)
    for source in order:
        copies[source] += 1
    if bucket and len({*copies}) > 1:  # one class has one number of copies: here every sample gets its own row
        sources, order = [sources[source] for source in order], range(len(order))
        copies = [1] * len(sources)
    counts = [records[record].count_of[source] for record, source in sources]
    first, sized = records[0], any(record.sized for record in records)
    uploaded, planned = Uploaded(first.device), []
    for members, width in classify(counts, copies, bucket):
        runs = _runs([sources[source] for source in members], records, uploaded)
        own = tuple(counts[source] for source in members)
        planned.append((members, width, own, runs, uploaded.add(own)))
    classes, recipe = [], []
    for members, width, own, runs, counts_there in planned:
        parts = [(record, number, rows()) for record, number, rows in runs]
        index, sizes = (_assembled(records, parts, name, width, fill) for name, fill in (("index", 0), ("sizes", 1)))
        valid = None if min(own) == width else first_places(counts_there(), width)
        classes.append(width_class(members, own, copies[members[0]], index, sizes, valid, first.dtype, sized, bucket))
        recipe.append((parts, width))
    visible = torch.stack([records[record].visible[source] for record, source in sources])
    # Samples may have had other numbers of pictures: what one never had is as out of reach as what another cannot see any more.
    tiles = max(record.readable_tiles.shape[1] for record in records)
    rows = [records[record].readable_tiles[source] for record, source in sources]
    readable = torch.stack([torch.nn.functional.pad(row, (0, tiles - len(row))) for row in rows])
    return KeptTokens(
        classes=tuple(classes),
        order=tuple(order),
        visible=visible,
        readable_tiles=readable,
        tile_tokens=first.tile_tokens,
        token_bytes=first.token_bytes,
        dtype=first.dtype,
        sized=sized,
        bucket=bucket,
    ), recipe


def _runs(wanted: Sequence[tuple[int, int]], records: Sequence[KeptTokens], uploaded: Uploaded) -> list[_Run]:
    """Where sources, (record, source), lie: neighbours in one class are one part."""
    place_of = [
        {source: (number, row) for number, own in enumerate(record.classes) for row, source in enumerate(own.sources)}
        for record in records
    ]
    runs: list[tuple[int, int, list[int]]] = []
    for record, source in wanted:
        number, row = place_of[record][source]
        if runs and runs[-1][:2] == (record, number):
            runs[-1][2].append(row)
        else:
            runs.append((record, number, [row]))
    found: list[_Run] = []
    for record, number, rows in runs:
        whole = rows == list(range(len(records[record].classes[number].sources)))
        found.append((record, number, (lambda: None) if whole else uploaded.rows(rows)))
    return found


def _assembled(records: Sequence[KeptTokens], parts: ClassParts, name: str, width: int, fill: int = 0) -> torch.Tensor:
    """The classes' `index` or `sizes`, put together as the layers' stores are."""
    tensors = []
    for record, number, rows in parts:
        tensor = getattr(records[record].classes[number], name)
        tensors.append(tensor if rows is None else take(tensor, rows))
    return padded_join([tensor.to(tensors[0].device) for tensor in tensors], width, dim=1, fill=fill)


def padded_join(tensors: Sequence[torch.Tensor], width: int, dim: int, fill: int = 0) -> torch.Tensor:
    """Tensors one after the other along the batch, filled up, or cut, to `width` along `dim`.

    Example:
        >>> padded_join([torch.ones(1, 1), torch.ones(1, 2)], 2, dim=1)
        tensor([[1., 0.],
                [1., 1.]])
    """
    first = tensors[0]
    if len(tensors) == 1 and first.shape[dim] == width:
        return first
    shape = list(first.shape)
    shape[0], shape[dim] = sum(tensor.shape[0] for tensor in tensors), width
    whole, start = first.new_full(shape, fill), 0
    for tensor in tensors:
        length = min(width, tensor.shape[dim])
        whole.narrow(0, start, tensor.shape[0]).narrow(dim, 0, length).copy_(tensor.narrow(dim, 0, length))
        start += tensor.shape[0]
    return whole
