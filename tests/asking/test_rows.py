"""One row format: what it allows, every spelling of it, and a file in which whatever is wrong stays in its line."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from PIL import Image

from trim_plugin.asking.rows import MOST_CHARACTERS, Row, RowError, read_rows

ROW = {"id": "a", "images": ["1.png"], "question": "How many?"}


def read(folder, *lines):
    file = folder / "questions.jsonl"
    file.write_bytes(b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines))
    return read_rows(file)


@pytest.mark.parametrize("name", ["images", "image", "picture", "pictures"])
def test_spellings_mean_the_same(tmp_path, name):
    asked = {"id": "a", name: ["1.png"], "question": "How many?"}
    assert read(tmp_path, asked) == read(tmp_path, ROW)
    if name != "images":
        assert read(tmp_path, {**asked, name: "1.png"}) == read(tmp_path, ROW)
    picture = Image.new("RGB", (1, 1))
    assert Row.of({**asked, name: [picture, b"x", Path("y")]}).images == (picture, b"x", Path("y"))


def test_right_answers_may_be_there(tmp_path):
    given = [{**ROW, "id": name, "answer": answer} for name, answer in enumerate(["two", ["two", "2"], 2, None])]
    assert [row.right for row in read(tmp_path, *given)] == [("two",), ("two", "2"), ("2",), ()]


def test_a_chat_s_last_text_is_what_is_asked():
    chat = [{"role": "user", "content": "First?"}, {"role": "assistant", "content": "Yes."}]
    chat.append({"role": "user", "content": [{"type": "text", "text": "And now?"}, {"type": "image"}]})
    row = Row.of({"images": ["1.png"], "messages": chat})
    assert (row.text, row.names) == ("And now?", ("1.png",))


def test_rows_without_an_id_are_known_by_their_lines(tmp_path):
    asked = {"question": "?"}
    rows = read(tmp_path, {"id": 7, **asked}, b"", asked, {"id": 5, **asked}, asked, b"  ")
    assert [row.id for row in rows] == ["7", "3", "5", "line 5"]
    assert len({row.key for row in rows[1::2]}) == 2


#: Lines that cannot be answered, what is said of them, and what their results are filed under.
BROKEN = {
    "not JSON": (b"not json", "line 2 is not JSON: ", "2"),
    "a list": (b"[1]", "line 2 is not an object such as ", "2"),
    "deep": (b"[" * 100_000, "line 2 is nested too deeply", "2"),
    "deep inside": (b'{"id": "x", "messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply", "2"),
    "many digits": (b'{"question": "?", "id": ' + b"9" * 5000 + b"}", "line 2 has a number of too many digits", "2"),
    "latin-1": (b'{"question": "caf\xe9"}', "line 2 is not UTF-8: ", "2"),
    "surrogate": (rb'{"id": "x", "question": "\ud800"}', r"no character: \ud800", "x"),
    "surrogate in a chat": (rb'{"messages": [{"role": "user", "content": "\udfff"}]}', r"no character: \udfff", "2"),
    "surrogate in an id": (rb'{"id": "\ud800", "question": "?"}', "no character", "2"),
    "surrogate in an answer": (rb'{"id": "x", "question": "?", "answer": "\ud800"}', "no character", "x"),
    "id": (b'{"id": ["x"], "question": "?"}', "'id' must be a text or a number, got ['x']", "2"),
    "answer": (b'{"id": "x", "question": "?", "answer": {}}', "'answer' must be a text or a list of texts", "x"),
    "no picture": (b'{"pictures": [], "question": "?"}', "'pictures' names no picture", "2"),
    "twice": (
        b'{"image": "a", "images": ["a"], "question": "?"}',
        "'images' and 'image' are both given: they mean the same",
        "2",
    ),
    "long": (json.dumps({"question": "?", "x" * 10**7: 1}).encode(), "unknown field", "2"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_row_not_json(tmp_path, name):
    line, said, filed = BROKEN[name]
    first, broken, last = read(tmp_path, ROW, line, {**ROW, "id": "b"})
    assert (first.error, last.error) == ("", "")
    assert said in broken.error
    assert len(broken.error) <= MOST_CHARACTERS
    assert broken.id == filed
    with pytest.raises(RowError):
        Row.of(broken)


def test_row_id(tmp_path):
    for wrong in (["x"], {}, True):
        (row,) = read(tmp_path, {**ROW, "id": wrong})
        assert (row.id, row.error.partition(", got ")[0]) == ("1", "'id' must be a text or a number")
    rows = read(tmp_path, *({**ROW, "id": name} for name in (7, 0.5, "", None)))
    assert [row.id for row in rows] == ["7", "0.5", "", "4"]


def test_a_broken_line_takes_no_other_row_s_id(tmp_path):
    assert [row.id for row in read(tmp_path, {**ROW, "id": 0}, b"{", {**ROW, "id": 2})] == ["0", "line 2", "2"]


def test_byte_order_marks_and_odd_line_breaks_are_read(tmp_path):
    mark = b"\xef\xbb\xbf"
    text = "One\u2028question\x85with odd spaces"
    line = json.dumps({"question": text}, ensure_ascii=False).encode()
    rows = read(tmp_path, mark + line + b"\r", mark + line, mark)
    assert [row.question for row in rows] == [text, text]


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "is empty"), ("\n", "is empty"), ('{"id": 1}\n{"id": "1"}\n', "line 2: the id '1' is that of line 1, too")],
)
def test_questions_file(tmp_path, text, message):
    file = tmp_path / "questions.jsonl"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_rows(file)
    with pytest.raises(FileNotFoundError, match="no such file: "):
        read_rows(tmp_path / "nowhere.jsonl")
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "."):
        with pytest.raises(ValueError, match=r"cannot read .*: it is a .*, not a file"):
            read_rows(tmp_path / name)
