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


def visual_states(
    model: Any,
    pixel_values: torch.Tensor,
    aspect_ratio_ids: torch.Tensor,
    aspect_ratio_mask: torch.Tensor | None,
    at_a_time: int,
    share: float | None = None,
) -> torch.Tensor:
    """What the text model reads of pictures: the tower's output, projected. Upstream: `MllamaModel.forward`.

    Args:
        model: an `MllamaModel`; its own modules do the work, so quantized, offloaded and dispatched ones count.
        pixel_values: (batch, pictures, tiles, channels, height, width).
        aspect_ratio_ids: (batch, pictures).
        aspect_ratio_mask: (batch, pictures, tiles).
        at_a_time: most pictures that the tower is given in one call.
        share: share of the patches that go on through the tower, see `tower_merging`; None leaves it untouched.

    Returns:
        (batch · pictures · tiles, patches, width of the text model).
    """
    batch, pictures, tiles = pixel_values.shape[:3]
    flat = [
        None if tensor is None else tensor.reshape(batch * pictures, 1, *tensor.shape[2:])
        for tensor in (pixel_values, aspect_ratio_ids, aspect_ratio_mask)
    ]
    states = None
    for first in range(0, batch * pictures, at_a_time):
        pixels, ids, mask = (None if tensor is None else tensor[first : first + at_a_time] for tensor in flat)
        with merging_in_tower(model.vision_model, share, mask):
            seen = model.vision_model(pixel_values=pixels, aspect_ratio_ids=ids, aspect_ratio_mask=mask)
        projected = model.multi_modal_projector(seen.last_hidden_state).flatten(0, 2)
        del seen
        if states is None:  # filled in place: gathering parts and joining them would take the room twice
            states = projected.new_empty(batch * pictures * tiles, *projected.shape[1:])
        states[first * tiles : first * tiles + len(projected)] = projected
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
    return visual_states(model, pixel_values, ids, kwargs.get("aspect_ratio_mask"), at_a_time, share)
