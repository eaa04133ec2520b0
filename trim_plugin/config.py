"""`TrimConfig`, the settings of a trimmed cache: they are checked when they are made, before any work."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from trim_plugin.arithmetic import checked_share, share
from trim_plugin.kv_formats import KV_FORMATS

if TYPE_CHECKING:
    from trim_plugin.selection.processors import ProcessorLike, VisualTokenProcessorList

#: Share that `KCenter` keeps where nothing else is asked for: the smallest measured that lost no accuracy on any of the three
#: trained models, second questions and whole pages of print included (benchmarks/quality). At equal share it answers at least as
#: often as stock does as the paper's rule, which keeps 36 to 48 % at a ratio of 0.15.
DEFAULT_KEPT_SHARE = 0.35
DEFAULT_STATIC_BUCKET = 256
SELF_KV_QUANTIZATIONS = ("fp8", "quanto")


@dataclasses.dataclass(frozen=True, repr=False)
class TrimConfig:
    """Settings of a `TrimmedCache`.

    `generate(cache_implementation="trimmed", cache_config=...)` takes the fields as a dict, or a `TrimConfig`. Either may stand
    in a model's `generation_config.cache_config`, is saved with it, and comes back as a dict that makes an equal one.

    Args:
        top_k_ratio: the paper's rule instead of the default one: the share of a visibility group's visual tokens that each head
            keeps, in (0, 1]. 1.0 is exact mode: prefill is untouched and the cache drops only what decoding cannot read.
        processors: the whole list of visual token processors, `[KCenter(0.35)]` where neither this nor `top_k_ratio` is given.
            A rule may be given as it is saved, for instance `{"rule": "KCenter", "kept_share": 0.1}` (`selection.written`).
        kv_quantization: "int8" or "nf4" stores the kept visual tokens' keys and values in 8 or 4 bits with bitsandbytes,
            quantized once after the prefill; None keeps the model's dtype. Goes with every ratio, exact mode included, and
            with `static`.
        self_kv_quantization: "fp8" or "quanto" uses transformers' own quantized layers (with their default settings) for
            self-attention; None keeps the model's dtype. Such layers cannot be cropped, repeated or selected from, so
            assisted decoding and prompt lookup need None.
        static: buffers of fixed size, so that `generate` can compile decoding: self-attention layers are transformers'
            static layers, cross-attention layers hold the kept tokens padded to a multiple of `static_bucket`.
        static_bucket: visual tokens; pictures whose kept tokens round up to the same multiple share one compiled graph.
        max_cache_len: text tokens that a static cache has room for. `generate` makes it at least as large as the call
            needs; give the longest you expect, so that longer prompts reuse the graph.
        merge: every visual token that the rule drops joins the kept token that it resembles most, which then stands for all
            of its members (`selection.merging`). False is the paper's own: what the rule drops is forgotten.
        prefill_pictures: most pictures that are read at a time while a prompt is read: by the vision tower, and by the text model
            (which reads whole samples, at least one). Fewer need less memory. None is a default that keeps the peak near that of
            one picture of the 11B model.
        tower_share: share of the pictures' patches that go on through the vision tower, in (0, 1]: before an early layer, patches
            that are alike are merged, and padding is thinned further (`forward.tower_merging`). Opt-in, and not exact. None, and
            1.0, which becomes None, leave the tower untouched.

    Raises:
        ValueError: a field has a value that is not allowed, or `processors` and `top_k_ratio` are both given.

    Example:
        >>> TrimConfig().processor_list
        [KCenter(0.35)]
        >>> TrimConfig(top_k_ratio=1.0).exact
        True
        >>> TrimConfig(top_k_ratio=0.15, merge=False)
        TrimConfig(top_k_ratio=0.15, merge=False)
        >>> TrimConfig(top_k_ratio=2)
        Traceback (most recent call last):
        ...
        ValueError: top_k_ratio must be a number in (0, 1], got 2.
    """

    top_k_ratio: float | None = None
    processors: tuple[ProcessorLike, ...] | None = None
    kv_quantization: str | None = None
    self_kv_quantization: str | None = None
    static: bool = False
    static_bucket: int = DEFAULT_STATIC_BUCKET
    max_cache_len: int | None = None
    merge: bool = True
    prefill_pictures: int | None = None
    tower_share: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.merge, bool):
            raise ValueError(f"merge must be True or False, got {self.merge!r}.")
        _check_choice("kv_quantization", self.kv_quantization, (None, *KV_FORMATS))
        _check_choice("self_kv_quantization", self.self_kv_quantization, (None, *SELF_KV_QUANTIZATIONS))
        _check_static(self)
        if self.prefill_pictures is not None:
            _check_count("prefill_pictures", self.prefill_pictures)
        # Fields are normalised here, once; object.__setattr__ is how a frozen dataclass does that.
        object.__setattr__(self, "tower_share", checked_share(self.tower_share))
        if self.processors is None:
            if self.top_k_ratio is not None:
                object.__setattr__(self, "top_k_ratio", share("top_k_ratio", self.top_k_ratio))
            return
        if self.top_k_ratio is not None:
            raise ValueError(
                "processors and top_k_ratio are both given. processors is the whole list: "
                f"put TopKPerHead({self.top_k_ratio!r}) into it, or give top_k_ratio alone."
            )
        object.__setattr__(self, "processors", _checked_processors(self.processors))

    @functools.cached_property
    def exact(self) -> bool:
        """Whether answers are stock's: tower and prefill are untouched, the cache drops only what decoding cannot read."""
        return self.keeps_reachable and self.tower_share is None

    @functools.cached_property
    def keeps_reachable(self) -> bool:
        """Whether no rule chooses: the cache drops only what decoding cannot read, however the tower was run."""
        return self.top_k_ratio == 1.0

    @functools.cached_property
    def bucket(self) -> int:
        """What the number of places for visual tokens is a multiple of; 0 where it need not be a multiple of anything."""
        return self.static_bucket if self.static else 0

    @functools.cached_property
    def processor_list(self) -> VisualTokenProcessorList:
        """The processors that decide what is kept; empty where nothing is chosen."""
        # Loaded here, since it needs torch: settings are checked before that is loaded.
        from trim_plugin.selection.k_center import KCenter
        from trim_plugin.selection.processors import TopKPerHead, VisualTokenProcessorList

        if self.processors is not None:
            return VisualTokenProcessorList(self.processors)
        if self.keeps_reachable:
            return VisualTokenProcessorList()
        rule = KCenter(DEFAULT_KEPT_SHARE) if self.top_k_ratio is None else TopKPerHead(self.top_k_ratio)
        return VisualTokenProcessorList([rule])

    @functools.cached_property
    def needs_scores(self) -> bool:
        """Whether what is kept depends on the text's attention, so that it has to be worked out."""
        return self.processor_list.needs_scores

    @classmethod
    def of(cls, settings: TrimConfig | Mapping[str, Any] | None) -> TrimConfig:
        """Make a `TrimConfig` of what a user gave as `cache_config`; the caller's object is never changed.

        Raises:
            TypeError: neither a mapping nor a `TrimConfig`.
            ValueError: an unknown field, a value that is not allowed, or a saved rule that cannot be made again.

        Example:
            >>> TrimConfig.of({"top_k_ratio": 0.5}).top_k_ratio
            0.5
            >>> TrimConfig.of({"top_k": 5})
            Traceback (most recent call last):
            ...
            ValueError: Unknown field 'top_k' in cache_config of the trimmed cache. Allowed: top_k_ratio, processors...
        """
        if settings is None:
            return DEFAULT
        if isinstance(settings, TrimConfig):
            return settings
        if not isinstance(settings, Mapping):
            raise TypeError(
                f"cache_config of the trimmed cache must be a dict or a TrimConfig, got {type(settings).__name__}."
            )
        allowed = [field.name for field in dataclasses.fields(cls)]
        for name in settings:
            if name not in allowed:
                raise ValueError(
                    f"Unknown field {name!r} in cache_config of the trimmed cache. Allowed: {', '.join(allowed)}."
                )
        return cls(**settings)

    def to_dict(self) -> dict[str, Any]:
        """The fields that say something else than the defaults, as JSON has them: `of` makes an equal one of it.

        Transformers calls it when it saves or prints a generation configuration.

        Raises:
            ValueError: one of the rules is the user's own and cannot be saved; the message says why.

        Example:
            >>> from trim_plugin import TopKPerHead
            >>> TrimConfig(top_k_ratio=0.5, merge=False).to_dict()
            {'top_k_ratio': 0.5, 'merge': False}
            >>> TrimConfig.of(TrimConfig(processors=[TopKPerHead(0.5)]).to_dict()).processors
            (TopKPerHead(0.5),)
        """
        return as_json(self)

    def _said(self) -> dict[str, Any]:
        """The fields that say something else than the defaults."""
        fields = {field.name: (getattr(self, field.name), field.default) for field in dataclasses.fields(self)}
        return {name: value for name, (value, default) in fields.items() if value != default}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self._said().items())})"

    def __getstate__(self) -> dict[str, Any]:
        # Without what follows from the fields, and has been worked out.
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def __deepcopy__(self, memo: dict[int, Any]) -> TrimConfig:
        # Immutable, and `generate` copies its configuration deeply: processors that a user holds on to stay the same.
        return self


def as_json(
    settings: TrimConfig | Mapping[str, Any], write: Callable[[ProcessorLike], Any] | None = None
) -> dict[str, Any]:
    """Settings of either kind as JSON has them; `write` is how rules are written, `selection.written.written` by default.

    Example:
        >>> from trim_plugin import TopKPerHead
        >>> as_json({"processors": [TopKPerHead(0.5)]})
        {'processors': [{'rule': 'TopKPerHead', 'ratio': 0.5}]}
    """
    saved = settings._said() if isinstance(settings, TrimConfig) else dict(settings)
    if isinstance(saved.get("processors"), list | tuple):
        from trim_plugin.selection.written import written

        write = write or written
        saved["processors"] = [write(rule) if callable(rule) else rule for rule in saved["processors"]]
    return saved


def _check_choice(name: str, value: Any, choices: tuple[str | None, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}.")


def _check_count(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise ValueError(f"{name} must be a positive integer, got {value!r}.")


def _check_static(config: TrimConfig) -> None:
    if not isinstance(config.static, bool):
        raise ValueError(f"static must be True or False, got {config.static!r}.")
    _check_count("static_bucket", config.static_bucket)
    if config.max_cache_len is not None:
        _check_count("max_cache_len", config.max_cache_len)
    if config.static and config.self_kv_quantization is not None:
        raise ValueError(
            f"static=True and self_kv_quantization={config.self_kv_quantization!r} are both given, but transformers has no "
            "static quantized layer for self-attention. Choose one of the two; kv_quantization goes with static=True."
        )


def _checked_processors(processors: Any) -> tuple[ProcessorLike, ...]:
    if callable(processors) and not isinstance(processors, list | tuple):
        from trim_plugin.selection.processors import processor_name

        raise ValueError(
            f"processors must be a list of visual token processors, got the single {processor_name(processors)}."
        )
    found = tuple(_each_processor(processors)) if isinstance(processors, list | tuple) else ()
    if not found:
        raise ValueError(
            f"processors must be a non-empty list of visual token processors, got {processors!r}. "
            "To keep everything that can be read, use top_k_ratio=1.0."
        )
    return found


def _each_processor(processors: Any) -> Iterator[ProcessorLike]:
    from trim_plugin.selection.processors import VisualTokenProcessorList
    from trim_plugin.selection.written import read_rule

    for processor in processors:
        if type(processor) is VisualTokenProcessorList:  # a chain in a chain
            yield from _each_processor(processor)
        elif isinstance(processor, Mapping):
            yield read_rule(processor)
        elif isinstance(processor, type) or not callable(processor):
            raise ValueError(f"processors must hold callables processor(scores, visible) -> scores, got {processor!r}.")
        else:
            yield processor


#: The settings of whoever gives none.
DEFAULT = TrimConfig()
