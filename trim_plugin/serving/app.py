"""An OpenAI-compatible server of one model: a small ASGI application around an engine."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hmac
import json
import time
import uuid
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from starlette.applications import Starlette
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from trim_plugin.engine.engine import Engine, EngineClosed
from trim_plugin.engine.request import Request
from trim_plugin.serving.answers import chunk, last_chunk, usage_chunk, whole
from trim_plugin.serving.limits import Limits, RequestError
from trim_plugin.serving.metrics import Metrics
from trim_plugin.serving.requests import ChatRequest, check_model, read_request

LOCAL_NAMES = ("localhost", "127.0.0.1", "::1", "[::1]")
#: What a page of another site can send without asking first; nobody else sends it.
FOREIGN_TYPES = ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data")
ROUTES = "POST /v1/chat/completions, GET /v1/models, GET /health, GET /metrics"
#: Requests whose pictures are decoded and whose texts are tokenized at a time: decoded pictures are large.
READERS = 2


class Server:
    """The routes, and what they share.

    Args:
        engine: answers; it is closed when the application ends.
        processor: of its model.
        name: what requests call the model.
        limits: bounds on a request.
        local: answer only requests to this machine's own names: a page in a browser could otherwise lead a name of its own here.
        api_key: what requests have to bring as a bearer token; None lets everybody ask.
        cors: let web pages of any site ask.
    """

    def __init__(
        self, engine: Engine, processor: Any, name: str, limits: Limits, *, local: bool, api_key: str | None, cors: bool
    ) -> None:
        self.engine, self.processor, self.name, self.limits = engine, processor, name, limits
        self.local, self.api_key, self.cors = local, api_key, cors
        self.metrics = Metrics(engine, name)
        self._inside = 0
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="trim_plugin-reader")
        self.created = int(time.time())

    async def answer(self, http: HttpRequest) -> Response:
        """Answer any request."""
        routes = {
            ("POST", "/v1/chat/completions"): self.chat,
            ("GET", "/v1/models"): self.models,
            ("GET", "/health"): self.health,
            ("GET", "/metrics"): self.show_metrics,
        }
        try:
            self.check(http)
            route = routes.get((http.method, http.url.path))
            if route is None:
                raise RequestError(404, f"this server answers {ROUTES}")
            return await route(http)
        except RequestError as error:
            headers = {"connection": "close"} if error.close else {}
            return JSONResponse(error.as_dict(), error.status, headers=headers)
        except ClientDisconnect:
            return Response(status_code=499)

    # -- routes --------------------------------------------------------------------------------------------------------

    async def chat(self, http: HttpRequest) -> Response:
        """`POST /v1/chat/completions`."""
        started = time.monotonic()
        self._check_type(http)
        body = await self._body(http)
        if self._inside >= self.limits.waiting:
            raise RequestError(429, f"{self._inside} requests are waiting already, this server's most. Try again")
        self._inside += 1
        inside = contextlib.ExitStack()
        inside.callback(self._leave)
        try:
            loop = asyncio.get_running_loop()
            answer = Answer(self, started, loop)
            await loop.run_in_executor(self._readers, functools.partial(self._submit, body, answer))
            inside.callback(answer.request.cancel)
            if answer.asked.stream:
                sent = answer.stream(inside.pop_all())
                return StreamingResponse(sent, media_type="text/event-stream", headers={"cache-control": "no-cache"})
            return await answer.whole(http)
        finally:
            inside.close()

    async def models(self, http: HttpRequest) -> Response:
        """`GET /v1/models`."""
        own = {"id": self.name, "object": "model", "created": self.created, "owned_by": "trim-plugin"}
        return JSONResponse({"object": "list", "data": [own]})

    async def health(self, http: HttpRequest) -> Response:
        """`GET /health`: 503 once the engine's thread is dead."""
        return JSONResponse(
            {"status": "ok"} if self.engine.healthy else {"status": "dead"}, 200 if self.engine.healthy else 503
        )

    async def show_metrics(self, http: HttpRequest) -> Response:
        """`GET /metrics`."""
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    # -- on the way ----------------------------------------------------------------------------------------------------

    def check(self, http: HttpRequest) -> None:
        """Raise `RequestError` for what must not ask here."""
        if self.local:
            host = http.headers.get("host", "").lower()
            if host.rsplit(":", 1)[0] not in LOCAL_NAMES and host not in LOCAL_NAMES:
                raise RequestError(421, "this server answers on localhost alone")
        if http.headers.get("origin") is not None and not self.cors:
            raise RequestError(403, "this server answers no web pages (--enable-cors lets them ask)")
        if self.api_key is not None and http.url.path != "/health":
            given = http.headers.get("authorization", "").removeprefix("Bearer ").encode()
            if not hmac.compare_digest(given, self.api_key.encode()):
                raise RequestError(401, "this server asks for an API key: Authorization: Bearer ...")

    def _check_type(self, http: HttpRequest) -> None:
        kind = http.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind in FOREIGN_TYPES and not self.cors:
            raise RequestError(415, "the request's content-type must be application/json")

    async def _body(self, http: HttpRequest) -> bytes:
        data = bytearray()
        try:
            async with asyncio.timeout(self.limits.body_seconds):
                async for part in http.stream():
                    data += part
                    if len(data) > self.limits.body_bytes:
                        raise RequestError(
                            413,
                            f"the request has more than {self.limits.body_bytes} bytes, this server's most",
                            close=True,
                        )
        except TimeoutError:
            said = f"the request did not come within {self.limits.body_seconds:g} seconds"
            raise RequestError(408, said, close=True) from None
        return bytes(data)

    def _submit(self, data: bytes, answer: Answer) -> None:
        """Check the request and hand it to the engine, in a thread: others shall be heard meanwhile."""
        try:
            body = json.loads(data)
        except (ValueError, RecursionError):
            raise RequestError(400, "the request is not JSON") from None
        asked = read_request(body, self.processor, self.limits)
        check_model(asked, self.name)
        answer.asked = asked
        try:
            answer.request = self.engine.submit(
                asked.messages,
                images=asked.pictures,
                cache_config=asked.cache_config,
                listener=answer.heard,
                **asked.sampling,
            )
        except (ValueError, TypeError) as error:
            raise RequestError(400, str(error)) from None
        except EngineClosed as error:
            raise RequestError(503, str(error)) from None

    def _leave(self) -> None:
        self._inside -= 1


class Answer:
    """One answer on its way to a client."""

    asked: ChatRequest
    request: Request

    def __init__(self, server: Server, started: float, loop: asyncio.AbstractEventLoop) -> None:
        self._server, self._started, self._loop = server, started, loop
        self._pieces: asyncio.Queue[str | None] = asyncio.Queue()
        self.id = f"chatcmpl-{uuid.uuid4().hex}"
        self.created = int(time.time())

    def heard(self, piece: str | None) -> None:
        """Called by the engine's thread."""
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._pieces.put_nowait, piece)

    async def _texts(self) -> AsyncIterator[str]:
        first = True
        while (piece := await self._pieces.get()) is not None:
            if first:
                self._server.metrics.first_token(time.monotonic() - self._started)
                first = False
            yield piece

    async def whole(self, http: HttpRequest) -> Response:
        """The whole answer at once. A client that leaves ends it."""
        leaving = asyncio.ensure_future(_left(http))
        reading = asyncio.ensure_future(self._read_all())
        try:
            await asyncio.wait({leaving, reading}, return_when=asyncio.FIRST_COMPLETED)
            if not reading.done():
                raise ClientDisconnect
        finally:
            for task in (leaving, reading):
                task.cancel()
        finished = self._result()
        self._server.metrics.finished(finished, time.monotonic() - self._started)
        return Response(whole(self.id, self.created, self._server.name, finished), media_type="application/json")

    async def _read_all(self) -> None:
        async for _ in self._texts():
            pass

    def _result(self) -> Any:
        try:
            return self.request.result(0)
        except EngineClosed as error:
            raise RequestError(503, str(error)) from None
        except (Exception, SystemExit) as error:  # noqa: BLE001 - this request's own failure
            raise RequestError(
                500, f"the generation failed: {str(error).splitlines()[0] if str(error) else error!r}"
            ) from None

    async def stream(self, inside: contextlib.ExitStack) -> AsyncIterator[str]:
        """Server-sent events, to the end. A client that leaves ends it."""
        about = (self.id, self.created, self._server.name)
        with inside:
            yield chunk(*about, "", first=True)
            async for piece in self._texts():
                yield chunk(*about, piece)
            try:
                finished = self._result()
            except RequestError as error:
                yield f"data: {json.dumps(error.as_dict())}\n\n"
                return
            self._server.metrics.finished(finished, time.monotonic() - self._started)
            yield last_chunk(*about, finished)
            if self.asked.include_usage:
                yield usage_chunk(*about, finished)
            yield "data: [DONE]\n\n"


async def _left(http: HttpRequest) -> None:
    """Wait until the client has left."""
    while True:
        message = await http.receive()
        if message["type"] == "http.disconnect":
            return


def build_app(
    engine: Engine,
    processor: Any,
    name: str,
    limits: Limits | None = None,
    *,
    local: bool = True,
    api_key: str | None = None,
    cors: bool = False,
) -> Starlette:
    """An ASGI application, for uvicorn or a replica of Ray Serve.

    Args:
        engine: answers; it is closed, which lets it finish, when the application ends.
        processor: the model's `MllamaProcessor`.
        name: what requests call the model.
        limits: bounds on a request; `Limits()` by default.
        local: answer only requests to this machine's own names.
        api_key: what requests have to bring; None lets everybody ask.
        cors: let web pages of any site ask.

    Raises:
        ValueError: the model has no chat format.

    Example:
        >>> from trim_plugin import Engine
        >>> from trim_plugin.embedded import load_small_model
        >>> model, processor = load_small_model()
        >>> with Engine(model, processor) as engine:
        ...     type(build_app(engine, processor, "small")).__name__
        'Starlette'
    """
    if not getattr(processor, "chat_template", None):
        raise ValueError("This model has no chat format, so it cannot answer chats. Serve an Instruct model.")
    server = Server(engine, processor, name, limits or Limits(), local=local, api_key=api_key, cors=cors)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(engine.close)

    # One route for all: what is unknown is answered by `Server` as well, in OpenAI's words.
    routes = [Route("/{path:path}", server.answer, methods=["GET", "POST", "PUT", "DELETE", "PATCH", "HEAD"])]
    app = Starlette(routes=routes, lifespan=lifespan)
    if cors:
        app.add_middleware(CORSMiddleware, allow_origins=["*"], allow_methods=["*"], allow_headers=["*"])
    app.state.server = server
    return app
