"""`generate` with a trimmed cache, for `model.generate(custom_generate=<this folder or repository>, trust_remote_code=True)`."""

import trim_plugin

SETTINGS = tuple(trim_plugin.TrimConfig.__dataclass_fields__)


def generate(model, **arguments):
    """Call the model's own `generate` with a trimmed cache.

    Args:
        model: an Mllama model (Llama-3.2-Vision).
        arguments: those of `generate`, and any field of `trim_plugin.TrimConfig` (`top_k_ratio`, `kv_quantization`, ...).

    Raises:
        ValueError: another `cache_implementation` was asked for, a `cache_config` beside single fields, or a cache was given.
    """
    own = {name: arguments.pop(name) for name in SETTINGS if name in arguments and name != "max_cache_len"}
    # Handed on by `generate` for every argument of its signature, whether it was given or not.
    given = {name: value for name, value in arguments.items() if value is not None}
    implementation = given.pop("cache_implementation", "trimmed")
    if implementation != "trimmed":
        raise ValueError(f"This custom_generate makes a trimmed cache; cache_implementation={implementation!r} is another one.")
    if own and "cache_config" in given:
        raise ValueError(f"Give {', '.join(own)} either by name or in cache_config, not both.")
    if own:
        given["cache_config"] = own
    return model.generate(cache_implementation="trimmed", **given)
