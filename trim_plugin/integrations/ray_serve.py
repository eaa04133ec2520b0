"""Many users on many GPUs: the server of `trim-plugin serve` on every replica of a Ray Serve deployment."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ray import serve
from starlette.requests import Request
from starlette.responses import Response

from trim_plugin.config import TrimConfig
from trim_plugin.embedded import SMALL_MODEL
from trim_plugin.engine.engine import MAX_RUNNING, Engine
from trim_plugin.integrations.ray import Recipe
from trim_plugin.serving.app import Server
from trim_plugin.serving.limits import Limits

#: Arguments of `chat_app` that are bounds on a request.
LIMITS = ("pictures", "pixels", "tokens", "body_bytes")
ARGUMENTS = (
    *("model", "weights", "adapter", "device", "top_k_ratio", "config", "max_running", "memory"),
    *("replicas", "num_cpus", "num_gpus"),
    *LIMITS,
)


@serve.deployment
class Chat:
    """OpenAI's chat completions with pictures, answered by an engine of this replica's own; arguments as for `chat_app`."""

    def __init__(
        self, recipe: Recipe, name: str, limits: Limits, max_running: int = MAX_RUNNING, memory: int | None = None
    ) -> None:
        model, processor = recipe.load()
        self._engine = Engine(model, processor, recipe.config, max_running=max_running, memory=memory)
        bounds = limits.for_model(model)
        # Ray's proxy is what the network reaches; who may ask is decided there.
        self._server = Server(self._engine, processor, name, bounds, local=False, api_key=None, cors=True)

    async def __call__(self, request: Request) -> Response:
        """Answer a request over HTTP."""
        return await self._server.answer(request)

    def check_health(self) -> None:
        """Called by Ray, which replaces a replica that raises."""
        if not self._engine.healthy:
            raise RuntimeError("The engine's thread has died.")


def chat_app(arguments: Mapping[str, str]) -> serve.Application:
    """A Serve application: `serve run trim_plugin.integrations.ray_serve:chat_app model=small replicas=2`.

    Args:
        arguments: texts. `model` (required; "small" is the model that ships with the package), `weights`, `adapter`, `device`;
            `top_k_ratio`, or other fields of `TrimConfig` as JSON in `config`; `max_running` (requests at once), `memory` (bytes
            for their keys and values), `replicas`, `num_cpus`, `num_gpus` (of a replica); and `pictures`, `pixels`, `tokens`,
            `body_bytes`, the bounds on a request of `serving.limits.Limits`.

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
    running = int(given.pop("max_running", MAX_RUNNING))
    memory = int(given.pop("memory", 0)) or None
    replicas = int(given.pop("replicas", 1))
    resources = {key: float(given.pop(key)) for key in ("num_cpus", "num_gpus") if key in given}
    bounds: dict[str, Any] = {key: int(given.pop(key)) for key in LIMITS if key in given}
    recipe = Recipe(
        str(SMALL_MODEL) if name == "small" else name,
        weights=given.pop("weights", "fp32" if name == "small" else "bf16"),
        adapter=given.pop("adapter", None),
        device=given.pop("device", "auto"),
        config=TrimConfig.of(config),
    )
    if given:
        raise ValueError(f"Unknown argument {sorted(given)[0]!r}. Allowed: {', '.join(ARGUMENTS)}.")
    deployment = Chat.options(  # type: ignore[attr-defined]
        num_replicas=replicas,
        # Beside those that run some wait in the replica, so that it never idles; who comes later waits in Ray, or gets a 503.
        max_ongoing_requests=2 * running,
        max_queued_requests=8 * running,
        ray_actor_options=resources,
    )
    return deployment.bind(recipe, name, Limits(**bounds), running, memory)
