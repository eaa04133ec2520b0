"""Encodes pictures: runs the vision tower once, and keeps all of its visual tokens or those that a rule chooses."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from trim_plugin.arithmetic import checked_share, picture_tokens, tile_tokens
from trim_plugin.forward.finding import find_model, find_text_model, first_cross_layer, whole_weights
from trim_plugin.forward.projections import layer_keys
from trim_plugin.forward.tower import visual_states
from trim_plugin.pictures.encoded import Pictures
from trim_plugin.pictures.fingerprint import fingerprint
from trim_plugin.pictures.prompting import open_picture
from trim_plugin.pictures.rgb import to_rgb
from trim_plugin.selection.merging import merge_dropped
from trim_plugin.selection.processors import (
    ProcessorLike,
    TopKPerHead,
    TopPPerHead,
    VisualTokenProcessorList,
    processor_name,
)
from trim_plugin.selection.visibility import pack


def encode_pictures(
    model: torch.nn.Module,
    processor: Any,
    images: Sequence[Image.Image | Path | str],
    rule: ProcessorLike | None = None,
    *,
    tower_share: float | None = None,
) -> Pictures:
    """Read a sample's pictures with the vision tower once, picture by picture, to ask about them as often as wanted.

    Args:
        model: an Mllama model, or a wrapper around one.
        processor: its `MllamaProcessor`.
        images: pictures or files of pictures, in the order in which prompts name them.
        rule: what is kept of each picture's real tiles; all others join the kept token that they resemble most
            (`selection.merging`). `KCenter(0.25)` keeps a quarter. A rule that asks for states (`needs_states`) is given
            the keys of the first cross-attention layer in their place. One that needs attention cannot choose here, since
            there is no prompt. None keeps everything, padding tiles included: the same answers as with the pictures
            themselves.
        tower_share: share of the patches that go on through the tower, as in `TrimConfig`: the same answers as with the pictures
            themselves and that setting. None, and 1.0, leave the tower untouched.

    Returns:
        The pictures, on the model's device.

    Raises:
        ValueError: no image is given, the rule needs a prompt or removes everything, the model has no vision tower, or
            `tower_share` is not a number in (0, 1].
        FileNotFoundError: a picture's file is missing.
        TypeError: the rule returns something else than scores.

    Example:
        >>> from trim_plugin import KCenter
        >>> from trim_plugin.embedded import examples, load_small_model
        >>> model, processor = load_small_model()
        >>> page = encode_pictures(model, processor, [examples()[0].picture], rule=KCenter(0.25))
        >>> page.tiles, len(page.index), page.total
        ([1], 17, 260)
    """
    tower_share = checked_share(tower_share)
    if isinstance(images, str | Path | Image.Image):
        raise ValueError(
            f"images must be a list of pictures, got a single {type(images).__name__}: put it into a list."
        )
    if not images:
        raise ValueError("No image was given to encode_pictures. Give at least one.")
    if isinstance(rule, TopKPerHead | TopPPerHead):
        raise ValueError(
            f"{rule!r} chooses by the attention of a prompt, and there is none yet. Use KCenter, or rule=None."
        )
    read = (to_rgb(image) if isinstance(image, Image.Image) else open_picture(image) for image in images)
    pages = (encode_each(model, processor, [picture], rule, tower_share=tower_share)[0] for picture in read)
    return functools.reduce(operator.add, pages)


def encode_each(
    model: torch.nn.Module,
    processor: Any,
    pictures: Sequence[Image.Image],
    rule: ProcessorLike | None = None,
    *,
    tower_share: float | None = None,
) -> list[Pictures]:
    """Read pictures with one call of the vision tower; each can be asked about by itself.

    Args:
        model, processor, rule, tower_share: as for `encode_pictures`, checked.
        pictures: RGB, at least one, and as many as the tower may be given in one call.

    Example:
        >>> from trim_plugin.embedded import examples, load_small_model
        >>> pages = [open_picture(example.picture) for example in examples()[:2]]
        >>> [page.tiles for page in encode_each(*load_small_model(), pages)]
        [[1], [2]]
    """
    own = find_model(model)
    device = next(own.vision_model.parameters()).device
    seen = processor.image_processor(images=[[picture] for picture in pictures], return_tensors="pt")
    inputs = {name: seen[name].to(device) for name in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")}
    mark = fingerprint(own)
    crossing = first_cross_layer(find_text_model(model))
    with torch.no_grad(), whole_weights(model, own.vision_model, own.multi_modal_projector, crossing):
        states = visual_states(own, **inputs, at_a_time=len(pictures), share=tower_share)
        pages = states.reshape(len(pictures), -1, states.shape[-1])
        vision, made = own.config.vision_config, []
        for page, (tiles,) in zip(pages, seen["num_tiles"], strict=True):
            # Each has memory of its own: a view would hold that of all others for as long as one of them is held.
            kept = page if len(pictures) == 1 else page.clone()
            index = torch.arange(len(page), device=page.device)
            sizes = torch.ones_like(index)
            if rule is not None:
                kept, index, sizes = _merged(own, page[: tiles * tile_tokens(vision)], rule)
            made.append(
                Pictures(
                    states=kept,
                    index=index,
                    sizes=sizes,
                    total=picture_tokens(vision),
                    tiles=[tiles],
                    most_tiles=vision.max_num_tiles,
                    tile_tokens=tile_tokens(vision),
                    mark=mark,
                    rule="whole" if rule is None else processor_name(rule),
                    tower_share=tower_share,
                )
            )
        return made


def _merged(model: Any, states: torch.Tensor, rule: ProcessorLike) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The tokens of a picture's real tiles, (tokens, width), that a rule keeps, with what the others add to them.

    Tokens are chosen and compared by the first cross-attention layer's keys: those with equal keys are read alike, so that one
    of them can stand for the others, however their states differ.
    """
    states = states[None]
    members = torch.ones(1, states.shape[1], dtype=torch.bool, device=states.device)
    crossing = first_cross_layer(find_text_model(model))
    features = layer_keys(crossing, states).transpose(1, 2).flatten(2).to(states.device)
    kept = (VisualTokenProcessorList([rule])(members.float()[:, None], members, features) != -math.inf).any(dim=1)
    if not bool(kept.any()):
        raise ValueError(
            f"The rule {processor_name(rule)} removed every visual token of a picture. Leave at least one."
        )
    positions, _ = pack(kept)
    merging = merge_dropped(features, kept, 0 * members.long(), members.long(), positions)
    return merging.mean(states)[0], positions[0], merging.sizes[0]
