"""One selection: which visual tokens survive the first cross-attention layer, and what becomes of the others."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any, NamedTuple

import torch

from trim_plugin.selection.k_center import ASKS, KCenter, members_of, short_ones
from trim_plugin.selection.merging import Merging, merge_dropped
from trim_plugin.selection.processors import VisualTokenProcessorList, processor_name, returned_nan
from trim_plugin.selection.rounds import NAN_STATES, Unread
from trim_plugin.selection.visibility import Tiles


@dataclasses.dataclass
class Columns:
    """What a cross-attention layer attends to: visual tokens cached in earlier turns, then those of the new pictures.

    Args:
        index: int64 (batch, columns), the visual token behind every column.
        valid: bool (batch, columns), False for columns that only pad a sample.
        sizes: int64 (batch, columns), how many visual tokens each stands for; 1 in padding.
        group: int64 (batch, columns), the visibility group of a new token; −1 for earlier ones, and for those that nobody reads.
        readable: bool (batch, columns), visible to the last prompt row: decoding can read nothing else.
        first_new: columns of earlier turns.
        tile_tokens: visual tokens of a tile.
    """

    index: torch.Tensor
    valid: torch.Tensor
    sizes: torch.Tensor
    group: torch.Tensor
    readable: torch.Tensor
    first_new: int
    tile_tokens: int

    @property
    def tile_of(self) -> torch.Tensor:
        """int64 (batch, columns): the tile of every token; −1 in padding."""
        return (self.index // self.tile_tokens).masked_fill(~self.valid, -1)

    def followed_by(self, new: Columns, readable_tiles: torch.Tensor) -> Columns:
        """These and then a new turn's, whose last row can read `readable_tiles`, bool (batch, tiles)."""
        still = self.readable & readable_tiles.gather(1, self.index // self.tile_tokens)

        def both(name: str) -> torch.Tensor:
            return torch.cat([getattr(self, name), getattr(new, name)], dim=1)

        return dataclasses.replace(
            self,
            index=both("index"),
            valid=both("valid"),
            sizes=both("sizes"),
            group=both("group"),
            readable=torch.cat([still, new.readable], dim=1),
        )

    def narrowed(self, selection: Selection) -> Columns:
        """The columns that later layers attend to."""
        if selection.positions is None:
            return self
        old, positions, present = self.first_new, selection.positions, selection.present

        def left(tensor: torch.Tensor) -> torch.Tensor:
            return torch.cat([tensor[:, :old], tensor[:, old:].gather(1, positions)], dim=1)

        sizes = left(self.sizes)
        if selection.merging is not None:
            sizes = torch.cat([self.sizes[:, :old], selection.merging.sizes], dim=1)
        valid = torch.cat([self.valid[:, :old], present], dim=1)
        return dataclasses.replace(
            self,
            index=left(self.index),
            valid=valid,
            sizes=sizes.masked_fill(~valid, 1),
            group=left(self.group),
            readable=left(self.readable) & valid,
        )


@dataclasses.dataclass(frozen=True)
class Selection:
    """What survived, for all samples.

    Args:
        positions: int64 (batch, slots), the kept ones among the new columns, ascending, and padding; None if all were kept.
        present: bool (batch, slots), False for that padding.
        merging: what the dropped ones become part of; None if they are forgotten, or nothing was dropped.
        readable_counts: how many columns of every sample decoding can read, earlier turns' counted.
    """

    positions: torch.Tensor | Any
    present: torch.Tensor
    merging: Merging | None
    readable_counts: list[int]


class Counts(NamedTuple):
    """What the host has to know of a choice.

    Args:
        kept: how many new tokens every sample keeps.
        readable: how many columns of every sample decoding can read, earlier turns' counted.
        whole: whether all are kept.
        drops: whether a token that is read is dropped: only then are there log sizes to be added.
    """

    kept: list[int]
    readable: list[int]
    whole: bool
    drops: bool


@dataclasses.dataclass(frozen=True)
class KnownGroups:
    """What the host knows of a turn's columns without asking the device.

    Args:
        sizes: for every sample, the new tokens of each visibility group; 0 for groups that it lacks.
        readable: whether decoding can read them: what a sample's last row reads is what its group's rows read.
        tokens: new tokens of every sample.
        readable_counts: how many columns of every sample decoding can read, earlier turns' counted.
        held: how many of these are earlier turns'.

    Example:
        >>> groups, readable = torch.tensor([[0, 1, 1, -1]]), torch.tensor([[False, True, True, False]])
        >>> KnownGroups.of(Tiles(groups, readable, groups), torch.tensor([[5, 5, 5, 5]]), readable[:, :0], [0])
        KnownGroups(sizes=[[5, 10]], readable=[[False, True]], tokens=[20], readable_counts=[10], held=[0])
    """

    sizes: list[list[int]]
    readable: list[list[bool]]
    tokens: list[int]
    readable_counts: list[int]
    held: list[int]

    @classmethod
    def of(cls, tiles: Tiles, there: torch.Tensor, before: torch.Tensor, counts: list[int]) -> KnownGroups | None:
        """Of new tiles, the last ones, of which so many tokens are there, int64 (batch, new tiles) on the CPU; behind so many
        columns of tiles that could be read before, bool (batch, earlier tiles). None if a sample goes on reading a part of these.
        """
        old = before.shape[1]
        still, groups, readable = tiles.readable[:, :old], tiles.groups[:, old:], tiles.readable[:, old:]
        if not torch.equal(still, before & still.any(dim=1, keepdim=True)):
            return None
        held = [count * read for count, read in zip(counts, still.any(dim=1).tolist(), strict=True)]
        own = groups[:, None] == torch.arange(int(groups.max()) + 1, device="cpu")[:, None]
        return cls(
            sizes=(own * there[:, None]).sum(dim=2).tolist(),
            readable=(own & readable[:, None]).any(dim=2).tolist(),
            tokens=there.sum(dim=1).tolist(),
            readable_counts=((readable * there).sum(dim=1) + torch.tensor(held, device="cpu")).tolist(),
            held=held,
        )

    def kept_by(self, rule: KCenter | None) -> Counts | None:
        """What a rule leaves of them; None if that depends on the picture."""
        if rule is None or rule.kept_share is None:
            return None
        kept, readable, drops = list(self.tokens), list(self.readable_counts), False
        for sample, sizes in enumerate(self.sizes):
            left = [rule.keeps(size) for size in sizes]
            if any(sizes):  # else no row reads anything, and all is kept
                kept[sample] = sum(left)
                readable[sample] = self.held[sample] + sum(itertools.compress(left, self.readable[sample]))
            drops |= left != sizes
        return Counts(kept, readable, kept == self.tokens, drops)


def select(
    scores: torch.Tensor | None,
    keys: torch.Tensor,
    states: torch.Tensor,
    columns: Columns,
    groups: int,
    processors: VisualTokenProcessorList,
    merge: bool,
    known: KnownGroups | None = None,
    unread: Unread | None = None,
) -> Selection:
    """Let the processors choose in every visibility group; the union over heads is kept, and the rest merged or forgotten.

    A sample without any query row keeps everything: its rows are fully masked, which read all tokens in stock's attention.
    Waits for the device once, for counts and checks together; not at all where nothing is chosen and `known` says the rest, or
    where the rule is a share of `KCenter` alone, of which `known` says the rest as well, and what it says may wait.

    Args:
        scores: float32 (batch, heads, columns), see `scoring.visual_token_scores`; None keeps everything (exact mode).
        keys: (batch, key-value heads, columns, head_dim) of the first cross-attention layer. Dropped tokens are compared by them:
            tokens with equal keys are read with equal weights, so that merging them changes nothing, whatever their values.
        states: (batch, new columns, width), visual states, for processors that need them.
        columns: what `scores` and `keys` are about.
        groups: visibility groups of the sample that has most.
        processors: the chain that decides, called for every sample's first group, then for their second ones, and so on. A sample
            that has fewer is given its first group again, and what is chosen then is ignored.
        merge: whether a dropped token joins the kept token of its group that is most like it.
        known: what is known of the columns without counting them; None: they are counted here.
        unread: gets what `KCenter` leaves for the host to read, where the rest is known; None: it is read here.

    Raises:
        TypeError, ValueError: a processor returned something else than scores of the same shape, or removed every token of
            a group; or the scores are NaN.

    Example:
        >>> from trim_plugin import TopKPerHead
        >>> here, ones = torch.arange(4)[None], torch.ones(1, 4, dtype=torch.long)
        >>> columns = Columns(here, ones.bool(), ones, 0 * ones, ones.bool(), first_new=0, tile_tokens=4)
        >>> attention = torch.tensor([[[0.7, 0.1, 0.1, 0.1], [0.1, 0.1, 0.1, 0.7]]])
        >>> rule = VisualTokenProcessorList([TopKPerHead(0.25)])
        >>> chosen = select(attention, torch.ones(1, 1, 4, 2), torch.ones(1, 4, 2), columns, 1, rule, merge=True)
        >>> chosen.positions.tolist(), chosen.merging.sizes.tolist(), chosen.readable_counts
        ([[0, 3]], [[3, 1]], [2])
    """
    valid, group = columns.valid[:, columns.first_new :], columns.group[:, columns.first_new :]
    if scores is None and known is not None:
        return Selection(None, valid, None, known.readable_counts)
    checks, kept, counts = _Checks(processors), valid, None
    if scores is not None:
        counts = None if known is None else known.kept_by(_alone(processors))
        if counts is not None:
            checks.unread = unread or Unread(ASKS)
        kept = _choose(scores[..., columns.first_new :], states, valid, group, groups, checks, known)
    if counts is None:
        counts = _counted(kept, columns, checks)
    elif scores is not None and unread is None and short_ones([checks.unread]):
        checks.unread = Unread()
        kept = _choose(scores[..., columns.first_new :], states, valid, group, groups, checks, known)
    if counts.whole:
        return Selection(None, valid, None, counts.readable)
    # The kept tokens in their order, then the others.
    order = kept.view(torch.uint8).argsort(dim=1, descending=True, stable=True)
    positions, least = order[:, : max(counts.kept)], min(counts.kept)
    present = torch.arange(positions.shape[1], device=kept.device) < kept.sum(dim=1, keepdim=True)
    merging = None
    if merge and counts.drops:
        features = keys[:, :, columns.first_new :].transpose(1, 2).flatten(2)
        sizes, one_group = columns.sizes[:, columns.first_new :], groups == 1 and least == positions.shape[1]
        merging = merge_dropped(features, kept, group, sizes, positions, others=order[:, least:], one_group=one_group)
    return Selection(positions, present, merging, counts.readable)


def _alone(processors: VisualTokenProcessorList) -> KCenter | None:
    """The rule, if it is `KCenter` itself and no other processor comes before or after it: nothing but states counts then."""
    return processors[0] if len(processors) == 1 and type(processors[0]) is KCenter else None


def _choose(
    scores: torch.Tensor,
    states: torch.Tensor,
    valid: torch.Tensor,
    group: torch.Tensor,
    groups: int,
    checks: _Checks,
    known: KnownGroups | None,
) -> torch.Tensor:
    """bool (batch, new columns): what the processors keep; what has no query row at all is kept whole."""
    processors, read = checks.processors, group >= 0
    rule = _alone(processors)
    if groups > 0 and rule is not None:
        members, sizes = members_of(group, groups), None if known is None else known.sizes
        chosen = rule.choose(states.to(group.device), members, sizes=sizes, unread=checks.unread)
        return torch.where(read.any(dim=1, keepdim=True), chosen.any(dim=1), valid)
    checks.no_scores(scores)
    states = states.to(scores.device) if processors.needs_states else states
    if groups > 0 and processors.knows_groups:
        survivors = (processors.in_groups(scores, group, groups, states) != -math.inf).any(dim=1)
        return torch.where(read.any(dim=1, keepdim=True), survivors, valid)
    # What stands in for a group that a sample lacks: its first one; all of its tokens where it has none.
    instead = torch.where((group == 0).any(dim=1, keepdim=True), group == 0, valid)
    kept = valid & ~read.any(dim=1, keepdim=True)
    for number in range(groups):
        members = group == number
        there = members.any(dim=1, keepdim=True)
        asked = torch.where(there, members, instead)
        given = scores.masked_fill(~asked[:, None], -math.inf)
        chosen, spoiled = processors.apply(given, asked, states)
        survivors = (chosen != -math.inf).any(dim=1) & members
        checks.group(spoiled, there[:, 0] & ~survivors.any(dim=1))
        kept = kept | survivors
    return kept


def _counted(kept: torch.Tensor, columns: Columns, checks: _Checks) -> Counts:
    """What the device says, read at once; the checks are looked at as well."""
    first_new, batch = columns.first_new, len(kept)
    counts = torch.stack([kept, columns.readable[:, first_new:] & kept, columns.valid[:, first_new:]]).sum(dim=2)
    if first_new:
        counts[1] += (columns.readable & columns.valid)[:, :first_new].sum(dim=1)
    drops = ((columns.group[:, first_new:] >= 0) > kept).any()
    numbers = torch.cat([counts.flatten(), drops[None], *checks.flags]).tolist()
    checks.raise_if(numbers[3 * batch + 1 :])
    own, readable, present = numbers[:batch], numbers[batch : 2 * batch], numbers[2 * batch : 3 * batch]
    return Counts(own, readable, own == present, bool(numbers[3 * batch]))


class _Checks:
    """What has to hold of scores and processors, gathered on the device and looked at with the counts: one host read for all."""

    def __init__(self, processors: VisualTokenProcessorList) -> None:
        self.unread = Unread()
        self._others: list[torch.Tensor] = []
        self.processors = processors
        self._meanings: list[tuple[str, int, int]] = []  # what a flag says: of which processor, or group and sample

    @property
    def flags(self) -> list[torch.Tensor]:
        """All of them."""
        return [*self.unread.nan, *self._others]

    def no_scores(self, scores: torch.Tensor) -> None:
        self._note("scores", scores.isnan().any()[None])

    def group(self, spoiled: list[torch.Tensor], emptied: torch.Tensor) -> None:
        """For one more group: whether each processor returned NaN, and bool (batch,), whether a sample's group was emptied."""
        number = sum(meaning == "emptied" and sample == 0 for meaning, _, sample in self._meanings)
        if spoiled:
            self._note("spoiled", torch.stack(spoiled), number)
        self._note("emptied", emptied, number)

    def _note(self, meaning: str, flags: torch.Tensor, number: int = 0) -> None:
        self._others.append(flags)
        self._meanings += [(meaning, number, place) for place in range(len(flags))]

    def raise_if(self, flags: list[int]) -> None:
        """Raise `ValueError` for the first thing that does not hold."""
        if any(flags[: len(self.unread.nan)]):
            raise ValueError(NAN_STATES)
        for flag, (meaning, number, place) in zip(flags[len(self.unread.nan) :], self._meanings, strict=True):
            if not flag:
                continue
            if meaning == "scores":
                raise ValueError(
                    "The attention scores of the visual tokens are NaN: the picture, the text before it or the model's weights "
                    "hold NaN or inf, so no head could choose. top_k_ratio=1.0 chooses nothing and does what transformers does."
                )
            if meaning == "spoiled":
                raise ValueError(returned_nan(self.processors[place]))
            names = ", ".join(map(processor_name, self.processors))
            raise ValueError(
                f"The visual token processors {names} removed every visual token of visibility group {number} in "
                f"sample {place}. Leave at least one token of each group above -inf, so that no text row loses all it reads."
            )
