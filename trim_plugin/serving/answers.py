"""Answers in OpenAI's words, by the types of their own package."""

from __future__ import annotations

from typing import Any

from openai.types.chat import ChatCompletion, ChatCompletionChunk, ChatCompletionMessage
from openai.types.chat.chat_completion import Choice
from openai.types.chat.chat_completion_chunk import Choice as ChunkChoice
from openai.types.chat.chat_completion_chunk import ChoiceDelta
from openai.types.completion_usage import CompletionUsage

from trim_plugin.engine.request import Finished

#: A generation that was cancelled has nobody who reads why.
REASONS: dict[str, Any] = {"stop": "stop", "length": "length", "cancelled": "stop"}


def usage(finished: Finished) -> CompletionUsage:
    """Text tokens of prompt and answer."""
    written = len(finished.tokens)
    return CompletionUsage(
        prompt_tokens=finished.prompt_tokens, completion_tokens=written, total_tokens=finished.prompt_tokens + written
    )


def whole(id: str, created: int, model: str, finished: Finished) -> str:
    """A whole answer, as JSON.

    Example:
        >>> import json
        >>> answer = json.loads(whole("a", 0, "small", Finished("red", "stop", [5, 1], 9, 4, 16)))
        >>> answer["choices"][0]["message"]["content"], answer["usage"]["total_tokens"]
        ('red', 11)
    """
    message = ChatCompletionMessage(role="assistant", content=finished.text)
    choice = Choice(index=0, finish_reason=REASONS[finished.finish_reason], message=message, logprobs=None)
    return ChatCompletion(
        id=id, created=created, model=model, object="chat.completion", choices=[choice], usage=usage(finished)
    ).model_dump_json()


def chunk(id: str, created: int, model: str, text: str, first: bool = False) -> str:
    """A piece of an answer, as a server-sent event."""
    delta = ChoiceDelta(content=text, role="assistant") if first else ChoiceDelta(content=text)
    return _event(id, created, model, [ChunkChoice(index=0, delta=delta, finish_reason=None)])


def last_chunk(id: str, created: int, model: str, finished: Finished) -> str:
    """The event that says why an answer ends."""
    reason = REASONS[finished.finish_reason]
    return _event(id, created, model, [ChunkChoice(index=0, delta=ChoiceDelta(), finish_reason=reason)])


def usage_chunk(id: str, created: int, model: str, finished: Finished) -> str:
    """The event that follows if a request asks for its usage."""
    return _event(id, created, model, [], usage(finished))


def _event(id: str, created: int, model: str, choices: list[ChunkChoice], used: CompletionUsage | None = None) -> str:
    made = ChatCompletionChunk(
        id=id, created=created, model=model, object="chat.completion.chunk", choices=choices, usage=used
    )
    return f"data: {made.model_dump_json(exclude_none=True)}\n\n"
