import pytest

from trim_plugin.evaluation import Answer, Question, summarize, variants_for
from trim_plugin.evaluation.summary import is_right, normalized, word_overlap

WAYS = variants_for([0.25])
QUESTIONS = [Question("1", (), "?", ("seven",)), Question("2", (), "?", ("red two", "2")), Question("3", (), "?")]


def answers(*texts):
    """Of every question the texts of stock and of 0.25."""
    found = []
    for number, (stock, ours) in enumerate(texts, start=1):
        found.append(Answer(str(number), "stock", stock, 2.0, 2, peak_bytes=number))
        found.append(Answer(str(number), "0.25", ours, 1.0, 2, 100, 10 * number, 20, 80))
    return found


def test_accuracy_counts_questions_with_an_answer_and_agreement_all():
    stock, ours = summarize(QUESTIONS, WAYS, answers(("Seven.", "nine"), ("2", "Red  two"), ("a b", "a c")))
    assert (stock.questions, stock.known, stock.accuracy, ours.accuracy) == (3, 2, 1.0, 0.5)
    assert stock.agreement == stock.overlap == 1.0
    assert ours.agreement == 0.0
    assert ours.overlap == pytest.approx((0 + 0 + 0.5) / 3)
    assert ours.kept_share == 60 / 300
    assert ours.cross_kv_ratio == 0.25
    assert (stock.kept_share, stock.cross_kv_ratio) == (None, None)
    assert (stock.seconds, ours.seconds) == (2.0, 1.0)
    assert (stock.peak_bytes, ours.peak_bytes) == (3, None)


def test_only_questions_that_every_way_has_answered_count():
    given = answers(("seven", "seven"), ("2", "2"))
    rows = summarize(QUESTIONS, WAYS, [one for one in given if (one.question, one.way) != ("2", "0.25")])
    assert [row.questions for row in rows] == [1, 1]
    assert summarize(QUESTIONS, WAYS, []) == []


def test_without_any_known_answer_there_is_no_accuracy():
    (row,) = summarize(QUESTIONS[2:], variants_for([]), [Answer("3", "stock", "x", 1.0, 1)])
    assert (row.known, row.accuracy) == (0, None)


@pytest.mark.parametrize(
    ("text", "match", "right"),
    [
        ("SEVEN!", "exact", True),
        ("it is seven", "exact", False),
        ("it is seven, I think", "contains", True),
        ("seventeen", "contains", False),
        ("27", "contains", False),
    ],
)
def test_right_is_what_is_given_case_and_final_punctuation_aside(text, match, right):
    assert is_right(text, ["seven", "7"], match) is right
    with pytest.raises(ValueError, match="match must be one of 'exact', 'contains'"):
        summarize(QUESTIONS, WAYS, [], "fuzzy")


def test_words_are_compared_as_often_as_they_occur():
    assert word_overlap("red red", "red") == pytest.approx(2 / 3)
    assert word_overlap("", "") == 1.0
    assert word_overlap("red", "") == 0.0
    assert normalized(" A\tb \n c ?! ") == "a b c"
