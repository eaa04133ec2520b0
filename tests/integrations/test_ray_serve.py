"""Ray Serve: concurrent requests get the same answers as alone, and errors that say what is wrong."""

from __future__ import annotations

import base64
import socket
from concurrent.futures import ThreadPoolExecutor

import pytest

from trim_plugin.embedded import examples

from ..scenes import scene_rows

ray = pytest.importorskip("ray")
openai = pytest.importorskip("openai")
serve = pytest.importorskip("ray.serve")


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture(scope="module")
def client():
    from trim_plugin.integrations.ray_serve import chat_app

    with pytest.MonkeyPatch.context() as patch:
        # Serve kills a proxy that is not ready after five seconds, which a busy machine takes.
        patch.setenv("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "120")
        ray.init(num_cpus=4, include_dashboard=False, object_store_memory=200 * 2**20, log_to_driver=False)
        try:
            port = free_port()
            serve.start(http_options={"host": "127.0.0.1", "port": port})
            arguments = {"model": "small", "device": "cpu", "top_k_ratio": "0.1", "num_cpus": "0.5", "pictures": "4"}
            serve.run(chat_app(arguments), name="chat", route_prefix="/")
            yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=120)
            serve.shutdown()
        finally:
            ray.shutdown()


def messages(data, question):
    url = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    picture = {"type": "image_url", "image_url": {"url": url}}
    return [{"role": "user", "content": [picture, {"type": "text", "text": question}]}]


def ask(client, asked, **settings):
    return client.chat.completions.create(**{"model": "small", "messages": asked, "max_tokens": 24, **settings})


def test_thirty_two_at_once_are_answered_as_alone(client, tmp_path):
    rows = scene_rows(tmp_path, 32)
    asked = [messages((tmp_path / row["images"][0]).read_bytes(), row["question"]) for row in rows]
    with ThreadPoolExecutor(32) as users:
        together = list(users.map(lambda one: ask(client, one), asked))
    alone = [ask(client, one) for one in asked]
    assert [answer.choices[0].message.content for answer in together] == [
        answer.choices[0].message.content for answer in alone
    ]
    assert {answer.choices[0].finish_reason for answer in alone} <= {"stop", "length"}


def test_a_stream_is_the_whole_answer(client):
    example = examples()[0]
    asked = messages(example.picture.read_bytes(), example.question)
    parts = [chunk.choices[0].delta.content or "" for chunk in ask(client, asked, stream=True)]
    text = "".join(parts)
    # Without a length, too: as long as the model reads.
    assert text == ask(client, asked, max_tokens=openai.NOT_GIVEN).choices[0].message.content == example.answer


@pytest.mark.parametrize(
    ("change", "status", "said"),
    [
        (
            {"messages": [{"role": "user", "content": messages(b"", "?")[0]["content"] * 5}]},
            400,
            "more than 4 pictures",
        ),
        ({"extra_body": {"cache_config": {"static": True}}}, 400, "operator's"),
        ({"model": "other"}, 404, "this server's model"),
    ],
)
def test_what_is_refused(client, change, status, said):
    example = examples()[0]
    asked = messages(example.picture.read_bytes(), example.question)
    with pytest.raises(openai.APIStatusError) as error:
        ask(
            client,
            **{"asked": asked} | {("asked" if name == "messages" else name): value for name, value in change.items()},
        )
    assert error.value.status_code == status
    assert said in error.value.body["message"]
    assert ask(client, asked).choices[0].message.content == example.answer


def test_arguments_are_checked():
    from trim_plugin.integrations.ray_serve import chat_app

    with pytest.raises(ValueError, match="Say which model"):
        chat_app({})
    with pytest.raises(ValueError, match="Unknown argument 'replica'"):
        chat_app({"model": "small", "replica": "2"})
    with pytest.raises(ValueError, match="top_k_ratio must be a number in"):
        chat_app({"model": "small", "top_k_ratio": "7"})
