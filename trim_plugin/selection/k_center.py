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

#: float32 values of states that are copied at a time.
BLOCK_VALUES = 2**22
#: Bytes of features that are compared at a time.
FEATURE_BYTES = 64 * 2**20
#: Tokens that a round looks at: those least like what is chosen. Never depends on what else is in the batch.
CANDIDATES = 256
#: A round takes what is at least this far from the chosen tokens, as a share of the farthest token's distance.
FAR_ENOUGH = 0.9
#: Up to so many tokens are chosen strictly one after the other, where a round's haste would show; from there on the share that a
#: token may lack grows by one in `HASTE` with every token, until it is 1 - `FAR_ENOUGH`.
ONE_BY_ONE = 24
HASTE = 4000
#: How often candidates that are too near an earlier one are told from those whose earlier one is itself too near.
LOOKS = 2
#: Rounds before the host asks for the first time whether enough are chosen.
ROUNDS_UNASKED = 3
#: Similarities that differ by less are equal.
EQUAL = 1e-5
#: The similarity of what is chosen, or no member: higher than any.
DONE = 4.0


class KCenter(VisualTokenProcessor):
    """k-center choice over the visual states: each next token is (nearly) the one that is least like all chosen so far.

    Distances are cosine distances of the uncentred visual states; the first token is the one most like the group's mean. Made
    for merging (`TrimConfig(merge=True)`), where a kept token stands for those that resemble it. Sources: Gonzalez 1985
    (farthest-point clustering); core-sets, Sener and Savarese, arXiv 1708.00489; DivPrune, arXiv 2503.02175.

    Tokens are taken in rounds. A round looks at the 256 tokens that are least like the chosen ones, goes through them from the
    farthest on, and takes each that is at least 0.9 as far as the farthest, from chosen tokens and from those it takes itself.
    The cover is the greedy choice's within 3 % (`docs/explanation/merging.md`), in a sixth of its operations. Few tokens are
    chosen one by one. All visibility groups and samples are chosen for at once, each as if it were alone.

    Cost for a group of N tokens: in every round one product of N × 256 × 256 values and 24 small operations. No N × K matrix
    exists, and the host is read a few times, not in every round. For a page of the 11B model 17 to 20 rounds choose 641
    of 6,404 tokens, 26 to 30 rounds 3,202. Scratch: 256 float32 values a token (64 MiB of them at a time), and as many beside.

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
        return scores.masked_fill(~self.choose(states, left).any(dim=1, keepdim=True), -math.inf)

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
        positions, valid = pack(rows)
        chosen, width = torch.zeros_like(rows), positions.shape[1]
        at_once = max(1, FEATURE_BYTES // (4 * FEATURES * max(1, width)))
        with full_float32(states.device):
            for start in range(0, len(rows) if width else 0, at_once):
                part = slice(start, start + at_once)
                sample = torch.arange(len(rows), device=rows.device)[part, None] // (len(rows) // len(states))
                features = _features(states, sample * tokens + positions[part])
                slots, taken = self._cover(features, valid[part])
                # A slot that is not taken repeats the first one, which is taken.
                found = positions[part].gather(1, torch.where(taken, slots, slots[:, :1]))
                chosen[part].scatter_(1, found, True)
        return (chosen & rows).view_as(members)

    def _cover(self, features: torch.Tensor, valid: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Slots of features (rows, slots, width) in the order in which they are chosen, and which of them are taken."""
        most, members = valid.shape[1], valid.sum(dim=1, keepdim=True)
        if self.kept_share is None:
            rounds = _Rounds.begin(features, valid, covered=1.0 - float(self.radius or 0.0), one_by_one=members)
            rounds.until_covered()
            return rounds.chosen()
        table = _rounded_up(self.kept_share, most, valid.device)
        counts = table[members]
        rounds = _Rounds.begin(features, valid, covered=DONE - 1.0, one_by_one=counts)
        rounds.until_counted(counts, most_wanted=math.ceil(self.kept_share * most))
        slots, taken = rounds.chosen()
        return slots, taken & (taken.cumsum(dim=1) <= counts)

    @property
    def arguments(self) -> dict[str, float | None]:
        """What makes an equal one."""
        return {"kept_share": self.kept_share} if self.radius is None else {"radius": self.radius}

    def __repr__(self) -> str:
        return f"KCenter({self.kept_share})" if self.radius is None else f"KCenter(radius={self.radius})"


@functools.lru_cache(maxsize=16)
def _rounded_up(kept_share: float, most: int, device: torch.device) -> torch.Tensor:
    """int64 (most + 1,): tokens to keep of every number of them. A table, so that 0.1 of 260 tokens are 26 whatever a device's
    float32 makes of it; some have no float64."""
    return torch.tensor([max(1, math.ceil(kept_share * count - 1e-9)) for count in range(most + 1)], device=device)


def _features(states: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """float32 (rows, slots, features) of length 1: the states (batch, tokens, width) at places, int64 (rows, slots), among all
    of them; or a random projection that keeps their distances."""
    width = states.shape[-1]
    projection = _projection(width, states.device) if width > FEATURES else None
    all_states, flat = states.reshape(-1, width), places.flatten()
    found = states.new_empty(len(flat), min(width, FEATURES), dtype=torch.float32)
    block = max(1, BLOCK_VALUES // width)
    for start in range(0, len(flat), block):
        part = slice(start, start + block)
        rows = all_states.index_select(0, flat[part]).float()
        found[part] = rows if projection is None else rows @ projection
    found /= found.norm(dim=1, keepdim=True).clamp_min_(torch.finfo(torch.float32).tiny)
    return found.view(*places.shape, -1)


@functools.lru_cache(maxsize=4)
def _projection(width: int, device: torch.device) -> torch.Tensor:
    """The same Gaussian matrix (width, `FEATURES`) everywhere: which tokens are kept must not depend on a seed or a device."""
    drawn = torch.randn(width, FEATURES, generator=torch.Generator().manual_seed(0))
    return (drawn / math.sqrt(FEATURES)).to(device)


@dataclasses.dataclass
class _Rounds:
    """Rounds of choosing among rows of features (rows, slots, width), in company as alone.

    Args:
        features: float32, of length 1.
        nearest: float32 (rows, slots), how like the most alike chosen token each is; `DONE` for chosen ones and padding.
        covered: what is as like a chosen token as this needs no other.
        hurry: float32 (rows, 1), the share of the largest distance that a token may lack; 0 chooses one by one.
        slots, takes: of every round, which slots it looked at, (rows, slots), and 1 for those that it took.
        alike, never, earlier: 1, `-DONE` and the strict lower triangle, as tensors.
    """

    features: torch.Tensor
    nearest: torch.Tensor
    covered: float
    hurry: torch.Tensor
    slots: list[torch.Tensor]
    takes: list[torch.Tensor]
    alike: torch.Tensor
    never: torch.Tensor
    earlier: torch.Tensor

    @classmethod
    def begin(cls, features: torch.Tensor, valid: torch.Tensor, covered: float, one_by_one: torch.Tensor) -> _Rounds:
        """With the token of each row that is most like the mean of its valid ones; `one_by_one`, int64 (rows, 1), says how many
        tokens there are to choose: few are chosen without haste."""
        mean = torch.nn.functional.normalize(torch.bmm(valid[:, None].float(), features), dim=-1)
        alike = torch.bmm(features, mean.transpose(1, 2))[..., 0].masked_fill_(~valid, -torch.inf)
        # Two tokens are equally like their mean: the first of equal ones, whatever rounding makes of them.
        first = alike.ge(alike.amax(dim=1, keepdim=True) - EQUAL).byte().argmax(dim=1, keepdim=True)
        own = features.gather(1, first[..., None].expand(-1, -1, features.shape[2]))
        nearest = torch.bmm(features, own.transpose(1, 2))[..., 0].masked_fill_(~valid, DONE).scatter_(1, first, DONE)
        hurry = ((one_by_one - ONE_BY_ONE) / HASTE).clamp_(0, 1 - FAR_ENOUGH)
        looked_at = min(CANDIDATES, features.shape[1])
        return cls(
            features,
            nearest,
            covered,
            hurry,
            slots=[first],
            takes=[torch.ones_like(nearest[:, :1])],
            alike=torch.ones_like(hurry),
            never=torch.full_like(hurry, -DONE),
            earlier=torch.ones(looked_at, looked_at, device=features.device).tril_(-1),
        )

    def until_counted(self, counts: torch.Tensor, most_wanted: int) -> None:
        """Go on until every row has int64 (rows, 1) tokens, of which the highest is known to be at most `most_wanted`."""
        due = math.ceil((most_wanted - 1) / CANDIDATES) + ROUNDS_UNASKED
        unclear, before = self.features.isnan().any()[None], [1.0] * len(self.features)
        while True:
            for _ in range(due):
                self._go_on()
            have = torch.cat(self.takes, dim=1).sum(dim=1)
            *numbers, is_nan = torch.cat([have, counts[:, 0].float(), unclear.float()]).tolist()
            _check(is_nan)
            had, wanted = numbers[: len(have)], numbers[len(have) :]
            if all(got >= want for got, want in zip(had, wanted, strict=True)):
                return
            # At the pace since the last look; rounds take more and more, so a far estimate is too high.
            paces = [
                (want - got) / (got - old) for got, want, old in zip(had, wanted, before, strict=True) if got < want
            ]
            due, before = min(math.ceil(max(paces) * due), math.ceil(len(self.takes) / 2)), had

    def until_covered(self) -> None:
        """Go on until every token is covered."""
        due, unclear = ROUNDS_UNASKED, self.features.isnan().any()
        while True:
            for _ in range(due):
                self._go_on()
            is_open, is_nan = torch.stack([(self.nearest < self.covered).any(), unclear]).tolist()
            _check(is_nan)
            if not is_open:
                return
            due = math.ceil(0.6 * len(self.takes))

    def chosen(self) -> tuple[torch.Tensor, torch.Tensor]:
        """int64 (rows, slots looked at), in order, and bool: which of them were taken."""
        return torch.cat(self.slots, dim=1), torch.cat(self.takes, dim=1) > 0

    def _go_on(self) -> None:
        """One more round, without a number from the device."""
        near, slots = self.nearest.sort(dim=1, stable=True)
        near, slots = near[:, :CANDIDATES], slots[:, :CANDIDATES]
        own = self.features.gather(1, slots[..., None].expand(-1, -1, self.features.shape[2]))
        limit = torch.lerp(near[:, :1], self.alike, self.hurry).add_(EQUAL).clamp_(max=self.covered)
        close = torch.bmm(own, own.transpose(1, 2)).ge(limit[..., None]) * self.earlier
        eligible = near.lt(limit).float()[..., None]
        # Of the candidates in order, one is taken if none that was taken before it is close. Looking 2n - 1 times settles chains
        # of n and takes nothing wrongly: what is still open then waits for the next round.
        takes = eligible
        for _ in range(2 * LOOKS - 1):
            takes = torch.baddbmm(eligible, close, takes, alpha=-1).clamp_(min=0)
        takes = takes[..., 0]
        # What was not taken gets a similarity below any.
        nothing = torch.add(self.never, takes, alpha=DONE)
        alike = torch.baddbmm(nothing[:, None], self.features, own.transpose(1, 2)).amax(dim=2)
        torch.maximum(self.nearest, alike, out=self.nearest)
        self.nearest.scatter_(
            1, slots, self.nearest.gather(1, slots).maximum(torch.add(self.never, takes, alpha=2 * DONE))
        )
        self.slots.append(slots)
        self.takes.append(takes)


def _check(is_nan: float) -> None:
    if is_nan:
        raise ValueError(
            "The visual states are NaN: the picture or the model's weights hold NaN or inf, so KCenter could not choose. "
            "top_k_ratio=1.0 chooses nothing and does what transformers does."
        )
