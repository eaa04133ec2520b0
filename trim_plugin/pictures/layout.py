"""Makes prompts about encoded pictures: ids and masks follow from the number of tiles, without any pixels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers.models.mllama.processing_mllama import (
    build_string_from_input,
    convert_sparse_cross_attention_mask_to_dense,
    get_cross_attention_token_mask,
)

from trim_plugin.pictures.prompting import tensors_of, written

Text = str | Sequence[Mapping[str, Any]]


def prompt_inputs(
    processor: Any,
    tiles: Sequence[Sequence[int]],
    texts: Sequence[Text],
    most_tiles: int,
    device: str | torch.device = "cpu",
) -> dict[str, torch.Tensor]:
    """What the processor returns for prompts about pictures of these many tiles, without the pictures; padded on the left.

    Upstream: `MllamaProcessor.__call__`, whose own functions make the mask.

    Args:
        processor: an `MllamaProcessor`.
        tiles: for every sample the real tiles of its pictures.
        texts: for every sample a question, messages, or a prompt that holds image tokens.
        most_tiles: tiles that the model pads every picture to.
        device: where the tensors go.

    Returns:
        `input_ids` and `attention_mask` (batch, text tokens), `cross_attention_mask` (batch, text tokens, pictures, tiles).

    Raises:
        ValueError: a prompt has another number of pictures than `tiles` says.

    Example:
        >>> from trim_plugin.embedded import load_small_model
        >>> _, processor = load_small_model()
        >>> inputs = prompt_inputs(processor, [[1], [4]], ["Which digit is red?", "Read all digits."], 4)
        >>> inputs["cross_attention_mask"].amax(dim=1).flatten(1).tolist()
        [[1, 0, 0, 0], [1, 1, 1, 1]]
    """
    prompts = [
        _prompt(processor, text, len(own), sample) for sample, (text, own) in enumerate(zip(texts, tiles, strict=True))
    ]
    tokenized = tensors_of(processor, prompts, [])
    ids = tokenized["input_ids"]
    spans = [get_cross_attention_token_mask(row, processor.image_token_id) for row in ids.tolist()]
    mask = convert_sparse_cross_attention_mask_to_dense(
        spans, num_tiles=[list(own) for own in tiles], max_num_tiles=most_tiles, length=ids.shape[1]
    )
    made = {
        "input_ids": ids,
        "attention_mask": tokenized["attention_mask"],
        "cross_attention_mask": torch.from_numpy(mask),
    }
    return {name: tensor.to(device) for name, tensor in made.items()}


def _prompt(processor: Any, text: Text, pictures: int, sample: int) -> str:
    """The prompt as the tokenizer gets it."""
    token = processor.image_token
    if not isinstance(text, str) or token not in text:
        text = written(processor, text, pictures)
    found = text.count(token)
    if found != pictures:
        raise ValueError(
            f"The prompt of sample {sample} has {found} pictures ({token}), but {pictures} are encoded. Name each picture once, "
            "in their order."
        )
    return build_string_from_input(text, processor.bos_token, token)
