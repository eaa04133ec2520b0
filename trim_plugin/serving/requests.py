"""A request of OpenAI's chat completions, checked, as a row that a worker can answer."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from trim_plugin.arithmetic import share
from trim_plugin.asking.prompts import Prompt, read_prompt
from trim_plugin.asking.rows import RowError
from trim_plugin.config import TrimConfig
from trim_plugin.engine.engine import OWN_SETTINGS
from trim_plugin.serving.limits import Limits, RequestError
from trim_plugin.serving.sources import checked_picture, picture_bytes

#: An answer's length where the request does not say, as in transformers' server.
NEW_TOKENS = 1024
#: What of the trimmed cache a request may set; the rest takes memory or code, and is the operator's.
OPEN_FIELDS = OWN_SETTINGS
#: What of a `generation_config`, a field of transformers' server, a request may set.
OPEN_GENERATION = ("cache_implementation", "cache_config", "do_sample", "top_k", "min_p")
#: Numbers of a request, their least and their most.
NUMBERS: dict[str, tuple[float, float]] = {
    "temperature": (0.0, 2.0),
    "top_p": (0.0, 1.0),
    "seed": (-(2**63), 2**63 - 1),
    "top_k": (0, 10**6),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (0.01, 100.0),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
}
WHOLE = ("seed", "top_k")
#: What would change the answer, and cannot be had; a value that asks for nothing is taken.
REFUSED = (
    *("logit_bias", "tools", "functions", "logprobs", "top_logprobs", "audio", "prediction", "web_search_options"),
    *("response_format", "modalities", "tool_choice", "function_call", "moderation"),
)
#: Values of these that ask for nothing.
NOTHING: dict[str, tuple[Any, ...]] = {
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "functions": ([],),
}
#: Fields of OpenAI's clients that change nothing here.
WITHOUT_EFFECT = (
    *("user", "metadata", "store", "service_tier", "reasoning_effort", "parallel_tool_calls", "safety_identifier"),
    *("prompt_cache_key", "prompt_cache_retention", "prompt_cache_options", "verbosity"),
)
KNOWN = {
    *NUMBERS,
    *REFUSED,
    *WITHOUT_EFFECT,
    *("stream", "stream_options", "max_tokens", "max_completion_tokens", "cache_config", "generation_config"),
    *("model", "n", "stop"),
}
#: Longest text of a request, in characters for each token that it may have. Only endless repetition has more.
CHARACTERS_OF_A_TOKEN = 32
#: Logits divided by less are no numbers any more.
LEAST_TEMPERATURE = 0.01


@dataclasses.dataclass(frozen=True)
class ChatRequest:
    """What a request asks for.

    Args:
        messages: the chat, whose parts `{"type": "image"}` stand for the pictures.
        pictures: the pictures, decoded, in their order.
        prompt: the whole as the tokenizer gets it.
        sampling: fields of `engine.request.Sampling`.
        stream: whether it is to come in parts.
        include_usage: whether a stream ends with its usage.
        cache_config: what it wants otherwise than the server's configuration.
        model: the model that it names; None for whichever there is.
    """

    messages: list[dict[str, Any]]
    pictures: tuple[Image.Image, ...]
    prompt: Prompt
    sampling: dict[str, Any]
    stream: bool
    include_usage: bool
    cache_config: dict[str, Any]
    model: str | None


def parsed(data: bytes) -> Any:
    """A request's body as JSON.

    Raises:
        RequestError: it is none.
    """
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        raise RequestError(400, "the request is not JSON") from None


def fetched_pictures(data: bytes, limits: Limits) -> dict[str, bytes]:
    """The files of a request's pictures that other hosts have, by their addresses.

    Raises:
        RequestError: an address is not allowed, or leads to nothing.
    """
    body = parsed(data)
    _, urls = _chat(body.get("messages") if isinstance(body, Mapping) else None, limits)
    return {url: picture_bytes(url, limits) for url in dict.fromkeys(urls) if url.lower().startswith("http")}


def read_request(
    body: Any,
    processor: Any,
    limits: Limits,
    fetched: Mapping[str, bytes] | None = None,
    take: Callable[[int], None] | None = None,
) -> ChatRequest:
    """Check a request's body.

    Args:
        body: the parsed JSON.
        processor: an `MllamaProcessor`.
        limits: bounds.
        fetched: files of pictures that are there already, by their addresses.
        take: called with a picture's pixels before it is decoded; may raise `RequestError`.

    Raises:
        RequestError: something about it is wrong or not allowed.

    Example:
        >>> from trim_plugin.embedded import load_small_model
        >>> _, processor = load_small_model()
        >>> body = {"messages": [{"role": "user", "content": "How many?"}], "max_tokens": 5}
        >>> request = read_request(body, processor, Limits())
        >>> request.prompt.text, request.sampling["max_new_tokens"]
        ('<|bos|><|user|>How many?<|assistant|>', 5)
    """
    if not isinstance(body, Mapping):
        raise RequestError(400, "the request must be a JSON object")
    fields = {str(name): value for name, value in body.items()}
    messages, urls = _chat(fields.get("messages"), limits)
    _check_characters(messages, limits)
    fields.pop("messages", None)
    _check_others(fields)
    settings = {**_generation(fields.get("generation_config")), **{n: v for n, v in fields.items() if n in NUMBERS}}
    _check_numbers(settings)
    stream = fields.get("stream") or False
    if not isinstance(stream, bool):
        raise RequestError(400, "'stream' must be true or false")
    cache_config = (
        fields.get("cache_config") if fields.get("cache_config") is not None else settings.pop("cache_config", None)
    )
    cache_config = {} if cache_config is None else _cache_config(cache_config)
    settings.pop("cache_config", None)
    there = fetched or {}
    files = (there[url] if url in there else picture_bytes(url, limits) for url in urls)
    pictures = tuple(checked_picture(file, limits, take) for file in files)
    try:
        prompt = read_prompt(processor, {"images": pictures, "messages": messages}, Path(), limits.tokens)
    except RowError as error:
        said = str(error).replace(
            f"but the model reads {limits.tokens} at most", f"more than {limits.tokens}, this server's most"
        )
        raise RequestError(400, said) from None
    return ChatRequest(
        messages=messages,
        pictures=pictures,
        prompt=prompt,
        sampling={**_sampling(settings, fields), "max_new_tokens": _length(fields, prompt.tokens, limits)},
        stream=stream,
        include_usage=_include_usage(fields.get("stream_options")),
        cache_config=cache_config,
        model=fields.get("model"),
    )


def _length(fields: Mapping[str, Any], prompt: int, limits: Limits) -> int:
    """Longest answer, of which there is room for."""
    room = limits.tokens - prompt
    given = [fields.get(name) for name in ("max_completion_tokens", "max_tokens")]
    asked = next((value for value in given if value is not None), min(NEW_TOKENS, max(1, room)))
    if not isinstance(asked, int) or isinstance(asked, bool) or asked < 1:
        raise RequestError(400, f"'max_tokens' must be a positive number, got {_short(asked)}")
    if asked > room:
        said = f"a prompt of {prompt} tokens and {_short(asked)} new ones are more than {limits.tokens}, this server's most"
        raise RequestError(400, said)
    return asked


def _sampling(settings: dict[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `Sampling`. A temperature samples; without one the likeliest token is taken, unless `do_sample` is set."""
    draws = settings.pop("do_sample", None)
    given = {name: value for name, value in settings.items() if value is not None}
    if draws is False:
        given["temperature"] = 0.0
    elif draws and given.get("temperature") is None:
        given["temperature"] = 1.0
    if given.get("top_p") == 0:
        given["top_p"], given["temperature"] = 1.0, 0.0
    if not given.get("top_k"):
        given.pop("top_k", None)
    stop = fields.get("stop")
    if stop is not None and not isinstance(stop, str | list):
        raise RequestError(400, "'stop' must be a text or a list of texts")
    return {**given, "stop": stop or ()}


def _include_usage(options: Any) -> bool:
    if options is None:
        return False
    wanted = options.get("include_usage") if isinstance(options, Mapping) else options
    if not isinstance(options, Mapping) or not isinstance(wanted, bool | None):
        raise RequestError(400, "'stream_options' must be an object such as {'include_usage': true}")
    return bool(wanted)


def _short(value: Any) -> str:
    """A value as a sentence can hold it: a number of thousands of digits has no other text."""
    try:
        return repr(value)[:80]
    except ValueError:
        return "a number of thousands of digits"
    except RecursionError:
        return "a value that is nested too deeply"


def check_model(request: ChatRequest, name: str) -> None:
    """Raise `RequestError` unless a request is for the model of this name, or names none."""
    if request.model not in (None, name):
        raise RequestError(404, f"this server's model is {name!r}, not {_short(request.model)}")


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


def _check_characters(messages: list[dict[str, Any]], limits: Limits) -> None:
    """Refuse what is far too long before anything reads it: some tokenizers take a minute for it."""
    most = CHARACTERS_OF_A_TOKEN * limits.tokens
    found = sum(len(message["role"]) for message in messages)
    found += sum(len(part.get("text", "")) for message in messages for part in message["content"])
    if found > most or len(messages) > limits.tokens:
        said = f"a prompt of {found} characters in {len(messages)} messages"
        raise RequestError(
            400, f"{said} is too long: {limits.tokens} tokens are this server's most, and {most} characters"
        )


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
        raise RequestError(400, f"unknown field {_short(name)}")
    for name in REFUSED:
        if fields.get(name) is not None and fields[name] not in NOTHING.get(name, ()):
            raise RequestError(400, f"{name!r} is not offered by this server")


def _generation(given: Any) -> dict[str, Any]:
    """What a request sets where OpenAI has no field, as clients of transformers' server do."""
    if given is None:
        return {}
    try:
        generation = json.loads(given) if isinstance(given, str) else given
    except (ValueError, RecursionError) as error:
        raise RequestError(400, f"'generation_config' is not JSON: {_short(error)}") from None
    unknown = sorted(set(generation) - set(OPEN_GENERATION)) if isinstance(generation, Mapping) else ["no object"]
    if unknown:
        raise RequestError(400, f"generation_config: {_short(unknown[0])}. Allowed: {', '.join(OPEN_GENERATION)}")
    found = dict(generation)
    if found.pop("cache_implementation", None) not in (None, "trimmed"):
        raise RequestError(400, "'cache_implementation' must be 'trimmed'; {'top_k_ratio': 1} answers as stock does")
    if not isinstance(found.get("do_sample"), bool | None):
        raise RequestError(400, "'do_sample' must be true or false")
    return found


def _cache_config(config: Any) -> dict[str, Any]:
    if not isinstance(config, Mapping):
        raise RequestError(400, "'cache_config' must be an object such as {'kept_share': 0.1}")
    try:
        TrimConfig.of({name: value for name, value in config.items() if name != "kept_share"})
        if config.get("kept_share") is not None:
            share("kept_share", config["kept_share"])
    except (ValueError, TypeError, RecursionError) as error:
        raise RequestError(400, str(error)) from None
    closed = sorted(set(config) - set(OPEN_FIELDS))
    if closed:
        raise RequestError(
            400, f"cache_config: {_short(closed[0])} is the operator's. Allowed: {', '.join(OPEN_FIELDS)}"
        )
    return dict(config)
