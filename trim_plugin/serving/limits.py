"""What a server lets a request ask for."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

#: A sentence about a request shows this much of it.
MOST_CHARACTERS = 500


class RequestError(Exception):
    """What is wrong with a request: an HTTP status and a sentence for whoever sent it."""

    def __init__(self, status: int, message: str, close: bool = False) -> None:
        if len(message) > MOST_CHARACTERS:
            message = f"{message[:MOST_CHARACTERS]} …"
        message = message.encode("utf-8", errors="replace").decode()  # half a character cannot be sent
        super().__init__(message)
        self.status = status
        #: Whether the connection cannot be used any further: a part of the request has not been read.
        self.close = close
        self.message = message

    def as_dict(self) -> dict[str, dict[str, str]]:
        """As OpenAI's clients expect it."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind}}


@dataclasses.dataclass(frozen=True)
class Limits:
    """Bounds on a request. By default pictures come inside it, and nothing else is opened for it.

    Args:
        pictures: most pictures of a request, those of earlier turns included.
        pixels: most pixels of a picture; what its file says is checked before it is decoded.
        tokens: most text tokens of a request, prompt and answer together.
        body_bytes: most bytes of a request.
        body_seconds: how long a request may take to come, and a client to receive a part of an answer.
        waiting: most requests that are answered or wait at a time.
        folder: files under it may be named as pictures; None: no files.
        hosts: hosts that pictures may be fetched from, by http or https.

    Example:
        >>> Limits().folder is None, Limits().hosts
        (True, frozenset())
    """

    pictures: int = 8
    pixels: int = 40_000_000
    tokens: int = 8192
    body_bytes: int = 64 * 2**20
    body_seconds: float = 20.0
    waiting: int = 256
    folder: Path | None = None
    hosts: frozenset[str] = frozenset()

    def for_model(self, model: Any) -> Limits:
        """The same, with no more tokens than the model reads."""
        most = int(model.config.get_text_config().max_position_embeddings)
        return dataclasses.replace(self, tokens=min(self.tokens, most))
