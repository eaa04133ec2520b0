"""Many users at once: a Ray Serve deployment that gathers concurrent requests into one `generate`, read in pieces."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Mapping
from typing import Any

from ray import serve
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from trim_plugin.config import TrimConfig
from trim_plugin.embedded import SMALL_MODEL
from trim_plugin.integrations.ray import Recipe
from trim_plugin.serving.limits import Limits, RequestError
from trim_plugin.serving.requests import ChatRequest, check_model, read_request

#: Seconds that the first request of a batch waits for others.
WAIT = 0.05
#: Most requests of a batch, unless the operator says otherwise.
BATCH = 32
#: Arguments of `chat_app` that are bounds on a request.
LIMITS = ("pictures", "pixels", "tokens", "body_bytes")
ARGUMENTS = (
    *("model", "weights", "adapter", "device", "top_k_ratio", "config", "batch", "wait", "batch_size"),
    *("replicas", "num_cpus", "num_gpus"),
    *LIMITS,
)
#: Fields that a batch cannot share, and what they may be.
GREEDY: dict[str, tuple[Any, ...]] = {"temperature": (None, 0)}


@serve.deployment
class Chat:
    """OpenAI's chat completions with pictures, answered greedily, many together.

    Args:
        recipe: what the worker is made of.
        name: what requests call the model.
        limits: bounds on a request.
        batch: most requests of one batch.
        wait: seconds that the first request of a batch waits for others.
    """

    def __init__(self, recipe: Recipe, name: str, limits: Limits, batch: int = BATCH, wait: float = WAIT) -> None:
        self.worker = recipe.worker()
        self.name, self.limits = name, limits.for_model(self.worker.model)
        self._reading = asyncio.Lock()
        self._answer.set_max_batch_size(batch)
        self._answer.set_batch_wait_timeout_s(wait)

    @serve.batch(max_batch_size=BATCH, batch_wait_timeout_s=WAIT)
    async def _answer(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Results of the requests that came together."""
        return await asyncio.to_thread(self.worker, rows)

    async def __call__(self, request: Request) -> Response:
        """Answer a request over HTTP."""
        route = request.method, request.url.path
        if route == ("GET", "/health"):
            return JSONResponse({"status": "ok"})
        if route == ("GET", "/v1/models"):
            entry = {"id": self.name, "object": "model", "created": 0, "owned_by": "trim-plugin"}
            return JSONResponse({"object": "list", "data": [entry]})
        try:
            if route != ("POST", "/v1/chat/completions"):
                raise RequestError(404, "this server answers POST /v1/chat/completions, GET /v1/models, GET /health")
            return await self._chat(await self._body(request))
        except RequestError as error:
            return JSONResponse(error.as_dict(), status_code=error.status)

    async def _chat(self, data: bytes) -> Response:
        try:
            body = json.loads(data)
        except (ValueError, RecursionError):
            raise RequestError(400, "the request is not JSON") from None
        # One by one, since decoded pictures are large.
        async with self._reading:
            asked = await asyncio.to_thread(read_request, body, self.worker.processor, self.limits)
        check_model(asked, self.name)
        _check_greedy(asked)
        row = {"images": list(asked.files), "messages": asked.messages, "max_new_tokens": asked.max_new_tokens}
        result = await self._answer(row)
        if "error" in result:
            raise RequestError(400, result["error"])
        head = {"id": f"chatcmpl-{uuid.uuid4()}", "created": int(time.time()), "model": self.name}
        reason = "length" if result["tokens"] >= asked.max_new_tokens else "stop"
        if asked.stream:
            return StreamingResponse(_events(head, result["answer"], reason), media_type="text/event-stream")
        return JSONResponse(_completion(head, result, reason))

    async def _body(self, request: Request) -> bytes:
        data = bytearray()
        async for part in request.stream():
            data += part
            if len(data) > self.limits.body_bytes:
                raise RequestError(413, f"the request has more than {self.limits.body_bytes} bytes, this server's most")
        return bytes(data)


def chat_app(arguments: Mapping[str, str]) -> serve.Application:
    """A Serve application: `serve run trim_plugin.integrations.ray_serve:chat_app model=small replicas=2`.

    Args:
        arguments: texts. `model` (required; "small" is the model that ships with the package), `weights`, `adapter`, `device`;
            `top_k_ratio`, or other fields of `TrimConfig` as JSON in `config`; `batch` (most requests of a batch), `wait`
            (seconds), `batch_size` (most pictures of one `generate`), `replicas`, `num_cpus`, `num_gpus` (of a replica); and
            `pictures`, `pixels`, `tokens`, `body_bytes`, the bounds on a request of `serving.limits.Limits`.

    Raises:
        ValueError: an unknown argument, or one that is missing or not allowed.
    """
    given = dict(arguments)
    if not given.get("model"):
        raise ValueError("Say which model: serve run trim_plugin.integrations.ray_serve:chat_app model=small")
    name = given.pop("model")
    config = json.loads(given.pop("config", "{}"))
    if "top_k_ratio" in given:
        config["top_k_ratio"] = float(given.pop("top_k_ratio"))
    batch = int(given.pop("batch", BATCH))
    wait = float(given.pop("wait", WAIT))
    replicas = int(given.pop("replicas", 1))
    resources = {key: float(given.pop(key)) for key in ("num_cpus", "num_gpus") if key in given}
    bounds: dict[str, Any] = {key: int(given.pop(key)) for key in LIMITS if key in given}
    recipe = Recipe(
        str(SMALL_MODEL) if name == "small" else name,
        weights=given.pop("weights", "fp32" if name == "small" else "bf16"),
        adapter=given.pop("adapter", None),
        device=given.pop("device", "auto"),
        config=TrimConfig.of(config),
        batch_size=int(given.pop("batch_size", 0)) or None,
    )
    if given:
        raise ValueError(f"Unknown argument {sorted(given)[0]!r}. Allowed: {', '.join(ARGUMENTS)}.")
    deployment = Chat.options(  # type: ignore[attr-defined]
        num_replicas=replicas,
        # A batch is answered while the next one gathers; who comes later gets a 503 at once instead of waiting for minutes.
        max_ongoing_requests=2 * batch,
        max_queued_requests=4 * batch,
        ray_actor_options=resources,
    )
    return deployment.bind(recipe, name, Limits(**bounds), batch, wait)


def _check_greedy(asked: ChatRequest) -> None:
    """Raise `RequestError` if a request asks for what those beside it in a batch cannot share."""
    for field, allowed in GREEDY.items():
        if asked.fields.get(field) not in allowed:
            raise RequestError(400, f"{field!r} must be {allowed[-1]} or be left out: this server answers greedily")
    if asked.generation:
        raise RequestError(400, "'cache_config' and 'generation_config' are the operator's on this server")


def _completion(head: dict[str, Any], result: Mapping[str, Any], reason: str) -> dict[str, Any]:
    message = {"role": "assistant", "content": result["answer"]}
    return {
        **head,
        "object": "chat.completion",
        "choices": [{"index": 0, "message": message, "finish_reason": reason}],
        "usage": {
            "prompt_tokens": result["prompt_tokens"],
            "completion_tokens": result["tokens"],
            "total_tokens": result["prompt_tokens"] + result["tokens"],
        },
    }


async def _events(head: dict[str, Any], answer: str, reason: str) -> AsyncIterator[str]:
    """The whole answer as a stream, for clients that ask for one: a batch is written together."""
    for delta, end in (({"role": "assistant", "content": answer}, None), ({}, reason)):
        choice = {"index": 0, "delta": delta, "finish_reason": end}
        yield f"data: {json.dumps({**head, 'object': 'chat.completion.chunk', 'choices': [choice]})}\n\n"
    yield "data: [DONE]\n\n"


__all__ = ["Chat", "chat_app"]
