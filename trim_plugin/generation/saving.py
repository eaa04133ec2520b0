"""Writes generation configurations as JSON, also where their `cache_config` holds rules."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Mapping
from typing import Any


def writing_json(original: Callable[..., str]) -> Callable[..., str]:
    """`GenerationConfig.to_json_string`, which cannot write rules by itself.

    Transformers asks for it without metadata where nothing is saved: to print, to hash, to compare. A rule that cannot be saved
    is shown there; otherwise it is an error.
    """

    def to_json_string(
        self: Any, use_diff: bool = True, ignore_metadata: bool = False, *args: Any, **kwargs: Any
    ) -> str:
        if holds_rules(self):
            from trim_plugin.config import as_json
            from trim_plugin.selection.written import shown, written

            settings = as_json(self.cache_config, shown if ignore_metadata else written)
            self = copy.copy(self)
            self.cache_config = settings
        return original(self, use_diff, ignore_metadata, *args, **kwargs)

    return to_json_string


def writing_json_file(original: Callable[..., None]) -> Callable[..., None]:
    """`GenerationConfig.to_json_file`, which empties the file before it writes: what cannot be written is found before that."""

    def to_json_file(self: Any, *args: Any, **kwargs: Any) -> None:
        if holds_rules(self):
            self.to_json_string()
        original(self, *args, **kwargs)

    return to_json_file


def holds_rules(generation_config: Any) -> bool:
    """Whether its `cache_config` is a `TrimConfig`, or a dict with processors.

    Example:
        >>> from transformers import GenerationConfig
        >>> holds_rules(GenerationConfig(cache_config={"top_k_ratio": 0.5}))  # JSON already
        False
    """
    settings = getattr(generation_config, "cache_config", None)
    if isinstance(settings, Mapping):
        return isinstance(settings.get("processors"), list | tuple)
    config = sys.modules.get("trim_plugin.config")  # where it was never loaded, nobody has made one
    return config is not None and isinstance(settings, config.TrimConfig)
