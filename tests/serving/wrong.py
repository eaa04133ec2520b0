"""Requests that are refused: what is wrong, the status, and what the message says."""

from __future__ import annotations

import io

from PIL import Image

from trim_plugin.embedded import examples

from .conftest import data_uri


def huge():
    file = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(file, "PNG")
    return data_uri(file.getvalue())


def wide():
    file = io.BytesIO()
    Image.new("1", (10_000, 8_000)).save(file, "PNG")
    return data_uri(file.getvalue())


def half():
    return data_uri(examples()[0].picture.read_bytes()[:-200])


ONLY_INSIDE = "this server takes pictures only as data:image/...;base64,... addresses"
#: By the names of rows in docs/errors.md, after "request-"; what follows a comma tells cases of one name apart.
PICTURES = {
    "picture-address, path": ("/etc/hostname", 400, ONLY_INSIDE),
    "picture-address, file": ("file:///etc/hostname", 400, ONLY_INSIDE),
    "picture-address, relative": ("questions.json", 400, ONLY_INSIDE),
    "picture-address, http": ("http://127.0.0.1:1/a.png", 400, ONLY_INSIDE),
    "picture-address, https": ("https://example.com/a.png", 400, ONLY_INSIDE),
    "picture-address, bare base64": ("iVBORw0KGgo=", 400, ONLY_INSIDE),
    "picture-address-broken": ("http://[", 400, "a picture's address is broken"),
    "picture-base64": ("data:image/png;base64,%%%%", 400, "a picture's base64 is broken"),
    "picture-unreadable, text": (data_uri(b"no picture at all"), 400, "a picture cannot be read"),
    "picture-unreadable, svg": (data_uri(b"<svg/>", "svg+xml"), 400, "a picture cannot be read"),
    "picture-cut-off": (half, 400, "a picture cannot be decoded: its file is cut off or broken"),
    "picture-too-large, huge": (huge, 413, "pixels, this server's most"),
    "picture-too-large, wide": (wide, 413, "a picture of 10000 x 8000 has more than"),
}
SETTINGS = {
    "cache-field": ({"extra_body": {"cache_config": {"top_k": 5}}}, 400, "Unknown field 'top_k'"),
    "cache-value, share": ({"extra_body": {"cache_config": {"kept_share": 2}}}, 400, "must be a number in (0, 1]"),
    "cache-value, two rules": (
        {"extra_body": {"cache_config": {"kept_share": 0.5, "top_k_ratio": 0.5}}},
        400,
        "they name different rules",
    ),
    "cache-value, ratio": ({"extra_body": {"cache_config": {"top_k_ratio": 2}}}, 400, "must be a number in (0, 1]"),
    "cache-value, rule": ({"extra_body": {"cache_config": {"processors": ["os.system"]}}}, 400, "callables"),
    "cache-not-an-object": ({"extra_body": {"cache_config": "trimmed"}}, 400, "'cache_config' must be an object"),
    "cache-field-of-the-operator": ({"extra_body": {"cache_config": {"static": True}}}, 400, "is the operator's"),
    "generation-field": (
        {"extra_body": {"generation_config": '{"num_beams": 1000}'}},
        400,
        "generation_config: 'num_beams'",
    ),
    "generation-not-json": ({"extra_body": {"generation_config": "{"}}, 400, "'generation_config' is not JSON"),
    "another-cache": (
        {"extra_body": {"generation_config": '{"cache_implementation": "offloaded"}'}},
        400,
        "'cache_implementation' must be 'trimmed'",
    ),
    "unknown-field": ({"extra_body": {"beams": 4}}, 400, "unknown field 'beams'"),
    "too-long, answer": ({"max_tokens": 10_000}, 400, "new ones are more than 512, this server's most"),
    "length-not-positive": ({"max_tokens": 0}, 400, "'max_tokens' must be a positive number"),
    "number-out-of-range, much": ({"temperature": 99}, 400, "'temperature' must be a number from 0 to 2"),
    "number-out-of-range, endless": ({"temperature": 10**400}, 400, "'temperature' must be a number from 0 to 2"),
    "temperature-near-0": ({"temperature": 1e-9}, 400, "'temperature' must be 0, or at least 0.01"),
    "not-offered, logprobs": ({"logprobs": True}, 400, "is not offered by this server"),
    "not-offered, format": ({"response_format": {"type": "json_object"}}, 400, "is not offered by this server"),
    "not-offered, tools": (
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]},
        400,
        "is not offered by this server",
    ),
    "not-offered, tools that are none": ({"extra_body": {"tools": 0}}, 400, "is not offered by this server"),
    "not-offered, bias": ({"extra_body": {"logit_bias": ""}}, 400, "is not offered by this server"),
    "number-out-of-range, penalty": (
        {"extra_body": {"frequency_penalty": []}},
        400,
        "'frequency_penalty' must be a number",
    ),
    "number-out-of-range, digits": ({"extra_body": {"seed": 10**30}}, 400, "'seed' must be a number"),
    "stop-kind": ({"extra_body": {"stop": 7}}, 400, "'stop' must be a text or a list of texts"),
    "generation-not-json, deep": (
        {"extra_body": {"generation_config": "[" * 50_000}},
        400,
        "'generation_config' is not JSON",
    ),
    "several-answers": ({"n": 3}, 400, "'n' must be 1"),
    "another-model": ({"model": "other"}, 404, "this server's model is 'small', not 'other'"),
}
MESSAGES = {
    "messages-empty": ([], 400, "'messages' must be a list that is not empty"),
    "message-role": ([{"content": "?"}], 400, "every message must be an object with a 'role' and a 'content'"),
    "message-content": ([{"role": "user", "content": None}], 400, "a message's 'content' must be a text"),
    "message-part": (
        [{"role": "user", "content": [{"type": "video_url", "video_url": {"url": "a"}}]}],
        400,
        "a part of a message must be a text, or an image_url",
    ),
    "pictures-not-named": ([{"role": "user", "content": "<|image|> ?"}], 400, "the prompt names 1 pictures"),
    "too-much-text": (
        [{"role": "user", "content": "d" * 20_000}],
        400,
        "is too long: 512 tokens are this server's most",
    ),
    "too-long, question": ([{"role": "user", "content": "digit " * 600}], 400, "more than 512, this server's most"),
}
