"""Checks of what `generate` is called with, before the model runs: whatever is wrong is said while nothing has happened yet.

`docs/errors.md` lists every error with what to do and the state after it. A plain forward has no such moment: there the
hooks check what they can see, and the failed cache says so when it is used again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from trim_plugin.arithmetic import picture_tokens
from trim_plugin.compat import slices_mask_rows
from trim_plugin.forward.encoded import ENCODED_AND_PIXELS, EncodedSample
from trim_plugin.forward.finding import (
    check_layers_get_caches,
    check_reads_caches,
    cross_layers,
    find_text_model,
    parts_of,
)
from trim_plugin.forward.hooks import OF_ANOTHER_MODEL, TrimmedCache, before_layer, check_attention
from trim_plugin.selection.visibility import LOST_TOKENS, of_tiles, padding_of


def check_mode(model: torch.nn.Module) -> None:
    """Check what a model is and how it runs, whatever it is asked.

    Raises:
        ValueError: its layers get no cache (training with gradient checkpointing, prefix tuning), or it runs with flex attention.
    """
    text_model = find_text_model(model)
    check_layers_get_caches(text_model)
    check_reads_caches(model)
    check_attention(text_model)


def check_reuse(model: torch.nn.Module, cache: TrimmedCache, batch: int, length: int) -> None:
    """Check a cache that the user gives (as `cache`, or `past_key_values` before transformers 5.24).

    Args:
        model, cache: of this generation; the cache may hold earlier turns.
        batch: samples of this generation, beams and return sequences counted.
        length: text tokens that the cache holds at the end of the generation, if nothing ends it earlier.

    Raises:
        ValueError: the cache was made for another model, holds another number of samples, is static and too small, or is left
            over from a forward that failed; or the model's hooks were removed.
    """
    parts = parts_of(model)
    if not cache.owner.bound:
        cache.bind(model)
    layers_changed = (parts.cross_places, parts.self_places) != (cache.cross_layers, cache.self_layers)
    if cache.owner.text_model() is not parts.text_model or layers_changed:
        raise ValueError(OF_ANOTHER_MODEL)
    if not has_hooks(parts.text_model):
        raise ValueError(
            "This TrimmedCache reached a model whose trim_plugin hooks were removed (trim_plugin.detach). Make a new one, "
            "which attaches them again: TrimmedCache(model, ...)."
        )
    cache.check_finished()
    held = cache.batch_size
    if held not in (-1, 0, batch):
        raise ValueError(
            f"This TrimmedCache holds {held} samples, but this generation has {batch} (beams and return sequences count). "
            "Make a new cache, or bring this one to the batch size with batch_repeat_interleave or batch_select_indices."
        )
    room = cache.layers[cache.self_layers[0]].max_cache_len if cache.config.static else None
    if room is not None and length > room:
        raise ValueError(
            f"This static TrimmedCache has room for {room} text tokens, but this generation can reach {length}, earlier turns "
            f"counted. Make a cache with TrimConfig(max_cache_len={length}) or more, or generate fewer tokens (max_new_tokens)."
        )


def check_inputs(model: Any, cache: TrimmedCache, inputs: Mapping[str, Any], batch: int, copies: int) -> None:
    """Check the tensors that `generate` was given.

    Args:
        model, cache, batch: as for `check_reuse`.
        inputs: `generate`'s model inputs, expanded for beams and return sequences.
        copies: the expand size: how often each sample stands in the batch.

    Raises:
        ValueError: something does not fit; the message names the argument and what to do.
    """
    attention_mask, encoded = inputs.get("attention_mask"), cache.pictures
    pixel_values, mask = inputs.get("pixel_values"), inputs.get("cross_attention_mask")
    if pixel_values is not None:
        _check_pictures(pixel_values, inputs, batch)
    if encoded is not None:
        _check_encoded(model, encoded, pixel_values, batch // copies)
    if not hasattr(model.config, "vision_config"):
        mask = None  # a text model, which is given prepared states and an additive mask
    if mask is not None:
        _check_mask(mask, batch)
        _check_mask_rows(mask, int(cache.get_seq_length()), inputs)
    _check_values(attention_mask, None if cache.config.exact else pixel_values, mask)
    shows = pixel_values is not None or encoded is not None or cache.kept is not None
    if mask is not None and shows:
        new = 0 if pixel_values is None else pixel_values.shape[1]
        if encoded is not None:
            new = max(sample.total for sample in encoded) // picture_tokens(model.config.vision_config)
        _check_mask_columns(mask, cache, model.config.vision_config, new, attention_mask)


def check_chunks(cache: TrimmedCache, inputs: Mapping[str, Any], chunk_size: int | None) -> None:
    """Check that `prefill_chunk_size` leaves a prompt with pictures in one piece.

    Raises:
        ValueError: it does not, or this transformers cannot cut the masks of cached pictures into chunks.
    """
    mask = inputs.get("cross_attention_mask")
    if chunk_size is None or mask is None:
        return
    # Where transformers cannot cut the mask's rows, it cuts a prompt that fits into one chunk wrongly as well.
    if slices_mask_rows() and mask.shape[1] - int(cache.get_seq_length()) <= chunk_size:
        return
    if inputs.get("pixel_values") is not None or cache.pictures is not None or not slices_mask_rows():
        raise ValueError(
            f"prefill_chunk_size={chunk_size} would cut a prompt with pictures into pieces, and the first one alone would decide "
            "which visual tokens are kept. Leave prefill_chunk_size out; prompts and follow-ups without new pictures may be cut "
            "(follow-ups in newer versions of transformers)."
        )


def _check_values(
    attention_mask: torch.Tensor | None, pixel_values: torch.Tensor | None, mask: torch.Tensor | None
) -> None:
    """Check the values of what is given, at one look at the device."""
    # Per message, the flag of every sample, True where something is wrong.
    found: list[tuple[str, torch.Tensor]] = []
    if attention_mask is not None:
        found.append((NO_TEXT, ~attention_mask.any(dim=-1).flatten()))
    if pixel_values is not None:
        found.append((NOT_FINITE, ~pixel_values.isfinite().all()[None]))
    if mask is not None:
        found.append((NOT_A_MASK, ~((mask == 0) | (mask == 1)).all()[None]))
    if not found:
        return
    device = found[0][1].device
    wrong = torch.cat([flags.to(device) for _, flags in found]).tolist()
    for message, flags in found:
        own, wrong = wrong[: len(flags)], wrong[len(flags) :]
        if any(own):
            raise ValueError(message.format(sample=own.index(True)))


NO_TEXT = (
    "attention_mask is 0 for every token of sample {sample}: there is no text to go on from. Give the mask that the processor "
    "returns, 1 for text and 0 for padding, or leave the sample out."
)
NOT_FINITE = (
    "pixel_values hold NaN or inf: no rule could choose among such visual tokens. Mend the picture or its preprocessing; "
    "top_k_ratio=1.0 chooses nothing and does what transformers does with such a picture."
)
NOT_A_MASK = (
    "cross_attention_mask holds values other than 0 and 1. It is not additive: 1 lets a text token read a tile, 0 does not. Pass "
    "what the processor returns."
)


def _check_pictures(pixel_values: torch.Tensor, inputs: Mapping[str, Any], batch: int) -> None:
    if inputs.get("aspect_ratio_ids") is None:
        raise ValueError(
            "pixel_values were given without aspect_ratio_ids, which say how each picture is tiled. Pass everything that "
            "the processor returns: model.generate(**processor(...))."
        )
    if pixel_values.ndim != 6 or pixel_values.shape[0] != batch:
        raise ValueError(
            f"pixel_values must have the shape ({batch} samples, pictures, tiles, channels, height, width) here, got "
            f"{tuple(pixel_values.shape)}. Pass what the processor returns."
        )


def _check_encoded(model: Any, encoded: list[EncodedSample], pixel_values: torch.Tensor | None, sources: int) -> None:
    if pixel_values is not None:
        raise ValueError(ENCODED_AND_PIXELS)
    if len(encoded) != sources:
        raise ValueError(
            f"This TrimmedCache was given encoded pictures of {len(encoded)} samples, but input_ids has {sources}. Give one "
            "entry of pictures for every sample (beams and returned sequences don't count)."
        )
    known: dict[str, Any] = {}
    for sample in encoded:  # adapters may have been switched since the cache was made
        sample.check_fits(model, known)


def _check_mask(mask: torch.Tensor, batch: int) -> None:
    if mask.ndim != 4 or mask.shape[0] != batch:
        raise ValueError(
            f"cross_attention_mask must have the shape ({batch} samples, text tokens, pictures, tiles) here, got "
            f"{tuple(mask.shape)}. Pass what the processor returns."
        )


def _check_mask_rows(mask: torch.Tensor, past: int, inputs: Mapping[str, Any]) -> None:
    texts = [inputs[name].shape[-1] for name in ("attention_mask", "position_ids") if inputs.get(name) is not None]
    allowed = {*texts, *(text - past for text in texts if slices_mask_rows())}
    if texts and mask.shape[1] not in allowed:
        new = f" (or for the {texts[0] - past} new ones)" if past else ""
        raise ValueError(
            f"cross_attention_mask has rows for {mask.shape[1]} text tokens, but there are {texts[0]}{new}. It needs one row "
            "per token of input_ids; let the processor make it, or repeat its last row for text added by hand."
        )


def _check_mask_columns(
    mask: torch.Tensor, cache: TrimmedCache, vision_config: Any, new: int, attention_mask: torch.Tensor | None
) -> None:
    """Check it against what the cache holds and the `new` pictures of a sample."""
    tiles = vision_config.max_num_tiles
    earlier = 0 if cache.kept is None else cache.kept.total // picture_tokens(vision_config)
    if mask.shape[3] != tiles or mask.shape[2] != earlier + new:
        follow_up = ""
        if earlier:
            follow_up = f" ({earlier} from earlier turns and {new} new: in a follow-up, pixel_values hold the new pictures only, "
            follow_up += "cross_attention_mask covers all)"
        raise ValueError(
            f"cross_attention_mask covers {mask.shape[2]} pictures of {mask.shape[3]} tiles, but there are {earlier + new} "
            f"of {tiles}{follow_up}. Pass what the processor returns for the whole conversation."
        )
    if cache.kept is not None:
        _check_nothing_lost(mask, cache, attention_mask)


def _check_nothing_lost(mask: torch.Tensor, cache: TrimmedCache, attention_mask: torch.Tensor | None) -> None:
    """Raise if this turn's text reads a tile that earlier turns' last rows could not read: the cache has dropped it."""
    past = int(cache.get_seq_length())
    from_the_start = mask.shape[1] > past and (attention_mask is None or attention_mask.shape[1] == mask.shape[1])
    rows = mask[:, past:] if from_the_start else mask
    seen = of_tiles(rows, padding_of(attention_mask, past, rows.shape[1]))
    if seen.reads_any(~cache.kept.readable_tiles[list(cache.kept.order)], cache.config.keeps_reachable):
        raise ValueError(LOST_TOKENS)


def has_hooks(text_model: Any) -> bool:
    """Whether every cross-attention layer of an `MllamaTextModel` carries the hooks."""
    return all(before_layer in layer._forward_pre_hooks.values() for layer in cross_layers(text_model))
