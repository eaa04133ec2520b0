"""An answer on its way to a client: whole, or in parts as it is written. A client that leaves ends it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.responses import Response

from trim_plugin.engine.engine import EngineClosed
from trim_plugin.engine.request import Request
from trim_plugin.serving.answers import chunk, last_chunk, usage_chunk, whole
from trim_plugin.serving.limits import RequestError
from trim_plugin.serving.metrics import Metrics


class Answer:
    """One answer. Made and read in the loop's thread.

    Args:
        name: what the model is called.
        metrics: counts it.
        started: when its request came, by `time.monotonic`.
        leave: called once, when nothing of it is in the engine any more.
    """

    def __init__(self, name: str, metrics: Metrics, started: float, leave: Callable[[Answer], None]) -> None:
        self._name, self._metrics, self._started = name, metrics, started
        self._leave: Callable[[Answer], None] | None = leave
        self._loop = asyncio.get_running_loop()
        self._pieces: asyncio.Queue[str | None] = asyncio.Queue()
        self._request: Request | None = None
        self.id = f"chatcmpl-{uuid.uuid4().hex}"
        self.created = int(time.time())
        #: Whether it is to come in parts, and to end with its usage.
        self.stream = self.include_usage = False
        #: Pixels of its pictures, which are held until it is done.
        self.pixels = 0
        #: Whether nobody waits for it any more.
        self.ended = False

    # -- from other threads --------------------------------------------------------------------------------------------

    def follow(self, request: Request) -> None:
        """The engine has the request. Called by the thread that has submitted it."""
        self._request = request
        if self.ended:
            request.cancel()

    def heard(self, piece: str | None) -> None:
        """A piece of text, None at the end. Called by the engine's thread."""
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._take, piece)

    # -- in the loop ---------------------------------------------------------------------------------------------------

    def _take(self, piece: str | None) -> None:
        self._pieces.put_nowait(piece)
        if piece is None:
            self._left()

    def _left(self) -> None:
        leave, self._leave = self._leave, None
        if leave is not None:
            leave(self)

    def end(self) -> None:
        """Nobody waits for it: the engine stops at its next step."""
        self.ended = True
        if self._request is not None:
            self._request.cancel()
        self._left()

    async def _texts(self) -> AsyncIterator[str]:
        first = True
        while (piece := await self._pieces.get()) is not None:
            if first:
                self._metrics.first_token(time.monotonic() - self._started)
                first = False
            yield piece

    async def _read_all(self) -> None:
        async for _ in self._texts():
            pass

    async def whole(self, leaving: asyncio.Future[None]) -> Response:
        """The whole answer at once.

        Args:
            leaving: done once the client has left.
        """
        await first_of(leaving, self._read_all())
        leaving.cancel()
        finished = self._result()
        return Response(whole(self.id, self.created, self._name, finished), media_type="application/json")

    def _result(self) -> Any:
        """What came of it, which counts as an answer.

        Raises:
            RequestError: it has failed.
        """
        if self._request is None:
            raise RequestError(500, "the generation ended before it began")
        try:
            finished = self._request.result(0)
        except EngineClosed as error:
            raise RequestError(503, str(error)) from None
        except BaseException as error:  # noqa: BLE001 - this request's own failure
            said = str(error).splitlines()
            raise RequestError(500, f"the generation failed: {said[0] if said else error!r}") from None
        self._metrics.finished(finished, time.monotonic() - self._started)
        return finished

    async def events(self) -> AsyncIterator[str]:
        """Server-sent events, to the end."""
        about = (self.id, self.created, self._name)
        yield chunk(*about, "", first=True)
        async for piece in self._texts():
            yield chunk(*about, piece)
        try:
            finished = self._result()
        except RequestError as error:
            yield f"data: {json.dumps(error.as_dict())}\n\n"
            yield DONE
            return
        yield last_chunk(*about, finished)
        if self.include_usage:
            yield usage_chunk(*about, finished)
        yield DONE


DONE = "data: [DONE]\n\n"


class Events(Response):
    """A response in parts.

    Starlette's own begins to look after its generator only once the first part is asked for, so that a client that has left
    before that would never be noticed.

    Args:
        answer: what is sent.
        leaving: done once the client has left.
        seconds: how long a client may take to receive a part.
    """

    media_type = "text/event-stream"

    def __init__(self, answer: Answer, leaving: asyncio.Future[None], seconds: float) -> None:
        super().__init__(headers={"cache-control": "no-cache"})
        del self.headers["content-length"]
        self._answer, self._leaving, self._seconds = answer, leaving, seconds

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Send all, unless the client leaves."""
        try:
            with contextlib.suppress(ClientDisconnect):
                await first_of(self._leaving, self._send(send))
        finally:
            self._leaving.cancel()
            self._answer.end()

    async def _send(self, send: Any) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for event in self._answer.events():
            try:
                async with asyncio.timeout(self._seconds):
                    await send({"type": "http.response.body", "body": event.encode(), "more_body": True})
            except TimeoutError:
                raise ClientDisconnect from None
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def left(receive: Any) -> None:
    """Wait until a client has left whose request has come whole."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def first_of(leaving: asyncio.Future[None], work: Coroutine[Any, Any, None]) -> None:
    """Do something, unless the client leaves before it is done.

    Raises:
        ClientDisconnect: it has left.
    """
    doing = asyncio.ensure_future(work)
    try:
        await asyncio.wait({leaving, doing}, return_when=asyncio.FIRST_COMPLETED)
        if not doing.done():
            raise ClientDisconnect
        doing.result()
    finally:
        doing.cancel()
