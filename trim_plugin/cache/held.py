"""What one trimmed generation holds: stock's self-attention layers, cross-attention layers with few visual tokens.

The public `TrimmedCache` is this plus the hooks on a model that fill it (`trim_plugin.forward.trimmed_cache`).
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer

from trim_plugin.cache.layers import CrossAttentionLayer
from trim_plugin.cache.quantized import QuantizedCrossAttentionLayer, quantized_self_layer
from trim_plugin.cache.report import TrimReport, held_bytes, stored_tensors
from trim_plugin.cache.sources import SourceMap
from trim_plugin.cache.static import StaticCrossAttentionLayer, StaticQuantizedCrossAttentionLayer
from trim_plugin.cache.tokens import CachedTokens
from trim_plugin.config import TrimConfig


class HeldCache(Cache):
    """The layers of a trimmed generation, the record of what they hold, and the operations that move a batch.

    Knows nothing of hooks: they, and the steps of a forward, are given one and fill it. All state of a generation lives here.

    Args:
        text_model: the `MllamaTextModel` whose layers it stands for.
        config: settings.
        max_cache_len: text tokens that a static cache has room for; the larger of this and the configuration's counts.

    Raises:
        ValueError: a static cache that is not told how long the text can get.
        ImportError: `kv_quantization` or `self_kv_quantization` needs a package that is not installed.
    """

    layers: list[Any]

    def __init__(self, text_model: Any, config: TrimConfig, max_cache_len: int | None = None) -> None:
        self.config = config
        lengths = [length for length in (max_cache_len, config.max_cache_len) if length is not None]
        text = text_model.config
        self.shared_heads = text.num_key_value_heads < text.num_attention_heads
        self.cross_layers = [index for index, layer in enumerate(text_model.layers) if hasattr(layer, "cross_attn")]
        self.self_layers = [index for index in range(len(text_model.layers)) if index not in set(self.cross_layers)]
        self.sources = SourceMap()
        super().__init__(layers=self.new_layers(config, max(lengths, default=None)))
        #: How often `generate` has repeated every sample of a batch that is still to be read (beams, returned sequences).
        self.copies = 1
        self._owner = weakref.ref(text_model.layers[self.cross_layers[0]])
        self.tokens: CachedTokens | None = None
        #: The forward in progress (`trim_plugin.forward.step.Step`), None between forwards.
        self.step: Any = None
        self.unfinished = False
        #: bool (batch or 1, rows): rows of the forward in progress that are no text; None if there are none.
        self.padding: torch.Tensor | None = None
        #: Encoded pictures that the next forward reads, one entry a sample (`trim_plugin.forward.encoded`); None if it has none.
        self.encoded: list[Any] | None = None
        #: What the forward in progress reads of them, between the model's hook and its first cross-attention layer's.
        self.reading: Any = None

    def new_layers(self, config: TrimConfig, max_cache_len: int | None = None) -> list[Any]:
        """Empty layers of this cache's kinds in this order, for these settings."""
        cross = set(self.cross_layers)
        count = len(self.cross_layers) + len(self.self_layers)
        return [
            _cross_layer(config, self.sources) if index in cross else _self_layer(config, max_cache_len)
            for index in range(count)
        ]

    # -- what it holds ------------------------------------------------------------------------------------------

    @property
    def kept_indices(self) -> list[torch.Tensor]:
        """For every sample a sorted LongTensor: the visual tokens that decoding can read. Empty tensors without an image."""
        if self.tokens is None:
            return [torch.empty(0, dtype=torch.long) for _ in range(self.batch_size)]
        return [index[valid] for index, valid in zip(self.tokens.index, self.tokens.valid, strict=True)]

    @property
    def kept_sizes(self) -> list[torch.Tensor]:
        """For every sample a LongTensor: how many visual tokens each of `kept_indices` stands for; 1 where none were merged."""
        if self.tokens is None:
            return self.kept_indices
        return [sizes[valid] for sizes, valid in zip(self.tokens.sizes, self.tokens.valid, strict=True)]

    def report(self) -> TrimReport:
        """Count tokens and bytes from the tensors that are held now."""
        self_bytes = held_bytes(tensor for index in self.self_layers for tensor in stored_tensors(self.layers[index]))
        batch = max(self.batch_size, 0)
        if self.tokens is None:
            return TrimReport([0] * batch, [0] * batch, [0] * batch, 0, 0, self_bytes)
        cross = [self.layers[index] for index in self.cross_layers]
        return TrimReport(
            total_tokens=[self.tokens.total] * batch,
            visible_tokens=self.tokens.visible.tolist(),
            kept_tokens=self.tokens.valid.sum(dim=1).tolist(),
            cross_kv_bytes=held_bytes(tensor for layer in cross for tensor in layer.held_tensors()),
            stock_cross_kv_bytes=batch * self.tokens.total * len(cross) * self.tokens.storage.token_bytes,
            self_kv_bytes=self_bytes,
        )

    def belongs_to(self, layer: torch.nn.Module) -> bool:
        """Whether `layer` is the first cross-attention layer of the model that this cache was made for."""
        return self._owner() is layer

    @property
    def batch_size(self) -> int:
        """Samples that it holds; −1 while it is new."""
        if self.tokens is not None:
            return self.tokens.index.shape[0]
        layer = self.layers[self.self_layers[0]]
        if not layer.is_initialized:
            return -1
        # Transformers' quantized layers hold an empty tensor beside what they have quantized.
        keys = layer.keys if layer.keys.ndim == 4 else layer._quantized_keys
        return (keys[0] if isinstance(keys, tuple) else keys).shape[0]

    def check_finished(self) -> None:
        """Raise `ValueError` if the last forward with this cache failed midway: parts of its turn are in, others not."""
        if self.unfinished:
            raise ValueError(
                "This TrimmedCache is left over from a forward that failed: it holds half a turn. Call its reset() to use "
                "it as a new one, or make a new one. (copy.deepcopy(cache) before a turn keeps the conversation so far.)"
            )

    # -- what transformers asks of a cache ----------------------------------------------------------------------

    def get_seq_length(self, layer_idx: int | None = None) -> int:
        """Text tokens so far; of a cross-attention layer that is named, the visual tokens that it holds."""
        return self.layers[self.self_layers[0] if layer_idx is None else layer_idx].get_seq_length()

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Text tokens so far: masks are made for the text, whichever kind of layer comes first."""
        return self.get_seq_length()

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Length and offset of the causal mask, from a self-attention layer."""
        return self.layers[self.self_layers[0]].get_mask_sizes(query_length)

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Longest text that the cache can hold, -1 for no limit."""
        return self.layers[self.self_layers[0] if layer_idx is None else layer_idx].get_max_length()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Reorder the batch for beam search. Of the pictures only the map from samples to entries moves."""
        for index in self.self_layers:
            self.layers[index].reorder_cache(beam_idx)
        self._select_tokens(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sample `repeats` times. Pictures are held once and read by all copies."""
        self._require_plain_text("batch_repeat_interleave")
        batch = self.batch_size
        for index in self.self_layers:
            self.layers[index].batch_repeat_interleave(repeats)
        if self.tokens is not None:
            self.sources.repeat(repeats, batch)
            self.tokens = self.tokens.of_samples(torch.arange(batch).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep only these samples of the batch, and the pictures that they read."""
        self._require_plain_text("batch_select_indices")
        for index in self.self_layers:
            self.layers[index].batch_select_indices(indices)
        self._select_tokens(torch.as_tensor(indices))
        self._take_entries(self.sources.compacted())

    def unshare(self) -> None:
        """Give every sample entries of its own: what comes next need not be the same for copies."""
        entries, self.sources.of_sample = self.sources.of_sample, None
        self._take_entries(entries)

    def _select_tokens(self, samples: torch.Tensor) -> None:
        if self.tokens is not None:
            self.sources.select(samples)
            self.tokens = self.tokens.of_samples(samples)

    def _take_entries(self, entries: torch.Tensor | None) -> None:
        if entries is not None:
            for index in self.cross_layers:
                self.layers[index].take_entries(entries)

    def crop(self, *args: Any, **kwargs: Any) -> None:
        """Take back text tokens (assisted decoding, prompt lookup); pictures stay."""
        self._require_plain_text("crop")
        super().crop(*args, **kwargs)

    def _require_plain_text(self, method: str) -> None:
        # Transformers' quantized layers inherit these methods, but apply them to an empty tensor beside what they hold.
        if self.config.self_kv_quantization is not None:
            raise ValueError(
                f"{method} is not possible with self_kv_quantization={self.config.self_kv_quantization!r}: transformers' "
                "quantized layers don't support it. Use self_kv_quantization=None for this way of generating."
            )

    def reset(self) -> None:
        """Forget text and pictures; the cache is as new."""
        super().reset()
        for index in self.self_layers:
            layer = self.layers[index]
            if isinstance(layer, DynamicLayer):  # transformers 5.17 zeroes it and keeps its length
                layer.keys = layer.values = None
                layer.is_initialized = False
        self.tokens = self.step = self.encoded = self.reading = self.padding = self.sources.of_sample = None
        self.copies = 1
        self.unfinished = False


def _cross_layer(config: TrimConfig, sources: SourceMap) -> CrossAttentionLayer:
    if config.kv_quantization is None:
        return StaticCrossAttentionLayer(sources) if config.static else CrossAttentionLayer(sources)
    quantized = StaticQuantizedCrossAttentionLayer if config.static else QuantizedCrossAttentionLayer
    return quantized(config.kv_quantization, sources)


def _self_layer(config: TrimConfig, max_cache_len: int | None) -> DynamicLayer | StaticLayer:
    if config.static:
        if max_cache_len is None:
            raise ValueError(
                "A static cache needs to know how long the text can get: give TrimConfig(static=True, max_cache_len=...). "
                "(generate(cache_implementation='trimmed') knows it by itself.)"
            )
        return StaticLayer(max_cache_len)
    if config.self_kv_quantization is None:
        return DynamicLayer()
    return quantized_self_layer(config.self_kv_quantization)
