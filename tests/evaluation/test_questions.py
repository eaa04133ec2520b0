import json

import pytest

from trim_plugin.asking.rows import read_rows
from trim_plugin.evaluation import read_questions


@pytest.fixture
def folder(tmp_path):
    for name in ("a.png", "b.png"):
        (tmp_path / name).touch()
    return tmp_path


def read(folder, *entries, blank=""):
    lines = [blank, *(json.dumps(entry) for entry in entries)]
    (folder / "questions.jsonl").write_text("\n".join(lines))
    return read_questions(folder)


def test_names_are_the_ids_or_the_lines_in_the_file(folder):
    first, second = read(
        folder, {"picture": "a.png", "question": "?"}, {"picture": "b.png", "question": "!", "id": "mine"}
    )
    assert (first.name, second.name) == ("2", "mine")  # the first line is blank
    assert first.pictures == (folder / "a.png",)


def test_several_pictures_and_several_answers(folder):
    (question,) = read(folder, {"pictures": ["a.png", "b.png"], "question": "?", "answer": ["two", "2"]})
    assert question.pictures == (folder / "a.png", folder / "b.png")
    assert question.answers == ("two", "2")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"question": " "}, "'question' must be a text"),
        ({"colour": "red"}, "unknown field 'colour'"),
    ],
)
def test_the_line_that_is_wrong_is_named(folder, change, message):
    good = {"picture": "a.png", "question": "?"}
    with pytest.raises(ValueError, match=f"questions.jsonl, line 3: {message}"):
        read(folder, good, good | change)
    with pytest.raises(ValueError, match=r"questions.jsonl, line 2 is not an object"):
        read(folder, ["a.png"])


def test_another_file(folder):
    (folder / "other.jsonl").write_text('{"picture": "a.png", "question": "?"}')
    assert len(read_questions(folder, folder / "other.jsonl")) == 1
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_questions(folder)


CHAT = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
SPELLINGS = {
    "picture": {"picture": "a.png", "question": "?"},
    "answer": {"images": ["a.png"], "question": "?", "answer": ["two", "2"]},
    "messages": {"images": ["a.png"], "messages": CHAT},
    "length": {"id": 7, "images": ["a.png"], "question": "?", "max_new_tokens": 3},
}


@pytest.mark.parametrize("row", SPELLINGS.values(), ids=SPELLINGS)
def test_rows_are_those_of_batch_in_every_spelling(folder, row):
    (question,) = read(folder, row)
    assert question.pictures == (folder / "a.png",)
    (same,) = read_rows(folder / "questions.jsonl")
    assert (same.id, same.text, same.right, same.error) == (question.name, question.text, question.answers, "")
    assert question.max_new_tokens == row.get("max_new_tokens")


@pytest.mark.parametrize("name", ["n" * 5000 + ".png", "a\0.png"])
def test_a_name_that_no_file_can_have(folder, name):
    with pytest.raises(FileNotFoundError, match="line 2: no such picture"):
        read(folder, {"picture": name, "question": "?"})
