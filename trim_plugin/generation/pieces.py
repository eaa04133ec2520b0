"""A prompt read in pieces: some samples at a time, each trimmed at once, then joined. Copies of a sample are read once.

Without pieces a trimmed cache frees nothing for one call of `generate`: its peak is the prefill, where transformers holds the
tower's and the text model's working set for all samples, copies included, at the same time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers.distributed.fsdp import is_fsdp_managed_module
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from trim_plugin.cache.held import HeldCache
from trim_plugin.cache.joining import can_part, join, part_of
from trim_plugin.compat import CACHE
from trim_plugin.forward.tower import picture_tokens, pictures_at_a_time

#: Unless the configuration says otherwise, the text model reads the pictures of this many tower calls at a time. Few cost time: a
#: piece reads the text model's weights once, and unpacks 4-bit ones. Many cost memory: for a picture, the first cross-attention
#: layer needs a fifth of what the tower needs (11B: 0.18 of 0.94 GB). With 4 the tower still sets the peak, with 8 it does not.
TOWER_CALLS = 4

#: A field of outputs since transformers 5.24: what the vision tower has yielded, before it is projected to what the text model
#: reads (11B: 98 MB a picture, twice as much). Holding it for every piece would cost what reading in pieces saves.
LEFT_OUT = "image_outputs"

#: What reads one piece: its inputs and its cache, which it fills → the model's output.
Read = Callable[[dict[str, Any], HeldCache], Any]


@dataclasses.dataclass(frozen=True)
class Pieces:
    """How a batch is cut.

    Args:
        sources: samples without their copies.
        size: most sources in a piece.
        copies: how often every source stands in the batch, one copy after the other.

    Example:
        >>> [(piece.start, piece.stop) for piece in Pieces(sources=5, size=2, copies=3).slices]
        [(0, 2), (2, 4), (4, 5)]
    """

    sources: int
    size: int
    copies: int = 1

    @property
    def slices(self) -> list[slice]:
        """The sources of every piece."""
        return [slice(first, min(first + self.size, self.sources)) for first in range(0, self.sources, self.size)]

    @property
    def whole(self) -> bool:
        """Whether there is nothing to cut."""
        return self.size >= self.sources and self.copies == 1


def prefill_of_generate(
    model: Any,
    cache: HeldCache,
    input_ids: torch.Tensor,
    model_kwargs: dict[str, Any],
    read: Callable[[torch.Tensor, dict[str, Any]], Any],
) -> Any:
    """What `GenerationMixin._prefill` returns, read in pieces where that saves something.

    Args:
        model: the model that generates.
        cache: its cache.
        input_ids: int64 (batch, text tokens), copies included.
        model_kwargs: `generate`'s model inputs without `input_ids`.
        read: transformers' own `_prefill` of given `input_ids` and `model_kwargs`.
    """
    batch = input_ids.shape[0]
    pieces = cut(cache, model_kwargs, batch, getattr(model.config, "vision_config", None))
    cache.copies = 1
    if pieces.whole or _in_step_with_others(model):
        if cache.encoded is not None:
            cache.encoded = [sample for sample in cache.encoded for _ in range(batch // len(cache.encoded))]
        return read(input_ids, model_kwargs)

    def read_piece(inputs: dict[str, Any], part: HeldCache) -> Any:
        return read(inputs.pop("input_ids"), {**inputs, CACHE: part})

    return read_in_pieces(cache, {"input_ids": input_ids, **model_kwargs}, batch, pieces, read_piece)


def prefill(model: Any, cache: HeldCache | None = None, **inputs: Any) -> Any:
    """Read prompts in pieces, for decoding loops written by hand; `generate` does it by itself.

    Args:
        model: an Mllama model.
        cache: a `TrimmedCache` of this model, new or holding a conversation; as `past_key_values` as well.
        inputs: what the model's forward takes, without the cache: `input_ids` or `inputs_embeds`, `attention_mask`,
            `pixel_values` and so on, batch first.

    Returns:
        The forward's output. Logits are of the last row alone, (batch, 1, vocabulary), unless `logits_to_keep` says otherwise.
        Read in pieces, it has no `image_outputs`.

    Raises:
        TypeError: no cache is given, or two are.
        ValueError: neither `input_ids` nor `inputs_embeds` is given, or something does not fit, see `docs/errors.md`.

    Example:
        >>> from trim_plugin import TrimConfig, TrimmedCache
        >>> from trim_plugin.embedded import ask, load_small_model
        >>> model, processor = load_small_model()
        >>> cache = TrimmedCache(model, TrimConfig(prefill_pictures=1))
        >>> prefill(model, cache, **ask(processor)).logits.shape[:2]
        torch.Size([1, 1])
    """
    caches = [one for one in (cache, inputs.pop("past_key_values", None)) if one is not None]
    if len(caches) != 1:
        raise TypeError(
            f"prefill needs one TrimmedCache, got {len(caches)}. Give it as cache: prefill(model, cache, **inputs)."
        )
    cache = caches[0]
    text = inputs.get("input_ids")
    text = inputs.get("inputs_embeds") if text is None else text
    if text is None:
        raise ValueError("Give input_ids or inputs_embeds: there is no text to read.")
    inputs.setdefault("logits_to_keep", 1)
    vision_config = getattr(model.config, "vision_config", None)

    def read(own: dict[str, Any], part: HeldCache) -> Any:
        with torch.no_grad():
            return model(**own, **{CACHE: part}, use_cache=True, return_dict=True)

    pieces = cut(cache, inputs, len(text), vision_config)
    return read(inputs, cache) if pieces.whole else read_in_pieces(cache, inputs, len(text), pieces, read)


def _in_step_with_others(model: Any) -> bool:
    """Whether processes share the weights' shards: all of them must run as many forwards."""
    return is_deepspeed_zero3_enabled() or is_fsdp_managed_module(model)


def cut(cache: HeldCache, inputs: Mapping[str, Any], batch: int, vision_config: Any) -> Pieces:
    """How the prompts of a batch are read.

    Args:
        cache: the batch's cache, new or holding a conversation.
        inputs: the model's inputs, copies included.
        batch: samples, copies included.
        vision_config: the model's; None for a text model, which is never cut.
    """
    pixel_values = inputs.get("pixel_values")
    is_new = int(cache.get_seq_length()) == 0
    copies = cache.copies if is_new and batch % cache.copies == 0 else 1
    sources = batch // copies
    # A static cache's attention maps are as wide as its buffers, those of its parts are not.
    maps = cache.config.static and inputs.get("output_attentions")
    if not can_part(cache) or maps or inputs.get("cross_attention_states") is not None or vision_config is None:
        return Pieces(batch, batch)
    if cache.encoded is not None:
        pictures = -(-max(len(sample.index) for sample in cache.encoded) // picture_tokens(vision_config))
    elif pixel_values is not None:
        pictures = max(1, pixel_values.shape[1])
    else:
        return Pieces(sources, sources, copies)
    at_a_time = pictures_at_a_time(cache.config, vision_config)
    if cache.config.prefill_pictures is None:
        at_a_time *= TOWER_CALLS
    return Pieces(sources, max(1, at_a_time // pictures), copies)


def read_in_pieces(cache: HeldCache, inputs: Mapping[str, Any], batch: int, pieces: Pieces, read: Read) -> Any:
    """Read every piece with a cache of its own, and let `cache` hold what they hold.

    Args:
        cache: the batch's cache. If anything fails before all is read, it is as it was.
        inputs: the model's inputs; tensors whose first dimension is the batch are cut, others are handed on.
        batch: samples, copies included.
        pieces: what `cut` returned.
        read: reads one piece.

    Returns:
        The output as one forward over the whole batch returns it, with `cache` as its cache, but without `LEFT_OUT`.
    """
    if cache.sources.shared:
        cache.unshare()
    parts, outputs = [], []
    for piece in pieces.slices:
        part = part_of(cache, piece)
        output = read(_rows(inputs, batch, pieces.copies, piece), part)
        kind = type(output)
        outputs.append({name: value for name, value in output.items() if name not in (CACHE, LEFT_OUT)})
        parts.append(part)
        del output  # and with it what is left out, before the next piece is read
    fields = {name: _joined([one[name] for one in outputs], pieces.copies) for name in outputs[0]}
    outputs.clear()
    join(cache, parts, pieces.copies)
    return kind(**fields, **{CACHE: cache})


def _rows(inputs: Mapping[str, Any], batch: int, copies: int, piece: slice) -> dict[str, Any]:
    """The inputs of a piece's sources."""
    return {
        name: value[piece.start * copies : piece.stop * copies : copies]
        if isinstance(value, torch.Tensor) and value.ndim > 0 and value.shape[0] == batch
        else value
        for name, value in inputs.items()
    }


def _joined(values: list[Any], copies: int) -> Any:
    """An output's field for the whole batch: tensors one after the other along the batch, tuples element by element.

    Attention maps of later layers are as wide as the longest kept set of their piece: padded with zeros, as in one piece.
    """
    if isinstance(values[0], tuple):
        return tuple(_joined(list(group), copies) for group in zip(*values, strict=True))
    if not isinstance(values[0], torch.Tensor):
        return values[0]
    width = max(value.shape[-1] for value in values)
    padded = [torch.nn.functional.pad(value, (0, width - value.shape[-1])) for value in values]
    return torch.cat(padded).repeat_interleave(copies, dim=0) if copies > 1 else torch.cat(padded)
