import re
import subprocess
import sys

import pytest
from PIL import Image

from trim_plugin.cli import main
from trim_plugin.embedded import examples


def test_demo_needs_no_argument(tmp_path):
    """As a user runs it: a process of its own, in some folder."""
    result = subprocess.run(
        [sys.executable, "-m", "trim_plugin.cli", "demo"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    for example in examples():
        assert example.picture.name in result.stdout
    for way in ("stock", "exact", "ratio 0.15", "ratio 0.1"):
        assert result.stdout.count(way) >= len(examples())
    with Image.open(tmp_path / "trim-demo.png") as picture:
        assert picture.size[0] > 500
    assert "Warning" not in result.stderr
    first = examples()[0].picture.name
    said = re.search(
        rf"A second question about {first}: (\d+) ms .* tower, (\d+) ms without it", unwrapped(result.stdout)
    )
    assert said is not None
    assert int(said[1]) > 0 < int(said[2])


def test_demo_with_a_picture_of_ones_own(tmp_path, capsys):
    picture, out = tmp_path / "mine.png", tmp_path / "kept.png"
    Image.new("RGB", (90, 33), "navy").save(picture)
    arguments = [
        "demo",
        "--image",
        str(picture),
        "--prompt",
        "Which digit is red?",
        "--top-k-ratio",
        "0.3",
        "--out",
        str(out),
    ]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert "mine.png" in shown
    assert "ratio 0.3" in shown
    assert "ratio 0.15" not in shown
    assert out.exists()


def unwrapped(text: str) -> str:
    return " ".join(text.split())


def answers_of(table: str) -> dict[str, str]:
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in table.splitlines() if "│" in line]
    return {row[0]: row[1] for row in rows if row[0]}


def test_exact_answers_are_stocks(tmp_path, capsys):
    picture = str(examples()[0].picture)
    assert main(["demo", "--image", picture, "--out", str(tmp_path / "x.png"), "--top-k-ratio", "1.0"]) == 0
    answers = answers_of(capsys.readouterr().out)
    assert answers["stock"]
    assert answers["exact"] == answers["stock"]


@pytest.fixture
def llama_folder(tmp_path):
    from transformers import LlamaConfig

    LlamaConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1).save_pretrained(
        tmp_path / "llama"
    )
    return tmp_path / "llama"


def test_what_the_user_can_mend_is_one_line_and_status_2(tmp_path, llama_folder, capsys):
    text = tmp_path / "text.png"
    text.write_text("not a picture")
    cases = [
        (["--image", str(tmp_path / "none.png")], "no such picture"),
        (["--image", str(text)], "not a picture"),
        (["--image", str(tmp_path)], "cannot read the picture"),
        (["--model", str(llama_folder)], "is a llama model; trim-plugin needs an Mllama"),
        (["--model", str(tmp_path / "nothing-here")], "cannot load"),
        (["--top-k-ratio", "0"], r"--top-k-ratio must be a number in (0, 1], got 0"),
        (["--top-k-ratio", "1.5"], "got 1.5"),
        (["--top-k-ratio", "many"], "got many"),
        (["--out", str(tmp_path / "no" / "x.png")], "--out: no such folder"),
        (["--out", str(tmp_path / "x.txt")], "--out must end in"),
        (["--device", "cuda:7"], "--device cuda:7 cannot be used here"),
        (["--device", "meta"], "--device meta holds no numbers"),
        (["--max-new-tokens", "0"], "--max-new-tokens must be at least 1, got 0"),
        (["--top-k-ratio", "0.2", "--top-k-ratio", ".2"], "--top-k-ratio: the same value is given twice"),
        (["--radius", "2"], "--radius must be a number in (0, 1], got 2"),
        (["--weights", "float32"], "invalid choice: 'float32'"),
        (["--bach", "3"], "unrecognized arguments: --bach 3"),
    ]
    for arguments, message in cases:
        assert main(["demo", *arguments]) == 2, arguments
        error = capsys.readouterr().err
        assert message in error, arguments
        lines = [line for line in error.strip().splitlines() if "it/s" not in line]
        assert len(lines) == 1, error
        assert "Traceback" not in error
