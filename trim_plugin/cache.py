"""The cache of one trimmed generation: self-attention layers as stock, cross-attention layers with few visual tokens."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer

from trim_plugin import compat
from trim_plugin.config import TrimConfig
from trim_plugin.report import TrimReport, held_bytes, stored_tensors
from trim_plugin.tokens import CachedTokens

if TYPE_CHECKING:
    from trim_plugin.step import Step


class CrossAttentionLayer(DynamicLayer):
    """Keys and values of visual tokens. They come with a picture, are trimmed once, and never grow with the text.

    Example:
        >>> layer = CrossAttentionLayer()
        >>> layer.expected = True
        >>> keys, values = layer.update(torch.ones(1, 2, 5, 4), torch.ones(1, 2, 5, 4))
        >>> layer.keep(torch.tensor([[0, 3]]))
        >>> layer.crop(-1)  # the text is cropped, not the picture
        >>> layer.keys.shape
        torch.Size([1, 2, 2, 4])
    """

    keys: Any
    values: Any

    #: Set by the hook that precedes an update. Without hooks nothing would be trimmed, silently.
    expected = False

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append a picture's keys and values, (batch, key-value heads, visual tokens, head_dim), and return all.

        Raises:
            RuntimeError: the model carries no hooks of trim_plugin.
        """
        if not self.expected:
            raise RuntimeError(
                "A TrimmedCache reached a model that has no trim_plugin hooks: it was made for another model, or "
                "trim_plugin.detach(model) was called since. Make a new one: TrimmedCache(model, ...)."
            )
        self.expected = False
        if self.get_seq_length() > 0:
            return super().update(key_states, value_states, *args, **kwargs)
        # The first picture's tensors are taken as they are; concatenating with nothing would copy them.
        self.lazy_initialization(key_states, value_states)
        self.keys, self.values = key_states, value_states
        return self.keys, self.values

    def keep(self, positions: torch.Tensor) -> None:
        """Hold only the tokens at `positions`, int64 (batch, kept)."""
        positions = positions.to(self.keys.device)
        self.keys = take_tokens(self.keys, positions)
        self.values = take_tokens(self.values, positions)

    def settle(self) -> None:
        """Lay keys and values out head by head, as decoding reads them; a projection returns them token by token.

        Measured: decoding from the projection's layout took up to 1.4 times as long (small model, CPU, 8 samples of 8 pictures).
        """
        self.keys, self.values = self.keys.contiguous(), self.values.contiguous()

    def release(self) -> None:
        """Called when a forward is done with the layer: drop what exists only to be read. Nothing here."""

    def crop(self, tokens_to_remove: int) -> None:
        """Do nothing: taking back text tokens (assisted decoding) leaves the picture in place."""

    def held_tensors(self) -> list[torch.Tensor | None]:
        """The tensors whose bytes this layer holds."""
        return [self.keys, self.values]


class TrimmedCache(Cache):
    """A transformers `Cache` whose cross-attention layers hold only the visual tokens that decoding needs.

    `generate(cache_implementation="trimmed")` makes one. By hand, `TrimmedCache(model, TrimConfig(...))` goes into
    `past_key_values=` of `generate` or of a plain forward; making it attaches hooks to the model's cross-attention layers,
    which do nothing for any other cache (`trim_plugin.detach(model)` removes them). All state of a generation lives here.

    A forward with one text row is taken to be a decoding step, whose row may read what the last prompt row could:
    that is how `generate` extends the mask. A forward with several rows has its mask read.

    Args:
        model: an Mllama model, or a wrapper around one (peft, for instance).
        config: settings; a dict of `TrimConfig`'s fields does as well.
        max_cache_len: text tokens that a static cache has room for; the larger of this and the configuration's counts.

    Raises:
        ValueError: the model has no Mllama cross-attention layers, or the settings are not allowed.
        TypeError: `config` is neither a `TrimConfig` nor a mapping.
        ImportError: `kv_quantization` or `self_kv_quantization` needs a package that is not installed.

    Example:
        >>> from trim_plugin.embedded import ask, load_small_model
        >>> model, processor = load_small_model()
        >>> cache = TrimmedCache(model, {"top_k_ratio": 0.25})
        >>> output = model.generate(**ask(processor), past_key_values=cache, max_new_tokens=4)
        >>> len(cache.kept_indices), cache.report().cross_kv_ratio < 1
        (1, True)
    """

    layers: list[Any]

    def __init__(
        self,
        model: torch.nn.Module,
        config: TrimConfig | Mapping[str, Any] | None = None,
        *,
        max_cache_len: int | None = None,
    ) -> None:
        # Imported here: hooks know the cache, and only making a cache needs the hooks.
        from trim_plugin.hooks import attach

        self.config = TrimConfig.of(config)
        lengths = [length for length in (max_cache_len, self.config.max_cache_len) if length is not None]
        text_model = attach(model)
        text = text_model.config
        self.shared_heads = text.num_key_value_heads < text.num_attention_heads
        self.cross_layers = [index for index, layer in enumerate(text_model.layers) if hasattr(layer, "cross_attn")]
        cross_layers = set(self.cross_layers)
        super().__init__(
            layers=[
                _cross_layer(self.config)
                if index in cross_layers
                else _self_layer(self.config, max(lengths, default=None))
                for index in range(len(text_model.layers))
            ]
        )
        self._self_layer = next(index for index in range(len(self.layers)) if index not in cross_layers)
        self._owner = weakref.ref(text_model.layers[self.cross_layers[0]])
        self.tokens: CachedTokens | None = None
        self.step: Step | None = None
        self.unfinished = False

    # -- what it holds ------------------------------------------------------------------------------------------

    @property
    def kept_indices(self) -> list[torch.Tensor]:
        """For every sample a sorted LongTensor: the visual tokens that decoding can read. Empty tensors without an image."""
        if self.tokens is None:
            return [torch.empty(0, dtype=torch.long) for _ in range(self.batch_size)]
        return [index[valid] for index, valid in zip(self.tokens.index, self.tokens.valid, strict=True)]

    def report(self) -> TrimReport:
        """Count tokens and bytes from the tensors that are held now."""
        self_layers = [layer for index, layer in enumerate(self.layers) if index not in set(self.cross_layers)]
        self_bytes = held_bytes(tensor for layer in self_layers for tensor in stored_tensors(layer))
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
        layer = self.layers[self._self_layer]
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

    @property
    def is_compileable(self) -> bool:
        """Whether `generate` may compile decoding: static layers, on a transformers that compiles Mllama's decoding."""
        return compat.compiles_mllama_decoding() and super().is_compileable

    # -- what transformers asks of a cache ----------------------------------------------------------------------

    def get_seq_length(self, layer_idx: int | None = None) -> int:
        """Text tokens so far; of a cross-attention layer that is named, the visual tokens that it holds."""
        return self.layers[self._self_layer if layer_idx is None else layer_idx].get_seq_length()

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Text tokens so far: masks are made for the text, whichever kind of layer comes first."""
        return self.get_seq_length()

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Length and offset of the causal mask, from a self-attention layer."""
        return self.layers[self._self_layer].get_mask_sizes(query_length)

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Longest text that the cache can hold, -1 for no limit."""
        return self.layers[self._self_layer if layer_idx is None else layer_idx].get_max_length()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Reorder the batch for beam search."""
        super().reorder_cache(beam_idx)
        if self.tokens is not None:
            self.tokens = self.tokens.of_samples(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sample `repeats` times."""
        self._require_plain_text("batch_repeat_interleave")
        batch = self.batch_size
        super().batch_repeat_interleave(repeats)
        if self.tokens is not None:
            self.tokens = self.tokens.of_samples(torch.arange(batch).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep only these samples of the batch."""
        self._require_plain_text("batch_select_indices")
        super().batch_select_indices(indices)
        if self.tokens is not None:
            self.tokens = self.tokens.of_samples(torch.as_tensor(indices))

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
        for layer in self.layers:
            if isinstance(layer, DynamicLayer):  # transformers 5.17 zeroes it and keeps its length
                layer.keys = layer.values = None
                layer.is_initialized = False
        self.tokens = self.step = None
        self.unfinished = False


def _cross_layer(config: TrimConfig) -> CrossAttentionLayer:
    from trim_plugin.quantized import QuantizedCrossAttentionLayer
    from trim_plugin.static import StaticCrossAttentionLayer, StaticQuantizedCrossAttentionLayer

    if config.kv_quantization is None:
        return StaticCrossAttentionLayer() if config.static else CrossAttentionLayer()
    quantized = StaticQuantizedCrossAttentionLayer if config.static else QuantizedCrossAttentionLayer
    return quantized(config.kv_quantization)


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
    from trim_plugin.quantized import quantized_self_layer

    return quantized_self_layer(config.self_kv_quantization)


def take_tokens(tensor: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Pick tokens per sample along the second last dimension.

    Args:
        tensor: (batch, ..., tokens, features).
        positions: int64 (batch, kept).

    Returns:
        (batch, ..., kept, features), a copy.

    Example:
        >>> take_tokens(torch.arange(6).view(2, 3, 1), torch.tensor([[0, 2], [1, 1]]))[..., 0]
        tensor([[0, 2],
                [4, 4]])
    """
    if tensor.shape[0] == 1:
        return tensor.index_select(-2, positions[0])
    spread = positions.view(positions.shape[0], *[1] * (tensor.ndim - 3), positions.shape[1], 1)
    return tensor.gather(-2, spread.expand(*tensor.shape[:-2], -1, tensor.shape[-1]))
