"""What one trimmed generation holds: stock's self-attention layers, cross-attention layers with few visual tokens.

The public `TrimmedCache` is this plus the hooks on a model that fill it (`trim_plugin.forward.hooks`).
"""

from __future__ import annotations

import functools
import html
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from transformers import cache_utils
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer

from trim_plugin.cache.blocks import Blocks
from trim_plugin.cache.kept import KeptTokens
from trim_plugin.cache.layers import CrossAttentionLayer
from trim_plugin.cache.regrouping import regrouped
from trim_plugin.cache.report import TrimReport, format_bytes, held_bytes, stored_tensors
from trim_plugin.config import TrimConfig
from trim_plugin.kv_formats import require_bitsandbytes


class HalfDone:
    """What stands in a cache's `turn` while its parts are put together: a failure then leaves it neither old nor new."""

    begun = True
    pictures = None


class HeldCache(Cache):
    """The layers of a trimmed generation, the record of what they hold, and the operations that move a batch.

    Knows nothing of hooks: they, and the turn of a forward, are given one and fill it. All state of a generation lives here.

    Args:
        cross_layers: the places of the cross-attention layers that it stands for, in the order in which they run.
        self_layers: those of the self-attention layers.
        config: settings.
        max_cache_len: text tokens that a static cache has room for; the larger of this and the configuration's counts.

    Raises:
        ValueError: a static cache that is not told how long the text can get.
        ImportError: `kv_quantization` or `self_kv_quantization` needs a package that is not installed.
    """

    layers: list[Any]
    #: The model that it was made for, see `trim_plugin.forward.finding.Owner`.
    owner: Any

    def __init__(
        self,
        cross_layers: Sequence[int],
        self_layers: Sequence[int],
        config: TrimConfig,
        max_cache_len: int | None = None,
    ) -> None:
        self.config = config
        lengths = [length for length in (max_cache_len, config.max_cache_len) if length is not None]
        self.cross_layers, self.self_layers = list(cross_layers), list(self_layers)
        super().__init__(layers=self.new_layers(config, max(lengths, default=None)))
        #: What the cross-attention layers hold; None without a picture.
        self.kept: KeptTokens | Any = None
        #: What the forward in progress brings and decides (`trim_plugin.forward.turn.Turn`). One that is prepared brings what the
        #: next forward reads; one that has begun and is found by the next forward is left over from a failure.
        self.turn: Any = None
        #: Whether a reordering has ever taken a sample to another source, 0-dim bool on the device; looked at when the host
        #: waits.
        self._crossed: torch.Tensor | None = None

    def new_layers(self, config: TrimConfig, max_cache_len: int | None = None) -> list[Any]:
        """Empty layers of this cache's kinds at their places, for these settings.

        Places that no layer has, since it was removed from the model, stay empty.
        """
        places = range(1 + max(*self.cross_layers, *self.self_layers))
        layers: list[Any] = [_self_layer(config, max_cache_len) for _ in places]
        encode = None
        if config.kv_quantization is not None:
            require_bitsandbytes(f"kv_quantization={config.kv_quantization!r}")
            encode = functools.partial(Blocks.of, format=config.kv_quantization)
        for index in self.cross_layers:
            layers[index] = CrossAttentionLayer(encode, config.static)
        return layers

    # -- what it holds ------------------------------------------------------------------------------------------

    @property
    def kept_indices(self) -> list[torch.Tensor]:
        """For every sample a sorted LongTensor: the visual tokens that decoding can read. Empty tensors without an image."""
        if self.kept is None:
            return [torch.empty(0, dtype=torch.long, device="cpu") for _ in range(self.batch_size)]
        return self.kept.per_sample("index")

    @property
    def kept_sizes(self) -> list[torch.Tensor]:
        """For every sample a LongTensor: how many visual tokens each of `kept_indices` stands for; 1 where none were merged."""
        return self.kept_indices if self.kept is None else self.kept.per_sample("sizes")

    def report(self) -> TrimReport:
        """Count tokens and bytes from the tensors that are held now."""
        self_bytes = held_bytes(tensor for index in self.self_layers for tensor in stored_tensors(self.layers[index]))
        batch = max(self.batch_size, 0)
        if self.kept is None:
            return TrimReport([0] * batch, [0] * batch, [0] * batch, 0, 0, self_bytes)
        self._check_never_crossed()
        cross = [self.layers[index] for index in self.cross_layers]
        visible = self.kept.visible.tolist()
        return TrimReport(
            total_tokens=[self.kept.total] * batch,
            visible_tokens=[visible[source] for source in self.kept.order],
            kept_tokens=self.kept.counts(),
            cross_kv_bytes=held_bytes(tensor for layer in cross for tensor in layer.held_tensors()),
            stock_cross_kv_bytes=batch * self.kept.total * len(cross) * self.kept.token_bytes,
            self_kv_bytes=self_bytes,
        )

    def __repr__(self) -> str:
        settings = repr(self.config).partition("(")[2].removesuffix(")")
        samples, text, report = self.batch_size, int(self.get_seq_length()), self.report()
        visual = sum(report.total_tokens)
        if not (text or visual):
            return f"{type(self).__name__}(new; {settings})"
        kept = f"{sum(report.kept_tokens)} of {sum(report.visible_tokens)} visible visual tokens kept"
        parts = (
            f"{samples} sample{'s' * (samples != 1)}: {text} text tokens",
            kept if visual else "no visual tokens",
            format_bytes(report.cross_kv_bytes + report.self_kv_bytes),
            settings,
        )
        return f"{type(self).__name__}({'; '.join(parts)})"

    def _repr_html_(self) -> str:
        """Its `repr` and the table of its report, which a notebook shows."""
        about = f"<p><code>{html.escape(repr(self))}</code></p>"
        return about + (self.report()._repr_html_() if self.batch_size > 0 else "")

    @property
    def batch_size(self) -> int:
        """Samples that it holds; −1 while it is new."""
        if self.kept is not None:
            return len(self.kept.order)
        layer = self.layers[self.self_layers[0]]
        if not layer.is_initialized:
            return -1
        # Transformers' quantized layers hold an empty tensor beside what they have quantized.
        keys = layer.keys if layer.keys.ndim == 4 else layer._quantized_keys
        return (keys[0] if isinstance(keys, tuple) else keys).shape[0]

    @property
    def pictures(self) -> list[Any] | None:
        """Encoded pictures that the next forward reads, an entry a sample; None if it has none."""
        return None if self.turn is None else self.turn.pictures

    def check_finished(self) -> None:
        """Raise `ValueError` if the last forward with this cache failed midway: parts of its turn are in, others not."""
        if self.turn is not None and self.turn.begun:
            raise ValueError(
                "This TrimmedCache is left over from a forward that failed: it holds half a turn. Call its reset() to use "
                "it as a new one, or make a new one. (copy.deepcopy(cache) before a turn keeps the conversation so far.)"
            )

    # -- what transformers asks of a cache ----------------------------------------------------------------------

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add to a layer, see `Cache.update`.

        Raises:
            RuntimeError: pictures come in, but the model carries no hooks of trim_plugin. Nothing would be trimmed, silently.
        """
        if layer_idx in self.cross_layers and (self.turn is None or not self.turn.begun):
            raise RuntimeError(
                "A TrimmedCache reached a model that has no trim_plugin hooks: it was made for another model, or "
                "trim_plugin.detach(model) was called since. Make a new one: TrimmedCache(model, ...)."
            )
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def get_seq_length(self, layer_idx: int | None = None) -> int:
        """Text tokens so far; of a cross-attention layer that is named, the visual tokens that it holds."""
        return self.layers[self.self_layers[0] if layer_idx is None else layer_idx].get_seq_length()

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Text tokens so far: masks are made for the text, whichever kind of layer comes first."""
        return self.get_seq_length()

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Length and offset of the causal mask, from a self-attention layer.

        Raises:
            RuntimeError: the cache was read from a file, and nothing has bound it to the model.
        """
        if not self.owner.bound:
            raise RuntimeError(
                "This TrimmedCache was read from a file or came from another process, and the model has no trim_plugin hooks "
                "yet. Call cache.bind(model) before the first forward (generate and trim_plugin.prefill do it by themselves)."
            )
        return self.layers[self.self_layers[0]].get_mask_sizes(query_length)

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Longest text that the cache can hold, -1 for no limit."""
        return self.layers[self.self_layers[0] if layer_idx is None else layer_idx].get_max_length()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Reorder the batch for beam search. Beams never leave their picture, so only the text moves.

        That they don't is noted on the device, and looked at when something waits for the host anyway.
        """
        for index in self.self_layers:
            self.layers[index].reorder_cache(beam_idx)
        if self.kept is None:
            return
        if not self.kept.shared or beam_idx.device.type == "cpu":
            self._follow(beam_idx.tolist())
            return
        source = self.kept.sources_on(beam_idx.device)
        crossed = (source[beam_idx] != source).any()
        self._crossed = crossed if self._crossed is None else self._crossed | crossed

    def _check_never_crossed(self) -> None:
        if self._crossed is not None and bool(self._crossed):
            raise RuntimeError(
                "reorder_cache took a sample to another sample's picture, which a TrimmedCache with copies of samples does not "
                "follow on this device. Use batch_select_indices for it."
            )

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sample `repeats` times. Pictures are held once and read by all copies."""
        self._require_plain_text("batch_repeat_interleave")
        batch = self.batch_size
        for index in self.self_layers:
            self.layers[index].batch_repeat_interleave(repeats)
        self._follow([sample for sample in range(batch) for _ in range(repeats)])

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep only these samples of the batch, and the pictures that they read.

        Args:
            indices: int64 (samples,), or bool (batch,), on any device; read on the host, so one on the CPU waits for nothing.
        """
        self._require_plain_text("batch_select_indices")
        chosen = torch.as_tensor(indices, device="cpu")
        chosen = chosen.nonzero()[:, 0] if chosen.dtype == torch.bool else chosen
        there: dict[torch.device, torch.Tensor] = {}
        for index in self.self_layers:
            layer = self.layers[index]
            if layer.is_initialized:
                device = layer.keys.device
                there.setdefault(device, chosen if device.type == "cpu" else chosen.to(device))
                layer.batch_select_indices(there[device])
        self._follow(chosen.tolist())

    def _follow(self, samples: Sequence[int]) -> None:
        """The batch consists of these samples from now on. What nobody reads any more goes."""
        if self.kept is None:
            return
        order = [self.kept.order[sample] for sample in samples]
        if order == list(self.kept.order):
            return
        sources = list(dict.fromkeys(order))
        self.regroup([self], [(0, source) for source in sources], [sources.index(source) for source in order])

    def unshare(self) -> None:
        """Give every sample a source of its own: what comes next need not be the same for copies."""
        if self.kept is not None and self.kept.shared:
            self.regroup([self], [(0, source) for source in self.kept.order], range(len(self.kept.order)))

    def regroup(
        self,
        caches: Sequence[HeldCache],
        sources: Sequence[tuple[int, int]],
        order: Sequence[int],
        *,
        empty: bool = False,
    ) -> None:
        """Hold the pictures of some sources, read by the batch in this order.

        Args:
            caches: whose pictures; this one may be among them.
            sources: (number of the cache, source there).
            order: for every sample of the batch a place in `sources`.
            empty: whether the others are emptied on the way, layer by layer, so that nothing is held twice.
        """
        records = [cache.kept for cache in caches if cache.kept is not None]
        kept, recipe = regrouped(records, sources, order, self.config.bucket)
        for index in self.cross_layers:
            self.layers[index].regroup(kept, recipe, [cache.layers[index] for cache in caches])
            for cache in caches if empty else ():
                cache.layers[index] = None
        self.kept = kept

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
        self.kept = self.turn = self._crossed = None


def _self_layer(config: TrimConfig, max_cache_len: int | None) -> Any:
    """A self-attention layer of transformers, of the kind that the settings ask for."""
    if config.static:
        if max_cache_len is None:
            raise ValueError(
                "A static cache needs to know how long the text can get: give TrimConfig(static=True, max_cache_len=...). "
                "(generate(cache_implementation='trimmed') knows it by itself.)"
            )
        return StaticLayer(max_cache_len)
    if config.self_kv_quantization is None:
        return DynamicLayer()
    kind = config.self_kv_quantization
    name = {"fp8": "Fp8QuantizedLayer", "quanto": "QuantoQuantizedLayer"}[kind]
    made = getattr(cache_utils, name, None)
    if made is None:
        raise ImportError(
            f"self_kv_quantization={kind!r} needs transformers' {name}, which transformers {transformers.__version__} "
            "does not have. Upgrade transformers, or use another self_kv_quantization."
        )
    return made()
