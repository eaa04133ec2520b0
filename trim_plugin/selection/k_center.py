"""Keep the visual tokens that cover a picture: no token is far from a kept one. Needs no attention, so no prompt."""

from __future__ import annotations

import dataclasses
import functools
import math

import torch

from trim_plugin.arithmetic import FEATURES, share
from trim_plugin.selection.precision import full_float32
from trim_plugin.selection.processors import VisualTokenProcessor
from trim_plugin.selection.visibility import pack

#: float32 values of states that are copied at a time, 52 MiB.
BLOCK_VALUES = 13 * 2**20
#: Bytes of features, and of what they are compared to, at a time.
COVER_BYTES = 128 * 2**20
#: Tokens that a round looks at: those least like what is chosen. Never depends on what else is in the batch.
CANDIDATES = 384
#: Up to so many tokens are chosen strictly one after the other, where a round's haste would show; with more, haste grows until
#: it is full with `LATE_RAMP` more, and that of the first rounds with `RAMP` more.
ONE_BY_ONE, LATE_RAMP, RAMP = 24, 200, 800
#: Full haste: a round takes what is at least this far from the chosen tokens, as a share of the farthest token's distance; ...
FAR_ENOUGH = 0.95
#: ... and the first round takes what lacks this much more, each later one three tenths less of it. What the first tokens leave
#: uncovered, the later ones cover: only the last ones' distances stay.
EARLY, FADING = 0.25, 0.7
#: Rounds that differ in haste.
SCHEDULED = 32
#: How often candidates that are too near an earlier one are told from those whose earlier one is itself too near.
LOOKS = 2
#: Similarities that differ by less are equal.
EQUAL = 1e-5
#: Similarities are (cosine + 2) / 4, so that a product with 0 is less like anything than any token. `SAME` is that of equal
#: tokens; what is chosen, or no member, has `DONE`.
SAME, DONE = 0.75, 1.0
#: A limit is this far from the farthest similarity to `BEYOND`, if there is no haste: `EQUAL` at `SAME`, and never above `DONE`.
NO_HASTE, BEYOND = 2.5e-5, 0.85
#: Columns of features that make similarities of cosines: four, so that rows stay aligned.
COLUMNS = 4
#: Rounds before the host asks for the first time whether a radius is covered.
ROUNDS_UNASKED = 6


class KCenter(VisualTokenProcessor):
    """k-center choice over the visual states: each next token is (nearly) the one that is least like all chosen so far.

    Distances are cosine distances of the uncentred visual states; the first token is the one most like the group's mean. Made
    for merging (`TrimConfig(merge=True)`), where a kept token stands for those that resemble it. Sources: Gonzalez 1985
    (farthest-point clustering); core-sets, Sener and Savarese, arXiv 1708.00489; DivPrune, arXiv 2503.02175.

    Tokens are taken in rounds. A round looks at the 384 tokens that are least like the chosen ones, goes through them from the
    farthest on, and takes each that is at least 0.95 as far as the farthest, from chosen tokens and from those it takes itself;
    the first rounds are content with 0.7. The cover of a page is the greedy choice's within about 3 %
    (`docs/explanation/merging.md`). Few tokens are chosen one by one. All visibility groups and samples are chosen for at
    once, each as if it were alone.

    Cost for a group of N tokens: in every round one product of N × 384 × 260 values, a sort of N, and 16 small operations. No
    N × K matrix exists. The host is read twice in most cases: how many members there are, and whether enough are chosen. For
    a page of the 11B model 10 to 16 rounds choose 641 of 6,404 tokens, 14 to 16 rounds 2,242. Scratch: 644 float32 values a
    token (128 MiB of them at a time).

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
        members = group[:, None] == torch.arange(groups, device=group.device)[:, None]
        left = members & (scores != -math.inf).any(dim=1)[:, None]
        chosen = self.choose(states, left)
        return scores.masked_fill(~(chosen if groups == 1 else chosen.any(dim=1, keepdim=True)), -math.inf)

    def choose(self, states: torch.Tensor, members: torch.Tensor) -> torch.Tensor:
        """The tokens to keep, without any prompt.

        Args:
            states: (batch, tokens, width), visual states.
            members: bool (batch, tokens), the tokens to choose among; or (batch, groups, tokens), for each group apart.

        Returns:
            bool, of the shape of `members`; nothing where there are no members.

        Raises:
            ValueError: the states are NaN.
        """
        if self.kept_share == 1.0:
            return members
        tokens = members.shape[-1]
        rows = members.reshape(-1, tokens)
        counts = rows.sum(dim=1, keepdim=True)
        there = [int(count) for count in counts[:, 0].tolist()]
        chosen, width = torch.zeros_like(rows), max(there, default=0)
        # Usually every token is a member: then nothing has to be packed.
        whole = min(there, default=0) == tokens and len(rows) == len(states)
        positions, valid = (None, rows) if whole else pack(rows, longest=width)
        at_once = max(1, COVER_BYTES // (4 * (FEATURES + COLUMNS + CANDIDATES) * max(1, width)))
        with full_float32(states.device):
            for start in range(0, len(rows) if width else 0, at_once):
                part = slice(start, start + at_once)
                if positions is None:
                    features = _features(states[part])
                else:
                    sample = torch.arange(len(rows), device=rows.device)[part, None] // (len(rows) // len(states))
                    features = _features(states, sample * tokens + positions[part])
                slots, taken = self._cover(features, valid[part], counts[part], there[part])
                # A slot that is not taken repeats the first one, which is taken.
                slots = torch.where(taken, slots, slots[:, :1])
                chosen[part].scatter_(1, slots if positions is None else positions[part].gather(1, slots), True)
        return (chosen if whole else chosen & rows).view_as(members)

    def _cover(
        self, features: torch.Tensor, valid: torch.Tensor, counts: torch.Tensor, there: list[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Slots of features (rows, slots, width) in the order in which they are chosen, and which of them are taken.

        `valid` is bool (rows, slots); `counts`, int64 (rows, 1), and `there` say how many of them are.
        """
        if self.kept_share is None:
            rounds = _Rounds.begin(features, valid, counts)
            return rounds.until_covered(float(self.radius or 0.0))
        wanted = _rounded_up(self.kept_share, valid.shape[1], valid.device)[counts]
        rounds = _Rounds.begin(features, valid, wanted)
        slots, taken, place = rounds.until_counted([_rounded_up_of(self.kept_share, count) for count in there])
        return slots, taken & (place <= wanted)

    @property
    def arguments(self) -> dict[str, float | None]:
        """What makes an equal one."""
        return {"kept_share": self.kept_share} if self.radius is None else {"radius": self.radius}

    def __repr__(self) -> str:
        return f"KCenter({self.kept_share})" if self.radius is None else f"KCenter(radius={self.radius})"


def _rounded_up_of(kept_share: float, count: int) -> int:
    """Tokens to keep of so many."""
    return max(1, math.ceil(kept_share * count - 1e-9))


@functools.lru_cache(maxsize=16)
def _rounded_up(kept_share: float, most: int, device: torch.device) -> torch.Tensor:
    """int64 (most + 1,): tokens to keep of every number of them. A table, so that 0.1 of 260 tokens are 26 whatever a device's
    float32 makes of it; some have no float64."""
    return torch.tensor([_rounded_up_of(kept_share, count) for count in range(most + 1)], device=device)


def _features(states: torch.Tensor, places: torch.Tensor | None = None) -> torch.Tensor:
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
    found[:, :used].div_(torch.rsub(length, torch.finfo(torch.float32).tiny, alpha=-2))
    found[:, used:] = math.sqrt(0.5 / COLUMNS)
    return found.view(*(states.shape[:2] if places is None else places.shape), -1)


@functools.lru_cache(maxsize=4)
def _projection(width: int, device: torch.device) -> torch.Tensor:
    """The same Gaussian matrix (width, `FEATURES`) everywhere: which tokens are kept must not depend on a seed or a device."""
    drawn = torch.randn(width, FEATURES, generator=torch.Generator().manual_seed(0))
    return (drawn / math.sqrt(FEATURES)).to(device)


@functools.lru_cache(maxsize=4)
def _haste(device: torch.device) -> torch.Tensor:
    """float32 (tokens to choose, rounds): the share of the largest distance that a token may lack; later rounds and more tokens
    are as the last ones."""
    more = (torch.arange(ONE_BY_ONE + RAMP + 1) - ONE_BY_ONE).clamp(min=0)[:, None]
    late = (1 - FAR_ENOUGH) * (more / LATE_RAMP).clamp(max=1)
    return (late + EARLY * more / RAMP * FADING ** torch.arange(SCHEDULED) + NO_HASTE).to(device)


@functools.lru_cache(maxsize=8)
def _beyond(looked_at: int, device: torch.device) -> torch.Tensor:
    """What limits go towards, (candidates, candidates): no candidate is too near itself or a later one."""
    earlier = torch.ones(looked_at, looked_at).tril(-1) > 0
    return torch.where(earlier, BEYOND, math.inf).to(device)


def _rounds_for(wanted: int) -> int:
    """How many rounds usually take so many tokens. One too many costs launches, one too few a host read."""
    if wanted <= ONE_BY_ONE:
        return wanted - 1
    haste = min(1.0, (wanted - ONE_BY_ONE) / RAMP)
    return min(wanted - 1, math.ceil(7.5 + 30 * (1 - haste) ** 2.5 + wanted / CANDIDATES))


@dataclasses.dataclass
class _Rounds:
    """Rounds of choosing among rows of features (rows, slots, width), in company as alone.

    Args:
        features: float32, see `_features`.
        nearest: float32 (rows, slots), how like the most alike chosen token each is; `DONE` for chosen ones and padding.
        haste: float32 (rows, rounds), see `_haste`.
        most_alike: float32 (rows, 1), NaN if a state is.
        slots, takes: of every round, which slots it looked at, (rows, slots), and 1 for those that it took.
        beyond: see `_beyond`.
        covered: what is as like a chosen token as this needs no other; None: every token may be needed.
    """

    features: torch.Tensor
    nearest: torch.Tensor
    haste: torch.Tensor
    most_alike: torch.Tensor
    slots: list[torch.Tensor]
    takes: list[torch.Tensor]
    beyond: torch.Tensor
    covered: float | None = None

    @classmethod
    def begin(cls, features: torch.Tensor, valid: torch.Tensor, wanted: torch.Tensor) -> _Rounds:
        """With the token of each row that is most like the mean of its valid ones; `wanted`, int64 (rows, 1), says how many
        tokens there are to choose: few are chosen without haste."""
        plain = features[..., :-COLUMNS]
        mean, none = torch.bmm(valid[:, None].float(), plain), ~valid
        alike = torch.bmm(plain, mean.transpose(1, 2))[..., 0].masked_fill_(none, -torch.inf)
        most_alike = alike.amax(dim=1, keepdim=True)
        # Two tokens are equally like their mean: the first of equal ones, whatever rounding makes of them.
        limit = torch.sub(most_alike, torch.linalg.vector_norm(mean, dim=2), alpha=EQUAL / 2)  # features are halves
        first = alike.ge_(limit).argmax(dim=1, keepdim=True)
        own = features.gather(1, first[..., None].expand(-1, -1, features.shape[2]))
        nearest = torch.bmm(features, own.transpose(1, 2))[..., 0].masked_fill_(none, DONE).scatter_(1, first, DONE)
        return cls(
            features,
            nearest,
            haste=_haste(features.device)[wanted[:, 0].clamp(max=ONE_BY_ONE + RAMP)],
            most_alike=most_alike,
            slots=[first],
            takes=[torch.ones_like(most_alike)],
            beyond=_beyond(min(CANDIDATES, features.shape[1]), features.device),
        )

    def until_counted(self, wanted: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Go on until every row has as many tokens: int64 (rows, slots looked at), in order; bool, which of them were taken; and
        int64, how many had been by then."""
        due = max(map(_rounds_for, wanted))
        while True:
            for _ in range(due):
                self._go_on()
            taken = torch.cat(self.takes, dim=1) > 0
            place = taken.cumsum(dim=1)
            looked_at = self.takes[-1].shape[1]
            before = place[:, -1 - looked_at] if due else place[:, -1]
            numbers = torch.stack([place[:, -1].float(), before.float(), self.most_alike[:, 0]]).tolist()
            _check(numbers[2])
            # At the pace of the last round.
            missing = [
                math.ceil((want - got) / max(1, got - old))
                for want, got, old in zip(wanted, *numbers[:2], strict=True)
                if got < want
            ]
            if not missing:
                return torch.cat(self.slots, dim=1), taken, place
            due = min(max(missing), math.ceil(len(self.takes) / 2))

    def until_covered(self, radius: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Go on until no token is further than this: slots and which of them were taken, as in `until_counted`."""
        due, covered = ROUNDS_UNASKED, torch.tensor(SAME - radius / 4).item()
        self.covered = covered
        while True:
            for _ in range(due):
                self._go_on()
            least, most_alike = torch.stack([self.nearest.amin(), self.most_alike.amax()]).tolist()
            _check([most_alike])
            if least >= covered:
                return torch.cat(self.slots, dim=1), torch.cat(self.takes, dim=1) > 0
            due = math.ceil(0.6 * len(self.takes))

    def _go_on(self) -> None:
        """One more round, without a number from the device."""
        near, slots = self.nearest.sort(dim=1, stable=True)
        near, slots = near[:, : len(self.beyond)], slots[:, : len(self.beyond)]
        own = self.features.gather(1, slots[..., None].expand(-1, -1, self.features.shape[2]))
        haste = self.haste[:, min(len(self.takes), SCHEDULED) - 1]
        limits = torch.lerp(near[:, :1, None], self.beyond, haste[:, None, None])
        limit = limits[:, -1, :1]
        if self.covered is not None:
            limit = limit.clamp(max=self.covered)
            limits = torch.minimum(limits, torch.where(self.beyond < math.inf, self.covered, math.inf))
        close = torch.bmm(own, own.transpose(1, 2)).ge_(limits)
        eligible = near < limit
        # Of the candidates in order, one is taken if none that was taken before it is close. Looking 2n - 1 times settles chains
        # of n and takes nothing wrongly: what is still open then waits for the next round.
        takes = close.amax(dim=2).lt_(eligible)
        for _ in range(2 * LOOKS - 2):
            takes = torch.bmm(close, takes[..., None])[..., 0].lt_(eligible)
        # What was not taken becomes 0, which is like nothing.
        alike = torch.bmm(self.features, own.mul_(takes[..., None]).transpose(1, 2)).amax(dim=2)
        self.nearest = torch.maximum(self.nearest, alike).scatter_reduce_(1, slots, takes, "amax")
        self.slots.append(slots)
        self.takes.append(takes)


def _check(most_alike: list[float]) -> None:
    if any(map(math.isnan, most_alike)):
        raise ValueError(
            "The visual states are NaN: the picture or the model's weights hold NaN or inf, so KCenter could not choose. "
            "top_k_ratio=1.0 chooses nothing and does what transformers does."
        )
