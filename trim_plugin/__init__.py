"""Trimmed cross-attention cache for Llama-3.2-Vision (Mllama) in transformers.

Importing this package registers `cache_implementation="trimmed"`:

    import trim_plugin
    model.generate(**inputs, cache_implementation="trimmed", cache_config={"top_k_ratio": 0.25})
"""

from trim_plugin.compat import require_supported_transformers

require_supported_transformers()

# The version check comes first: an unsupported transformers shall say so, not fail in some import below.
from trim_plugin.cache.report import TrimReport  # noqa: E402
from trim_plugin.config import TrimConfig  # noqa: E402
from trim_plugin.forward.hooks import detach  # noqa: E402
from trim_plugin.forward.trimmed_cache import TrimmedCache  # noqa: E402
from trim_plugin.generation.registration import register, unregister  # noqa: E402
from trim_plugin.pictures.visualize import visualize  # noqa: E402
from trim_plugin.rules.k_center import KCenter  # noqa: E402
from trim_plugin.rules.processors import (  # noqa: E402
    BestOfCells,
    TopKPerHead,
    TopPPerHead,
    VisualTokenProcessor,
    VisualTokenProcessorList,
)

__version__ = "0.1.0"

__all__ = [
    "BestOfCells",
    "KCenter",
    "TopKPerHead",
    "TopPPerHead",
    "TrimConfig",
    "TrimReport",
    "TrimmedCache",
    "VisualTokenProcessor",
    "VisualTokenProcessorList",
    "detach",
    "register",
    "unregister",
    "visualize",
]

register()
