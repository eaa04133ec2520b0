import importlib.util

import pytest
from PIL import Image

from trim_plugin.cli import main
from trim_plugin.embedded import examples


def generate(*options):
    return main(["generate", *map(str, options)])


@pytest.mark.parametrize("options", [(), ("--kv-quantization", "nf4"), ("--weights", "nf4"), ("--top-k-ratio", "1")])
def test_it_answers_and_reports(capsys, options):
    example = examples()[0]
    assert generate("small", "--image", example.picture, "--prompt", example.question, *options) == 0
    shown = capsys.readouterr().out
    answer, report = shown.split("\n\n")
    assert answer
    assert report.startswith("visual tokens: ")
    assert "cross-attention KV:" in report


def test_the_answer_is_that_of_the_model(capsys):
    from trim_plugin.embedded import ask, load_small_model

    example = examples()[0]
    assert generate("small", "--weights", "fp32", "--image", example.picture, "--prompt", example.question) == 0
    model, processor = load_small_model()
    inputs = ask(processor, example.question, example.picture)
    output = model.generate(**inputs, cache_implementation="trimmed", do_sample=False)
    expected = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert capsys.readouterr().out.splitlines()[0].strip() == expected.strip()


def test_two_pictures_and_none(capsys, tmp_path):
    Image.new("RGB", (50, 90), "navy").save(tmp_path / "other.png")
    pictures = ("--image", examples()[0].picture, "--image", tmp_path / "other.png")
    assert generate("small", *pictures, "--prompt", "Read all digits.", "--max-new-tokens", 2) == 0
    assert "520 in all" in capsys.readouterr().out
    assert generate("small", "--prompt", "Which digit is red?", "--max-new-tokens", 2) == 0
    assert "no visual tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("small", "--prompt", "x", "--image", "nowhere.png"), "no such picture: nowhere.png"),
        (("small", "--prompt", "x", "--top-k-ratio", "2"), "--top-k-ratio must be a number in (0, 1], got 2"),
        (("small", "--prompt", "x", "--max-new-tokens", "0"), "--max-new-tokens must be at least 1"),
        (("small", "--prompt", "x", "--max-memory", "cpu"), "--max-memory must look like"),
        (("small", "--prompt", "x", "--adapter", "nowhere"), "no adapter in nowhere"),
        (("no/such folder", "--prompt", "x"), "cannot load no/such folder"),
    ],
)
def test_wrong_options_are_one_line(capsys, options, message):
    assert generate(*options) == 2
    shown = capsys.readouterr().err.strip().splitlines()
    assert message in shown[-1]
    assert shown[-1].startswith("trim-plugin generate: ")
    assert not any("Traceback" in line for line in shown)


def test_without_bitsandbytes(capsys, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "bitsandbytes" else find_spec(name, *rest)
    )
    for option in (("--weights", "nf4"), ("--kv-quantization", "int8")):
        assert generate("small", "--prompt", "x", *option) == 2
        assert "pip install 'trim-plugin[quantization]'" in capsys.readouterr().err
