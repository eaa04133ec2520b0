"""What training computes: the vision tower, packed questions, and the losses on both."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import MllamaForConditionalGeneration

DIGITS = {"patches": 11}
"""Classes of the patches of a scene of digits: none, and ten digits."""


def visual_features(model: MllamaForConditionalGeneration, batch: dict[str, Any]) -> torch.Tensor:
    """Run the vision tower: its features (B, 4, patches, 288)."""
    inputs = {key: batch[key] for key in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")}
    return model.model.vision_model(**inputs).last_hidden_state[:, 0]


def projected(model: MllamaForConditionalGeneration, features: torch.Tensor) -> torch.Tensor:
    """What the text model reads of the tower's features: states (B, 4 · patches, 128)."""
    return model.model.multi_modal_projector(features).flatten(1, 2)


def packed_logits(
    model: MllamaForConditionalGeneration,
    states: torch.Tensor,
    texts: dict[str, torch.Tensor],
    tiles: torch.Tensor,
    kept: torch.Tensor | None = None,
) -> torch.Tensor:
    """Logits (B, T, vocabulary) of packed rows; segments don't see each other.

    ``tiles`` is the mask (B, 1, 4), ``kept`` says which visual tokens the text may read (B, count); None for all.
    """
    segments, visible = texts["segments"], texts["visible"]
    lowest = torch.finfo(states.dtype).min
    length = segments.shape[1]
    allowed = (segments[:, :, None] == segments[:, None]) & torch.ones(length, length, dtype=torch.bool).tril()
    causal = torch.zeros(allowed.shape).masked_fill_(~allowed, lowest)[:, None]
    patches = states.shape[1] // tiles.shape[-1]
    # A blind row's mask is zero everywhere and its output is masked out, as the model does it.
    hidden = (1.0 - tiles[:, 0].repeat_interleave(patches, dim=1).to(states.dtype)) * lowest
    if kept is not None:
        hidden, states = hidden.gather(1, kept), states.gather(1, kept[..., None].expand(-1, -1, states.shape[-1]))
    cross = hidden[:, None, None, :] * visible[:, None, :, None]
    output = model.model.language_model(
        input_ids=texts["input_ids"],
        position_ids=texts["position_ids"],
        attention_mask=causal,
        cross_attention_states=states,
        cross_attention_mask=cross,
        full_text_row_masked_out_mask=visible[:, None, :, None].to(states.dtype),
        use_cache=False,
    )
    return model.lm_head(output.last_hidden_state)


def patch_loss(
    head: nn.Module, features: torch.Tensor, batch: dict[str, Any], aspects: dict[str, int] = DIGITS
) -> tuple[torch.Tensor, dict[str, float]]:
    """Loss of naming what is under every patch of the real tiles, and the accuracy on patches that show something.

    With ``kept`` in the batch, that is what the tower has read.

    ``aspects`` says how many classes each aspect of a patch has; "none" (class 0) has to be learned for the first one only.
    """
    read = batch["aspect_ratio_mask"][:, 0].bool()[:, :, None].expand(features.shape[:3])
    if "kept" in batch:
        chosen = torch.zeros(read.shape, dtype=torch.bool).flatten(1).scatter(1, batch["kept"], True)
        read = read & chosen.view(read.shape)
    labels = batch["patch_labels"][read[:, :, 1:]]
    logits = head(features[:, :, 1:][read[:, :, 1:]])
    weight = torch.ones(next(iter(aspects.values())))
    weight[0] = 0.3
    loss, seen = torch.zeros(()), {}
    for number, (name, part) in enumerate(zip(aspects, logits.split(list(aspects.values()), dim=-1), strict=True)):
        wanted = labels[:, number]
        shown = wanted > 0
        if number:
            loss = loss + 0.5 * F.cross_entropy(part[shown], wanted[shown])
        else:
            loss = loss + F.cross_entropy(part, wanted, weight=weight)
        seen[name] = (part.argmax(-1) == wanted)[shown].float().mean().item()
    return loss, seen


def answer_loss(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Loss on the answers' tokens, and the share of those tokens that are right."""
    answered = labels != -100
    chosen, wanted = logits[answered], labels[answered]
    return F.cross_entropy(chosen, wanted), (chosen.argmax(-1) == wanted).float().mean().item()
