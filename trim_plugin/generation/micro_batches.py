"""A prompt read in micro-batches: some samples at a time, each trimmed at once, then joined. Copies of a sample are read once.

Without them a trimmed cache frees nothing for one call of `generate`: its peak is the prefill, where transformers holds the
tower's and the text model's working set for all samples, copies included, at the same time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers.distributed.fsdp import is_fsdp_managed_module
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from trim_plugin.arithmetic import picture_tokens, pictures_read_together, tile_tokens
from trim_plugin.cache.held import HeldCache
from trim_plugin.cache.joining import can_part, join, part_of
from trim_plugin.compat import CACHE
from trim_plugin.forward.encoded import tokens_of_tiles
from trim_plugin.forward.finding import check_reads_caches
from trim_plugin.forward.turn import Turn
from trim_plugin.selection.k_center import make_all
from trim_plugin.selection.rounds import Unread

#: What reads one micro-batch: its inputs and its cache, which it fills → the model's output.
Read = Callable[[dict[str, Any], HeldCache], Any]


#: A field of outputs since transformers 5.24: what the vision tower has yielded, before it is projected to what the text model
#: reads (11B: 98 MB a picture, twice as much). Holding it for every micro-batch would cost what reading in them saves.
LEFT_OUT = "image_outputs"


@dataclasses.dataclass(frozen=True)
class Cut:
    """How a batch is cut into micro-batches.

    Args:
        sources: samples without their copies.
        size: most sources in a micro-batch.
        copies: how often every source stands in the batch, one copy after the other.

    Example:
        >>> [(part.start, part.stop) for part in Cut(sources=5, size=2, copies=3).slices]
        [(0, 2), (2, 4), (4, 5)]
    """

    sources: int
    size: int
    copies: int = 1

    @property
    def slices(self) -> list[slice]:
        """The sources of every micro-batch."""
        return [slice(first, min(first + self.size, self.sources)) for first in range(0, self.sources, self.size)]

    @property
    def whole(self) -> bool:
        """Whether there is nothing to cut."""
        return self.size >= self.sources and self.copies == 1


def prefill_of_generate(
    model: Any,
    cache: HeldCache,
    copies: int,
    input_ids: torch.Tensor,
    model_kwargs: dict[str, Any],
    read: Callable[[torch.Tensor, dict[str, Any]], Any],
    mask_length: int = -1,
) -> Any:
    """What `GenerationMixin._prefill` returns, read in micro-batches where that saves something.

    Args:
        model: the model that generates.
        cache: its cache.
        copies: the expand size: how often `generate` has repeated every sample (beams, returned sequences).
        input_ids: int64 (batch, text tokens), copies included.
        model_kwargs: `generate`'s model inputs without `input_ids`.
        read: transformers' own `_prefill` of given `input_ids` and `model_kwargs`.
        mask_length: text tokens of the attention mask that `generate` was given, if it has left it out since nothing is padding.
    """
    batch = input_ids.shape[0]
    vision_config = getattr(model.config, "vision_config", None)
    how = cut(cache, model_kwargs, batch, vision_config, copies)
    if how.whole or _in_step_with_others(model):
        if cache.pictures is not None:
            cache.turn.pictures = [sample for sample in cache.pictures for _ in range(batch // len(cache.pictures))]
        return read(input_ids, model_kwargs)

    def read_part(inputs: dict[str, Any], part: HeldCache) -> Any:
        return read(inputs.pop("input_ids"), {**inputs, CACHE: part})

    inputs, rows = {"input_ids": input_ids, **model_kwargs}, _rows_read(cache, input_ids, model_kwargs, mask_length)
    return read_in_micro_batches(cache, inputs, batch, how, vision_config, read_part, rows)


def prefill(model: Any, cache: HeldCache | None = None, **inputs: Any) -> Any:
    """Read prompts in micro-batches, for decoding loops written by hand; `generate` does it by itself.

    Args:
        model: an Mllama model.
        cache: a `TrimmedCache` of this model, new or holding a conversation; as `past_key_values` as well.
        inputs: what the model's forward takes, without the cache: `input_ids` or `inputs_embeds`, `attention_mask`,
            `pixel_values` and so on, batch first.

    Returns:
        The forward's output. Logits are of the last row alone, (batch, 1, vocabulary), unless `logits_to_keep` says otherwise.
        Read in micro-batches, it has no `image_outputs`.

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
    check_reads_caches(model)
    if not cache.owner.bound:
        cache.bind(model)
    text = inputs.get("input_ids")
    text = inputs.get("inputs_embeds") if text is None else text
    if text is None:
        raise ValueError("Give input_ids or inputs_embeds: there is no text to read.")
    inputs.setdefault("logits_to_keep", 1)
    vision_config = getattr(model.config, "vision_config", None)

    def read(own: dict[str, Any], part: HeldCache) -> Any:
        with torch.no_grad():
            return model(**own, **{CACHE: part}, use_cache=True, return_dict=True)

    how = cut(cache, inputs, len(text), vision_config)
    return (
        read(inputs, cache)
        if how.whole
        else read_in_micro_batches(cache, inputs, len(text), how, vision_config, read, text.shape[1])
    )


def _in_step_with_others(model: Any) -> bool:
    """Whether processes share the weights' shards: all of them must run as many forwards."""
    return is_deepspeed_zero3_enabled() or is_fsdp_managed_module(model)


def cut(cache: HeldCache, inputs: Mapping[str, Any], batch: int, vision_config: Any, copies: int = 1) -> Cut:
    """How the prompts of a batch are read.

    Args:
        cache: the batch's cache, new or holding a conversation.
        inputs: the model's inputs, copies included.
        batch: samples, copies included.
        vision_config: the model's; None for a text model, which is never cut.
        copies: the expand size.
    """
    pixel_values, pictures = inputs.get("pixel_values"), cache.pictures
    is_new = int(cache.get_seq_length()) == 0
    copies = copies if is_new and batch % copies == 0 else 1
    sources = batch // copies
    # A static cache's attention maps are as wide as its buffers, those of its parts are not.
    maps = cache.config.static and inputs.get("output_attentions")
    if not can_part(cache) or maps or inputs.get("cross_attention_states") is not None or vision_config is None:
        return Cut(batch, batch)
    if pictures is not None:
        most = -(-max(len(sample.index) for sample in pictures) // picture_tokens(vision_config))
    elif pixel_values is not None:
        most = max(1, pixel_values.shape[1])
    else:
        return Cut(sources, sources, copies)
    at_a_time = pictures_read_together(cache.config.prefill_pictures, vision_config)
    return Cut(sources, max(1, at_a_time // most), copies)


def read_in_micro_batches(
    cache: HeldCache, inputs: Mapping[str, Any], batch: int, how: Cut, vision_config: Any, read: Read, rows: int
) -> Any:
    """Read every micro-batch with a cache of its own, and let `cache` hold what they hold.

    Args:
        cache: the batch's cache. If anything fails before all is read, it is as it was.
        inputs: the model's inputs; tensors whose first dimension is the batch are cut, others are handed on.
        batch: samples, copies included.
        how: what `cut` returned.
        vision_config: the model's.
        read: reads one micro-batch.
        rows: text rows of its forward.

    Returns:
        The output as one forward over the whole batch returns it, with this cache in it, but without `LEFT_OUT`.
    """
    cache.unshare()
    whole, slices = _looked_at(cache, inputs, how.copies, vision_config, rows), how.slices
    parts: dict[int, HeldCache] = {}
    outputs: dict[int, dict[str, Any]] = {}

    def read_part(number: int, unread: Unread) -> None:
        part = part_of(cache, slices[number])
        part.turn = whole.of_samples(slices[number], unread)
        output = read(_rows(inputs, batch, how.copies, slices[number]), part)
        kinds.append(type(output))
        # And with the rest what is left out goes, before the next micro-batch is read.
        outputs[number] = {name: value for name, value in output.items() if name not in (CACHE, LEFT_OUT)}
        parts[number] = part

    kinds: list[type] = []
    make_all(len(slices), read_part)
    fields = {name: _joined([one[name] for one in outputs.values()], how.copies) for name in outputs[0]}
    outputs.clear()
    join(cache, list(parts.values()), how.copies)
    return kinds[0](**fields, **{CACHE: cache})


def _rows_read(cache: HeldCache, input_ids: torch.Tensor, model_kwargs: dict[str, Any], mask_length: int) -> int:
    """Text rows that `GenerationMixin._prefill` reads of what it is given: all, or what a conversation's cache lacks."""
    embeds, mask = (model_kwargs.get(name) for name in ("inputs_embeds", "attention_mask"))
    past = int(cache.get_seq_length())
    if embeds is not None:
        return int(embeds.shape[1]) - past
    rows = int(input_ids.shape[1])
    return rows - past if (mask_length if mask is None else mask.shape[1]) == rows else rows


def _looked_at(cache: HeldCache, inputs: Mapping[str, Any], copies: int, vision_config: Any, rows: int) -> Turn:
    """The turn of all sources: the masks are read once, however many micro-batches there are."""
    turn = Turn(pictures=cache.pictures)
    mask, attention_mask, real_tiles = (
        None if inputs.get(name) is None else inputs[name][::copies]
        for name in ("cross_attention_mask", "attention_mask", "aspect_ratio_mask")
    )
    if cache.config.tower_share is not None and real_tiles is not None:
        turn.real_tiles = real_tiles.cpu()
    if cache.pictures is not None:
        turn.total, of_tile = max(sample.total for sample in cache.pictures), tile_tokens(vision_config)
        turn.there = tokens_of_tiles(cache.pictures, turn.total // of_tile, of_tile)
    if rows > 0 and (cache.pictures is not None or inputs.get("pixel_values") is not None):
        turn.look(cache, rows, mask, attention_mask, vision_config)
        earlier = 0 if cache.kept is None else cache.kept.readable_tiles.shape[1]
        if (
            mask is not None and turn.seen is not None and turn.seen.open.shape[2] >= earlier
        ):  # else the forward says what is wrong
            turn.note_tiles(cache, mask.device)
    return turn


def _rows(inputs: Mapping[str, Any], batch: int, copies: int, samples: slice) -> dict[str, Any]:
    """The inputs of a micro-batch's sources."""
    return {
        name: value[samples.start * copies : samples.stop * copies : copies]
        if isinstance(value, torch.Tensor) and value.ndim > 0 and value.shape[0] == batch
        else value
        for name, value in inputs.items()
    }


def _joined(values: list[Any], copies: int) -> Any:
    """An output's field for the whole batch: tensors one after the other along the batch, tuples element by element.

    Attention maps of later layers are as wide as the longest kept set of their micro-batch: padded with zeros, as in one forward.
    """
    if isinstance(values[0], tuple):
        return tuple(_joined(list(group), copies) for group in zip(*values, strict=True))
    if not isinstance(values[0], torch.Tensor):
        return values[0]
    width = max(value.shape[-1] for value in values)
    padded = [torch.nn.functional.pad(value, (0, width - value.shape[-1])) for value in values]
    return torch.cat(padded).repeat_interleave(copies, dim=0) if copies > 1 else torch.cat(padded)
