"""A generation, a thread or a request that fails is told to whom it concerns, and harms nobody else."""

from __future__ import annotations

import contextlib
import json

import pytest
import torch

from trim_plugin.embedded import examples
from trim_plugin.serving.limits import Limits

from .conftest import chat, data_uri, running
from .speaking import HELLO, ask, body, connection, head, one_answer

openai = pytest.importorskip("openai")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("where", ["read", "step", "write", "tower"])
@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory."), SystemExit(3), MemoryError(), RuntimeError("broken")]
)
def test_a_generation_that_fails_is_its_request_s_error(client, monkeypatch, error, where, stream):
    model, alone = client.app.engine._model, ask(client).choices[0].message.content
    module = model.model.vision_model if where == "tower" else model.get_input_embeddings()
    handle = module.register_forward_pre_hook(
        lambda _, args: failing(error) if where == "tower" or (args[0].shape[1] == 1) is (where == "step") else None
    )
    if where == "write":
        handle.remove()
        monkeypatch.setattr("trim_plugin.engine.running.Running.write", lambda *_: failing(error))
    picture = data_uri(examples()[5].picture.read_bytes()) if where == "tower" else None
    messages = None if picture is None else chat(picture, "?")
    try:
        with pytest.raises(openai.APIError) as told:
            for _ in ask(client, messages, stream=stream):
                pass
    finally:
        handle.remove()
        monkeypatch.undo()
    assert "the generation failed" in str(told.value)
    assert stream or told.value.status_code == 500
    assert ask(client).choices[0].message.content == alone
    assert client.models.with_raw_response.list().http_response.status_code == 200


def failing(error):
    raise error


def test_health_and_requests_once_the_thread_is_dead(monkeypatch):
    from huggingface_hub.utils import httpx

    with running() as client:
        address = f"http://127.0.0.1:{client.port}/health"
        assert (httpx.get(address).status_code, httpx.get(address).json()) == (200, {"status": "ok"})
        monkeypatch.setattr(client.engine._scheduler, "_admit", lambda: failing(RuntimeError("gone")))
        with pytest.raises(openai.InternalServerError, match="gone"):
            ask(client)
        assert httpx.get(address).status_code == 503
        with pytest.raises(openai.InternalServerError, match="has died") as told:
            ask(client)
        assert told.value.status_code == 503


def test_the_connection_is_usable_after_an_error_or_said_to_be_closed():
    wrong = [
        (b"{", 400),
        (json.dumps({"messages": []}).encode(), 400),
        (b"x" * 3000, 413),
        (b"x" * 50_000, 413),
        (json.dumps({"messages": HELLO, "model": "other"}).encode(), 404),
    ]
    with running(Limits(body_bytes=2000)) as client:
        for data, status in wrong:
            for more in ([], ["Origin: http://example.com"], ["Content-Type: text/plain"]):
                with connection(client) as own:
                    start = head(client, len(data), *more)
                    if more and more[0].startswith("Content-Type"):
                        start = start.replace(b"Content-Type: application/json\r\n", b"")
                    own.sendall(start + data)
                    answer = one_answer(own)
                    assert int(answer.split()[1]) == {"": status, "O": 403, "C": 415}[more[0][0] if more else ""]
                    if b"connection: close" in answer:
                        with contextlib.suppress(ConnectionError):
                            assert own.recv(65536) == b""
                        continue
                    asked = body(max_tokens=2)
                    own.sendall(head(client, len(asked)) + asked)
                    assert one_answer(own).startswith(b"HTTP/1.1 200 ")
