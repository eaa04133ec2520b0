"""What a server lets a request ask for."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any


class RequestError(Exception):
    """What is wrong with a request: an HTTP status of 4xx and a sentence for whoever sent it."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message

    def as_dict(self) -> dict[str, dict[str, str]]:
        """As OpenAI's clients expect it."""
        return {"error": {"message": self.message, "type": "invalid_request_error"}}


@dataclasses.dataclass(frozen=True)
class Limits:
    """Bounds on a request. By default pictures come inside it, and nothing else is opened for it.

    Args:
        pictures: most pictures of a request, those of earlier turns included.
        pixels: most pixels of a picture; what its file says is checked before it is decoded.
        tokens: most text tokens of a request, prompt and answer together.
        body_bytes: most bytes of a request.
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
    waiting: int = 16
    folder: Path | None = None
    hosts: frozenset[str] = frozenset()

    def for_model(self, model: Any) -> Limits:
        """The same, with no more tokens than the model reads."""
        most = int(model.config.get_text_config().max_position_embeddings)
        return dataclasses.replace(self, tokens=min(self.tokens, most))
