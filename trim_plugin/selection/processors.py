"""Visual token processors: small callables that decide which visual tokens each head wants to keep.

They follow transformers' `LogitsProcessor`: `processor(scores, visible) -> scores`. A score of −inf removes the token for
that head; a token survives if any head leaves it above −inf. They are called once for every visibility group (the visual
tokens that the same text rows may read), so a processor never has to know about groups.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from trim_plugin.arithmetic import share

ProcessorLike = Callable[..., torch.Tensor]
#: All attention of a head in whole numbers.
_WHOLE = 2**40


class VisualTokenProcessor(ABC):
    """Base class of the stages that remove visual tokens. Write one method, `__call__`.

    A processor that also looks at the visual states sets `needs_states = True` and is called with a third argument,
    `states` (batch, visual tokens, width), what the vision tower and its projector made of the pictures.

    Example:
        >>> class EverySecond(VisualTokenProcessor):
        ...     def __call__(self, scores, visible):
        ...         odd = torch.arange(scores.shape[-1]) % 2 == 1
        ...         return scores.masked_fill(odd, float("-inf"))
        >>> EverySecond()(torch.ones(1, 1, 4), torch.ones(1, 4, dtype=torch.bool))
        tensor([[[1., -inf, 1., -inf]]])
    """

    #: Whether `__call__` takes the visual states as a third argument.
    needs_states = False
    #: Whether scores say anything to it. Where no processor of a chain needs them, none are worked out, and all given are 0.
    needs_scores = True

    @abstractmethod
    def __call__(self, scores: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        """Return the scores with −inf where a head gives a token up.

        Args:
            scores: float32 of shape (batch, heads, visual tokens). The mean attention that query rows pay to a token; −inf
                outside of `visible` and where an earlier stage removed the token.
            visible: bool of shape (batch, visual tokens): the visibility group at hand, never empty for a sample.
            states: only with `needs_states`: (batch, visual tokens, width).

        Returns:
            Scores of the same shape.
        """

    def in_groups(self, scores: torch.Tensor, group: torch.Tensor, groups: int) -> torch.Tensor:
        """The same for all visibility groups in one call, in as many operations for many as for few.

        Optional: a class that writes it, beside a `__call__` that says the same, is called so. It leaves every group a token, and
        returns no NaN. With `needs_states` it takes the states as a fourth argument.

        Args:
            scores: as in `__call__`.
            group: int64 (batch, visual tokens), the group of each; −1 for none.
            groups: more than the highest of these.
        """
        raise NotImplementedError(f"{processor_name(self)} decides group by group.")

    @property
    def arguments(self) -> Mapping[str, Any] | None:
        """Keyword arguments that make an equal one: what is saved with a model, and what `==` compares.

        A class with an `__init__` of its own says them, in values that JSON holds, for instance `{"minimum": self.minimum}`.
        None where nobody said them: such a rule cannot be saved, and equals itself alone.
        """
        plain = type(self).__init__ is object.__init__ and not vars(self)
        return {} if plain else None

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if type(self) is not type(other) or not isinstance(other, VisualTokenProcessor) or self.arguments is None:
            return NotImplemented
        return self.arguments == other.arguments

    def __hash__(self) -> int:
        return hash(type(self))


class VisualTokenProcessorList(list[ProcessorLike]):
    """A chain of processors, applied from first to last; itself a processor.

    Example:
        >>> chain = VisualTokenProcessorList([TopKPerHead(0.5), TopKPerHead(0.25)])
        >>> chain(torch.tensor([[[0.1, 0.2, 0.3, 0.4]]]), torch.ones(1, 4, dtype=torch.bool))
        tensor([[[  -inf,   -inf,   -inf, 0.4000]]])
    """

    def __init__(self, processors: Iterable[ProcessorLike] = ()) -> None:
        super().__init__(processors)

    @property
    def needs_states(self) -> bool:
        """Whether any processor of the chain looks at the visual states."""
        return any(getattr(processor, "needs_states", False) for processor in self)

    @property
    def needs_scores(self) -> bool:
        """Whether any processor of the chain looks at scores."""
        return any(getattr(processor, "needs_scores", True) for processor in self)

    @property
    def knows_groups(self) -> bool:
        """Whether every processor of the chain decides for all visibility groups in one call."""
        return all(map(_knows_groups, self))

    def in_groups(
        self, scores: torch.Tensor, group: torch.Tensor, groups: int, states: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Apply every processor in turn to all groups; as in `VisualTokenProcessor.in_groups`."""
        for processor in self:
            extra = (states,) if getattr(processor, "needs_states", False) else ()
            scores = getattr(processor, "in_groups")(scores, group, groups, *extra)  # noqa: B009 - `knows_groups` said so
        return scores

    def __call__(self, scores: torch.Tensor, visible: torch.Tensor, states: torch.Tensor | None = None) -> torch.Tensor:
        """Apply every processor in turn; shapes as in `VisualTokenProcessor.__call__`.

        Raises:
            TypeError: a processor returned something that is not a tensor of floats.
            ValueError: a processor changed the shape or returned NaN.
        """
        processed, unclear = self.apply(scores, visible, states)
        for processor, is_nan in zip(self, unclear, strict=True):
            if bool(is_nan):
                raise ValueError(returned_nan(processor))
        return processed

    def apply(
        self, scores: torch.Tensor, visible: torch.Tensor, states: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The same without looking at a number: the scores, and for every processor a 0-dim bool, whether it returned NaN."""
        unclear = []
        for processor in self:
            extra = (states,) if getattr(processor, "needs_states", False) else ()
            processed = processor(scores, visible, *extra)
            _check_processed(processor, processed, scores.shape)
            unclear.append(processed.isnan().any())
            scores = processed
        return scores, unclear


class TopKPerHead(VisualTokenProcessor):
    """The rule of Trimmed Llama: every head keeps its k best tokens, k = max(1, ceil(ratio · visible tokens)).

    Equal scores prefer the lower index. Source: Lee et al. 2025, arXiv 2504.00557, section 3.

    Args:
        ratio: share of the visible tokens that each head keeps, in (0, 1]. The union over heads is larger.

    Raises:
        ValueError: `ratio` is not a number in (0, 1].

    Example:
        >>> TopKPerHead(0.5)(torch.tensor([[[0.4, 0.1, 0.3, 0.2]]]), torch.ones(1, 4, dtype=torch.bool))
        tensor([[[0.4000,   -inf, 0.3000,   -inf]]])
    """

    def __init__(self, ratio: float) -> None:
        self.ratio = share("ratio", ratio)

    def __call__(self, scores: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        """Keep the k best of each head; shapes as in `VisualTokenProcessor.__call__`."""
        return self.in_groups(scores, torch.where(visible, 0, -1), 1)

    def in_groups(self, scores: torch.Tensor, group: torch.Tensor, groups: int) -> torch.Tensor:
        """Keep the k best of each head and group."""
        ranked = _Ranking.of(scores, group, groups)
        k = _rounded_up(self.ratio, scores.shape[-1], scores.device)[ranked.counts]
        return ranked.scattered(ranked.values.masked_fill_((ranked.place >= ranked.at_place(k))[:, None], -math.inf))

    @property
    def arguments(self) -> dict[str, float]:
        """What makes an equal one."""
        return {"ratio": self.ratio}

    def __repr__(self) -> str:
        return f"TopKPerHead({self.ratio})"


class TopPPerHead(VisualTokenProcessor):
    """Every head keeps the fewest best tokens that hold `mass` of its attention, at least one.

    A head that looks at little keeps little, so the budget follows the picture. Equal scores prefer the lower index.

    Args:
        mass: share of the head's attention to be kept, in (0, 1].

    Raises:
        ValueError: `mass` is not a number in (0, 1].

    Example:
        >>> TopPPerHead(0.6)(torch.tensor([[[0.5, 0.1, 0.3, 0.1]]]), torch.ones(1, 4, dtype=torch.bool))
        tensor([[[0.5000,   -inf, 0.3000,   -inf]]])
    """

    def __init__(self, mass: float) -> None:
        self.mass = share("mass", mass)

    def __call__(self, scores: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        """Keep the head's mass; shapes as in `VisualTokenProcessor.__call__`."""
        candidates = scores.masked_fill(~visible[:, None], -math.inf)
        ranked = candidates.sort(dim=-1, descending=True, stable=True)
        attention = ranked.values.clamp(min=0.0)
        if torch.are_deterministic_algorithms_enabled():  # a GPU adds up floats in any order, whole numbers exactly
            attention = (attention * (_WHOLE / attention.sum(dim=-1, keepdim=True).clamp_(min=1e-30))).long()
        before = attention.cumsum(dim=-1) - attention
        wanted = before < self.mass * attention.sum(dim=-1, keepdim=True)
        wanted[..., 0] = True
        keep = torch.zeros_like(wanted).scatter_(-1, ranked.indices, wanted)
        return candidates.masked_fill(~keep, -math.inf)

    @property
    def arguments(self) -> dict[str, float]:
        """What makes an equal one."""
        return {"mass": self.mass}

    def __repr__(self) -> str:
        return f"TopPPerHead({self.mass})"


@dataclasses.dataclass
class _Ranking:
    """Every head's tokens, group after group, the best of a group first; equal ones in their own order.

    Args:
        values: (batch, heads, tokens), scores in that order; −inf for tokens of no group, which come first.
        tokens: int64 (batch, heads, tokens), which token each is.
        at: int64 (batch, tokens), 1 + the group at each place, the same for all heads.
        counts: int64 (batch, groups + 1), tokens of no group and of every group.
        place: int64 (batch, tokens), places within the group; beyond all places for tokens of no group.
    """

    values: torch.Tensor
    tokens: torch.Tensor
    at: torch.Tensor | None
    counts: torch.Tensor
    place: torch.Tensor

    @staticmethod
    def of(scores: torch.Tensor, group: torch.Tensor, groups: int) -> _Ranking:
        in_none, here = group < 0, torch.arange(group.shape[1], device=group.device)
        values, tokens = scores.masked_fill(in_none[:, None], -math.inf).sort(dim=-1, descending=True, stable=True)
        if groups == 1:  # what is of no group is −inf, and so behind the others already
            return _Ranking(values, tokens, None, (group >= 0).sum(dim=1, keepdim=True), here[None])
        own = (group + 1)[:, None].expand_as(tokens).gather(-1, tokens)
        own, order = own.sort(dim=-1, stable=True)
        counts = group.new_zeros(len(group), groups + 1).scatter_add_(1, group + 1, torch.ones_like(group))
        at = own[:, 0]
        place = here - (counts.cumsum(dim=1) - counts).gather(1, at)
        return _Ranking(
            values.gather(-1, order),
            tokens.gather(-1, order),
            at,
            counts,
            place.masked_fill_(at == 0, group.shape[1]),
        )

    def at_place(self, of_group: torch.Tensor) -> torch.Tensor:
        """What is said of every group, (batch, groups + 1), for every place; one group is said once."""
        return of_group if self.at is None else of_group.gather(1, self.at)

    def scattered(self, values: torch.Tensor) -> torch.Tensor:
        """Scores at the tokens' own places."""
        return torch.empty_like(values).scatter_(-1, self.tokens, values)


@functools.lru_cache(maxsize=16)
def _rounded_up(ratio: float, most: int, device: torch.device) -> torch.Tensor:
    """int64 (most + 1,): max(1, ceil(ratio · n)) for every n. A table, so that no number is read from the device and that the
    product is float64 everywhere.
    """
    return torch.tensor([max(1, math.ceil(ratio * count)) for count in range(most + 1)], device=device)


def processor_name(processor: object) -> str:
    """What an error calls a processor: its `repr` if it has one of its own, else the name of the function or class.

    Example:
        >>> processor_name(TopKPerHead(0.5)), processor_name(share)
        ('TopKPerHead(0.5)', 'share')
        >>> class Mine:
        ...     def __call__(self, scores, visible): ...
        >>> processor_name(Mine())
        'Mine'
    """
    if type(processor).__repr__ is not object.__repr__ and not hasattr(processor, "__name__"):
        return repr(processor)
    return str(getattr(processor, "__name__", type(processor).__name__))


def _knows_groups(processor: object) -> bool:
    """Whether a processor's `in_groups` says what its `__call__` says: a class that overrides the latter alone is asked that."""
    for cls in type(processor).__mro__:
        if cls is VisualTokenProcessor or "__call__" in vars(cls) or "in_groups" in vars(cls):
            return cls is not VisualTokenProcessor and "in_groups" in vars(cls)
    return False


def _check_processed(processor: ProcessorLike, processed: object, shape: torch.Size) -> None:
    name = processor_name(processor)
    if not isinstance(processed, torch.Tensor):
        raise TypeError(
            f"The visual token processor {name} returned {type(processed).__name__} instead of a tensor. "
            "Return the scores, with -inf where a token is removed."
        )
    if not processed.is_floating_point():
        mistake = (
            "It looks like a mask of what to keep; return scores.masked_fill(~mask, float('-inf')) instead."
            if processed.dtype == torch.bool
            else "Return the scores, with -inf where a token is removed."
        )
        raise TypeError(
            f"The visual token processor {name} returned {processed.dtype} instead of float scores. {mistake}"
        )
    if processed.shape != shape:
        raise ValueError(
            f"The visual token processor {name} returned scores of shape {tuple(processed.shape)} instead of "
            f"{tuple(shape)}. Return the shape you were given, with -inf where a token is removed."
        )


def returned_nan(processor: ProcessorLike) -> str:
    """What is wrong with a processor whose scores are NaN."""
    return (
        f"The visual token processor {processor_name(processor)} returned NaN. Remove a token with -inf; inf - inf and "
        "0 * inf give NaN."
    )
