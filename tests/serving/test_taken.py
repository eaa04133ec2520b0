"""What a request may hold: whatever it is, it is taken or refused by name, and never the server's failure."""

from __future__ import annotations

import json
import typing

import pytest

from trim_plugin.embedded import examples
from trim_plugin.serving.requests import KNOWN, REFUSED, WITHOUT_EFFECT

from .conftest import chat, data_uri, running

openai = pytest.importorskip("openai")
httpx = pytest.importorskip("huggingface_hub.utils").httpx
EXAMPLE = examples()[0]
HELLO = [{"role": "user", "content": "Read all digits."}]
PICTURE = chat(data_uri(EXAMPLE.picture.read_bytes()), EXAMPLE.question)


def nested(depth, kind="[]"):
    return json.loads(kind[0] * depth + kind[1] * depth)


def nested_objects(depth):
    return json.loads('{"a":' * depth + "1" + "}" * depth)


ODD = [
    *(
        None,
        [],
        {},
        "",
        0,
        -1,
        0.5,
        1.5,
        True,
        False,
        "x",
        "0.5",
        "none",
        "auto",
        [None],
        [[]],
        [""],
        ["a"],
        ["a", 0],
        [{}],
    ),
    *(
        {"a": 1},
        {"": None},
        {"type": "text"},
        10**400,
        -(10**30),
        2**63,
        1e308,
        -1e308,
        5e-324,
        float("nan"),
        float("inf"),
    ),
    *("\ud800", ["\ud800"], {"\ud800": "\ud800"}, "\x00", "🦙", " " * 300, "x" * 10_000, ["a"] * 100, nested(900)),
    *(nested_objects(900), "[" * 5000, '{"a":' * 5000, "[1]", "{}", "null", '{"do_sample": []}'),
]
#: A wish of theirs may be granted.
LONG = ("max_tokens", "max_completion_tokens")


def ask(client, messages=None, **settings):
    return client.chat.completions.create(
        **{"model": "small", "messages": PICTURE if messages is None else messages, "max_tokens": 12, **settings}
    )


def post(session, client, body, **headers):
    # Written as Python writes it: half a character is \ud800, and no number is NaN.
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    address = f"http://127.0.0.1:{client.port}/v1/chat/completions"
    return session.post(address, content=data, headers={"content-type": "application/json", **headers})


@pytest.fixture(scope="module")
def session():
    with httpx.Client(timeout=60) as found:
        yield found


def check(session, client, body):
    answer = post(session, client, body)
    said = f"{answer.status_code} for {str(body)[:300]}: {answer.text[:300]}"
    assert answer.status_code in (200, 400, 404, 413), said
    if answer.status_code != 200:
        assert 10 < len(answer.json()["error"]["message"]) < 600, said
    return answer


@pytest.mark.parametrize("field", sorted({*KNOWN, "messages", "beams", "", "\ud800"}), ids=repr)
def test_odd_values_of_a_field(client, session, field):
    for value in ODD:
        answer = check(session, client, {"messages": HELLO, "max_tokens": 1, field: value})
        if answer.status_code == 400 and field in REFUSED:
            assert field in answer.json()["error"]["message"]
    assert post(session, client, {"messages": HELLO, "max_tokens": 1}).status_code == 200


PARTS = {
    "a request": lambda odd: odd,
    "a message": lambda odd: {"messages": [odd]},
    "a role": lambda odd: {"messages": [{"role": odd, "content": "?"}]},
    "a content": lambda odd: {"messages": [{"role": "user", "content": odd}]},
    "a part": lambda odd: {"messages": [{"role": "user", "content": [odd]}]},
    "a part's type": lambda odd: {"messages": [{"role": "user", "content": [{"type": odd, "text": "?"}]}]},
    "a text": lambda odd: {"messages": [{"role": "user", "content": [{"type": "text", "text": odd}]}]},
    "a picture": lambda odd: {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": odd}]}]},
    "an address": lambda odd: {
        "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": odd}}]}]
    },
    "a message's other field": lambda odd: {"messages": [{"role": "user", "content": "?", "tool_calls": odd}]},
    "usage": lambda odd: {"messages": HELLO, "stream": True, "stream_options": {"include_usage": odd}},
    "a share": lambda odd: {"messages": HELLO, "cache_config": {"top_k_ratio": odd}},
    "merge": lambda odd: {"messages": HELLO, "cache_config": {"merge": odd}},
    "another setting": lambda odd: {"messages": HELLO, "cache_config": {"processors": odd}},
    "drawing": lambda odd: {"messages": HELLO, "generation_config": {"do_sample": odd}},
    "a rank": lambda odd: {"messages": HELLO, "generation_config": json.dumps({"top_k": odd, "do_sample": True})},
    "a cache": lambda odd: {"messages": HELLO, "generation_config": {"cache_config": odd}},
    "a cache's kind": lambda odd: {"messages": HELLO, "generation_config": {"cache_implementation": odd}},
}


@pytest.mark.parametrize("name", PARTS)
def test_odd_values_further_in(client, session, name):
    for value in ODD:
        body = PARTS[name](value)
        check(session, client, {**body, "max_tokens": 1} if isinstance(body, dict) else body)
    assert post(session, client, {"messages": HELLO, "max_tokens": 1}).status_code == 200


def test_every_field_of_openai_s_package_is_known():
    """Those of the installed one: taken, or refused by its name."""
    from openai.types.chat.completion_create_params import CompletionCreateParamsBase

    assert set(typing.get_type_hints(CompletionCreateParamsBase)) - {"messages"} <= KNOWN


HARMLESS = {
    "response_format": {"type": "text"},
    "safety_identifier": "someone",
    "prompt_cache_key": "a",
    "prompt_cache_retention": "24h",
    "verbosity": "low",
    "user": "me",
    "n": 1,
    "metadata": {"a": "b"},
    "store": False,
    "service_tier": "auto",
    "reasoning_effort": "low",
    "parallel_tool_calls": True,
    "stop": [],
    "tools": [],
    "tool_choice": "none",
    "modalities": ["text"],
    "logprobs": False,
    "top_logprobs": 0,
    "logit_bias": {},
    "presence_penalty": 0,
    "frequency_penalty": 0.0,
    "top_p": 1,
    "temperature": 0,
    "seed": 5,
    "stream_options": None,
}


def test_what_changes_nothing_is_taken(client):
    expected = ask(client).choices[0].message.content
    for name, value in [*HARMLESS.items(), ("stop", ""), ("stop", [""]), ("stop", None), ("tools", None)]:
        assert ask(client, extra_body={name: value}).choices[0].message.content == expected, name
    together = {name: value for name, value in HARMLESS.items() if name != "stream_options"}
    assert ask(client, extra_body=together).choices[0].message.content == expected
    assert set(WITHOUT_EFFECT) - set(HARMLESS) == {"prompt_cache_options"}


WISHES = {
    "logit_bias": {"5": 10},
    "logprobs": True,
    "top_logprobs": 3,
    "response_format": {"type": "json_object"},
    "tools": [{"type": "function", "function": {"name": "f"}}],
    "tool_choice": "required",
    "functions": [{"name": "f"}],
    "function_call": {"name": "f"},
    "modalities": ["text", "audio"],
    "audio": {"voice": "alloy", "format": "mp3"},
    "prediction": {"type": "content", "content": "a"},
    "web_search_options": {},
    "moderation": {"model": "omni-moderation-latest"},
}


@pytest.mark.parametrize("name", WISHES)
def test_what_would_change_the_answer_is_refused_by_name(client, name):
    with pytest.raises(openai.BadRequestError, match=f"'{name}' is not offered by this server"):
        ask(client, extra_body={name: WISHES[name]})


def test_every_field_that_is_refused_is_wished_for():
    assert set(WISHES) == set(REFUSED)


# -- what requests get -------------------------------------------------------------------------------------------------


def test_a_temperature_draws(client):
    """Alone, without any other setting: the more, the hotter."""
    texts = {
        heat: {ask(client, HELLO, temperature=heat, seed=seed).choices[0].message.content for seed in range(8)}
        for heat in (0, 0.7, 2.0)
    }
    assert len(texts[0]) == 1
    assert len(texts[0.7] | texts[0]) > 1
    assert len(texts[2.0]) > 4
    assert texts[0.7] != texts[2.0]
    drawn = {ask(client, HELLO, temperature=2.0).choices[0].message.content for _ in range(6)}
    assert len(drawn) > 1  # nor is one seed everybody's
    again = [ask(client, HELLO, temperature=2.0, seed=7).choices[0].message.content for _ in range(2)]
    assert again[0] == again[1]


def test_the_name_that_is_told_is_taken(client):
    (listed,) = client.models.list().data
    answer = ask(client, model=listed.id)
    assert answer.model == listed.id
    assert client.models.retrieve(listed.id).id == listed.id
    assert {chunk.model for chunk in ask(client, model=answer.model, stream=True)} == {listed.id}
    with pytest.raises(openai.NotFoundError, match="this server's model is 'small', not 'small@main'"):
        ask(client, model="small@main")


@pytest.mark.parametrize("stop", [None, ["e"], "ll"])
def test_streams_end_as_they_should(client, session, stop):
    whole = ask(client, HELLO, stop=stop)
    for options in (None, {"include_usage": False}, {"include_usage": True}):
        body = {"messages": HELLO, "max_tokens": 12, "stream": True, "stream_options": options, "stop": stop}
        answer = post(session, client, body)
        assert answer.headers["content-type"].startswith("text/event-stream")
        events = answer.text.split("\n\n")
        assert events[-2:] == ["data: [DONE]", ""]
        parts = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
        assert "".join(part["choices"][0]["delta"].get("content") or "" for part in parts if part["choices"]) == (
            whole.choices[0].message.content
        )
        wanted = bool(options and options["include_usage"])
        counted = {name: count for name, count in whole.usage.to_dict().items() if count is not None}
        assert [part["usage"] for part in parts if part.get("usage")] == [counted] * wanted
        reasons = [part["choices"][0].get("finish_reason") for part in parts if part["choices"]]
        assert reasons[-1] == whole.choices[0].finish_reason
        assert set(reasons[:-1]) == {None}


# -- who may ask -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST", "LocalHost:{port}", "127.0.0.1:{port}", "[::1]:{port}", "localhost:1", "[::1]"]
)
def test_this_machine_s_names(client, session, host):
    found = post(session, client, {"messages": HELLO, "max_tokens": 1}, host=host.format(port=client.port))
    assert found.status_code == 200


@pytest.mark.parametrize("host", ["example.com", "localhost.example.com", "127.0.0.1.example.com:80", "10.0.0.1", ""])
def test_other_names(client, session, host):
    assert post(session, client, {"messages": HELLO, "max_tokens": 1}, host=host).status_code == 421


FOREIGN = [
    {"origin": "http://example.com"},
    {"origin": "null"},
    {"origin": "http://localhost:3000"},
    {"content-type": "text/plain"},
    {"content-type": "TEXT/PLAIN; charset=UTF-8"},
    {"content-type": "application/x-www-form-urlencoded"},
    {"content-type": "multipart/form-data; boundary=a"},
]


@pytest.mark.parametrize("headers", FOREIGN, ids=str)
def test_pages_of_other_sites(client, session, headers):
    refused = post(session, client, {"messages": HELLO, "max_tokens": 1}, **headers)
    assert refused.status_code in (403, 415)
    assert not [name for name in refused.headers if name.startswith("access-control")]


def test_pages_may_ask_where_they_are_let(session):
    with running(cors=True) as client:
        for headers in FOREIGN:
            answer = post(session, client, {"messages": HELLO, "max_tokens": 1}, **headers)
            assert answer.status_code == 200
            assert "origin" not in headers or answer.headers["access-control-allow-origin"] == "*"
        wanted = {"origin": "http://a.b", "access-control-request-method": "POST"}
        wanted["access-control-request-headers"] = "authorization, content-type"
        address = f"http://127.0.0.1:{client.port}/v1/chat/completions"
        assert session.options(address, headers=wanted).status_code == 200


@pytest.mark.parametrize("key", ["secret", "mit Ü"])
def test_only_who_has_the_key(session, key):
    with running(api_key=key) as client:
        body, address = {"messages": HELLO, "max_tokens": 1}, f"http://127.0.0.1:{client.port}"
        right = b"Bearer " + key.encode()
        for given in (right, right.replace(b"Bearer", b"bearer")):
            assert post(session, client, body, authorization=given).status_code == 200
        wrong = (None, b"", b"Bearer", right + b"s", right[:-1], key.encode(), b"Basic " + key.encode())
        for given in (*wrong, "Bearer Ä".encode("latin-1"), b"Bearer none"):
            refused = post(session, client, body, **({} if given is None else {"authorization": given}))
            assert refused.status_code == 401, given
            assert key not in refused.text
        for path in ("/v1/models", "/metrics", "/v1/models/small", "/v1/nothing"):
            assert session.get(address + path).status_code == 401
        assert session.get(address + "/v1/models", headers={"authorization": right}).status_code == 200
        assert session.get(address + "/health").status_code == 200
