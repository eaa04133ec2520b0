"""Choices in full float32, whatever is set for the model's matrix products.

TF32 (and bfloat16 on CPUs, `torch.set_float32_matmul_precision`) multiplies float32 numbers at 10 (7) bits of mantissa. Two
visual tokens whose scores or cosines differ by less than a thousandth would then change places.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch

_REDUCED = ("tf32", "bf16")
_lock = threading.Lock()
_inside = 0
_before: tuple[str | None, list[tuple[Any, str]]] | None = None


@contextlib.contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """Within this context nothing is remembered for gradients, autocast is off, and products of float32 are float32's.

    The setting is the process's: products of other threads are as precise while somebody chooses, and what was set comes back
    with the last one that leaves. Where nothing was reduced, nothing is set.

    Example:
        >>> torch.set_float32_matmul_precision("high")
        >>> with full_float32(torch.device("cpu")):
        ...     torch.get_float32_matmul_precision()
        'highest'
        >>> torch.get_float32_matmul_precision()
        'high'
        >>> torch.set_float32_matmul_precision("highest")
    """
    global _inside, _before
    with _lock:
        if _inside == 0:
            _before = _raise_precision()
        _inside += 1
    try:
        available = torch.amp.is_autocast_available(device.type)
        autocast = torch.autocast(device.type, enabled=False) if available else contextlib.nullcontext()
        with torch.no_grad(), autocast:
            yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0 and _before is not None:
                _restore(*_before)


def _raise_precision() -> tuple[str | None, list[tuple[Any, str]]] | None:
    """Ask for full float32; returns what was set before, or None if it was that."""
    products: tuple[Any, ...] = (torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul"))  # noqa: B009 - for mypy
    own = [(product, str(product.fp32_precision)) for product in products]
    if not any(precision in _REDUCED for _, precision in own):
        return None
    legacy: str | None
    try:
        legacy = torch.get_float32_matmul_precision()
    except RuntimeError:  # set by `fp32_precision` alone: torch cannot tell in its older words
        legacy = None
    torch.set_float32_matmul_precision("highest")
    return legacy, own


def _restore(legacy: str | None, own: list[tuple[Any, str]]) -> None:
    if legacy is not None:
        torch.set_float32_matmul_precision(legacy)
    for product, precision in own:
        product.fp32_precision = precision
