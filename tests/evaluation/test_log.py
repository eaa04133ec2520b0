import dataclasses

import pytest

from trim_plugin.evaluation import Answer, AnswerLog


def answer(question="1", way="stock", text="seven", **fields):
    return Answer(question, way, text, 0.5, 2, **fields)


def test_answers_come_back_as_they_were(tmp_path):
    given = [answer(kept_tokens=13, peak_bytes=2**40), answer(text='two\nlines, "quoted" … 七')]
    log = AnswerLog(tmp_path, {})
    log.add(given[0])
    log.add(dataclasses.replace(given[1], way="0.25"))
    assert AnswerLog(tmp_path, {}).answers() == [given[0], dataclasses.replace(given[1], way="0.25")]


def test_the_answers_of_all_processes_count_and_each_once(tmp_path):
    first, second = (AnswerLog(tmp_path, {}, process) for process in range(2))
    first.add(answer())
    second.add(answer(question="2"))
    second.add(answer(text="answered twice"))
    assert {(one.question, one.text) for one in first.answers()} == {("1", "seven"), ("2", "seven")}


def test_a_line_that_was_cut_short_is_forgotten_and_whole_ones_stay(tmp_path):
    AnswerLog(tmp_path, {}).add(answer())
    file = tmp_path / "answers-0.jsonl"
    whole = file.read_text()
    file.write_text(whole + whole[: len(whole) // 2])
    log = AnswerLog(tmp_path, {})
    assert [one.question for one in log.answers()] == ["1"]
    log.add(answer(question="2"))
    assert [one.question for one in log.answers()] == ["1", "2"]
    assert file.read_text().startswith(whole)
    assert file.read_text().count("\n") == 2


def test_a_damaged_line_is_answered_again(tmp_path):
    log = AnswerLog(tmp_path, {})
    log.add(answer())
    file = tmp_path / "answers-0.jsonl"
    file.write_bytes(file.read_bytes() + b"\0\0\xff\n")
    log.add(answer(question="2"))
    assert [one.question for one in AnswerLog(tmp_path, {}).answers()] == ["1", "2"]


def test_half_a_line_of_another_process_costs_no_answer(tmp_path):
    """Of the same command, given twice and killed once."""
    log = AnswerLog(tmp_path, {})
    for number in "12":
        log.add(answer(question=number))
        with log.file.open("a") as file:
            file.write('{"question": "3", "way": "st')
    assert [one.question for one in log.answers()] == ["1", "2"]
    assert log.aside.read_text() == 2 * '{"question": "3", "way": "st\n'


@pytest.mark.parametrize("text", ["my notes", "[1]\n", '{"id": "1", "answer": "seven"}\n{"q', '{"question": "?"}'])
def test_a_file_of_something_else_is_left_as_it_is(tmp_path, text):
    file = tmp_path / "answers-1.jsonl"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"answers-1\.jsonl is no file of results: .* Give another folder"):
        AnswerLog(tmp_path, {})
    assert file.read_text() == text


def test_a_folder_of_an_earlier_version_is_continued(tmp_path):
    """Its lines may lack fields that came later, and its settings have no mark."""
    (tmp_path / "settings.json").write_text('{"model": "small"}')
    (tmp_path / "answers-0.jsonl").write_text(
        '{"question": "1", "way": "stock", "text": "seven", "seconds": 0.5, "new_tokens": 2, "right": ["seven"]}\n'
    )
    log = AnswerLog(tmp_path, {"model": "small"})
    log.add(answer(question="2"))
    assert log.answers() == [answer(right=("seven",)), answer(question="2")]
    with pytest.raises(ValueError, match="model was 'small', now 'large'"):
        AnswerLog(tmp_path, {"model": "large"})


@pytest.mark.parametrize("now", [{"model": "large"}, {}, {"model": "small", "adapter": None, "limit": 1}])
def test_other_settings_are_another_run(tmp_path, now):
    AnswerLog(tmp_path, {"model": "small"})
    log = AnswerLog(tmp_path, {"model": "small", "adapter": None})
    with pytest.raises(ValueError, match="holds answers of another run"):
        AnswerLog(tmp_path, now, process=1)
    (tmp_path / "settings.json").write_text('{"mod')
    with pytest.raises(ValueError, match=r"settings\.json is damaged"):
        AnswerLog(tmp_path, now)
    (tmp_path / "settings.json").unlink()
    AnswerLog(tmp_path, now)
    with pytest.raises(ValueError, match="holds answers of another run"):
        log.add(answer())
