import os
import re
import subprocess
import sys

import pytest
from PIL import Image

from trim_plugin.cli import main
from trim_plugin.compat import cache_of
from trim_plugin.embedded import ask, examples, load_small_model

QUESTIONS = [example.question for example in examples()]
#: The default rule.
NAME = "share 0.35"


def rows_of(shown: str) -> list[list[str]]:
    """The cells of a table's rows: columns are two spaces apart, a cell of several lines stays in its column."""
    lines = shown.splitlines()
    rule = next(number for number, line in enumerate(lines) if line.startswith("───"))
    starts = [match.start() for match in re.finditer(r"(?:(?<=\s\s)|^)\S", lines[rule - 1])]
    return [
        [line[start:end].strip() for start, end in zip(starts, [*starts[1:], None], strict=True)]
        for line in [lines[rule - 1], *lines[rule + 1 :]]
    ]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """As a user runs it: a process of its own, in some folder."""
    folder = tmp_path_factory.mktemp("demo")
    environment = {**os.environ, "COLUMNS": "80"}
    command = [sys.executable, "-m", "trim_plugin.cli", "demo"]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result, folder


def test_demo_needs_no_argument(demo):
    result, folder = demo
    with Image.open(folder / "trim-demo.png") as picture:
        assert picture.size[0] > 500
    assert result.stderr.splitlines() == ["trim-plugin demo: loading small ..."]


def test_the_demo_is_one_table_and_three_sentences(demo):
    shown = demo[0].stdout
    assert max(map(len, shown.splitlines())) <= 80
    assert sum(line.startswith("───") for line in shown.splitlines()) == 1
    head, *rows = rows_of(shown)
    assert head == ["question", "true", "stock", "exact", NAME, "share 0.1"]
    assert unwrapped(" ".join(row[0] for row in rows)).startswith(" ".join(QUESTIONS))
    sentences = unwrapped(shown.split("of stock's ", 1)[1]).split(" Of stock's 6 answers,")
    said = "Of stock's 6 answers," + sentences[1]
    assert len(re.findall(r"\.(?= [A-Z]|$)", said)) == 3, said


def test_the_demo_sums_up_what_it_shows(demo):
    """Against generations of one's own: answers, tokens and bytes."""
    shown = demo[0].stdout
    model, processor = load_small_model()
    same, held, stock = {NAME: 0}, {NAME: 0}, 0
    for example in examples():
        inputs = ask(processor, example.question, example.picture)
        texts = {}
        for name, settings in (("stock", {}), (NAME, {"cache_implementation": "trimmed"})):
            output = model.generate(
                **inputs, max_new_tokens=128, do_sample=False, return_dict_in_generate=True, **settings
            )
            texts[name] = processor.decode(
                output.sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
            )
        same[NAME] += texts["stock"] == texts[NAME]
        report = cache_of(output).report()
        held[NAME] += report.cross_kv_bytes
        stock += report.stock_cross_kv_bytes
    said = unwrapped(shown)
    share = round(100 * held[NAME] / stock)
    assert f"{NAME} gives {same[NAME]} with {share} %" in said
    assert "exact gives 6 with " in said
    assert re.search(r"takes \d+ ms instead of \d+ ms to its first token if the picture was encoded once", said)


def test_demo_with_pictures_of_ones_own(tmp_path, capsys):
    picture, out = tmp_path / "mine.png", tmp_path / "kept.png"
    Image.new("RGB", (90, 33), "navy").save(picture)
    words = ["demo", "--prompt", "Which digit is red?", "--top-k-ratio", "0.3", "--out", str(out)]
    assert main([*words, "--image", str(picture)]) == 0
    shown = capsys.readouterr().out
    assert "ratio 0.3" in shown
    assert NAME not in shown
    assert out.exists()
    (one,) = re.findall(r"visual tokens held, mean +(\d+)", shown)
    assert main([*words, "--image", str(picture), str(examples()[0].picture), "--max-new-tokens", "2"]) == 0
    (both,) = re.findall(r"visual tokens held, mean +(\d+)", capsys.readouterr().out)
    assert int(both) == 2 * int(one)  # both are read by one question


def unwrapped(text: str) -> str:
    return " ".join(text.split())


def test_exact_answers_are_stocks(tmp_path, capsys):
    picture = str(examples()[0].picture)
    assert main(["demo", "--image", picture, "--out", str(tmp_path / "x.png"), "--top-k-ratio", "1.0"]) == 0
    shown = capsys.readouterr().out
    head, first, *_ = rows_of(shown)
    assert head == ["question", "stock", "exact"]
    assert first[1]
    assert first[2] == "same"
    assert "these variants choose nothing" in unwrapped(shown)


def test_what_the_user_can_mend_is_one_line_and_status_2(tmp_path, capsys):
    text = tmp_path / "text.png"
    text.write_text("not a picture")
    cases = [
        (["--image", str(tmp_path / "none.png")], "no such picture"),
        (["--image", str(text)], "not a picture"),
        (["--image", str(tmp_path)], "cannot read the picture"),
        (["--model", str(tmp_path / "nothing-here")], "cannot load"),
        (["--top-k-ratio", "0"], r"--top-k-ratio must be a number in (0, 1], got 0"),
        (["--out", str(tmp_path / "no" / "x.png")], "--out: no such folder"),
        (["--out", str(tmp_path / "x.txt")], "--out must end in"),
        (["--device", "cuda:7"], "--device cuda:7 cannot be used here"),
        (["--device", "meta"], "--device meta holds no numbers"),
        (["--max-new-tokens", "0"], "--max-new-tokens must be at least 1, got 0"),
        (["--top-k-ratio", "0.2", "--top-k-ratio", ".2"], "--top-k-ratio: the same value is given twice"),
        (["--radius", "2"], "--radius must be a number in (0, 1], got 2"),
        (["--weights", "float32"], "invalid choice: 'float32'"),
    ]
    for arguments, message in cases:
        assert main(["demo", *arguments]) == 2, arguments
        error = capsys.readouterr().err
        assert message in error, arguments
        lines = [line for line in error.strip().splitlines() if "it/s" not in line and not line.endswith("small ...")]
        assert len(lines) == 1, error
        assert "Traceback" not in error
