"""What stands before transformers' server: checked requests get through, with nothing left in them to be opened."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from PIL import Image

from trim_plugin.pictures.prompting import opened
from trim_plugin.serving.limits import Limits, RequestError
from trim_plugin.serving.requests import check_model, read_request

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

CHAT = ("POST", "/v1/chat/completions")
#: What else transformers' server offers loads models, or takes requests that nothing here has checked.
OPEN = (CHAT, ("GET", "/v1/models"), ("GET", "/health"))
LOCAL_NAMES = ("localhost", "127.0.0.1", "::1", "[::1]")


class Gate:
    """An ASGI application in front of another.

    Args:
        app: transformers' server.
        processor: of the model behind it.
        name: what requests call the model.
        limits: bounds on a request.
        defaults: the model's settings of `generate`, which a request that sets some of its own starts from.
        local: whether to answer requests to this machine's own names alone: a page in a browser could otherwise lead a name of
            its own here.
    """

    def __init__(
        self, app: App, processor: Any, name: str, limits: Limits, defaults: dict[str, Any], *, local: bool = True
    ) -> None:
        self.app, self.processor, self.name, self.limits = app, processor, name, limits
        self.defaults, self.local = defaults, local
        self._inside = 0
        self._reading = asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer with an error, or let the request through."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        try:
            if scope["type"] != "http" or (scope["method"], scope["path"]) not in OPEN:
                raise RequestError(404, f"this server answers {', '.join(' '.join(route) for route in OPEN)}")
            if self.local:
                _check_host(scope)
            if (scope["method"], scope["path"]) != CHAT:
                await self.app(scope, receive, send)
                return
            await self._chat(scope, receive, send)
        except RequestError as error:
            if scope["type"] == "http":
                await _reply(send, error)

    async def _chat(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._inside >= self.limits.waiting:
            raise RequestError(429, f"{self._inside} requests are waiting already, this server's most. Try again")
        self._inside += 1
        try:
            data = await self._body(receive)
            try:
                body = json.loads(data)
            except (ValueError, RecursionError):
                raise RequestError(400, "the request is not JSON") from None
            # In a thread, since others shall be heard meanwhile; one by one, since decoded pictures are large.
            async with self._reading:
                checked = await asyncio.to_thread(self._checked, body)
            await self.app(_with_length(scope, len(checked)), _once(checked, receive), send)
        finally:
            self._inside -= 1

    async def _body(self, receive: Receive) -> bytes:
        data = bytearray()
        while True:
            message = await receive()
            if message["type"] != "http.request":
                raise RequestError(400, "the request was cut off")
            data += message.get("body", b"")
            if len(data) > self.limits.body_bytes:
                raise RequestError(413, f"the request has more than {self.limits.body_bytes} bytes, this server's most")
            if not message.get("more_body"):
                return bytes(data)

    def _checked(self, body: Any) -> bytes:
        """The request as transformers' server gets it: pictures inside it, as this package reads them, and its length."""
        request = read_request(body, self.processor, self.limits)
        check_model(request, self.name)
        pictures = iter(zip(request.files, request.pictures, strict=True))
        messages = [
            {
                "role": message["role"],
                "content": [
                    part
                    if part["type"] == "text"
                    else {"type": "image_url", "image_url": {"url": _data_uri(*next(pictures))}}
                    for part in message["content"]
                ],
            }
            for message in request.messages
        ]
        body = {**request.fields, "messages": messages, "stream": request.stream, "max_tokens": request.max_new_tokens}
        if request.generation:
            body["generation_config"] = json.dumps({**self.defaults, **request.generation})
        return json.dumps(body).encode()


def _data_uri(data: bytes, picture: Image.Image) -> str:
    """A picture that transformers reads as this package does: the file itself where both agree, else what was read of it."""
    with opened(data) as seen:
        same = seen.mode in ("RGB", "L") and "transparency" not in seen.info
        kind = str(seen.format or "png").lower()
    if not same:
        written = io.BytesIO()
        picture.save(written, "PNG", compress_level=1)
        data, kind = written.getvalue(), "png"
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _check_host(scope: Scope) -> None:
    host = next((value.decode("latin-1") for name, value in scope["headers"] if name == b"host"), "")
    if host.rsplit(":", 1)[0] not in LOCAL_NAMES and host not in LOCAL_NAMES:
        raise RequestError(421, "this server answers on localhost alone")


def _with_length(scope: Scope, length: int) -> Scope:
    replaced = {b"content-length": str(length).encode(), b"content-type": b"application/json"}
    kept = [(name, value) for name, value in scope["headers"] if name not in (*replaced, b"transfer-encoding")]
    return {**scope, "headers": [*kept, *replaced.items()]}


def _once(body: bytes, receive: Receive) -> Receive:
    """Hand out a body, then whatever else the client says (that it has gone)."""
    given = False

    async def receive_checked() -> MutableMapping[str, Any]:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return receive_checked


async def _reply(send: Send, error: RequestError) -> None:
    body = json.dumps(error.as_dict()).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
