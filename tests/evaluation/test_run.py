import pytest

from trim_plugin.embedded import load_small_model
from trim_plugin.evaluation import AnswerLog, evaluate, read_questions, summarize, variants_for


def test_exact_agrees_with_stock(data, tmp_path):
    model, processor = load_small_model()
    questions, ways = read_questions(data), variants_for([1.0])
    log = AnswerLog(tmp_path / "log", {})
    evaluate(model, processor, questions, ways, log, max_new_tokens=3)
    stock, exact = summarize(questions, ways, log.answers())
    assert exact.agreement == exact.overlap == 1.0
    assert exact.accuracy == stock.accuracy is not None


def test_goes_on_after_an_interruption(data, tmp_path):
    model, processor = load_small_model()
    questions, ways = read_questions(data), variants_for([0.5])

    def stop(answer):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(model, processor, questions, ways, AnswerLog(tmp_path, {}), max_new_tokens=2, on_answer=stop)
    (file,) = tmp_path.glob("answers-*.jsonl")
    first = file.read_text()
    file.write_text(first + '{"question": "1", "way": "0.5", "te')  # the power went
    log, seen = AnswerLog(tmp_path, {}), []
    evaluate(model, processor, questions, ways, log, max_new_tokens=2, on_answer=seen.append)
    assert [(answer.question, answer.way) for answer in seen] == [("2", "stock"), ("1", "0.5"), ("2", "0.5")]
    assert len(log.answers()) == file.read_text().count("\n") == 4
    assert file.read_text().startswith(first)
    evaluate(model, processor, questions, ways, log, max_new_tokens=2, on_answer=pytest.fail)
