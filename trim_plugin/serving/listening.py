"""The application on a port: it says where once it listens, and ends when it is told to, whatever its clients do."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import uvicorn

#: How long a client may take to receive the rest of what it asked for when everything has been answered and the server ends.
REST_SECONDS = 5.0


class Listener(uvicorn.Server):
    """uvicorn, which waits for answers when it ends, and not for clients that send or receive nothing.

    Args:
        config: uvicorn's, with an application of `build_app`.
        announce: called once it listens.

    Example:
        >>> from trim_plugin import Engine
        >>> from trim_plugin.embedded import load_small_model
        >>> from trim_plugin.serving.app import build_app
        >>> model, processor = load_small_model()
        >>> with Engine(model, processor) as engine:
        ...     Listener(uvicorn.Config(build_app(engine, processor, "small"), port=0)).started
        False
    """

    def __init__(self, config: uvicorn.Config, announce: Callable[[], None] | None = None) -> None:
        super().__init__(config)
        self._announce, self._app = announce, config.app

    async def startup(self, sockets: Any = None) -> None:
        """Listen."""
        await super().startup(sockets)
        if self.started and self._announce is not None:
            self._announce()

    async def shutdown(self, sockets: Any = None) -> None:
        """End: who has asked gets an answer, who is still sending is told."""
        server: Any = self._app.state.server  # type: ignore[union-attr]
        server.stop()
        watching = asyncio.ensure_future(self._drop_stalled(server))
        try:
            await super().shutdown(sockets)
        finally:
            watching.cancel()

    async def _drop_stalled(self, server: Any) -> None:
        """Let go of connections that stay although all has been answered."""
        rest = REST_SECONDS
        while rest > 0:
            await asyncio.sleep(0.1)
            rest = REST_SECONDS if server.inside else rest - 0.1
        for connection in list(self.server_state.connections):
            transport = getattr(connection, "transport", None)
            if transport is not None:
                transport.abort()
