"""What earlier servers were found to do wrong: slow, leaving and careless clients harm nobody else."""

from __future__ import annotations

import contextlib
import io
import json
import socket
import threading
import time

import pytest
from PIL import Image

from trim_plugin.serving.limits import Limits

from .conftest import chat, data_uri, running
from .speaking import HELLO, ask, body, connection, head, received

openai = pytest.importorskip("openai")


def timed(work):
    start = time.monotonic()
    work()
    return time.monotonic() - start


def until(true, seconds=20):
    """Wait until something is so."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it never comes"
        time.sleep(0.01)


@contextlib.contextmanager
def dripping(client, count, first):
    """So many clients that send this, and then a byte of their request a tenth of a second."""
    done = threading.Event()
    own = [connection(client) for _ in range(count)]

    def drip():
        for one in own:
            one.sendall(first)
        while not done.wait(0.1):
            for one in own:
                with contextlib.suppress(OSError):
                    one.sendall(b" ")

    thread = threading.Thread(target=drip, daemon=True)
    thread.start()
    try:
        yield own
    finally:
        done.set()
        thread.join()
        for one in own:
            one.close()


@pytest.fixture(scope="module")
def endless():
    with running(Limits(waiting=16), endless=True, max_running=2) as found:
        yield found


@pytest.fixture(autouse=True)
def nothing_is_left(request):
    """Every test leaves a server that has nothing to do."""
    yield
    if "endless" in request.fixturenames:
        own = request.getfixturevalue("endless")
        own.pause = 0.0
        until(lambda: own.app.inside == own.engine.stats()["running"] == own.engine.stats()["waiting"] == 0)


# -- slow clients ------------------------------------------------------------------------------------------------------


def test_clients_that_send_a_byte_at_a_time_keep_nobody_waiting():
    with running(Limits(waiting=16, body_seconds=1.0)) as client:
        alone = ask(client).choices[0].message.content
        with dripping(client, 40, head(client, 1000)) as slow:
            for _ in range(5):
                assert ask(client).choices[0].message.content == alone
            answers = [received(one) for one in slow]
        for answer in answers:
            assert answer.startswith(b"HTTP/1.1 408 ")
            assert b"connection: close" in answer
            assert b"did not come within 1 seconds" in answer


@pytest.mark.parametrize("what", ["headers", "bodies"])
def test_clients_that_send_a_byte_at_a_time_do_not_keep_the_server(what):
    with running(Limits(body_seconds=60)) as client:
        first = b"POST /v1/chat/completions HTTP/1.1\r\nHost: " if what == "headers" else head(client, 1000)
        with dripping(client, 16, first) as slow:
            ask(client)
            time.sleep(0.3)
            client.listener.should_exit = True
            assert timed(lambda: client.thread.join(timeout=30)) < 3
            assert not client.thread.is_alive()
            if what == "bodies":
                assert all(received(one).startswith(b"HTTP/1.1 503 ") for one in slow)


def test_clients_that_do_not_read_keep_neither_others_nor_the_server(monkeypatch):
    monkeypatch.setattr("trim_plugin.serving.listening.REST_SECONDS", 0.5)
    with running(Limits(waiting=4), endless=True) as client:
        own = []
        for _ in range(8):
            one = socket.socket()
            one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
            one.connect(("127.0.0.1", client.port))
            asked = body(stream=True, max_tokens=450)
            one.sendall(head(client, len(asked)) + asked)
            own.append(one)
            until(lambda: client.engine.stats().get("finished_length", 0) == len(own))
        until(lambda: client.app.inside == 0)
        ask(client)
        client.listener.should_exit = True
        assert timed(lambda: client.thread.join(timeout=30)) < 5
        assert not client.thread.is_alive()
        for one in own:
            one.close()


# -- much text ---------------------------------------------------------------------------------------------------------

MUCH = 10 * 2**20
LARGE = {
    "one text": [{"role": "user", "content": "digit " * (MUCH // 6)}],
    "a word without end": [{"role": "user", "content": "d" * MUCH}],
    "blanks": [{"role": "user", "content": " " * MUCH}],
    "of other scripts": [{"role": "user", "content": "数字" * (MUCH // 12)}],
    "many messages": [{"role": "user", "content": "digit " * 20}] * (MUCH // 200),
    "many parts": [{"role": "user", "content": [{"type": "text", "text": "digit " * 20}] * (MUCH // 200)}],
    "a role": [{"role": "u" * MUCH, "content": "?"}],
}


@pytest.mark.parametrize("name", LARGE)
def test_much_text_is_refused_before_it_is_read(client, name):
    data = json.dumps({"messages": LARGE[name], "max_tokens": 4}).encode()
    own, waits = connection(client), []
    threading.Thread(target=own.sendall, args=(head(client, len(data), "Connection: close") + data,)).start()
    reply = []
    waiting = threading.Thread(target=lambda: reply.append(received(own)))
    waiting.start()
    while waiting.is_alive() and len(waits) < 100:
        waits.append(timed(lambda: ask(client, HELLO, max_tokens=2)))
    waiting.join()
    own.close()
    assert reply[0].startswith(b"HTTP/1.1 400 ")
    assert len(reply[0]) < 2000
    assert max(waits) < 2.5


@pytest.mark.parametrize("field", ["beams", "model", "stop", "user", "response_format"])
def test_much_text_elsewhere(client, field):
    field = field * MUCH if field == "beams" else field
    data = json.dumps({"messages": HELLO, "max_tokens": 2, field: "x" * MUCH}).encode()
    with connection(client) as own:
        own.sendall(head(client, len(data), "Connection: close") + data)
        answer = received(own)
    assert answer.startswith(b"HTTP/1.1 4" if field != "user" else b"HTTP/1.1 200")
    assert len(answer) < 2000


def test_pixels_of_those_who_wait_are_bounded():
    """Small files that are large pictures: those that would not fit are told, and later they do."""
    file = io.BytesIO()
    Image.new("L", (1000, 1000)).save(file, "PNG")
    messages = chat(data_uri(file.getvalue()), "?")
    with running(Limits(pictures=1, pixels=2 * 10**6), endless=True, max_running=1) as client:
        client.pause = 0.05
        statuses, told = [], []

        def one():
            while True:
                try:
                    ask(client, messages, max_tokens=8)
                    statuses.append(200)
                    return
                except openai.APIStatusError as error:
                    statuses.append(error.status_code)
                    told.append(error.body["message"])

        threads = [threading.Thread(target=one) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(set(statuses)) == [200, 429]
        assert statuses.count(200) == 8, "whoever was told asks again, until it fits"
        assert all("pixels already" in message for message in told)
        for _ in range(6):
            ask(client, messages, max_tokens=1)
        for _ in range(6):  # nor is what those had who left
            with ask(client, messages, stream=True, max_tokens=400):
                pass
        until(lambda: client.app.inside == 0)
        client.pause = 0.0
        ask(client, messages, max_tokens=1)


# -- clients that leave ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("when", ["at once", "while it runs"])
def test_clients_that_leave_are_answered_no_further(endless, stream, when):
    endless.pause = 0.02
    asked = body(stream=stream, max_tokens=450)
    own = []
    for _ in range(12):
        one = connection(endless)
        one.sendall(head(endless, len(asked)) + asked)
        if when == "at once":
            one.close()
        own.append(one)
    if when == "while it runs":
        until(lambda: endless.app.inside == 12 and endless.engine.stats()["running"] == 2)
        for one in own:
            one.close()
    # 12 answers would take 6 × 450 steps of 20 ms.
    assert timed(lambda: until(lambda: endless.app.inside == 0)) < 4
    until(lambda: endless.engine.stats()["running"] + endless.engine.stats()["waiting"] == 0, 4)
    assert ask(endless, HELLO, max_tokens=3).usage.completion_tokens == 3


def test_clients_that_leave_before_their_request_is_looked_at(endless, monkeypatch):
    """The places of those who wait to be read are free at once, and nothing of theirs is generated."""
    from trim_plugin.serving import app

    go, original, read = threading.Event(), app.read_request, []

    def held_up(*args):
        assert go.wait(30)
        read.append(1)
        return original(*args)

    monkeypatch.setattr(app, "read_request", held_up)
    before = endless.engine.stats()
    try:
        for stream in (True, False) * 8:
            asked = body(stream=stream)
            with connection(endless) as own:
                own.sendall(head(endless, len(asked)) + asked)
                until(lambda: endless.app.inside)
        until(lambda: endless.app.inside == 0)
    finally:
        go.set()
    assert ask(endless, HELLO, max_tokens=3).usage.completion_tokens == 3
    until(lambda: endless.engine.stats()["running"] == 0)
    assert len(read) <= 3  # the two whose reading had begun, and the last
    assert endless.engine.stats()["tokens"] - before.get("tokens", 0) < 50


def test_leaving_the_openai_client_s_way(endless):
    endless.pause = 0.02
    stream = ask(endless, HELLO, stream=True, max_tokens=450)
    next(iter(stream))
    stream.close()
    assert timed(lambda: until(lambda: endless.engine.stats()["running"] == 0)) < 3
