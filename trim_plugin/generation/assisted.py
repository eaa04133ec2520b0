"""Assisted decoding on a trimmed cache: prompt lookup with pictures, and an assistant that trims as well.

transformers' own fails on Mllama (see `docs/upstream.md`): prompt lookup indexes the logits with the image token, whose id they
have no column for, and taking candidates back crops the picture in the assistant's cache.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers.generation.candidate_generator import AssistedCandidateGenerator, PromptLookupCandidateGenerator

from trim_plugin.compat import CACHE, slices_mask_rows
from trim_plugin.forward.finding import has_cross_attention
from trim_plugin.forward.hooks import TrimmedCache

_PICTURE_INPUTS = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask", "cross_attention_mask")


def forbidding_more(
    processors: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], extra: int
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Logits processors that return `extra` more columns, −inf: tokens that the model embeds, but never generates.

    Example:
        >>> forbid = forbidding_more(lambda ids, scores: scores, extra=1)
        >>> forbid(torch.tensor([[2]]), torch.zeros(1, 2))
        tensor([[0., 0., -inf]])
    """
    return lambda ids, scores: torch.nn.functional.pad(processors(ids, scores), (0, extra), value=float("-inf"))


class _PromptFirst:
    """`get_candidates` that offers none at first: the prompt is read alone.

    Candidates in the same forward would score, and read visual tokens in the first cross-attention layer that decoding cannot.
    So with sampling the first token is drawn before there are candidates, and a seed gives other tokens than stock's.
    """

    def __init__(self, get_candidates: Callable[..., tuple[torch.Tensor, torch.Tensor | None]]) -> None:
        self.get_candidates = get_candidates
        self.asked = False

    def __call__(self, input_ids: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        if not self.asked:
            self.asked = True
            return input_ids, None
        return self.get_candidates(input_ids, **kwargs)


def check_supported(cache: TrimmedCache, inputs: dict[str, Any]) -> None:
    """Raise `NotImplementedError` for what transformers, or an older one, cannot do with any cache.

    Its assisted decoding reads the whole `input_ids` again on top of a cache that holds a part of them. And up to some
    version after 5.17 Mllama's mask grows by one row per forward, however many candidates there are.
    """
    if cache.config.static:
        raise NotImplementedError(
            "Assisted decoding (prompt_lookup_num_tokens, assistant_model) takes rejected tokens back, which a static "
            "TrimmedCache does not. Use TrimConfig(static=False) for it, or generate without assistance."
        )
    if cache.get_seq_length() > 0:
        raise NotImplementedError(
            "Assisted decoding (prompt_lookup_num_tokens, assistant_model) cannot continue a cache: transformers would read "
            "the whole conversation once more on top of it. Generate without assistance, or give a new cache and every picture."
        )
    if inputs.get("cross_attention_mask") is not None and not slices_mask_rows():
        raise NotImplementedError(
            "This version of transformers cannot do assisted decoding (prompt_lookup_num_tokens, assistant_model) with "
            "pictures on Mllama: it prepares a single cross_attention_mask row for several candidates. Install a newer "
            "transformers, or generate without assistance."
        )


def adapt(generator: Any, model: Any, cache: TrimmedCache, input_ids: torch.Tensor) -> None:
    """Make transformers' candidate generator fit for Mllama with a trimmed cache.

    Args:
        generator: what `_get_candidate_generator` of transformers returned; changed in place.
        model: the model that verifies the candidates.
        cache: its cache, new.
        input_ids: int64 (1, text tokens), the prompt.
    """
    generator.get_candidates = _PromptFirst(generator.get_candidates)
    if isinstance(generator, PromptLookupCandidateGenerator):
        extra = model.get_input_embeddings().weight.shape[0] - generator.vocab_size
        if generator.logits_processor is not None and extra > 0:
            generator.logits_processor = forbidding_more(generator.logits_processor, extra)
    elif isinstance(generator, AssistedCandidateGenerator):
        # The assistant is called with its cache again and again, which excludes naming an implementation.
        generator.generation_config.cache_implementation = generator.generation_config.cache_config = None
        assistant, inputs = generator.assistant_model, generator.assistant_kwargs
        pictures = {name: inputs.pop(name, None) for name in _PICTURE_INPUTS}
        if has_cross_attention(assistant):
            inputs[CACHE] = TrimmedCache(assistant, cache.config)
            if pictures["pixel_values"] is not None and _sees_alike(assistant, model):
                _show_pictures(assistant, input_ids, inputs, pictures)
                inputs["cross_attention_mask"] = pictures["cross_attention_mask"]


def _show_pictures(assistant: Any, input_ids: torch.Tensor, inputs: dict[str, Any], pictures: dict[str, Any]) -> None:
    """Run the assistant's prefill here: `generate` drops the pictures from an assistant's inputs, so it would not see them.

    The text is read to its end, so that the assistant keeps what the prompt's last row may read; the generator takes back what
    it wants to run again.
    """
    assistant(
        input_ids=input_ids.to(assistant.device),
        attention_mask=inputs.get("attention_mask"),
        position_ids=inputs.get("position_ids"),
        **{CACHE: inputs[CACHE]},
        use_cache=True,
        logits_to_keep=1,
        **pictures,
    )


def _sees_alike(assistant: Any, model: Any) -> bool:
    """Whether the assistant can take the pictures as they were prepared for the model."""
    theirs, ours = (getattr(one.config, "vision_config", None) for one in (assistant, model))
    if theirs is None or ours is None:
        return False
    return (theirs.image_size, theirs.max_num_tiles) == (ours.image_size, ours.max_num_tiles)
