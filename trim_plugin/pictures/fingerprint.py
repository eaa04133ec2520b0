"""Tells whether a model is the one that encoded a picture: not another, not trained since, with the same adapters.

What counts is what shapes the visual states: the vision tower and the projector, with the adapters that are active on them and
their scales. An adapter and the same adapter merged into the weights are the same; so is a model in another format.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections import OrderedDict
from collections.abc import Hashable, Iterator
from typing import Any

import torch

from trim_plugin.forward.tower_weights import COLUMNS, PROBES, QUANTIZED, is_adapter, measured

#: Relative differences up to these are rounding: of sums, and of weights kept in another format. Merging adapters into weights
#: rounds these too: up to the spacing of the format's numbers.
SAME_FORMAT, OTHER_FORMAT = 1e-5, 1e-2
#: Differences up to these tell nothing: weights that were not touched, and quantized layers that other kernels have computed.
UNTOUCHED, OTHER_KERNELS = 1e-6, 2e-2
#: Fingerprints that are remembered of a model, for instance under several adapters.
_REMEMBERED = 8
#: Numbers of a tensor that are looked at to see whether it has changed.
_LOOKED_AT = 8

_known: weakref.WeakKeyDictionary[Any, OrderedDict[Hashable, torch.Tensor]] = weakref.WeakKeyDictionary()
_lock = threading.Lock()
_still = threading.local()


def fingerprint(model: Any) -> torch.Tensor:
    """Numbers for every layer of the tower and the projector, float32 (layers, COLUMNS), see `forward.tower_weights`.

    NaN where weights cannot be read: offloaded ones, and those spread over processes. The first call reads all weights. Later
    ones look at a few numbers of each, at their versions and places, and at which adapters are active with which scales; only
    if something has changed, all weights are read again. The model is an `MllamaModel`.

    Example:
        >>> from trim_plugin.embedded import load_small_model
        >>> model, _ = load_small_model()
        >>> fingerprint(model.model) is fingerprint(model.model)
        True
    """
    looked_at: dict[int, torch.Tensor] | None = getattr(_still, "marks", None)
    if looked_at is None:
        return _looked_up(model)
    if id(model) not in looked_at:
        looked_at[id(model)] = _looked_up(model)
    return looked_at[id(model)]


@contextlib.contextmanager
def weights_stay() -> Iterator[None]:
    """Look at a model's weights once, for all that this thread does meanwhile: nobody changes them.

    Example:
        >>> from trim_plugin.embedded import load_small_model
        >>> model, _ = load_small_model()
        >>> with weights_stay():
        ...     fingerprint(model.model) is fingerprint(model.model)
        True
    """
    before = getattr(_still, "marks", None)
    _still.marks = {} if before is None else before
    try:
        yield
    finally:
        _still.marks = before


def _looked_up(model: Any) -> torch.Tensor:
    parts = [model.vision_model, model.multi_modal_projector]
    now = _state(parts)
    with _lock:
        known = _known.setdefault(model, OrderedDict())
        if now in known:
            known.move_to_end(now)
            return known[now]
    made = measured(parts)
    # Measuring may lay quantized weights out anew.
    now = _state(parts)
    with _lock:
        known[now] = made
        while len(known) > _REMEMBERED:
            known.popitem(last=False)
    return made


def is_other(first: torch.Tensor, second: torch.Tensor) -> bool | None:
    """Whether two fingerprints are of models whose visual states differ by more than rounding; None if that cannot be told.

    Example:
        >>> from trim_plugin.embedded import load_small_model
        >>> model, _ = load_small_model()
        >>> mark = fingerprint(model.model)
        >>> is_other(mark, mark), is_other(mark, mark * 1.1), is_other(mark, mark * torch.nan)
        (False, True, None)
    """
    if torch.equal(first, second):  # no NaN among them
        return False
    if bool(first.isnan().all()) or bool(second.isnan().all()):
        return None
    if first.shape != second.shape or first.shape[1] != COLUMNS:
        return True
    one, other = first.double(), second.double()
    formats, adapters = torch.stack([one[:, 0], other[:, 0]]), torch.stack([one[:, 1], other[:, 1]])
    length = torch.maximum(one[:, 2], other[:, 2]).clamp(min=1e-12)
    base, added, made_up = (slice(start, start + PROBES) for start in range(3, COLUMNS, PROBES))
    apart = (one[:, base] - other[:, base]).norm(dim=1) / PROBES**0.5 / length

    # Nothing was merged on either side: adapters must be the same, however little they do.
    alike = torch.where(adapters.abs()[0] == adapters.abs()[1], SAME_FORMAT, OTHER_FORMAT)
    alike = torch.where((adapters == 0).any(dim=0), SAME_FORMAT, alike)
    # Where something was: what the layer does with all of them.
    together = (one[:, base] + one[:, added] - other[:, base] - other[:, added]).norm(dim=1) / PROBES**0.5 / length
    rounding = torch.where((adapters != 0).any(dim=0), formats.amax(dim=0), 0).clamp(min=SAME_FORMAT)
    rounding = torch.where(formats[0] == formats[1], rounding, OTHER_FORMAT)
    others = torch.where(apart <= UNTOUCHED, _differ(one, other, added, alike), together > rounding)
    unclear = apart.isnan() | one[:, added].isnan().any(dim=1) | other[:, added].isnan().any(dim=1)

    # Layers whose numbers are not known, or rounded to a few bits: the adapters alone can be compared.
    hidden = unclear | (formats == QUANTIZED).any(dim=0)
    apart_there = _differ(one, other, made_up, alike)
    both = (one[:, made_up].abs().sum(dim=1) > 0) & (other[:, made_up].abs().sum(dim=1) > 0)
    may_be_merged = _may_be_merged(one, made_up) | _may_be_merged(other, made_up)
    certain = both | ~may_be_merged | (apart <= OTHER_KERNELS)
    others = torch.where(hidden, apart_there & certain, others)
    clear = torch.where(hidden, others | (apart <= OTHER_KERNELS), ~unclear)
    return True if bool(others.any()) else False if bool(clear.any()) else None


def _differ(one: torch.Tensor, other: torch.Tensor, columns: slice, most: torch.Tensor) -> torch.Tensor:
    """Whether what adapters add differs by more than this share of it; not where it is unknown."""
    first, second = one[:, columns], other[:, columns]
    largest = torch.maximum(first.norm(dim=1), second.norm(dim=1))
    # What is nothing next to the layer itself is the rounding of a difference.
    least = 1e-9 * torch.maximum(one[:, 2], other[:, 2]).nan_to_num(1.0)
    return (first - second).norm(dim=1) > most * largest + least


def _may_be_merged(mark: torch.Tensor, made_up: slice) -> torch.Tensor:
    """Whether adapters that cannot be seen may be in the weights: some are merged, or no wrapper is there to tell."""
    return (mark[:, 1] <= 0) & (mark[:, made_up].abs().sum(dim=1) == 0)


def _state(parts: list[torch.nn.Module]) -> Hashable:
    """What changes if the weights, or what adapters do with them, change; costs one look at the device, and no large tensor."""
    kept: list[Hashable] = []
    looks: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = {}
    for part in parts:
        for name, module in part.named_modules():
            if is_adapter(module):
                kept.append((name, *_settings(module)))
            for parameter in module.parameters(recurse=False):
                version = None if parameter.is_inference() else parameter._version
                kept.append((parameter.dtype, tuple(parameter.shape), version))
                if type(parameter.data) is torch.Tensor and not parameter.is_meta and parameter.numel():
                    kept.append(parameter.data_ptr())
                    looks.setdefault((parameter.device, parameter.dtype), []).append(_few_of(parameter))
    seen = [torch.cat(few).to("cpu") for few in looks.values()]
    return (tuple(kept), *(few.contiguous().view(torch.uint8).numpy().tobytes() for few in seen))


def _few_of(parameter: torch.Tensor) -> torch.Tensor:
    """Some of a tensor's numbers, from all over it; in the order of memory, which costs no copy."""
    tensor = parameter.detach()
    count = min(_LOOKED_AT, tensor.numel())
    if not tensor.is_contiguous():
        return tensor[tuple(slice(0, 1) for _ in tensor.shape)].reshape(-1)
    return tensor.view(-1)[:: tensor.numel() // count][:count]


def _settings(module: Any) -> tuple[Hashable, ...]:
    """Which adapters a wrapper uses, and every number in its attributes: scales among them."""
    numbers = [
        (name, key, value)
        for name, entries in vars(module).items()
        if type(entries) is dict
        for key, value in entries.items()
        if isinstance(value, int | float | str | None)
    ]
    merged = tuple(getattr(module, "merged_adapters", ()))
    return (tuple(module.active_adapters), bool(module.disable_adapters), merged, tuple(numbers))
