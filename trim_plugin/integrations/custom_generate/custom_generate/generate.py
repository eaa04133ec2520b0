"""`generate` with a trimmed cache, for `model.generate(custom_generate=<this folder or repository>, trust_remote_code=True)`."""

import dataclasses
from typing import Any

import trim_plugin

#: Taken by name. `max_cache_len` is an argument of `generate` already, which a static trimmed cache obeys.
SETTINGS = [field.name for field in dataclasses.fields(trim_plugin.TrimConfig) if field.name != "max_cache_len"]


def generate(model: Any, **arguments: Any) -> Any:
    """Call the model's own `generate` with a trimmed cache.

    Args:
        model: an Mllama model (Llama-3.2-Vision).
        arguments: those of `generate`, and any field of `trim_plugin.TrimConfig` (`top_k_ratio`, `kv_quantization`, ...).

    Raises:
        ValueError: another `cache_implementation` was asked for, or a `cache_config` beside single fields.
    """
    own = {name: arguments.pop(name) for name in SETTINGS if name in arguments}
    # transformers hands on every argument in `generate`'s signature, given or not.
    given = {name: value for name, value in arguments.items() if value is not None}
    implementation = given.pop("cache_implementation", "trimmed")
    if implementation != "trimmed":
        raise ValueError(
            f"This custom_generate makes a trimmed cache; cache_implementation={implementation!r} is another one."
        )
    if own and "cache_config" in given:
        raise ValueError(f"Give {', '.join(own)} either by name or in cache_config, not both.")
    if own:
        given["cache_config"] = own
    return model.generate(cache_implementation="trimmed", **given)
