"""A cheaper vision tower for training on pages: it reads the patches that show print and only some of the empty ones.

A page is mostly paper. With 384 of 1,028 visual tokens a layer costs a third of the arithmetic, and its attention a seventh
(as in FLIP, Li et al. 2022, arXiv 2212.00794, but print is always kept). The last stage reads everything, as the model does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn


def chosen_tokens(labels: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """``count`` visual tokens of a picture, in order: class tokens, patches with print as far as there is room, others at random.

    Args:
        labels: what the patches show, (tiles, patches, aspects), 0 for nothing.
        count: how many.
        rng: chooses among the empty ones.

    Example:
        >>> labels = np.zeros((2, 4, 1), dtype=int)
        >>> labels[1, 2:] = 7
        >>> chosen_tokens(labels, 5, np.random.default_rng(0)).tolist()
        [0, 4, 5, 8, 9]
    """
    wanted = np.concatenate([np.full((len(labels), 1), 2), labels[:, :, 0] > 0], axis=1).ravel()
    order = np.argsort(-(wanted + rng.random(len(wanted)) * 0.5), kind="stable")
    return np.sort(order[:count])


@contextmanager
def thinned(vision: nn.Module, kept: torch.Tensor | None, tiles: int = 4) -> Iterator[None]:
    """Within this context the layers of a Mllama vision tower read the tokens ``kept``, (pictures, count), of every picture.

    All other tokens come out as zeros. None reads all.
    """
    if kept is None:
        yield
        return
    own_rows = int(vision.get_parameter("gated_positional_embedding.embedding").shape[0])
    index, length = kept, 0

    def gather(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        nonlocal index, length
        states, *rest = args
        length = states.shape[1]
        index = kept + kept // own_rows * (length // tiles - own_rows)  # every tile is padded
        own = states.gather(1, index[..., None].expand(-1, -1, states.shape[-1]))
        pictures = torch.arange(len(index))[:, None, None]
        mask = kwargs["attention_mask"][pictures, 0, index[:, :, None], index[:, None]][:, None]
        return (own, *rest), kwargs | {"attention_mask": mask}

    def scatter(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        def whole(states: torch.Tensor) -> torch.Tensor:
            empty = states.new_zeros(len(states), length, states.shape[-1])
            return empty.scatter(1, index[..., None].expand_as(states), states)

        output.last_hidden_state = whole(output.last_hidden_state)
        output.hidden_states = tuple(whole(states) for states in output.hidden_states)
        return output

    handles = []
    for encoder in (vision.get_submodule("transformer"), vision.get_submodule("global_transformer")):
        handles.append(encoder.register_forward_pre_hook(gather, with_kwargs=True))
        handles.append(encoder.register_forward_hook(scatter))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


__all__ = ["chosen_tokens", "thinned"]
