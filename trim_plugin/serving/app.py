"""An OpenAI-compatible server of one model: a small ASGI application around an engine."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hmac
import logging
import threading
import time
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from starlette.applications import Starlette
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from trim_plugin.engine.engine import Engine, EngineClosed
from trim_plugin.serving.answering import Answer, Events, first_of, left
from trim_plugin.serving.limits import Limits, RequestError
from trim_plugin.serving.metrics import Metrics
from trim_plugin.serving.requests import check_model, fetched_pictures, parsed, read_request

LOG = logging.getLogger(__name__)
LOCAL_NAMES = ("localhost", "127.0.0.1", "::1", "[::1]")
#: What a page of another site can send without asking first; nobody else sends it.
FOREIGN_TYPES = ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data")
ROUTES = "POST /v1/chat/completions, GET /v1/models, GET /health, GET /metrics"
#: Requests whose pictures are decoded and whose texts are tokenized at a time: decoded pictures are large.
READERS = 2
#: Requests for whose pictures other hosts are asked at a time.
FETCHERS = 16
#: Pixels that all requests together may have decoded, in requests with as many and as large pictures as one may have.
REQUESTS_OF_PIXELS = 2
#: A body so many times larger than the limit is not read to its end.
MUCH_LARGER = 4


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
        self._inside = self._pixels = 0
        self._lock = threading.Lock()
        self._stopping = asyncio.Event()
        self._fetchers = ThreadPoolExecutor(FETCHERS, thread_name_prefix="trim_plugin-fetcher")
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
            if route is None and http.method == "GET" and http.url.path == f"/v1/models/{self.name}":
                route = self.model
            if route is None:
                raise RequestError(404, f"this server answers {ROUTES}")
            return await route(http)
        except RequestError as error:
            headers = {"connection": "close"} if error.close else {}
            return JSONResponse(error.as_dict(), error.status, headers=headers)
        except ClientDisconnect:
            return Response(status_code=499)
        except Exception as error:
            LOG.exception("a request failed")
            found = RequestError(500, f"the server failed: {type(error).__name__}")
            return JSONResponse(found.as_dict(), found.status)

    # -- routes --------------------------------------------------------------------------------------------------------

    async def chat(self, http: HttpRequest) -> Response:
        """`POST /v1/chat/completions`."""
        started = time.monotonic()
        self._check_type(http)
        body = await self._body(http)
        if self._inside >= self.limits.waiting:
            raise RequestError(429, f"{self._inside} requests are waiting already, this server's most. Try again")
        self._inside += 1
        answer = Answer(self.name, self.metrics, started, self._leave)
        leaving = asyncio.ensure_future(left(http.receive))
        try:
            await first_of(leaving, self._read(body, answer))
            if not answer.stream:
                return await answer.whole(leaving)
        except BaseException:
            answer.end()
            leaving.cancel()
            raise
        return Events(answer, leaving, self.limits.body_seconds)

    async def _read(self, data: bytes, answer: Answer) -> None:
        """Check a request and hand it to the engine, in threads: others shall be heard meanwhile."""
        loop = asyncio.get_running_loop()
        pictures = None
        if self.limits.hosts:  # who waits for another host keeps nobody from being read
            pictures = await loop.run_in_executor(self._fetchers, fetched_pictures, data, self.limits)
        await loop.run_in_executor(self._readers, self._submit, data, answer, pictures)

    async def models(self, http: HttpRequest) -> Response:
        """`GET /v1/models`."""
        return JSONResponse({"object": "list", "data": [self._own()]})

    async def model(self, http: HttpRequest) -> Response:
        """`GET /v1/models/...`, of the one that there is."""
        return JSONResponse(self._own())

    def _own(self) -> dict[str, Any]:
        return {"id": self.name, "object": "model", "created": self.created, "owned_by": "trim-plugin"}

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
            scheme, _, given = http.headers.get("authorization", "").partition(" ")
            # Headers are bytes, which starlette shows as Latin-1.
            right = hmac.compare_digest(given.strip().encode("latin-1"), self.api_key.encode())
            if scheme.lower() != "bearer" or not right:
                raise RequestError(401, "this server asks for an API key: Authorization: Bearer ...")

    def _check_type(self, http: HttpRequest) -> None:
        kind = http.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind in FOREIGN_TYPES and not self.cors:
            raise RequestError(415, "the request's content-type must be application/json")

    async def _body(self, http: HttpRequest) -> bytes:
        said = f"the request did not come within {self.limits.body_seconds:g} seconds"
        reading, stopping = asyncio.ensure_future(self._read_body(http)), asyncio.ensure_future(self._stopping.wait())
        try:
            await asyncio.wait(
                {reading, stopping}, timeout=self.limits.body_seconds, return_when=asyncio.FIRST_COMPLETED
            )
            if reading.done():
                return reading.result()
            if stopping.done():
                raise RequestError(503, "this server is about to end", close=True)
            raise RequestError(408, said, close=True)
        finally:
            reading.cancel()
            stopping.cancel()

    async def _read_body(self, http: HttpRequest) -> bytes:
        """The body. One that is too large is read to its end if there is one soon, so that its sender sees the answer."""
        most, data, size = self.limits.body_bytes, bytearray(), 0
        too_large = f"the request has more than {most} bytes, this server's most"
        said = http.headers.get("content-length", "")
        if said.isdecimal() and int(said[:20]) > MUCH_LARGER * most:
            raise RequestError(413, too_large, close=True)
        async for part in http.stream():
            size += len(part)
            if size > MUCH_LARGER * most:
                raise RequestError(413, too_large, close=True)
            if size <= most:
                data += part
            else:
                data.clear()
        if size > most:
            raise RequestError(413, too_large)
        return bytes(data)

    def _submit(self, data: bytes, answer: Answer, pictures: Mapping[str, bytes] | None) -> None:
        """Check the request and hand it to the engine, unless its client has left meanwhile."""
        if answer.ended:
            return
        try:
            take = functools.partial(self._take_pixels, answer)
            asked = read_request(parsed(data), self.processor, self.limits, pictures, take)
            check_model(asked, self.name)
            answer.stream, answer.include_usage = asked.stream, asked.include_usage
            request = self.engine.submit(
                asked.messages,
                images=asked.pictures,
                cache_config=asked.cache_config,
                listener=answer.heard,
                **asked.sampling,
            )
        except RequestError:
            raise
        except (ValueError, TypeError) as error:
            raise RequestError(400, str(error)) from None
        except EngineClosed as error:
            raise RequestError(503, str(error)) from None
        except BaseException as error:
            raise RequestError(500, f"the request cannot be read: {type(error).__name__}") from error
        answer.follow(request)

    def _take_pixels(self, answer: Answer, pixels: int) -> None:
        """Before a picture is decoded: its file may be small. Called by a reader's thread."""
        most = REQUESTS_OF_PIXELS * self.limits.pictures * self.limits.pixels
        with self._lock:
            if answer.ended:
                raise RequestError(499, "the client has left")
            if self._pixels + pixels > most:
                raise RequestError(429, f"pictures of those who wait have {self._pixels} pixels already. Try again")
            self._pixels += pixels
            answer.pixels += pixels

    def _leave(self, answer: Answer) -> None:
        self._inside -= 1
        with self._lock:
            self._pixels -= answer.pixels
            answer.pixels = 0

    @property
    def inside(self) -> int:
        """Requests that are being answered or wait."""
        return self._inside

    def stop(self) -> None:
        """Wait no longer for requests that have not come whole: the server is about to end. Called in the loop's thread."""
        self._stopping.set()


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
