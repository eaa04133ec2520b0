"""Assisted decoding on a trimmed cache: prompt lookup with pictures, and an assistant that trims as well.

transformers' own fails on Mllama (see `docs/upstream.md`): prompt lookup indexes the logits with the image token, whose id they
have no column for, and taking candidates back crops the picture in the assistant's cache.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from transformers.generation.candidate_generator import AssistedCandidateGenerator, PromptLookupCandidateGenerator

from trim_plugin.cache import TrimmedCache
from trim_plugin.hooks import has_cross_attention

_PICTURE_INPUTS = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask", "cross_attention_mask")


class ForbidTokensBeyond:
    """Logits processors whose result has further columns of −inf: tokens that the model embeds, but never generates.

    Args:
        processors: what the generation uses, `processors(input_ids, scores) -> scores`.
        extra: number of such tokens.

    Example:
        >>> forbid = ForbidTokensBeyond(lambda ids, scores: scores, extra=1)
        >>> forbid(torch.tensor([[2]]), torch.zeros(1, 2))
        tensor([[0., 0., -inf]])
    """

    def __init__(self, processors: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], extra: int) -> None:
        self.processors = processors
        self.extra = extra

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Process scores (batch, vocabulary); return (batch, vocabulary + extra)."""
        return torch.nn.functional.pad(self.processors(input_ids, scores), (0, self.extra), value=float("-inf"))


def check_supported(model: Any, inputs: dict[str, Any]) -> None:
    """Raise `NotImplementedError` if this transformers cannot verify candidates of a prompt with pictures.

    Up to some version after 5.17 Mllama's mask grows by one row per forward, however many candidates there are.
    """
    slices_rows = "next_sequence_length" in inspect.signature(model.prepare_inputs_for_generation).parameters
    if inputs.get("cross_attention_mask") is not None and not slices_rows:
        raise NotImplementedError(
            "This version of transformers cannot do assisted decoding (prompt_lookup_num_tokens, assistant_model) with "
            "pictures on Mllama: it prepares a single cross_attention_mask row for several candidates. Install a newer "
            "transformers, or generate without assistance."
        )


def adapt(generator: Any, model: Any, cache: TrimmedCache) -> None:
    """Make transformers' candidate generator fit for Mllama with a trimmed cache.

    Args:
        generator: what `_get_candidate_generator` of transformers returned; changed in place.
        model: the model that verifies the candidates.
        cache: its cache.
    """
    if isinstance(generator, PromptLookupCandidateGenerator):
        extra = model.get_input_embeddings().weight.shape[0] - generator.vocab_size
        if generator.logits_processor is not None and extra > 0:
            generator.logits_processor = ForbidTokensBeyond(generator.logits_processor, extra)
    elif isinstance(generator, AssistedCandidateGenerator):
        # The assistant is called with its cache again and again, which excludes naming an implementation.
        generator.generation_config.cache_implementation = generator.generation_config.cache_config = None
        assistant = generator.assistant_model
        accepted = inspect.signature(assistant.forward).parameters
        for name in _PICTURE_INPUTS:
            if name not in accepted:
                generator.assistant_kwargs.pop(name, None)
        if has_cross_attention(assistant):
            generator.assistant_kwargs["past_key_values"] = TrimmedCache(assistant, cache.config)
