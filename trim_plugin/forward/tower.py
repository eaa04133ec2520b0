"""Runs the vision tower on a few pictures at a time, because its working set is what limits a prefill.

transformers keeps the hidden states of all vision layers (675 MB a picture at 11B, bf16) and a mask of all patches × all patches
for every picture of a batch at once. What is kept of a picture afterwards, its visual states, is a thirteenth of that.
"""

from __future__ import annotations

from typing import Any

import torch

from trim_plugin.arithmetic import pictures_at_a_time
from trim_plugin.cache.held import HeldCache
from trim_plugin.forward.tower_merging import merging_in_tower
from trim_plugin.selection.k_center import make_all
from trim_plugin.selection.rounds import Unread


def visual_states(
    model: Any,
    pixel_values: torch.Tensor,
    aspect_ratio_ids: torch.Tensor,
    aspect_ratio_mask: torch.Tensor | None,
    at_a_time: int,
    share: float | None = None,
    real_tiles: torch.Tensor | None = None,
    unread: Unread | None = None,
) -> torch.Tensor:
    """What the text model reads of pictures: the tower's output, projected. Upstream: `MllamaModel.forward`.

    Args:
        model: an `MllamaModel`; its own modules do the work, so quantized, offloaded and dispatched ones count.
        pixel_values: (batch, pictures, tiles, channels, height, width).
        aspect_ratio_ids: (batch, pictures).
        aspect_ratio_mask: (batch, pictures, tiles).
        at_a_time: most pictures that the tower is given in one call.
        share: share of the patches that go on through the tower, see `tower_merging`; None leaves it untouched.
        real_tiles: `aspect_ratio_mask` on the CPU, where somebody has read it.
        unread: gets what the choices of all calls leave for the host to read; None: it is read here.

    Returns:
        (batch · pictures · tiles, patches, width of the text model).
    """
    batch, pictures, tiles = pixel_values.shape[:3]
    flat = [
        None if tensor is None else tensor.reshape(batch * pictures, 1, *tensor.shape[2:])
        for tensor in (pixel_values, aspect_ratio_ids, aspect_ratio_mask)
    ]
    if share is not None and aspect_ratio_mask is not None:
        real_tiles = (aspect_ratio_mask.cpu() if real_tiles is None else real_tiles).reshape(batch * pictures, 1, -1)
    states: torch.Tensor | Any = None

    def read(number: int, unread: Unread) -> None:
        nonlocal states
        own = slice(number * at_a_time, (number + 1) * at_a_time)
        pixels, ids, mask = (None if tensor is None else tensor[own] for tensor in flat)
        on_cpu = None if real_tiles is None else real_tiles[own]
        with merging_in_tower(model.vision_model, share, mask, on_cpu, unread):
            seen = model.vision_model(pixel_values=pixels, aspect_ratio_ids=ids, aspect_ratio_mask=mask)
        projected = model.multi_modal_projector(seen.last_hidden_state).flatten(0, 2)
        del seen
        if states is None:  # filled in place: gathering parts and joining them would take the room twice
            states = projected.new_empty(batch * pictures * tiles, *projected.shape[1:])
        states[own.start * tiles : own.start * tiles + len(projected)] = projected

    calls = -(-batch * pictures // at_a_time)
    if unread is None:
        make_all(calls, read)
    else:
        for number in range(calls):
            read(number, unread)
    if states is None:
        raise ValueError("pixel_values hold no picture. Leave them out for text alone.")
    return states


def states_in_micro_batches(model: Any, cache: HeldCache, kwargs: dict[str, Any]) -> torch.Tensor | None:
    """The visual states of the forward's pictures; None where transformers may read them as it always does."""
    pixel_values, ids = kwargs["pixel_values"], kwargs.get("aspect_ratio_ids")
    if pixel_values.ndim != 6 or ids is None:
        return None  # transformers' own error
    share, pictures = cache.config.tower_share, pixel_values.shape[0] * pixel_values.shape[1]
    at_a_time = pictures_at_a_time(cache.config.prefill_pictures, model.config.vision_config)
    if share is None and pictures <= at_a_time:
        return None
    mask, turn = kwargs.get("aspect_ratio_mask"), cache.turn
    return visual_states(model, pixel_values, ids, mask, at_a_time, share, turn.real_tiles, turn.unread)
