"""How tests speak to a server: through OpenAI's client, and byte by byte."""

from __future__ import annotations

import contextlib
import json
import socket

from trim_plugin.embedded import examples

from .conftest import chat, data_uri

EXAMPLE = examples()[0]
HELLO = [{"role": "user", "content": "How many digits?"}]


def ask(client, messages=None, **settings):
    messages = chat(data_uri(EXAMPLE.picture.read_bytes()), EXAMPLE.question) if messages is None else messages
    return client.chat.completions.create(**{"model": "small", "messages": messages, "max_tokens": 12, **settings})


def connection(client):
    return socket.create_connection(("127.0.0.1", client.port), timeout=30)


def head(client, length, *more):
    lines = ["POST /v1/chat/completions HTTP/1.1", f"Host: 127.0.0.1:{client.port}", f"Content-Length: {length}"]
    return "\r\n".join([*lines, "Content-Type: application/json", *more, "", ""]).encode()


def body(**settings):
    return json.dumps({"messages": HELLO, "max_tokens": 400, **settings}).encode()


def received(own):
    """All that comes until the other end closes."""
    found = b""
    with contextlib.suppress(ConnectionError):
        while part := own.recv(65536):
            found += part
    return found


def one_answer(own):
    """What comes of one answer that says how long it is."""
    found = b""
    while b"\r\n\r\n" not in found:
        found += own.recv(65536)
    head, _, rest = found.partition(b"\r\n\r\n")
    length = int(head.lower().partition(b"content-length: ")[2].split()[0])
    while len(rest) < length:
        rest += own.recv(65536)
    return head + rest
