"""Keep the visual tokens that cover a picture: no token is far from a kept one. Needs no attention, so no prompt."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import torch

from trim_plugin.arithmetic import FEATURES, share
from trim_plugin.selection.precision import full_float32
from trim_plugin.selection.processors import VisualTokenProcessor
from trim_plugin.selection.rounds import CANDIDATES, DONE, EQUAL, NAN_STATES, SAME, SMALL, Rounds, Unread
from trim_plugin.selection.visibility import pack

#: Bytes of features, and of what they are compared to, at a time.
COVER_BYTES = 128 * 2**20
#: Groups of at most so many tokens are chosen from one by one: no tile of a model that is used has as few. So are ...
FEW = 1200
#: ... groups of up to `SMALL`, if at most so many of their tokens are kept: three launches each.
SINGLY = 240
#: float32 values of states that are copied at a time, 52 MiB.
BLOCK_VALUES = 13 * 2**20
#: Shorter states than about this have no direction: float32 cannot hold the squares of their values.
SHORTEST = 1e-15
#: Columns of features that make similarities of cosines: four, so that rows stay aligned.
COLUMNS = 4
#: Digits of the similarities of few tokens: equal tokens shall be equally alike, whatever rounding makes of them.
DIGITS = 6
#: How often the rounds of a prompt, or of all calls of the tower, ask the host before they do without.
ASKS = 4
#: At so many tokens that were taken one after the other the host asks whether a radius is covered.
ASKED_AT = (64, 256)


class KCenter(VisualTokenProcessor):
    """k-center choice over the visual states: each next token is (nearly) the one that is least like all chosen so far.

    Distances are cosine distances of the uncentred visual states; the first token is the one most like the group's mean. Made
    for merging (`TrimConfig(merge=True)`), where a kept token stands for those that resemble it. Sources: Gonzalez 1985
    (farthest-point clustering); core-sets, Sener and Savarese, arXiv 1708.00489; DivPrune, arXiv 2503.02175.

    Of a group of up to 1,200 tokens one is taken after the other, always the one least like all taken ones; so are up to 240 of
    up to 3,000 tokens. Of more, tokens are taken in rounds. A round looks at the 384 tokens that are least like the chosen ones,
    goes through them from the farthest on, and takes each that is at least 0.9 as far as the farthest (0.95 in groups of up to
    3,000), from chosen tokens and from its own; the first rounds are content with less. The cover is the greedy choice's within
    3 % (`docs/explanation/merging.md`). All visibility groups and samples are chosen for at once, each as if it were alone.

    Cost for a group of N tokens: one product of N × N × 260 values and three operations a chosen token if they are few, else
    in every round one product of N × 384 × 260 values, a sort of N, and 17 small operations: no N × K matrix exists. For a page
    of the 11B model 10 to 16 rounds choose 641 of 6,404 tokens, 14 to 19 rounds 2,242; the host asks the device once or twice
    whether they have. Scratch: up to 1,460 float32 values a token (128 MiB of them at a time).

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

    needs_scores = False
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
            ValueError: the states are NaN.
        """
        return self.in_groups(scores, visible.long() - 1, 1, states)

    def in_groups(
        self, scores: torch.Tensor, group: torch.Tensor, groups: int, states: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Keep what is chosen in each group for all heads."""
        if states is None:
            raise TypeError("KCenter needs the visual states as a third argument.")
        members = members_of(group, groups) & (scores != -math.inf).any(dim=1)[:, None]
        chosen = self.choose(states, members)
        return scores.masked_fill(~(chosen if groups == 1 else chosen.any(dim=1, keepdim=True)), -math.inf)

    def keeps(self, count: int) -> int:
        """How many of so many tokens of a group a share keeps.

        Raises:
            ValueError: with a radius that depends on the picture.

        Example:
            >>> KCenter(0.1).keeps(101), KCenter(0.1).keeps(0)
            (11, 0)
        """
        if self.kept_share is None:
            raise ValueError(f"How many tokens {self} keeps depends on the picture.")
        return _rounded_up(self.kept_share, count) if count else 0

    def choose(
        self,
        states: torch.Tensor,
        members: torch.Tensor,
        *,
        sizes: list[list[int]] | None = None,
        unread: Unread | None = None,
    ) -> torch.Tensor:
        """The tokens to keep, without any prompt.

        Args:
            states: (batch, tokens, width), visual states.
            members: bool (batch, tokens), the tokens to choose among; or (batch, groups, tokens), for each group apart.
            sizes: for every sample, how many members each of its groups has, where somebody knows; None: the device is asked.
            unread: gets what is left for the host to read; None: it reads here, and raises.

        Returns:
            bool, of the shape of `members`; nothing where there are no members.

        Raises:
            ValueError: the states are NaN.
        """
        if self.kept_share == 1.0:
            return members
        chosen = self._choose(states, members, sizes, own := unread or Unread())
        if unread is None:
            short_ones([own])
        return chosen

    def _choose(
        self, states: torch.Tensor, members: torch.Tensor, sizes: list[list[int]] | None, unread: Unread
    ) -> torch.Tensor:
        tokens = members.shape[-1]
        rows = members.reshape(-1, tokens)
        counts = rows.sum(dim=1, keepdim=True)
        there = counts[:, 0].tolist() if sizes is None else [size for sample in sizes for size in sample]
        chosen, width = torch.zeros_like(rows), max(there, default=0)
        limit = self._few
        if width > limit and any(0 < count <= limit for count in there):  # each kind as if it were alone
            few = members & (counts <= limit).view(*members.shape[:-1], 1)
            fewer = [[count if count <= limit else 0] for count in there]
            more = [[count if count > limit else 0] for count in there]
            return self._choose(states, few, fewer, unread) | self._choose(states, members & ~few, more, unread)
        # Usually every token is a member: then nothing has to be packed.
        whole = min(there, default=0) == tokens and len(rows) == len(states)
        positions, valid = (None, rows) if whole else pack(rows, longest=width)
        compared = width if width <= limit else CANDIDATES  # with all others, or with what a round looks at
        at_once = max(1, COVER_BYTES // (4 * (FEATURES + COLUMNS + compared) * max(1, width)))
        with full_float32(states.device):
            for start in range(0, len(rows) if width else 0, at_once):
                part = slice(start, start + at_once)
                if positions is None:
                    features = features_of(states[part])
                else:
                    sample = torch.arange(len(rows), device=rows.device)[part, None] // (len(rows) // len(states))
                    features = features_of(states, sample * tokens + positions[part])
                slots, taken = self._cover(features, valid[part], counts[part], there[part], unread)
                # A slot that is not taken repeats the first one, which is taken.
                slots = torch.where(taken, slots, slots[:, :1])
                chosen[part].scatter_(1, slots if positions is None else positions[part].gather(1, slots), True)
        return (chosen if whole else chosen & rows).view_as(members)

    def _cover(
        self,
        features: torch.Tensor,
        valid: torch.Tensor,
        counts: torch.Tensor,
        there: list[int],
        unread: Unread,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Slots of features (rows, slots, width) in the order in which they are chosen, and which of them are taken.

        `valid` is bool (rows, slots); `counts`, int64 (rows, 1), and `there` say how many of them are.
        """
        few = max(there) <= self._few
        first, most_alike = _first(features, valid)
        if few:
            unread.nan.append(most_alike.isnan().any()[None])
        if self.kept_share is None:
            if few:
                return one_by_one(features, valid, first, max(there), self.radius)
            return Rounds.begin(features, valid, first, most_alike, counts, counts).until_covered(self.radius or 0.0)
        wanted = _kept_of_each(self.kept_share, valid.shape[1], valid.device)[counts]
        known = [self.keeps(count) for count in there]
        if few:
            slots, _ = one_by_one(features, valid, first, max(known))
            return slots, torch.arange(slots.shape[1], device=slots.device) < wanted
        rounds = Rounds.begin(features, valid, first, most_alike, wanted, counts)
        slots, taken, place = rounds.until_counted(known, there, unread)
        if unread.asks == 0:
            unread.short.append((place[:, -1:] < wanted).any()[None])
        return slots, taken & (place <= wanted)

    @property
    def _few(self) -> int:
        """Groups of at most so many tokens are chosen from one by one."""
        return FEW if self.kept_share is None else max(FEW, int(min(SMALL, SINGLY / self.kept_share)))

    @property
    def arguments(self) -> dict[str, float | None]:
        """What makes an equal one."""
        return {"kept_share": self.kept_share} if self.radius is None else {"radius": self.radius}

    def __repr__(self) -> str:
        return f"KCenter({self.kept_share})" if self.radius is None else f"KCenter(radius={self.radius})"


def short_ones(unread: Sequence[Unread]) -> list[int]:
    """Read what choices have left unread, once for all: the numbers of those that are to be made again, and ask.

    Raises:
        ValueError: visual states are NaN.

    Example:
        >>> no, yes = torch.tensor([False]), torch.tensor([True])
        >>> short_ones([Unread(nan=[no]), Unread(nan=[no], short=[no, yes]), Unread()])
        [1]
    """
    flags = [flag for one in unread for flag in (*one.nan, *one.short)]
    said = iter(torch.cat([flag.to(flags[0].device) for flag in flags]).tolist() if flags else ())
    read = [([next(said) for _ in one.nan], [next(said) for _ in one.short]) for one in unread]
    if any(any(nan) for nan, _ in read):
        raise ValueError(NAN_STATES)
    return [number for number, (_, short) in enumerate(read) if any(short)]


def make_all(count: int, make: Callable[[int, Unread], None]) -> None:
    """Make choices for every number below `count`, and let the host read what they leave unread once, behind the last.

    Those whose rounds were too few are made again. Before that rounds ask at most `ASKS` times, however many choices there are.

    Raises:
        ValueError: visual states are NaN.
    """
    unread: list[Unread] = []
    for number in range(count):
        unread.append(unread[-1].next() if unread else Unread(ASKS))
        make(number, unread[-1])
    for number in short_ones(unread):
        make(number, Unread())


def members_of(group: torch.Tensor, groups: int) -> torch.Tensor:
    """bool (batch, groups, tokens): the tokens of each visibility group, of int64 (batch, tokens), the group of each."""
    return group[:, None] == torch.arange(groups, device=group.device)[:, None]


def _rounded_up(kept_share: float, count: int) -> int:
    return max(1, math.ceil(kept_share * count - 1e-9))


@functools.lru_cache(maxsize=16)
def _kept_of_each(kept_share: float, most: int, device: torch.device) -> torch.Tensor:
    """int64 (most + 1,): tokens to keep of every number of them. A table, so that 0.1 of 260 tokens are 26 whatever a device's
    float32 makes of it; some have no float64."""
    return torch.tensor([_rounded_up(kept_share, count) for count in range(most + 1)], device=device)


def features_of(states: torch.Tensor, places: torch.Tensor | None = None) -> torch.Tensor:
    """float32 (rows, slots, features + `COLUMNS`), whose products are similarities: the states (batch, tokens, width) at places,
    int64 (rows, slots), among all of them (None: as they are); or a random projection that keeps their distances."""
    width, used = states.shape[-1], min(states.shape[-1], FEATURES)
    projection = _projection(width, states.device) if width > FEATURES else None
    all_states, flat = states.reshape(-1, width), None if places is None else places.flatten()
    found = states.new_empty(len(all_states if flat is None else flat), used + COLUMNS, dtype=torch.float32)
    block = max(1, BLOCK_VALUES // width)
    for start in range(0, len(found), block):
        part = slice(start, start + block)
        rows = all_states[part] if flat is None else all_states.index_select(0, flat[part])
        if projection is None:
            found[part, :used] = rows
        else:
            torch.mm(rows.float(), projection, out=found[part, :used])
    length = torch.linalg.vector_norm(found[:, :used], dim=1, keepdim=True)
    # Half of what has length 1, and what adds a half to every product.
    found[:, :used].div_(torch.rsub(length, SHORTEST, alpha=-2))
    found[:, used:] = math.sqrt(0.5 / COLUMNS)
    return found.view(*(states.shape[:2] if places is None else places.shape), -1)


@functools.lru_cache(maxsize=4)
def _projection(width: int, device: torch.device) -> torch.Tensor:
    """The same Gaussian matrix (width, `FEATURES`) everywhere: which tokens are kept must not depend on a seed or a device."""
    drawn = torch.empty(width, FEATURES, dtype=torch.float32, device="cpu")
    drawn.normal_(generator=torch.Generator().manual_seed(0))
    return (drawn / math.sqrt(FEATURES)).to(device)


def _first(features: torch.Tensor, valid: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int64 (rows, 1), the slot of the token that is most like the mean of its row's valid ones; and float32 (rows, 1), how like
    it is: NaN if a state is."""
    plain = features[..., :-COLUMNS]
    mean = torch.bmm(valid[:, None].float(), plain)
    alike = torch.bmm(plain, mean.transpose(1, 2))[..., 0].masked_fill_(~valid, -torch.inf)
    most_alike = alike.amax(dim=1, keepdim=True)
    # Two tokens are equally like their mean: the first of equal ones, whatever rounding makes of them.
    limit = torch.sub(most_alike, torch.linalg.vector_norm(mean, dim=2), alpha=EQUAL / 2)  # features are halves
    return alike.ge_(limit).argmax(dim=1, keepdim=True), most_alike


def one_by_one(
    features: torch.Tensor, valid: torch.Tensor, first: torch.Tensor, most: int, radius: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Always the token that is least like all taken ones, the first of equal ones.

    Three operations a token, on similarities that are worked out once: for groups of few tokens, where a round would be more work
    than it saves, and for few tokens of larger ones. Scratch: (rows, slots, slots) float32.

    Args:
        features: float32 (rows, slots, width), see `features_of`.
        valid: bool (rows, slots).
        first: int64 (rows, 1), the slot to begin with.
        most: how many tokens are taken at most.
        radius: no more are taken once none is further than this from a taken one.

    Returns:
        int64 (rows, tokens), the slots in order; bool, whether something was still uncovered: those count that were taken then.

    Example:
        >>> states = torch.tensor([[[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]]])
        >>> valid, first = torch.ones(1, 4, dtype=torch.bool), torch.tensor([[1]])
        >>> one_by_one(features_of(states), valid, first, most=3)[0]
        tensor([[1, 2, 0]])
    """
    alike = torch.bmm(features, features.transpose(1, 2)).round_(decimals=DIGITS)
    alike.diagonal(dim1=1, dim2=2).fill_(DONE)
    rows, slot = torch.arange(len(alike), device=alike.device), first[:, 0]
    nearest = torch.maximum(alike[rows, slot], (~valid).float())  # which is `DONE`
    slots, least = [slot], [torch.full_like(nearest[:, 0], -DONE)]
    covered = DONE if radius is None else SAME - radius / 4
    while len(slots) < most:
        low, slot = nearest.min(dim=1)
        slots.append(slot)
        least.append(low)
        torch.maximum(nearest, alike[rows, slot], out=nearest)
        if radius is not None and len(slots) in ASKED_AT and bool((low >= covered).all()):
            break
    return torch.stack(slots, dim=1), torch.stack(least, dim=1) < covered
