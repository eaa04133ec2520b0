"""The small model behind the server, on this machine's own address."""

from __future__ import annotations

import base64
import contextlib
import threading
import time

import pytest

from trim_plugin.config import TrimConfig
from trim_plugin.embedded import examples, load_small_model
from trim_plugin.serving.limits import Limits


@pytest.fixture(scope="session")
def small():
    return load_small_model()


def data_uri(data, kind="png"):
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def chat(url, question):
    picture = {"type": "image_url", "image_url": {"url": url}}
    return [{"role": "user", "content": [picture, {"type": "text", "text": question}]}]


@pytest.fixture
def question():
    """The first example as a request's messages."""
    example = examples()[0]
    return chat(data_uri(example.picture.read_bytes()), example.question)


@contextlib.contextmanager
def running(limits=None, config=None, endless=False, **settings):
    """A server of its own model, and an `openai` client of it, which knows the server as well.

    `client.pause` is how many seconds every step takes longer. Answers of an endless one end only where their request says.
    """
    uvicorn, openai = pytest.importorskip("uvicorn"), pytest.importorskip("openai")
    pytest.importorskip("prometheus_client")
    from trim_plugin.engine.engine import Engine
    from trim_plugin.serving.app import build_app
    from trim_plugin.serving.listening import Listener

    model, processor = load_small_model()
    if endless:
        model.generation_config.eos_token_id = None
    of_engine = {name: settings.pop(name) for name in ("memory", "max_running") if name in settings}
    engine = Engine(model, processor, config or TrimConfig(top_k_ratio=0.1), **of_engine)
    bounds = (limits or Limits()).for_model(model)
    app = build_app(engine, processor, "small", bounds, **settings)
    server = Listener(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 60
    while not server.started and time.monotonic() < deadline:
        time.sleep(0.05)
    port = server.servers[0].sockets[0].getsockname()[1]
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=120)
    client.port, client.listener, client.thread = port, server, thread
    client.engine, client.app, client.pause = engine, app.state.server, 0.0
    model.get_input_embeddings().register_forward_pre_hook(lambda *_: time.sleep(client.pause))
    try:
        yield client
    finally:
        client.pause = 0.0
        server.should_exit = True
        thread.join(timeout=30)


@pytest.fixture(scope="module")
def client():
    with running() as found:
        yield found
