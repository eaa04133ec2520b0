"""A request of OpenAI's chat completions, checked, as a row that a worker can answer."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from trim_plugin.asking.prompts import Prompt, read_prompt
from trim_plugin.asking.rows import RowError
from trim_plugin.cache.blocks import require_bitsandbytes
from trim_plugin.config import TrimConfig
from trim_plugin.serving.limits import Limits, RequestError
from trim_plugin.serving.sources import checked_picture, picture_bytes

#: An answer's length where the request does not say, as in transformers' server.
NEW_TOKENS = 1024
#: What of the trimmed cache a request may set; the rest takes memory or code, and is the operator's.
OPEN_FIELDS = ("top_k_ratio", "kv_quantization", "merge")
#: What of a `generation_config` (a field that transformers' server adds to OpenAI's) a request may set.
OPEN_GENERATION = ("cache_implementation", "cache_config", "do_sample", "top_k", "min_p")
#: Numbers of a request, their least and their most.
NUMBERS: dict[str, tuple[float, float]] = {
    "temperature": (0.0, 2.0),
    "top_p": (0.0, 1.0),
    "seed": (0, 2**63 - 1),
    "top_k": (0, 10**6),
    "min_p": (0.0, 1.0),
}
WHOLE = ("seed", "top_k")
#: What would change the answer, and cannot be had. transformers' server looks for stop strings with the processor, which has no
#: vocabulary. A penalty looks for the image token's logit; Mllama has none, and transformers 5.17 reads past the end there.
REFUSED = ("frequency_penalty", "stop", "logit_bias", "tools", "functions", "logprobs", "response_format")
#: OpenAI's fields and what transformers' server adds; those that nothing here reads have no effect there either.
KNOWN = {
    *NUMBERS,
    *REFUSED,
    *("stream", "max_tokens", "max_completion_tokens", "cache_config", "generation_config"),
    *("model", "n", "user", "metadata", "stream_options", "presence_penalty", "top_logprobs", "store", "service_tier"),
    *("reasoning_effort", "parallel_tool_calls", "tool_choice", "function_call", "modalities"),
} - {"top_k", "min_p"}
#: Logits divided by less are no numbers any more.
LEAST_TEMPERATURE = 0.01


@dataclasses.dataclass(frozen=True)
class ChatRequest:
    """What a request asks for.

    Args:
        messages: the chat, whose parts `{"type": "image"}` stand for the pictures.
        pictures: the pictures, decoded, in their order.
        files: the files that they came in.
        prompt: the whole as the tokenizer gets it.
        max_new_tokens: longest answer.
        stream: whether it is to come in parts.
        generation: settings of `generate` beyond the server's own.
        fields: the request's other fields.
    """

    messages: list[dict[str, Any]]
    pictures: tuple[Image.Image, ...]
    files: tuple[bytes, ...]
    prompt: Prompt
    max_new_tokens: int
    stream: bool
    generation: dict[str, Any]
    fields: dict[str, Any]


def read_request(body: Any, processor: Any, limits: Limits) -> ChatRequest:
    """Check a request's body.

    Args:
        body: the parsed JSON.
        processor: an `MllamaProcessor`.
        limits: bounds.

    Raises:
        RequestError: something about it is wrong or not allowed.

    Example:
        >>> from trim_plugin.embedded import load_small_model
        >>> _, processor = load_small_model()
        >>> body = {"messages": [{"role": "user", "content": "How many?"}], "max_tokens": 5}
        >>> request = read_request(body, processor, Limits())
        >>> request.prompt.text, request.max_new_tokens
        ('<|bos|><|user|>How many?<|assistant|>', 5)
    """
    if not isinstance(body, Mapping):
        raise RequestError(400, "the request must be a JSON object")
    fields = dict(body)
    messages, urls = _chat(fields.pop("messages", None), limits)
    _check_numbers(fields)
    _check_others(fields)
    stream = fields.pop("stream", None) or False
    if not isinstance(stream, bool):
        raise RequestError(400, "'stream' must be true or false")
    generation = _generation(fields.pop("cache_config", None), fields.pop("generation_config", None))
    files = tuple(picture_bytes(url, limits) for url in urls)
    pictures = tuple(checked_picture(data, limits) for data in files)
    try:
        prompt = read_prompt(processor, {"images": pictures, "messages": messages}, Path())
    except RowError as error:
        raise RequestError(400, str(error)) from None
    room = limits.tokens - prompt.tokens
    given = [fields.pop(name, None) for name in ("max_completion_tokens", "max_tokens")]
    asked = next((value for value in given if value is not None), min(NEW_TOKENS, max(1, room)))
    if not isinstance(asked, int) or isinstance(asked, bool) or asked < 1:
        raise RequestError(400, f"'max_tokens' must be a positive number, got {asked!r}")
    if asked > room:
        raise RequestError(
            400,
            f"a prompt of {prompt.tokens} tokens and {asked} new ones are more than {limits.tokens}, this server's most",
        )
    return ChatRequest(messages, pictures, files, prompt, asked, stream, generation, fields)


def check_model(request: ChatRequest, name: str) -> None:
    """Raise `RequestError` unless a request is for the model of this name, or names none."""
    asked = request.fields.get("model")
    if asked not in (None, name):
        raise RequestError(404, f"this server's model is {name!r}, not {asked!r}")


def _chat(messages: Any, limits: Limits) -> tuple[list[dict[str, Any]], list[str]]:
    """Messages with placeholders for pictures, and the pictures' addresses."""
    if not isinstance(messages, list) or not messages:
        raise RequestError(400, "'messages' must be a list that is not empty")
    chat, urls = [], []
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise RequestError(400, "every message must be an object with a 'role' and a 'content'")
        content = message.get("content")
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
        if not isinstance(content, list) or not content:
            raise RequestError(400, "a message's 'content' must be a text, or a list of parts that is not empty")
        parts = []
        for part in content:
            url = _part_url(part)
            if url is not None:
                urls.append(url)
            parts.append({"type": "text", "text": part["text"]} if url is None else {"type": "image"})
        chat.append({"role": message["role"], "content": parts})
        if len(urls) > limits.pictures:
            raise RequestError(400, f"more than {limits.pictures} pictures, this server's most for a request")
    return chat, urls


def _part_url(part: Any) -> str | None:
    """The address of a part that is a picture, None for a text."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return None
    if kind == "image_url":
        given = part.get("image_url")
        url = given.get("url") if isinstance(given, Mapping) else given
        if isinstance(url, str):
            return url
    raise RequestError(400, "a part of a message must be a text, or an image_url with a url")


def _check_numbers(fields: Mapping[str, Any]) -> None:
    for name, (least, most) in NUMBERS.items():
        value = fields.get(name)
        if value is None:
            continue
        kinds = int if name in WHOLE else (int, float)
        number = isinstance(value, kinds) and not isinstance(value, bool)
        if not number or not least <= value <= most:
            raise RequestError(400, f"{name!r} must be a number from {least:g} to {most:g}")
    if 0 < (fields.get("temperature") or 0) < LEAST_TEMPERATURE:
        raise RequestError(400, f"'temperature' must be 0, or at least {LEAST_TEMPERATURE}")


def _check_others(fields: Mapping[str, Any]) -> None:
    if fields.get("n") not in (None, 1):
        raise RequestError(400, "'n' must be 1: this server gives one answer to a request")
    for name in sorted(set(fields) - KNOWN):
        raise RequestError(400, f"unknown field {name!r}")
    for name in REFUSED:
        if fields.get(name):
            raise RequestError(400, f"{name!r} is not offered by this server")


def _generation(cache_config: Any, generation_config: Any) -> dict[str, Any]:
    """A request's own settings of the cache, and of sampling where OpenAI has no field."""
    generation: Any = {}
    if generation_config is not None:
        try:
            generation = json.loads(generation_config) if isinstance(generation_config, str) else generation_config
        except json.JSONDecodeError as error:
            raise RequestError(400, f"'generation_config' is not JSON: {error}") from None
        unknown = sorted(set(generation) - set(OPEN_GENERATION)) if isinstance(generation, Mapping) else ["no object"]
        if unknown:
            raise RequestError(400, f"generation_config: {unknown[0]!r}. Allowed: {', '.join(OPEN_GENERATION)}")
        if generation.get("cache_implementation") not in (None, "trimmed"):
            raise RequestError(
                400, "'cache_implementation' must be 'trimmed'; {'top_k_ratio': 1} answers as stock does"
            )
    generation = dict(generation)
    _check_numbers(generation)
    if not isinstance(generation.get("do_sample", False), bool):
        raise RequestError(400, "'do_sample' must be true or false")
    config = generation.pop("cache_config", None) if cache_config is None else cache_config
    if config is not None:
        generation["cache_config"] = _cache_config(config)
    return generation


def _cache_config(config: Any) -> dict[str, Any]:
    if not isinstance(config, Mapping):
        raise RequestError(400, "'cache_config' must be an object such as {'top_k_ratio': 0.1}")
    try:
        checked = TrimConfig.of(config)
        if checked.kv_quantization is not None:
            require_bitsandbytes(f"kv_quantization={checked.kv_quantization!r}")
    except (ValueError, TypeError, ImportError) as error:
        raise RequestError(400, str(error)) from None
    closed = sorted(set(config) - set(OPEN_FIELDS))
    if closed:
        raise RequestError(400, f"cache_config: {closed[0]!r} is the operator's. Allowed: {', '.join(OPEN_FIELDS)}")
    return dict(config)
