"""The server: `generate`'s answers, many at once, and errors that say what is wrong."""

from __future__ import annotations

import io
import json
import threading
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
from PIL import Image

from trim_plugin.config import TrimConfig
from trim_plugin.embedded import examples
from trim_plugin.forward.hooks import TrimmedCache
from trim_plugin.pictures.prompting import build_inputs, open_picture
from trim_plugin.selection.k_center import KCenter
from trim_plugin.serving.limits import Limits

from .conftest import chat, data_uri, running
from .wrong import MESSAGES, PICTURES, SETTINGS

openai = pytest.importorskip("openai")


def generated(small, picture, question, **config):
    model, processor = small
    inputs = build_inputs(processor, question, [picture])
    output = model.generate(**inputs, cache_implementation="trimmed", cache_config=config, max_new_tokens=64)
    return processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def ask(client, messages, **settings):
    return client.chat.completions.create(**{"model": "small", "messages": messages, "max_tokens": 64, **settings})


def text(answer):
    return answer.choices[0].message.content.strip()


@pytest.mark.parametrize("example", examples()[:4], ids=lambda example: example.picture.stem)
def test_streamed_and_whole_answers_are_generates(client, small, example):
    messages = chat(data_uri(example.picture.read_bytes()), example.question)
    expected = generated(small, open_picture(example.picture), example.question, top_k_ratio=0.1)
    answer = ask(client, messages)
    assert text(answer) == expected
    assert answer.usage.completion_tokens > 0
    parts = [chunk.choices[0].delta.content or "" for chunk in ask(client, messages, stream=True)]
    assert "".join(parts).strip() == expected


def test_the_trimmed_cache_is_the_default_and_a_request_may_set_it(client, question, monkeypatch):
    ratios = []
    original = TrimmedCache.__init__

    def noting(self, model, config=None, **kwargs):
        ratios.append(TrimConfig.of(config).top_k_ratio)
        original(self, model, config, **kwargs)

    monkeypatch.setattr(TrimmedCache, "__init__", noting)
    ask(client, question)
    ask(client, question, extra_body={"cache_config": {"top_k_ratio": 0.5}})
    own = json.dumps({"cache_implementation": "trimmed", "cache_config": {"top_k_ratio": 1.0}})
    ask(client, question, extra_body={"generation_config": own})
    ask(client, question, extra_body={"generation_config": json.dumps({"do_sample": False})})
    assert [ratio for ratio in ratios if ratio] == [0.1, 0.1, 0.5, 0.1, 1.0, 0.1, 0.1, 0.1][: len(ratios)] or set(
        ratios
    ) == {0.1, 0.5, 1.0}


def test_a_request_may_keep_another_share_by_the_default_rule(client, question, monkeypatch):
    rules = []
    original = TrimmedCache.__init__

    def noting(self, model, config=None, **kwargs):
        rules.extend(TrimConfig.of(config).processors or ())
        original(self, model, config, **kwargs)

    monkeypatch.setattr(TrimmedCache, "__init__", noting)
    ask(client, question, extra_body={"cache_config": {"kept_share": 0.2}})
    assert {type(rule) for rule in rules} == {KCenter}
    assert {rule.kept_share for rule in rules} == {0.2}


def test_the_one_model_is_listed(client):
    (listed,) = client.models.list().data
    assert (listed.id, listed.owned_by) == ("small", "trim-plugin")


def test_several_pictures_and_turns(client, small):
    first, second = examples()[:2]
    turns = chat(data_uri(first.picture.read_bytes()), first.question)
    turns += [{"role": "assistant", "content": first.answer}]
    turns += chat(data_uri(second.picture.read_bytes()), second.question)
    model, processor = small
    placed = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": first.question}]},
        {"role": "assistant", "content": [{"type": "text", "text": first.answer}]},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": second.question}]},
    ]
    prompt = processor.apply_chat_template(placed, add_generation_prompt=True)
    pictures = [open_picture(first.picture), open_picture(second.picture)]
    inputs = processor(images=pictures, text=prompt, add_special_tokens=False, return_tensors="pt")
    output = model.generate(
        **inputs, cache_implementation="trimmed", cache_config={"top_k_ratio": 0.1}, max_new_tokens=64
    )
    expected = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    assert text(ask(client, turns)) == expected


def test_a_picture_is_read_as_generate_reads_it(client, small):
    """Transparency and 16 bits, which transformers' server would read in another way, and a photo turned by its EXIF."""
    example = examples()[0]
    picture = open_picture(example.picture)
    see_through = picture.convert("RGBA")
    see_through.putalpha(picture.convert("L"))
    turned = Image.Exif()
    turned[0x0112] = 6
    for changed, settings in (
        (see_through, {}),
        (picture.convert("L").convert("I;16"), {}),
        (picture, {"exif": turned}),
    ):
        file = io.BytesIO()
        changed.save(file, "PNG", **settings)
        expected = generated(small, Image.open(file), example.question, top_k_ratio=0.1)
        assert text(ask(client, chat(data_uri(file.getvalue()), example.question))) == expected


def refused(client, messages, status, said, **settings):
    with pytest.raises(openai.APIStatusError) as error:
        ask(client, messages, **settings)
    assert error.value.status_code == status
    assert said in error.value.body["message"]


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_that_are_refused(client, question, name):
    url, status, said = PICTURES[name]
    refused(client, chat(url() if callable(url) else url, "?"), status, said)
    assert text(ask(client, question))


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_that_are_refused(client, question, name):
    settings, status, said = SETTINGS[name]
    refused(client, question, status, said, **settings)
    assert text(ask(client, question))


@pytest.mark.parametrize("name", MESSAGES)
def test_messages_that_are_refused(client, question, name):
    messages, status, said = MESSAGES[name]
    refused(client, messages, status, said)
    assert text(ask(client, question))


def test_request_with_too_many_pictures(client, question):
    picture, words = question[0]["content"]
    refused(client, [{"role": "user", "content": [picture] * 40 + [words]}], 400, "more than 8 pictures")
    assert text(ask(client, question))


def test_request_to_another_route(client):
    assert [model.id for model in client.models.list()] == ["small"]
    for path, body in (
        ("/completions", {"prompt": "?"}),
        ("/responses", {"input": "?"}),
        ("/../load_model", {"model": "a/b"}),
    ):
        with pytest.raises(openai.APIStatusError) as error:
            client.post(path, body=body, cast_to=object)
        assert error.value.status_code == 404
        assert error.value.body["message"].startswith("this server answers POST /v1/chat/completions, ")


def test_request_to_another_name(client, question):
    refused(client, question, 421, "localhost alone", extra_headers={"Host": "example.com:80"})


def test_request_not_json(client, question):
    from huggingface_hub.utils import httpx

    for data in (b"{", b"[" * 100_000, b"\xff"):
        answer = httpx.post(f"{client.base_url}chat/completions", content=data, timeout=60)
        assert (answer.status_code, answer.json()["error"]["message"]) == (400, "the request is not JSON")
    answer = httpx.post(f"{client.base_url}chat/completions", content=b"[]", timeout=60)
    assert (answer.status_code, answer.json()["error"]["message"]) == (400, "the request must be a JSON object")
    assert text(ask(client, question))


def test_request_picture_outside_the_folder(tmp_path, question):
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    for folder in (inside, outside):
        folder.mkdir()
        (folder / "a.png").write_bytes(examples()[0].picture.read_bytes())
    (inside / "link.png").symlink_to(outside / "a.png")
    words = question[0]["content"][1]["text"]
    with running(Limits(folder=inside)) as client:
        expected = text(ask(client, question))
        for name in ("a.png", str(inside / "a.png"), f"file://{inside}/a.png"):
            assert text(ask(client, chat(name, words))) == expected
        for name in (
            "../outside/a.png",
            str(outside / "a.png"),
            "link.png",
            "none.png",
            f"file://{outside}/a.png",
            ".",
        ):
            refused(client, chat(name, words), 400, "no such picture in this server's folder")
        refused(client, chat("http://127.0.0.1:1/a.png", words), 400, "only as")


def test_request_picture_not_fetched(question, tmp_path):
    import functools
    import http.server

    (tmp_path / "a.png").write_bytes(examples()[0].picture.read_bytes())
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as pictures:
        threading.Thread(target=pictures.serve_forever, daemon=True).start()
        port, words = pictures.server_address[1], question[0]["content"][1]["text"]
        with running(Limits(hosts=frozenset({"127.0.0.1"}))) as client:
            assert text(ask(client, chat(f"http://127.0.0.1:{port}/a.png", words))) == text(ask(client, question))
            refused(client, chat(f"http://127.0.0.1:{port}/none.png", words), 400, "status 404")
            refused(client, chat(f"http://localhost:{port}/a.png", words), 400, "only from 127.0.0.1")
            refused(client, chat("http://127.0.0.1:1/a.png", words), 400, "cannot be fetched")
            refused(client, chat("http://127.0.0.1:99999/a.png", words), 400, "cannot be fetched")
        pictures.shutdown()


def test_request_too_large():
    with running(Limits(body_bytes=2000)) as client:
        refused(client, chat(data_uri(b"x" * 4000), "?"), 413, "more than 2000 bytes")
        assert text(ask(client, [{"role": "user", "content": "How many digits?"}])) is not None


def test_request_when_too_many_wait(question):
    with running(Limits(waiting=1), max_running=1) as client:
        statuses = []

        def one():
            try:
                ask(client, question)
                statuses.append(200)
            except openai.APIStatusError as error:
                statuses.append(error.status_code)

        threads = [threading.Thread(target=one) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert set(statuses) == {200, 429}
        assert text(ask(client, question))


@pytest.mark.parametrize("count", [60, pytest.param(500, marks=pytest.mark.slow)])
def test_requests_leave_nothing_behind(client, question, count):
    """Whole, in parts, wrong, left by their clients, about forty pictures; some at once."""
    own = psutil.Process()

    def one(number):
        picture = examples()[number % len(examples())].picture
        new = io.BytesIO()
        shown = open_picture(picture)
        shown.putpixel((0, 0), (number % 40, 0, 0))  # what is held of pictures is bounded, and no leak
        shown.save(new, "PNG")
        messages = chat(data_uri(new.getvalue()), "Read all digits.")
        if number % 10 == 0:
            refused(client, [], 400, "not empty")
        elif number % 10 == 1:
            with ask(client, messages, stream=True, max_tokens=200, temperature=2.0) as stream:
                next(iter(stream))
        elif number % 2:
            assert list(ask(client, messages, stream=True))
        else:
            ask(client, messages)

    with ThreadPoolExecutor(8) as users:
        list(users.map(one, range(60)))
        before = own.memory_info().rss
        list(users.map(one, range(60, 60 + count)))
    assert own.memory_info().rss - before < 60 * 2**20
    assert text(ask(client, question))
    assert client.app.inside == 0
