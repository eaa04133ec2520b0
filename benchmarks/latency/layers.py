"""Seconds of every decoder layer within a forward."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

from benchmarks.common.device import synchronize


@contextlib.contextmanager
def layers_timed(model: Any, device: str, found: dict[str, list[float]]) -> Iterator[None]:
    """Seconds of every self- and cross-attention decoder layer in a forward."""
    crossing = set(model.config.text_config.cross_attention_layers)
    handles, starts = [], {}

    def begin(layer: Any, _args: Any) -> None:
        synchronize(device)
        starts[layer] = time.perf_counter()

    def end(layer: Any, _args: Any, _output: Any) -> None:
        synchronize(device)
        kind = "cross" if layer.layer_idx in crossing else "self"
        found.setdefault(kind, []).append(time.perf_counter() - starts[layer])

    for index, layer in enumerate(model.model.language_model.layers):
        layer.layer_idx = index
        handles += [layer.register_forward_pre_hook(begin), layer.register_forward_hook(end)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
