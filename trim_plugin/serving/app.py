"""transformers' own server for one model that is loaded already, with the trimmed cache as every request's default."""

from __future__ import annotations

from typing import Any

from trim_plugin.compat import transformers_server
from trim_plugin.config import TrimConfig
from trim_plugin.generation.registration import NAME
from trim_plugin.serving.gate import Gate
from trim_plugin.serving.limits import Limits


def build_app(
    model: Any,
    processor: Any,
    name: str,
    config: TrimConfig,
    limits: Limits | None = None,
    *,
    local: bool = True,
) -> Gate:
    """An ASGI application for uvicorn.

    It answers one request at a time, in the order in which they come; `integrations.ray` answers many together.

    Args:
        model: an Mllama model in eval mode, on its device. Its generation configuration is changed: the trimmed cache becomes
            its default.
        processor: its `MllamaProcessor`.
        name: what requests call the model.
        config: of the trimmed cache.
        limits: bounds on a request; `Limits()` by default.
        local: answer only requests to this machine's own names.

    Raises:
        ImportError: what transformers' server needs is not installed.
        ValueError: the model has no chat format.

    Example:
        >>> from trim_plugin.embedded import load_small_model
        >>> build_app(*load_small_model(), "small", TrimConfig())  # doctest: +SKIP
        <trim_plugin.serving.gate.Gate object at ...>
    """
    from transformers.utils.import_utils import is_serve_available

    if not is_serve_available():
        raise ImportError("A server needs fastapi, uvicorn and openai. Install them: pip install 'trim-plugin[serve]'")
    if not getattr(processor, "chat_template", None):
        raise ValueError("This model has no chat format, so it cannot answer chats. Serve an Instruct model.")
    limits = (limits or Limits()).for_model(model)
    defaults = model.generation_config.to_dict()
    model.generation_config.cache_implementation = NAME
    model.generation_config.cache_config = config
    app = transformers_server(model, processor, name)
    return Gate(app, processor, name, limits, {**defaults, "cache_implementation": NAME}, local=local)
