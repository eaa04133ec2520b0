import json
import subprocess
import sys

from PIL import Image

from trim_plugin.cli import main
from trim_plugin.commands import FAILED_ROWS
from trim_plugin.embedded import examples


def command(data, out, *options):
    """Short answers of stock and of a rule, if the options don't say otherwise."""
    return ["eval", "--data", str(data), "--out", str(out), "--max-new-tokens", "2", *(options or RULE)]


RULE = ("--top-k-ratio", "0.5")


def summary(out):
    return json.loads((out / "summary.json").read_text())


def test_compares_stock_and_ratios(data, tmp_path, capsys):
    out = tmp_path / "out"
    rules = ["--top-k-ratio", "1.0", "--top-k-ratio", "0.1", "--kv-quantization", "int8"]
    assert main(command(data, out, *rules)) == 0
    rows = {row["way"]: row for row in summary(out)}
    assert list(rows) == ["stock", "exact, int8", "0.1, int8"]
    assert rows["stock"]["agreement"] == 1.0
    assert rows["stock"]["kept_share"] is None
    assert rows["exact, int8"]["kept_share"] == 1.0
    assert 0 < rows["0.1, int8"]["kept_share"] < 1
    assert rows["0.1, int8"]["cross_kv_ratio"] < rows["exact, int8"]["cross_kv_ratio"] < 1
    assert all(row["questions"] == 2 and row["seconds"] > 0 for row in rows.values())
    assert (out / "summary.md").read_text().startswith("| cache |")
    shown = capsys.readouterr().out
    assert "0.1, int8" in shown


def test_times_say_in_what_company_they_were_taken(data, tmp_path, capsys):
    many, alone = tmp_path / "many", tmp_path / "alone"
    assert main(command(data, many)) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "* up to 32 questions at once" in shown
    assert main(command(data, alone, *RULE, "--max-running", "1")) == 0
    shown = capsys.readouterr().out
    assert "at once" not in shown
    assert [row["at_once"] for row in summary(many)] == [1, 32]
    assert [row["at_once"] for row in summary(alone)] == [1, 1]
    for file in ("summary.md", "report.html"):
        assert "* up to 32 questions at once" in (many / file).read_text()
        assert "at once" not in (alone / file).read_text()
    stock, ours = (many / "summary.md").read_text().splitlines()[2:4]
    assert (stock.endswith("* |"), ours.endswith("* |")) == (False, True)
    assert "(a share: up to 32 at once)" in (many / "report.html").read_text()


def test_runs_in_unlike_company_have_no_time_together(data, tmp_path, capsys):
    words = command(data, tmp_path)
    assert main(words) == 0
    file = tmp_path / "answers-0.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:-1]))
    assert main([*words, "--max-running", "4"]) == 0
    stock, ours = summary(tmp_path)
    assert (stock["at_once"], ours["at_once"], ours["seconds"]) == (1, None, None)
    assert stock["seconds"] > 0
    assert "Neither seconds nor memory where runs with different --max-running" in (tmp_path / "summary.md").read_text()


def test_as_many_run_as_an_engine_runs():
    from trim_plugin.commands import common
    from trim_plugin.engine import engine

    assert common.MAX_RUNNING == engine.MAX_RUNNING


def test_processes_share_the_questions(data, tmp_path, monkeypatch):
    """As under `accelerate launch`, which sets these variables; the second to end writes the summary."""
    out = tmp_path / "out"
    for rank in range(2):
        assert not (out / "summary.json").exists()
        for name, value in (("RANK", rank), ("WORLD_SIZE", 2), ("LOCAL_RANK", rank)):
            monkeypatch.setenv(name, str(value))
        assert main(command(data, out)) == 0
    by_process = [
        {json.loads(line)["question"] for line in (out / f"answers-{rank}.jsonl").read_text().splitlines()}
        for rank in range(2)
    ]
    assert by_process == [{"1"}, {"2"}]
    assert summary(out)[0]["questions"] == 2


def test_accelerate_launch_spreads_the_questions(data, tmp_path):
    """`--multi_gpu` makes accelerate start several processes; they need no GPU here."""
    out = tmp_path / "out"
    launch = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    words = [sys.executable, "-m", *launch, "-m", "trim_plugin.cli", *command(data, out, *RULE, "--kept-share", "0.3")]
    result = subprocess.run(words, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert all((out / f"answers-{rank}.jsonl").read_text() for rank in range(2))
    rows = summary(out)
    assert [row["way"] for row in rows] == ["stock", "0.5", "k-center 0.3"]
    assert rows[0]["questions"] == 2


def test_what_the_user_can_mend(data, tmp_path, capsys):
    out = ["--out", str(tmp_path / "out")]
    Image.new("RGB", (8, 8)).save(data / "a.png")
    lines = {
        "not JSON": "{",
        "no such picture: b.png": '{"picture": "b.png", "question": "?"}',
        "line 2: the id '7' is that of line 1, too": '{"picture": "a.png", "question": "?", "id": "7"}\n' * 2,
    }
    for message, line in lines.items():
        (data / "questions.jsonl").write_text(line)
        assert main(["eval", "--data", str(data), *out]) == 2, line
        error = capsys.readouterr().err
        assert message in error, line
        assert "Traceback" not in error
    assert main(["eval", "--data", str(data / "nowhere"), *out]) == 2
    assert "no such folder" in capsys.readouterr().err
    assert main(["eval", "--data", str(data), *out, "--limit", "0"]) == 2
    assert "--limit must be at least 1" in capsys.readouterr().err
    right = ["eval", "--data", str(data), *out]
    (data / "questions.jsonl").write_text('{"picture": "a.png", "question": "?"}')
    for words, message in {
        ("--max-running", "0"): "--max-running must be at least 1, got 0",
        ("--memory", "much"): "--memory must look like",
        ("--max-running", "1", "--memory", "1GiB"): "--memory is for questions that are answered at once",
    }.items():
        assert main([*right, *words]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert "loading" not in error


def test_answers_of_other_settings_are_refused(data, tmp_path, capsys):
    words = command(data, tmp_path, *RULE, "--limit", "1", "--no-stock")
    assert main([*words, "--max-new-tokens", "1"]) == 0
    assert main(words) == 2
    assert "holds answers of another run (max_new_tokens was 1, now 2)" in capsys.readouterr().err


def test_where_answers_cannot_be_written(data, capsys):
    for out in (data / "questions.jsonl", data / "questions.jsonl" / "out"):
        assert main(["eval", "--data", str(data), "--out", str(out)]) == 2
        assert capsys.readouterr().err.splitlines()[-1].startswith("trim-plugin eval: cannot write ")


def test_a_disk_that_gets_full_costs_no_answer(data, tmp_path, capsys, full_disk):
    out, file = tmp_path / "out", tmp_path / "out" / "answers-0.jsonl"
    words = command(data, out)
    assert main(words) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"trim-plugin eval: cannot write {file}: ")
    full_disk()
    lines = file.read_text().splitlines()
    assert 0 < len(lines) < 4
    assert main(words) == 0
    assert file.read_text().splitlines()[: len(lines)] == lines
    assert len(file.read_text().splitlines()) == 4


def test_a_broken_picture_is_its_questions_error(data, tmp_path, capsys):
    out = tmp_path / "out"
    (data / "text.png").write_text("no picture")
    with (data / "questions.jsonl").open("a") as file:
        file.write('{"picture": "text.png", "question": "What?", "id": "broken"}\n')
    words = command(data, out)
    assert main(words) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "question broken is left out: cannot read" in shown
    assert [row["questions"] for row in summary(out)] == [2, 2]
    (data / "text.png").write_bytes((data / examples()[0].picture.name).read_bytes())
    assert main(words) == 0  # mended: answered now, the others are not answered again
    assert [row["questions"] for row in summary(out)] == [3, 3]
    lines = [json.loads(line) for line in (out / "answers-0.jsonl").read_text().splitlines()]
    answered = [line["question"] for line in lines if not line["error"]]
    assert sorted(answered) == ["1", "1", "2", "2", "broken", "broken"]


def test_another_rule_adds_a_row(data, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(command(data, out, "--no-stock", *RULE)) == 0
    assert main(command(data, out, "--kept-share", "0.2")) == 0
    capsys.readouterr()
    assert main(command(data, out, "--no-stock", "--radius", "0.3")) == 0
    rows = summary(out)
    assert [row["way"] for row in rows] == ["stock", "0.5", "k-center 0.2", "radius 0.3"]
    shown = capsys.readouterr().out
    assert "k-center 0.2" in shown
    assert max(map(len, shown.splitlines())) <= 80
    page = (out / "report.html").read_text()
    assert all(row["way"] in page for row in rows)


def test_answers_say_what_was_asked(data, tmp_path):
    out = tmp_path / "out"
    assert main(command(data, out)) == 0
    lines = sorted(
        map(json.loads, (out / "answers-0.jsonl").read_text().splitlines()), key=lambda line: line["question"]
    )
    assert len(lines) == 4
    for answer, example in zip(lines[::2], examples(), strict=False):
        assert answer["asked"] == example.question
        assert answer["pictures"] == [example.picture.name]
        assert answer["right"] == [example.answer]


def test_one_file_of_rows_is_for_eval_and_for_batch(data, tmp_path, capsys):
    name = examples()[0].picture.name
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Read all digits."}]}]
    rows = [
        {"picture": name, "question": "How many?", "answer": "two"},
        {"id": "many", "pictures": [name, name], "question": "How many?", "max_new_tokens": 2},
        {"image": name, "question": "How many?"},
        {"images": [name], "messages": chat},
        {"question": "Hello"},
        {"question": "Hello again", "answer": ["two", 2]},
    ]
    file = data / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = ["--questions", str(file), "--top-k-ratio", "1.0", "--max-new-tokens", "4"]
    out = tmp_path / "out"
    assert main(["eval", "small", "--data", str(data), "--out", str(out), *asked]) == 0
    assert main(["batch", "small", "--out", str(tmp_path / "answers.jsonl"), *asked]) == 0
    by_batch = {
        row["id"]: row["answer"] for row in map(json.loads, (tmp_path / "answers.jsonl").read_text().splitlines())
    }
    logged = map(json.loads, (out / "answers-0.jsonl").read_text().splitlines())
    by_eval = {row["question"]: row["text"] for row in logged if row["way"] == "exact"}
    assert len(by_batch) == len(rows)
    assert by_eval == by_batch


def test_a_chat_that_names_other_pictures_is_its_questions_error(data, tmp_path, capsys):
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "?"}]}]
    row = {"id": "wrong", "image": examples()[0].picture.name, "messages": chat}
    with (data / "questions.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    assert main(command(data, tmp_path)) == 0
    assert "question wrong is left out: the prompt names 2 pictures" in " ".join(capsys.readouterr().out.split())


def test_variant_without_an_answer(data, tmp_path, capsys):
    """What others have answered is summed up all the same."""
    out = tmp_path / "out"
    words = command(data, out)
    assert main([*words, "--memory", "1KiB"]) == FAILED_ROWS
    printed = capsys.readouterr()
    assert printed.err.splitlines()[-1].startswith("trim-plugin eval: no question was answered with 0.5. Mend what ")
    assert "is left out" not in printed.out
    assert [(row["way"], row["questions"]) for row in summary(out)] == [("stock", 2)]
    for text in (" ".join(printed.out.split()), (out / "summary.md").read_text(), (out / "report.html").read_text()):
        assert "0.5 has answered none of 2 questions. The first error: This request may take " in text
    assert "could not be answered" not in (out / "report.html").read_text()
    assert main(words) == 0  # mended
    assert [row["questions"] for row in summary(out)] == [2, 2]
    assert "has answered none" not in (out / "summary.md").read_text()


def test_nothing_answered_by_anybody(data, tmp_path, capsys):
    out = tmp_path / "out"
    for picture in data.glob("*.png"):
        picture.write_text("no picture")
    assert main(command(data, out)) == FAILED_ROWS
    printed = capsys.readouterr()
    last = printed.err.splitlines()[-1]
    assert last.startswith("trim-plugin eval: no question was answered with stock, 0.5. Mend what ")
    assert "question 1 is left out: cannot read" in " ".join(printed.out.split())
    assert summary(out) == []
    written, page = (out / "summary.md").read_text(), (out / "report.html").read_text()
    for text in (written, page):
        for name in ("stock", "0.5"):
            assert f"{name} has answered none of 2 questions. The first error: cannot read" in text
    assert "|" not in written
    assert "<table>" not in page
    assert "could not be answered: 2" in page


def test_no_question_was_answered_by_all(data, tmp_path, capsys):
    """Each variant has answered another one, so nothing can be compared."""
    words = command(data, tmp_path)
    assert main(words) == 0
    capsys.readouterr()
    file = tmp_path / "answers-0.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    for line in lines:
        if (line["question"] == "1") == (line["way"] == "stock"):
            line |= {"text": "", "error": "lost"}
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for picture in data.glob("*.png"):
        picture.write_text("no picture")
    assert main(words) == FAILED_ROWS
    said = "no question was answered by all variants, so there is nothing to compare. Mend what "
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"trim-plugin eval: {said}")
    said = "No question was answered with all of stock, 0.5, so there is nothing to compare.\n"
    assert (tmp_path / "summary.md").read_text() == said


def test_what_an_earlier_run_could_not_answer_is_not_this_run_s_failure(data, tmp_path, capsys):
    assert main(command(data, tmp_path, "--no-stock", *RULE, "--memory", "1KiB")) == FAILED_ROWS
    assert main(command(data, tmp_path, "--top-k-ratio", "0.3")) == 0
    assert [row["way"] for row in summary(tmp_path)] == ["stock", "0.3"]
    assert "0.5 has answered none of 2 questions" in (tmp_path / "summary.md").read_text()
