"""Rounds of `KCenter`: many tokens at a time are taken so that they cover all others, for groups of many tokens."""

from __future__ import annotations

import dataclasses
import functools
import math

import torch

#: Tokens that a round looks at: those least like what is chosen. Never depends on what else is in the batch.
CANDIDATES = 384
#: Up to so many tokens are chosen strictly one after the other, where a round's haste would show; with more, haste grows until
#: it is full with `LATE_RAMP` more, and that of the first rounds with `RAMP` more.
ONE_BY_ONE, LATE_RAMP, RAMP = 24, 200, 800
#: Full haste: a round takes what is at least this far from the chosen tokens, as a share of the farthest token's distance: in
#: groups of up to `SMALL` tokens, where a token taken too early shows more, and in larger ones; ...
SMALL, FAR_ENOUGH = 3000, (0.95, 0.90)
#: ... and the first round takes what lacks this much more, each later one three tenths less of it. What the first tokens leave
#: uncovered, the later ones cover: only the last ones' distances stay.
EARLY, FADING = 0.3, 0.7
#: Rounds before the host asks for the first time whether a small group has enough: most pictures need so many, or more.
ROUNDS_IF_SMALL = 22
#: Rounds that differ in haste.
SCHEDULED = 32
#: How often candidates that are too near an earlier one are told from those whose earlier one is itself too near.
LOOKS = 2
#: Similarities that differ by less are equal.
EQUAL = 1e-5
#: Similarities are (cosine + 2) / 4, so that a product with 0 is less like anything than any token. `SAME` is that of equal
#: tokens; what is chosen, or no member, has `DONE`.
SAME, DONE = 0.75, 1.0
#: Where the host may not ask, as many times as many rounds, and so many more: enough for 378 drawn pictures, blank and crowded
#: ones among them. States on a smooth curve need up to six times as many; ...
SURE, MORE = 2, 8
#: ... so what was needed where the host asked is needed again, and as much more: pages of a prompt are alike.
MARGIN = 1.25
#: Rounds before the host asks for the first time whether a radius is covered.
ROUNDS_UNASKED = 6
#: What is wrong where states are NaN.
NAN_STATES = (
    "The visual states are NaN: the picture or the model's weights hold NaN or inf, so KCenter could not choose. "
    "top_k_ratio=1.0 chooses nothing and does what transformers does."
)


@dataclasses.dataclass
class Unread:
    """What choices say of themselves on the device, to be read by the host when many of them are made: see `k_center.short_ones`.

    Args:
        asks: how often rounds may ask the host whether they have chosen enough. Once they may not, they go on until that is as
            good as sure. None: as often as they need.
        needed: how many times as many rounds as usual had run at most when they asked.
        nan: bool (1,) each, whether visual states are NaN.
        short: bool (1,) each, whether rounds that did not ask have chosen too few.
    """

    asks: int | None = None
    needed: float = 0.0
    nan: list[torch.Tensor] = dataclasses.field(default_factory=list)
    short: list[torch.Tensor] = dataclasses.field(default_factory=list)

    def next(self) -> Unread:
        """For the choice that follows: what was learned, and nothing to be read yet."""
        return Unread(self.asks, self.needed)


@functools.lru_cache(maxsize=4)
def _haste(device: torch.device) -> torch.Tensor:
    """float32 (2, tokens to choose, rounds): the share of the largest distance that a token may lack, in small groups and in
    others; later rounds and more tokens are as the last ones."""
    more = (torch.arange(ONE_BY_ONE + RAMP + 1, dtype=torch.float32, device="cpu") - ONE_BY_ONE).clamp(min=0)[:, None]
    rounds = torch.arange(SCHEDULED, dtype=torch.float32, device="cpu")
    lacking = 1 - torch.tensor(FAR_ENOUGH, dtype=torch.float32, device="cpu")[:, None, None]
    late = lacking * (more / LATE_RAMP).clamp(max=1)
    return (late + EARLY * more / RAMP * FADING**rounds).to(device)


@functools.lru_cache(maxsize=8)
def _beyond(looked_at: int, device: torch.device) -> torch.Tensor:
    """What limits go towards, (candidates, candidates): no candidate is too near itself or a later one."""
    beyond = torch.full((looked_at, looked_at), math.inf, dtype=torch.float32, device=device)
    return beyond.masked_fill_(torch.ones_like(beyond).tril_(-1) > 0, SAME)


def _rounds_for(wanted: int, count: int) -> int:
    """How many rounds usually take so many of the tokens. One too many costs launches, one too few a host read."""
    if wanted <= ONE_BY_ONE:
        return wanted - 1
    if count <= SMALL:
        return min(wanted - 1, ROUNDS_IF_SMALL)
    haste = min(1.0, (wanted - ONE_BY_ONE) / RAMP)
    return min(wanted - 1, math.ceil(7.5 + 30 * (1 - haste) ** 2.5 + wanted / CANDIDATES))


@dataclasses.dataclass
class Rounds:
    """Rounds of choosing among rows of features (rows, slots, width), in company as alone: for many tokens.

    Args:
        features: float32, see `features_of`.
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
    def begin(
        cls,
        features: torch.Tensor,
        valid: torch.Tensor,
        first: torch.Tensor,
        most_alike: torch.Tensor,
        wanted: torch.Tensor,
        counts: torch.Tensor,
    ) -> Rounds:
        """With the slot of each row's first token, int64 (rows, 1). As large are `wanted`, how many tokens there are to choose,
        and `counts`, of how many: few are chosen without haste."""
        own = features.gather(1, first[..., None].expand(-1, -1, features.shape[2]))
        nearest = torch.bmm(features, own.transpose(1, 2))[..., 0].masked_fill_(~valid, DONE).scatter_(1, first, DONE)
        return cls(
            features,
            nearest,
            haste=_haste(features.device)[(counts[:, 0] > SMALL).long(), wanted[:, 0].clamp(max=ONE_BY_ONE + RAMP)],
            most_alike=most_alike,
            slots=[first],
            takes=[torch.ones_like(most_alike)],
            beyond=_beyond(min(CANDIDATES, features.shape[1]), features.device),
        )

    def until_counted(
        self, wanted: list[int], there: list[int], unread: Unread
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Go on until every row has as many tokens of those that are there: int64 (rows, slots looked at), in order; bool, which
        of them were taken; and int64, how many had been by then."""
        due = usual = max(map(_rounds_for, wanted, there))
        while True:
            asks = unread.asks != 0
            sure = math.ceil(max(SURE, MARGIN * unread.needed) * usual) + MORE
            for _ in range(due if asks else max(due, sure + 1 - len(self.takes))):
                self._go_on()
            taken = torch.cat(self.takes, dim=1) > 0
            place = taken.cumsum(dim=1)
            if not asks:
                unread.nan.append(self.most_alike.isnan().any()[None])
                return torch.cat(self.slots, dim=1), taken, place
            unread.asks = None if unread.asks is None else unread.asks - 1
            unread.needed = max(unread.needed, (len(self.takes) - 1) / max(1, usual))
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
            longer = 2 if unread.asks is not None and unread.asks < 3 else 1  # where few questions are left
            due = min(longer * max(missing), math.ceil(longer * len(self.takes) / 2))

    def until_covered(self, radius: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Go on until no token is further than this: slots and which of them were taken, as in `until_counted`."""
        due, covered = ROUNDS_UNASKED, torch.tensor(SAME - radius / 4, dtype=torch.float32, device="cpu").item()
        self.covered = covered
        while True:
            for _ in range(due):
                self._go_on()
            least, most_alike = torch.stack([self.nearest.amin(), self.most_alike.amax()]).tolist()
            _check([most_alike])
            if least >= covered:
                return torch.cat(self.slots, dim=1), torch.cat(self.takes, dim=1) > 0
            due = math.ceil(0.8 * len(self.takes))

    def _go_on(self) -> None:
        """One more round, without a number from the device."""
        near, slots = self.nearest.sort(dim=1, stable=True)
        near, slots = near[:, : len(self.beyond)], slots[:, : len(self.beyond)]
        own = self.features.gather(1, slots[..., None].expand(-1, -1, self.features.shape[2]))
        haste = self.haste[:, min(len(self.takes), SCHEDULED) - 1]
        limits = torch.lerp(near[:, :1, None].add(EQUAL / 4), self.beyond, haste[:, None, None])
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
        raise ValueError(NAN_STATES)
