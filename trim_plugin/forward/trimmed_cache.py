"""The public cache: what is held, and the hooks on the model that fill it."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from trim_plugin.cache.held import HeldCache
from trim_plugin.cache.report import format_bytes
from trim_plugin.config import TrimConfig
from trim_plugin.forward.encoded import EncodedSample, check_samples
from trim_plugin.forward.hooks import attach, find_text_model


class TrimmedCache(HeldCache):
    """A transformers `Cache` whose cross-attention layers hold only the visual tokens that decoding needs.

    `generate(cache_implementation="trimmed")` makes one. By hand, `TrimmedCache(model, TrimConfig(...))` goes into `cache=` of
    `generate` or of a plain forward (`past_key_values=` before transformers 5.24); making it attaches hooks to the model's
    cross-attention layers, which do nothing for any other cache (`trim_plugin.detach(model)` removes them). All state of a
    generation lives here.

    A forward with one text row is taken to be a decoding step, whose row may read what the last prompt row could:
    that is how `generate` extends the mask. A forward with several rows has its mask read.

    Args:
        model: an Mllama model, or a wrapper around one (peft, for instance).
        config: settings; a dict of `TrimConfig`'s fields does as well.
        max_cache_len: text tokens that a static cache has room for; the larger of this and the configuration's counts.
        pictures: encoded pictures (`trim_plugin.encode_pictures`) that the first forward reads instead of `pixel_values`: a
            sample's, or a list with an entry for every sample of the batch (before beams and returned sequences).

    Raises:
        ValueError: the model has no Mllama cross-attention layers, the settings are not allowed, or the pictures were encoded by
            another model.
        TypeError: `config` is neither a `TrimConfig` nor a mapping, or `pictures` are not encoded.
        ImportError: `kv_quantization` or `self_kv_quantization` needs a package that is not installed.

    Example:
        >>> from trim_plugin.embedded import ask, load_small_model
        >>> model, processor = load_small_model()
        >>> cache = TrimmedCache(model, {"top_k_ratio": 0.25})
        >>> output = model.generate(**ask(processor), cache=cache, max_new_tokens=4)
        >>> len(cache.kept_indices), cache.report().cross_kv_ratio < 1
        (1, True)
        >>> cache
        TrimmedCache(1 sample: 10 text tokens; ... of 65 visible visual tokens kept; ... KiB; top_k_ratio=0.25)
    """

    def __init__(
        self,
        model: torch.nn.Module,
        config: TrimConfig | Mapping[str, Any] | None = None,
        *,
        max_cache_len: int | None = None,
        pictures: EncodedSample | Sequence[EncodedSample] | None = None,
    ) -> None:
        # The settings first: a wrong one leaves the model without hooks.
        settings = TrimConfig.of(config)
        super().__init__(find_text_model(model), settings, max_cache_len)
        self._model = weakref.ref(model)
        if pictures is not None:
            self.show(pictures)
        attach(model)

    def show(self, pictures: EncodedSample | Sequence[EncodedSample]) -> None:
        """Let the next forward read these encoded pictures: for a later turn of a conversation that brings new ones.

        Its `cross_attention_mask` covers all pictures so far, as for a turn that brings `pixel_values`.

        Args:
            pictures: a sample's, or a list with an entry for every sample.

        Raises:
            TypeError, ValueError: as for the class.
        """
        samples = check_samples(pictures)
        model = self._model()
        known: dict[str, Any] = {}
        if model is not None:
            for sample in samples:
                sample.check_fits(model, known)
        self.encoded = samples

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
