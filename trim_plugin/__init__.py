"""Trimmed cross-attention cache for Llama-3.2-Vision (Mllama) in transformers.

Importing this package registers `cache_implementation="trimmed"`:

    import trim_plugin
    model.generate(**inputs, cache_implementation="trimmed", cache_config={"top_k_ratio": 0.25})

It loads neither torch nor transformers: what needs them is loaded at its first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from trim_plugin.compat import require_supported_transformers
from trim_plugin.generation.registration import register, unregister

if TYPE_CHECKING:
    from trim_plugin.cache.report import TrimReport
    from trim_plugin.config import TrimConfig
    from trim_plugin.engine.engine import Engine
    from trim_plugin.forward.detaching import detach
    from trim_plugin.forward.hooks import TrimmedCache
    from trim_plugin.generation.micro_batches import prefill
    from trim_plugin.pictures.encoded import Pictures
    from trim_plugin.pictures.encoding import encode_pictures
    from trim_plugin.pictures.prompting import open_picture
    from trim_plugin.pictures.visualize import visualize
    from trim_plugin.selection.k_center import KCenter
    from trim_plugin.selection.processors import (
        TopKPerHead,
        TopPPerHead,
        VisualTokenProcessor,
        VisualTokenProcessorList,
    )

__version__ = "0.2.0"

__all__ = [
    "Engine",
    "KCenter",
    "Pictures",
    "TopKPerHead",
    "TopPPerHead",
    "TrimConfig",
    "TrimReport",
    "TrimmedCache",
    "VisualTokenProcessor",
    "VisualTokenProcessorList",
    "detach",
    "encode_pictures",
    "open_picture",
    "prefill",
    "register",
    "unregister",
    "visualize",
]

#: The module of every public name that is loaded at its first use.
_MODULES = {
    "Engine": "engine.engine",
    "KCenter": "selection.k_center",
    "Pictures": "pictures.encoded",
    "TopKPerHead": "selection.processors",
    "TopPPerHead": "selection.processors",
    "TrimConfig": "config",
    "TrimReport": "cache.report",
    "TrimmedCache": "forward.hooks",
    "VisualTokenProcessor": "selection.processors",
    "VisualTokenProcessorList": "selection.processors",
    "detach": "forward.detaching",
    "encode_pictures": "pictures.encoding",
    "open_picture": "pictures.prompting",
    "prefill": "generation.micro_batches",
    "visualize": "pictures.visualize",
}


def _load(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from trim_plugin.contract import naming_missing_imports

    with naming_missing_imports():
        value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


# Type checkers go by the imports above: a name that is not there is an error for them, too.
if not TYPE_CHECKING:
    __getattr__ = _load


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


# An unsupported transformers shall say so, not fail somewhere below (`trim_plugin.contract` checks what it holds).
require_supported_transformers()
register()
