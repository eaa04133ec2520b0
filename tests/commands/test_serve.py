"""`trim-plugin serve` as a user starts it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from trim_plugin.cli import main
from trim_plugin.embedded import examples, load_small_model

from ..serving.conftest import chat, data_uri


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def test_answers_until_it_is_interrupted(tmp_path):
    openai = pytest.importorskip("openai")
    port, example = free_port(), examples()[0]
    words = ["serve", "small", "--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--kept-share", "0.1"]
    server = subprocess.Popen(
        [sys.executable, "-m", "trim_plugin.cli", *words],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=60)
        deadline = time.monotonic() + 120
        while server.poll() is None and time.monotonic() < deadline:
            try:
                client.models.list()
                break
            except openai.APIConnectionError:
                time.sleep(0.2)
        messages = chat(data_uri(example.picture.read_bytes()), example.question)
        answer = client.chat.completions.create(model="small", messages=messages, max_tokens=24)
        assert answer.choices[0].message.content.strip() == example.answer
    finally:
        server.send_signal(signal.SIGINT)
        _, said = server.communicate(timeout=60)
    assert f"small answers at http://127.0.0.1:{port}/v1, 32 requests at once" in said
    assert "Traceback" not in said
    assert server.returncode in (0, 130)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--max-pictures", "0"], "--max-pictures must be at least 1"),
        (["--port", "70000"], "--port: 70000 is no port; they end at 65535"),
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
    monkeypatch.setattr("trim_plugin.commands.serve.load_model", without_chats)
    monkeypatch.setattr("uvicorn.Server.run", lambda *_, **__: pytest.fail("listens"))
    assert main(["serve", "small"]) == 2
    assert "This model has no chat format, so it cannot answer chats." in capsys.readouterr().err


def test_server_not_installed(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["serve", "small"]) == 2
    said = capsys.readouterr().err
    assert "serve needs uvicorn, which is not installed. Install it: pip install starlette uvicorn openai" in said
