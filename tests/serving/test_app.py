"""transformers' server with the trimmed cache: `generate`'s answers, and errors that say what is wrong."""

from __future__ import annotations

import io
import json
import threading

import psutil
import pytest
from PIL import Image

from trim_plugin.config import TrimConfig
from trim_plugin.embedded import examples
from trim_plugin.forward.trimmed_cache import TrimmedCache
from trim_plugin.pictures.prompting import build_inputs, open_picture
from trim_plugin.serving.limits import Limits

from .conftest import chat, data_uri, running

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
    assert ratios == [0.1, 0.5, 1.0, 0.1]


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


def huge():
    file = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(file, "PNG")
    return data_uri(file.getvalue())


def wide():
    file = io.BytesIO()
    Image.new("1", (10_000, 8_000)).save(file, "PNG")
    return data_uri(file.getvalue())


def half():
    return data_uri(examples()[0].picture.read_bytes()[:-200])


PICTURES = {
    "path": ("/etc/hostname", 400, "only as data:image"),
    "file": ("file:///etc/hostname", 400, "only as data:image"),
    "relative": ("questions.json", 400, "only as data:image"),
    "http": ("http://127.0.0.1:1/a.png", 400, "only as data:image"),
    "https": ("https://example.com/a.png", 400, "only as data:image"),
    "bare base64": ("iVBORw0KGgo=", 400, "only as data:image"),
    "garbage": ("data:image/png;base64,%%%%", 400, "base64 is broken"),
    "text": (data_uri(b"no picture at all"), 400, "cannot be read"),
    "half": (half, 400, "cut off"),
    "huge": (huge, 413, "pixels"),
    "wide": (wide, 413, "10000 x 8000"),
    "svg": (data_uri(b"<svg/>", "svg+xml"), 400, "cannot be read"),
}
SETTINGS = {
    "cache field": ({"extra_body": {"cache_config": {"top_k": 5}}}, 400, "Unknown field 'top_k'"),
    "cache value": ({"extra_body": {"cache_config": {"top_k_ratio": 2}}}, 400, "must be a number in"),
    "cache type": ({"extra_body": {"cache_config": "trimmed"}}, 400, "must be an object"),
    "operator's": ({"extra_body": {"cache_config": {"static": True}}}, 400, "is the operator's"),
    "processors": ({"extra_body": {"cache_config": {"processors": ["os.system"]}}}, 400, "callables"),
    "generation": ({"extra_body": {"generation_config": '{"num_beams": 1000}'}}, 400, "'num_beams'"),
    "no json": ({"extra_body": {"generation_config": "{"}}, 400, "is not JSON"),
    "another cache": (
        {"extra_body": {"generation_config": '{"cache_implementation": "offloaded"}'}},
        400,
        "must be 'trimmed'",
    ),
    "field": ({"extra_body": {"beams": 4}}, 400, "unknown field 'beams'"),
    "too long": ({"max_tokens": 10_000}, 400, "more than 512"),
    "no length": ({"max_tokens": 0}, 400, "positive number"),
    "temperature": ({"temperature": 99}, 400, "'temperature' must be"),
    "no number": ({"temperature": 10**400}, 400, "'temperature' must be"),
    "tiny temperature": ({"temperature": 1e-9}, 400, "'temperature' must be"),
    "penalty": ({"frequency_penalty": 0.5}, 400, "'frequency_penalty' is not offered"),
    "stop": ({"stop": ["x"]}, 400, "'stop' is not offered"),
    "several": ({"n": 3}, 400, "'n' must be 1"),
    "model": ({"model": "other"}, 404, "this server's model is 'small'"),
}
MESSAGES = {
    "none": ([], 400, "not empty"),
    "no role": ([{"content": "?"}], 400, "'role'"),
    "no content": ([{"role": "user", "content": None}], 400, "'content'"),
    "a video": ([{"role": "user", "content": [{"type": "video_url", "video_url": {"url": "a"}}]}], 400, "a part"),
    "the token itself": ([{"role": "user", "content": "<|image|> ?"}], 400, "names 1 pictures"),
    "many words": ([{"role": "user", "content": "digit " * 600}], 400, "more than 512"),
}


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


def test_forty_pictures(client, question):
    picture, words = question[0]["content"]
    refused(client, [{"role": "user", "content": [picture] * 40 + [words]}], 400, "more than 8 pictures")
    assert text(ask(client, question))


def test_what_is_no_chat_is_not_there(client):
    assert [model.id for model in client.models.list()] == ["small"]
    for path, body in (
        ("/completions", {"prompt": "?"}),
        ("/responses", {"input": "?"}),
        ("/../load_model", {"model": "a/b"}),
    ):
        with pytest.raises(openai.APIStatusError) as error:
            client.post(path, body=body, cast_to=object)
        assert error.value.status_code == 404


def test_other_names_of_this_machine_are_refused(client, question):
    refused(client, question, 421, "localhost alone", extra_headers={"Host": "example.com:80"})


def test_a_folder_that_the_operator_allows(tmp_path, question):
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


def test_hosts_that_the_operator_allows(question, tmp_path):
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
        pictures.shutdown()


def test_bounds_on_bytes_and_on_those_who_wait(question):
    with running(Limits(body_bytes=2000)) as client:
        refused(client, chat(data_uri(b"x" * 4000), "?"), 413, "more than 2000 bytes")
        assert text(ask(client, [{"role": "user", "content": "How many digits?"}])) is not None
    with running(Limits(waiting=1)) as client:
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


def test_two_hundred_requests_leave_nothing_behind(client, question):
    own = psutil.Process()
    for _ in range(40):
        ask(client, question)
    before = own.memory_info().rss
    for number in range(200):
        ask(client, question, stream=number % 2 == 0) if number % 10 else refused(client, [], 400, "not empty")
    assert own.memory_info().rss - before < 60 * 2**20
