"""Greedy decoding step by step, and stock's cache."""

from __future__ import annotations

from typing import Any

import torch
import transformers


class Decoding:
    """Greedy decoding, one forward at a time, as `generate` calls the model but without its own overhead."""

    def __init__(self, model: Any, inputs: dict[str, torch.Tensor], cache: Any) -> None:
        self.model, self.cache = model, cache
        self._inputs, self._mask = inputs, inputs["attention_mask"]
        self._cross_mask = inputs["cross_attention_mask"][:, -1:]
        self.token: torch.Tensor | None = None

    @torch.no_grad()
    def prefill(self) -> torch.Tensor:
        """Read the prompt; returns the first tokens (batch, 1)."""
        output = self.model(**self._inputs, cache=self.cache, use_cache=True, logits_to_keep=1)
        self.token = output.logits[:, -1:].argmax(-1)
        return self.token

    @torch.no_grad()
    def step(self) -> torch.Tensor:
        """One more token for every sample, (batch, 1)."""
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(self._mask), 1)], dim=1)
        output = self.model(
            input_ids=self.token,
            attention_mask=self._mask,
            cross_attention_mask=self._cross_mask,
            position_ids=self._mask.sum(dim=1, keepdim=True) - 1,
            cache=self.cache,
            use_cache=True,
        )
        self.token = output.logits[:, -1:].argmax(-1)
        return self.token


def stock_cache(model: Any) -> Any:
    """The cache that stock `generate` makes."""
    return transformers.DynamicCache(config=model.config.get_text_config(decoder=True))
