import dataclasses

import pytest

from trim_plugin.evaluation import Answer, AnswerLog, write_whole


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
    assert file.read_text() == whole
    log.add(answer(question="2"))
    assert [one.question for one in log.answers()] == ["1", "2"]


@pytest.mark.parametrize("now", [{"model": "large"}, {}, {"model": "small", "adapter": None, "limit": 1}])
def test_other_settings_are_another_run(tmp_path, now):
    AnswerLog(tmp_path, {"model": "small"})
    AnswerLog(tmp_path, {"model": "small"})
    with pytest.raises(ValueError, match="holds answers of another run"):
        AnswerLog(tmp_path, now)


def test_a_file_is_replaced_whole_and_no_draft_is_left(tmp_path):
    write_whole(tmp_path / "a.txt", "one")
    write_whole(tmp_path / "a.txt", "two")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a.txt", "two")]
