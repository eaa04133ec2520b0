"""A cheaper vision tower for the beginning of training: tiles that read only themselves.

A picture's 4 tiles of 257 tokens attend to each other as 1,056 tokens; apart they cost a quarter. What the tower learns first,
to name the digit under a patch, needs no other tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def tiles_apart(vision: nn.Module, tiles: int = 4) -> Iterator[None]:
    """Within this context the layers of a Mllama vision tower let no tile read another one.

    Hidden states enter an encoder as (pictures, tiles × rows, width) and go through its layers as (pictures × tiles, rows,
    width), without a mask: rows of a tile are all real or all padding.
    """

    def split(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        states, *rest = args
        return (states.unflatten(1, (tiles, -1)).flatten(0, 1), *rest), kwargs | {"attention_mask": None}

    def join(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        output.last_hidden_state = output.last_hidden_state.unflatten(0, (-1, tiles)).flatten(1, 2)
        return output

    handles = []
    for encoder in (vision.get_submodule("transformer"), vision.get_submodule("global_transformer")):
        handles.append(encoder.register_forward_pre_hook(split, with_kwargs=True))
        handles.append(encoder.register_forward_hook(join))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


__all__ = ["tiles_apart"]
