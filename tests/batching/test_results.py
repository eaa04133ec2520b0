"""The file of results: every id once, whatever interrupts it and however many write."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trim_plugin.batching.questions import read_rows
from trim_plugin.batching.results import Results


def ids(file):
    return [json.loads(line)["id"] for line in file.read_text().splitlines()]


def test_an_id_is_written_once(tmp_path):
    file = tmp_path / "out.jsonl"
    assert Results(file, {}).add([{"id": "1", "answer": "é"}, {"id": "2", "error": "no"}]) == 2
    again = Results(file, {})
    assert (again.ids, again.failed) == ({"1", "2"}, {"2"})
    assert again.add([{"id": "2", "answer": "x"}, {"id": "3", "answer": "y"}]) == 1
    assert ids(file) == ["1", "2", "3"]


def test_two_holders_see_each_other(tmp_path):
    file = tmp_path / "out.jsonl"
    one, two = Results(file, {}), Results(file, {})
    one.add([{"id": "1", "answer": ""}])
    assert two.add([{"id": "1", "answer": ""}, {"id": "2", "answer": ""}]) == 1
    assert one.add([{"id": "2", "answer": ""}]) == 0
    assert ids(file) == ["1", "2"]


@given(cut=st.integers(0, 60))
def test_cut_off_anywhere_no_line_is_lost_or_doubled(tmp_path_factory, cut):
    file = tmp_path_factory.mktemp("cut") / "out.jsonl"
    lines = [{"id": "1", "answer": "sieben"}, {"id": "2", "answer": "acht"}]
    Results(file, {}).add(lines)
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) - min(cut, len(whole))])
    survivors = file.read_bytes().count(b"\n")
    results = Results(file, {})
    assert len(results.ids) == survivors
    results.add(lines)
    assert sorted(ids(file)) == ["1", "2"]


def test_errors_are_forgotten_on_demand(tmp_path):
    file = tmp_path / "out.jsonl"
    results, other = Results(file, {}), Results(file, {})
    results.add([{"id": "1", "answer": ""}, {"id": "2", "error": ""}, {"id": "3", "error": ""}])
    with file.open("a") as opened:
        opened.write('{"id": "4", "ans')
    other.add([])
    results.forget_errors(["1", "2"])
    assert ids(file) == ["1", "3"]
    assert (results.ids, results.failed) == ({"1", "3"}, {"3"})
    other.add([{"id": "2", "answer": "now"}])
    assert ids(file) == ["1", "3", "2"]


def test_results_of_another_run(tmp_path):
    file = tmp_path / "out.jsonl"
    Results(file, {"model": "a"}).add([{"id": "1", "answer": ""}])
    with pytest.raises(ValueError, match=r"model was 'a', now 'b'"):
        Results(file, {"model": "b"})


def test_results_file_of_something_else(tmp_path):
    file = tmp_path / "questions.jsonl"
    file.write_text('{"question": "?"}\n')
    with pytest.raises(ValueError, match="is no file of results"):
        Results(file, {})
    assert file.read_text() == '{"question": "?"}\n'


WRITER = """
import sys
from pathlib import Path
from trim_plugin.batching.results import Results
results = Results(Path(sys.argv[1]), {})
for number in range(40):
    results.add([{"id": str(number), "answer": "x" * 5000}])
"""


def test_processes_write_at_once(tmp_path):
    file = tmp_path / "out.jsonl"
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(file)]) for _ in range(3)]
    assert [writer.wait(timeout=120) for writer in writers] == [0, 0, 0]
    assert sorted(ids(file), key=int) == [str(number) for number in range(40)]


def test_row_not_json(tmp_path):
    file = tmp_path / "questions.jsonl"
    file.write_text('{"id": 7, "question": "?"}\n\nnot json\n[1]\n{"question": "?"}\n')
    rows = read_rows(file)
    assert [row["id"] for row in rows] == ["7", "3", "4", "5"]
    assert rows[1]["broken"].startswith("line 3 is not JSON: ")
    assert rows[2]["broken"].startswith("line 4 is not an object such as ")
    assert all("broken" not in rows[place] for place in (0, 3))


@pytest.mark.parametrize(
    ("text", "message"), [("", "is empty"), ('{"id": 1}\n{"id": "1"}\n', "line 2: the id '1' is that of line 1, too")]
)
def test_questions_file(tmp_path, text, message):
    file = tmp_path / "questions.jsonl"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_rows(file)
    with pytest.raises(FileNotFoundError, match="no such file: "):
        read_rows(tmp_path / "nowhere.jsonl")
