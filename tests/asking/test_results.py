"""The file of results: every row once and with what it asks, whatever interrupts it, edits it, and however many write."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trim_plugin.asking.results import Results
from trim_plugin.asking.rows import read_rows


def rows_of(folder, *lines):
    file = folder / "questions.jsonl"
    file.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return read_rows(file)


def named(folder, *names):
    return rows_of(folder, *({"id": name, "question": f"What is {name}?"} for name in names))


def unnamed(folder, *questions):
    return rows_of(folder, *({"question": question} for question in questions))


def answered(results, rows):
    """Add to every row without a result what it asks, and whether that was needed."""
    return results.add([{"id": row.id, "answer": row.question} for row in rows])


def found(file):
    return [(result["id"], result.get("answer")) for result in map(json.loads, file.read_text().splitlines())]


@pytest.fixture
def file(tmp_path):
    return tmp_path / "out.jsonl"


def test_an_id_is_written_once(file, tmp_path):
    rows = named(tmp_path, "1", "2", "3")
    assert Results(file, {}, rows).add([{"id": "1", "answer": "é"}, {"id": "2", "error": "no"}]) == 2
    again = Results(file, {}, rows)
    assert [again.has(row.id) for row in rows] == [True, True, False]
    assert again.add([{"id": "2", "answer": "x"}, {"id": "3", "answer": "y"}]) == 1
    assert found(file) == [("1", "é"), ("2", None), ("3", "y")]


def test_two_holders_see_each_other(file, tmp_path):
    rows = named(tmp_path, "1", "2")
    one, two = Results(file, {}, rows), Results(file, {}, rows)
    one.add([{"id": "1", "answer": ""}])
    assert two.add([{"id": "1", "answer": ""}, {"id": "2", "answer": ""}]) == 1
    assert one.add([{"id": "2", "answer": ""}]) == 0
    assert [name for name, _ in found(file)] == ["1", "2"]


@given(before=st.lists(st.sampled_from("abcd"), max_size=5), after=st.lists(st.sampled_from("abcd"), max_size=5))
def test_a_row_without_an_id_has_the_result_of_what_it_asks_wherever_it_stands(tmp_path_factory, before, after):
    folder = tmp_path_factory.mktemp("edited")
    file = folder / "out.jsonl"
    if before:
        rows = unnamed(folder, *before)
        answered(Results(file, {}, rows), rows)
    if after:
        rows = unnamed(folder, *after)
        results = Results(file, {}, rows)
        known = sum(min(before.count(text), after.count(text)) for text in set(after))
        assert results.set_aside == len(before) - known
        assert answered(results, rows) == len(after) - known
        assert sorted(found(file)) == sorted((row.id, row.question) for row in rows)


def test_a_row_that_asks_something_else_is_asked_again(file, tmp_path):
    asked = {"id": "a", "images": ["1.png"], "question": "How many?"}
    rows = rows_of(tmp_path, asked, {"id": "b", "question": "Which?"})
    answered(Results(file, {}, rows), rows)
    for change in ({"question": "Where?"}, {"images": ["2.png"]}, {"max_new_tokens": 3}):
        rows = rows_of(tmp_path, {**asked, **change}, {"id": "b", "question": "Which?"})
        results = Results(file, {}, rows)
        assert (results.has("a"), results.has("b")) == (False, True), change
        answered(results, rows)
        assert sorted(name for name, _ in found(file)) == ["a", "b"]
    assert [name for name, _ in found(results.aside)] == ["a", "a", "a"], "no answer is thrown away"


def test_what_changes_nothing_about_the_question_changes_nothing(file, tmp_path):
    rows = rows_of(tmp_path, {"id": "a", "images": ["1.png"], "question": "How many?"})
    answered(Results(file, {}, rows), rows)
    rows = rows_of(tmp_path, {"question": "How many?", "id": "a", "picture": "1.png", "answer": ["two", "2"]})
    assert Results(file, {}, rows).has("a")


def test_results_of_rows_with_ids_that_are_in_another_file_stay(file, tmp_path):
    for part in ("ab", "cd"):
        rows = named(tmp_path, *part)
        answered(Results(file, {}, rows), rows)
    assert [name for name, _ in found(file)] == ["a", "b", "c", "d"]


@given(cut=st.integers(0, 130))
def test_cut_off_anywhere_no_line_is_lost_or_doubled(tmp_path_factory, cut):
    folder = tmp_path_factory.mktemp("cut")
    file, rows = folder / "out.jsonl", named(folder, "1", "2")
    answered(Results(file, {}, rows), rows)
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) - min(cut, len(whole))])
    survivors = (file.read_bytes() + b"\n").count(b"}\n")
    results = Results(file, {}, rows)
    assert sum(results.has(row.id) for row in rows) == survivors
    answered(results, rows)
    assert sorted(found(file)) == [(row.id, row.question) for row in rows]


def test_a_last_line_without_its_end_is_a_result(file, tmp_path):
    file.write_text('{"id": "a", "answer": "by hand"}')
    rows = named(tmp_path, "a", "b")
    answered(Results(file, {}, rows), rows)
    assert found(file) == [("a", "by hand"), ("b", "What is b?")]


@pytest.mark.parametrize(
    "text", ['{"question": "?"}\n', '{"id": "a", "question": "?"}', "my notes", "my\nnotes\n", "[1]\n"]
)
def test_results_file_of_something_else(file, tmp_path, text):
    file.write_text(text)
    with pytest.raises(ValueError, match="is no file of results"):
        Results(file, {}, named(tmp_path, "a"))
    assert file.read_text() == text


def test_what_follows_a_power_failure(file, tmp_path):
    rows = named(tmp_path, "1", "2", "3")
    answered(Results(file, {}, rows), rows[:2])
    first, second = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(first + b"\0" * 40 + b"\xff\n" + second + b"\0" * 500)
    answered(Results(file, {}, rows), rows)
    assert sorted(found(file)) == [(row.id, row.question) for row in rows]


def test_errors_are_forgotten_on_demand(file, tmp_path):
    rows = named(tmp_path, "1", "2", "3", "4")
    results, other = Results(file, {}, rows), Results(file, {}, rows)
    results.add([{"id": "1", "answer": ""}, {"id": "2", "error": ""}, {"id": "3", "error": ""}])
    with file.open("a") as opened:
        opened.write('{"id": "4", "ans')
    other.add([])
    results.forget_errors(["1", "2"])
    assert [name for name, _ in found(file)] == ["1", "3"]
    assert [results.has(row.id) for row in rows] == [True, False, True, False]
    other.add([{"id": "2", "answer": "now"}])
    assert [name for name, _ in found(file)] == ["1", "3", "2"]


def test_a_process_notices_that_another_one_replaced_the_file(file, tmp_path):
    """Also where the new file has the old one's inode, as reused ones do, and is no shorter: nothing of the file tells it."""
    rows = named(tmp_path, "1", "2", "3")
    one, two = Results(file, {}, rows), Results(file, {}, rows)
    two.add([{"id": "1", "error": "x" * 60}, {"id": "2", "answer": "y"}])
    one.add([])
    before = tmp_path / "before"
    before.hardlink_to(file)
    two.forget_errors(["1"])
    two.add([{"id": "3", "answer": "z" * 60}, {"id": "1", "answer": "now"}])
    before.write_bytes(file.read_bytes())
    before.replace(file)
    assert one.add([{"id": name, "answer": "again"} for name in "123"]) == 0
    assert sorted(name for name, _ in found(file)) == ["1", "2", "3"]


def test_results_of_another_run(file, tmp_path):
    rows = named(tmp_path, "1")
    answered(Results(file, {"model": "a"}, rows), rows)
    with pytest.raises(ValueError, match=r"model was 'a', now 'b'"):
        Results(file, {"model": "b"}, rows)
    (tmp_path / "out.jsonl.settings.json").unlink()
    before = file.read_bytes()
    with pytest.raises(ValueError, match="holds the results of another run, made with other settings"):
        Results(file, {"model": "b"}, rows)
    assert file.read_bytes() == before
    assert Results(file, {"model": "a"}, rows).has("1")


def test_runs_that_begin_at_once_with_other_settings_do_not_mix(file, tmp_path):
    rows = named(tmp_path, "1")
    one, two = Results(file, {"model": "a"}, rows), Results(file, {"model": "b"}, rows)
    assert answered(two, rows) == 1
    with pytest.raises(ValueError, match=r"model was 'b', now 'a'"):
        answered(one, rows)
    assert len(found(file)) == 1


def test_a_deleted_settings_file_is_written_again(file, tmp_path):
    rows = named(tmp_path, "1", "2")
    results = Results(file, {"model": "a"}, rows)
    answered(results, rows[:1])
    (tmp_path / "out.jsonl.settings.json").unlink()
    answered(results, rows)
    with pytest.raises(ValueError, match=r"model was 'a', now 'b'"):
        Results(file, {"model": "b"}, rows)
    assert [name for name, _ in found(file)] == ["1", "2"]


def test_doubled_lines_are_one_again_and_an_answer_counts_more_than_an_error(file, tmp_path):
    file.write_text(
        "".join(json.dumps({"id": "1", **end}) + "\n" for end in ({"error": "x"}, {"answer": "y"}, {"answer": "z"}))
    )
    Results(file, {}, named(tmp_path, "1"))
    assert found(file) == [("1", "y")]


def test_what_a_link_leads_to_is_written(file, tmp_path):
    rows = named(tmp_path, "1", "2")
    link = tmp_path / "link.jsonl"
    link.symlink_to(file)
    results = Results(link, {}, rows)
    results.add([{"id": "1", "error": ""}])
    results.forget_errors(["1"])
    answered(results, rows)
    assert link.is_symlink()
    assert len(found(file)) == 2


@pytest.mark.parametrize("where", [".", "/dev/full", "a file/out.jsonl"])
def test_where_nothing_can_be_written(tmp_path, where):
    (tmp_path / "a file").touch()
    with pytest.raises((ValueError, OSError), match=r"results need a file|cannot write .*: "):
        Results(tmp_path / where, {}, named(tmp_path, "1"))


def test_a_full_disk_leaves_whole_lines(file, tmp_path, full_disk):
    rows = named(tmp_path, *"123456789")
    results = Results(file, {}, rows)
    answered(results, rows[:3])
    with pytest.raises(OSError, match=r"^cannot write .*out\.jsonl: "):
        answered(results, rows)
    full_disk()
    assert len(found(file)) == 3
    answered(results, rows)
    assert found(file) == [(row.id, row.question) for row in rows]


WRITER = """
import sys
from pathlib import Path
from trim_plugin.asking.results import Results
from trim_plugin.asking.rows import Row
rows = [Row(str(number), question="?", key=str(number)) for number in range(40)]
results = Results(Path(sys.argv[1]), {}, rows)
for row in rows:
    if int(row.id) % 3 == int(sys.argv[2]):
        results.add([{"id": row.id, "error": "x" * 5000}])
        results.forget_errors([row.id])
    results.add([{"id": row.id, "answer": "x" * 5000}])
"""


def test_processes_write_at_once_and_forget_errors_meanwhile(file):
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(file), str(number)]) for number in range(3)]
    assert [writer.wait(timeout=120) for writer in writers] == [0, 0, 0]
    assert sorted((name for name, _ in found(file)), key=int) == [str(number) for number in range(40)]
