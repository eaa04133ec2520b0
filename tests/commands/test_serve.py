"""`trim-plugin serve` as a user starts it."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from trim_plugin.cli import main
from trim_plugin.embedded import examples, load_small_model

from ..serving.conftest import chat, data_uri


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@contextlib.contextmanager
def served(*options, **environment):
    """The command on a port of its own, and a client; what it says is in `client.said` once it has ended."""
    openai = pytest.importorskip("openai")
    port = free_port()
    words = ["serve", "small", "--host", "127.0.0.1", "--port", str(port), "--device", "cpu", *options]
    server = subprocess.Popen(
        [sys.executable, "-m", "trim_plugin.cli", *words],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="right", max_retries=0, timeout=60)
        client.port, client.server = port, server
        deadline = time.monotonic() + 120
        while server.poll() is None and time.monotonic() < deadline:
            try:
                client.models.list()
                break
            except openai.APIConnectionError:
                time.sleep(0.2)
            except openai.AuthenticationError:
                break
        yield client
        if server.poll() is None:
            server.send_signal(signal.SIGINT)
        _, client.said = server.communicate(timeout=60)
    finally:
        if server.poll() is None:
            server.kill()
            server.communicate()


def test_answers_until_it_is_interrupted():
    example, openai = examples()[0], pytest.importorskip("openai")
    with served("--kept-share", "0.1", TRIM_PLUGIN_API_KEY="right") as client:
        messages = chat(data_uri(example.picture.read_bytes()), example.question)
        answer = client.chat.completions.create(model="small", messages=messages, max_tokens=24)
        assert answer.choices[0].message.content.strip() == example.answer
        assert answer.model == client.models.list().data[0].id
        with pytest.raises(openai.AuthenticationError):
            client.with_options(api_key="wrong").models.list()
    assert f"small answers at http://127.0.0.1:{client.port}/v1, 32 requests at once" in client.said
    assert "Traceback" not in client.said
    assert client.server.returncode in (0, 130, -signal.SIGINT)


def test_ends_on_sigterm_when_all_is_answered():
    """Those who are being answered and those who wait get all of it, in parts and whole; a client that sends nothing is told."""
    settings = {"model": "small", "max_tokens": 300, "temperature": 2.0}
    messages = [{"role": "user", "content": "Read all digits."}]
    with served("--max-running", "2", TRIM_PLUGIN_API_KEY="right") as client, ThreadPoolExecutor(16) as users:

        def one(seed):
            answer = client.chat.completions.create(messages=messages, stream=seed % 2 == 0, seed=seed, **settings)
            return answer if seed % 2 else list(answer)

        asked = [users.submit(one, seed) for seed in range(16)]
        idle = socket.create_connection(("127.0.0.1", client.port))
        idle.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer right\r\n")
        idle.sendall(b"Content-Length: 1000\r\n\r\n{")
        next(iter(client.chat.completions.create(messages=messages, stream=True, **settings)))
        start = time.monotonic()
        client.server.send_signal(signal.SIGTERM)
        for one in asked:
            answer = one.result(timeout=60)
            last = answer[-1] if isinstance(answer, list) else answer
            assert last.choices[0].finish_reason in ("stop", "length")
        client.server.wait(timeout=30)
        assert time.monotonic() - start < 25
        assert idle.recv(100).startswith(b"HTTP/1.1 503 ")
        idle.close()
    assert "Traceback" not in client.said
    assert client.server.returncode in (0, -signal.SIGTERM)


def test_nothing_is_announced_where_nothing_listens(capsys):
    pytest.importorskip("uvicorn")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(SystemExit) as ended:
            main(["serve", "small", "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"])
    assert ended.value.code
    assert "answers at" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--max-pictures", "0"], "--max-pictures must be at least 1"),
        (["--port", "65536"], "--port: 65536 is no port; they end at 65535"),
        (["--api-key", ""], "--api-key is empty"),
        (["--memory", "much"], "--memory"),
        (["--top-k-ratio", "0.1", "--kept-share", "0.2"], "several rules are given"),
        (["--top-k-ratio", "7"], "--top-k-ratio must be a number in (0, 1]"),
    ],
)
def test_what_the_user_can_mend(capsys, options, said):
    assert main(["serve", "small", *options]) == 2
    assert said in capsys.readouterr().err


def test_server_folder_missing(capsys):
    assert main(["serve", "small", "--allow-folder", "nowhere"]) == 2
    assert "--allow-folder: no such folder: nowhere" in capsys.readouterr().err


def test_server_without_a_chat_format(capsys, monkeypatch):
    def without_chats(arguments):
        model, processor = load_small_model()
        processor.chat_template = None
        return model, processor

    pytest.importorskip("uvicorn")
    monkeypatch.setattr("trim_plugin.commands.loading.load_model", without_chats)
    monkeypatch.setattr("uvicorn.Server.run", lambda *_, **__: pytest.fail("listens"))
    assert main(["serve", "small"]) == 2
    assert "This model has no chat format, so it cannot answer chats." in capsys.readouterr().err


def test_server_not_installed(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["serve", "small"]) == 2
    said = capsys.readouterr().err
    assert "serve needs uvicorn, which is not installed. Install it: pip install starlette uvicorn openai" in said
