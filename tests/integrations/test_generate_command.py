import pytest
from PIL import Image

from trim_plugin.cli import main
from trim_plugin.embedded import examples


def generate(*options):
    return main(["generate", *map(str, options)])


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--kv-quantization", "nf4"),
        ("--weights", "nf4"),
        ("--top-k-ratio", "1"),
        ("--kept-share", "0.2"),
        ("--radius", "0.2"),
        ("--top-k-ratio", "0.3", "--no-merge"),
        ("--device", "cpu", "--max-memory", "cpu=1GiB"),
    ],
)
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
    first, second = examples()[0].picture, tmp_path / "other.png"
    for pictures in (("--image", first, "--image", second), ("--image", first, second)):
        assert generate("small", *pictures, "--prompt", "Read all digits.", "--max-new-tokens", 2) == 0
        assert "520 in all" in capsys.readouterr().out
    assert generate("small", "--prompt", "Which digit is red?", "--max-new-tokens", 2) == 0
    assert "no visual tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("small", "--prompt", "x", "--image", "nowhere.png"), "no such picture: nowhere.png"),
        (("small", "--prompt", "x", "--tower-share", "2"), "--tower-share must be a number in (0, 1], got 2"),
        (
            ("small", "--prompt", "x", "--pictures", "x", "--tower-share", "0.5"),
            "--tower-share and --pictures are both given",
        ),
        (("small", "--prompt", "x", "--top-k-ratio", "2"), "--top-k-ratio must be a number in (0, 1], got 2"),
        (("small", "--prompt", "x", "--max-new-tokens", "0"), "--max-new-tokens must be at least 1"),
        (("small", "--prompt", "x", "--max-memory", "cpu"), "--max-memory must look like"),
        (("small", "--prompt", "x", "--adapter", "nowhere"), "no adapter in nowhere: there is no such folder"),
        (("small", "--prompt", "x", "--device", "cuda"), "--device cuda cannot be used here"),
        (
            ("small", "--prompt", "x", "--radius", "0.3", "--kept-share", "0.1"),
            "several rules are given: k-center 0.1, radius 0.3",
        ),
        (("nothing-here", "--prompt", "x"), "cannot load nothing-here: there is no such folder"),
        (("no/such folder", "--prompt", "x"), "cannot load no/such folder"),
    ],
)
def test_wrong_options_are_one_line(capsys, options, message):
    assert generate(*options) == 2
    shown = capsys.readouterr().err.strip().splitlines()
    assert message in shown[-1]
    assert shown[-1].startswith("trim-plugin generate: ")
    assert not any("Traceback" in line for line in shown)


def test_a_bad_adapter_is_blamed_on_the_adapter(capsys, tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    assert generate("small", "--prompt", "x", "--adapter", tmp_path) == 2
    error = capsys.readouterr().err
    assert f"--adapter {tmp_path}: The adapter {tmp_path} is of type IA3; only LORA" in error
    (tmp_path / "adapter_config.json").write_text("{")
    assert generate("small", "--prompt", "x", "--adapter", tmp_path) == 2
    assert f"--adapter {tmp_path}: The adapter {tmp_path} is damaged: adapter_config.json" in capsys.readouterr().err


def test_a_rule_is_the_one_that_was_asked_for(capsys):
    example = examples()[0]
    kept = {}
    for option, value in (("--kept-share", "0.2"), ("--top-k-ratio", "1")):
        assert generate("--image", example.picture, "--prompt", example.question, option, value) == 0
        kept[option] = int(capsys.readouterr().out.split("visual tokens: ")[1].split()[0])
    assert kept == {"--kept-share": 13, "--top-k-ratio": 65}
