"""`trim-plugin encode` and `generate --pictures`: one command writes what the other answers questions about."""

import errno
import os

import pytest
import torch
from PIL import Image

from trim_plugin import KCenter, Pictures, encode_pictures, open_picture
from trim_plugin.cli import main
from trim_plugin.embedded import examples, load_small_model

PAGES = [str(example.picture) for example in examples()[:3]]


def encode(*options):
    return main(["encode", *map(str, options)])


@pytest.mark.parametrize(
    ("options", "rule"),
    [((), None), (("--kept-share", "0.25"), KCenter(0.25)), (("--radius", "0.3"), KCenter(radius=0.3))],
)
def test_the_file_holds_what_the_pictures_give(tmp_path, capsys, options, rule):
    out = tmp_path / "pages.safetensors"
    assert encode("small", "--image", *PAGES[:2], "--image", PAGES[2], *options, "--out", out) == 0
    found, expected = Pictures.load(out), encode_pictures(*load_small_model(), PAGES, rule)
    torch.testing.assert_close(found.states, expected.states, rtol=0, atol=0)
    assert found.index.equal(expected.index)
    assert found.sizes.equal(expected.sizes)
    assert (found.tiles, found.rule) == (expected.tiles, expected.rule)
    shown = " ".join(capsys.readouterr().out.split())
    for page in PAGES:
        assert page.rsplit("/", 1)[-1] + ": " in shown
    total = f"all {len(found.index)}" if rule is None else f"{len(found.index)} of 325"
    assert f"3 pictures: 5 tiles, {total} visual tokens, " in shown


def test_the_tower_is_given_its_share(tmp_path):
    out = tmp_path / "pages.safetensors"
    assert encode("small", "--image", PAGES[0], "--tower-share", "0.5", "--out", out) == 0
    expected = encode_pictures(*load_small_model(), PAGES[:1], tower_share=0.5)
    assert Pictures.load(out).states.equal(expected.states)
    assert Pictures.load(out).tower_share == 0.5


def test_generate_answers_about_the_file_without_the_tower(tmp_path, capsys, monkeypatch):
    from transformers.models.mllama.modeling_mllama import MllamaVisionModel

    example = examples()[0]
    assert encode("--image", example.picture, "--out", tmp_path / "whole") == 0
    assert encode("--image", example.picture, "--kept-share", "0.25", "--out", tmp_path / "quarter") == 0
    capsys.readouterr()
    question = ["--prompt", example.question]
    assert main(["generate", "--image", str(example.picture), *question, "--top-k-ratio", "1"]) == 0
    expected = capsys.readouterr().out
    monkeypatch.setattr(MllamaVisionModel, "forward", lambda *_, **__: pytest.fail("the tower is called"))
    assert main(["generate", "small", "--pictures", str(tmp_path / "whole"), *question]) == 0
    assert capsys.readouterr().out == expected
    assert main(["generate", "--pictures", str(tmp_path / "quarter"), *question]) == 0
    answer, report = capsys.readouterr().out.split("\n\n")
    assert answer == expected.split("\n\n")[0]
    assert report.startswith("visual tokens: 17 kept of 65 visible")
    files = [str(tmp_path / "whole"), str(tmp_path / "quarter")]
    assert main(["generate", "--pictures", *files, *question, "--top-k-ratio", "0.1", "--max-new-tokens", "2"]) == 0
    assert "520 in all" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--image", "nowhere.png"), "no such picture: nowhere.png"),
        (("--image", PAGES[0], "--tower-share", "2"), "--tower-share must be a number in (0, 1], got 2"),
        (("--image", PAGES[0], "--kept-share", "0"), "--kept-share must be a number in (0, 1], got 0"),
        (("--image", PAGES[0], "--radius", "2"), "--radius must be a number in (0, 1], got 2"),
        (("--image", PAGES[0], "--radius", "0.2", "--kept-share", "0.5"), "--kept-share and --radius are both given"),
        (("--image", PAGES[0], "--model", "small", "--weights", "nf4", "--device", "abacus"), "--device abacus"),
        (("nothing-here", "--image", PAGES[0]), "cannot load nothing-here"),
    ],
)
def test_wrong_options_of_encode_are_one_line(tmp_path, capsys, options, message):
    assert encode(*options, "--out", tmp_path / "x.safetensors") == 2
    is_one_line(capsys, "encode", message)
    assert list(tmp_path.iterdir()) == []


def test_files_that_cannot_be_written(tmp_path, capsys, monkeypatch):
    assert encode("--image", PAGES[0], "--out", tmp_path / "no" / "x") == 2
    is_one_line(capsys, "encode", "--out: no such folder")
    (tmp_path / "folder").mkdir()
    assert encode("--image", PAGES[0], "--out", tmp_path / "folder") == 2
    is_one_line(capsys, "encode", "is a folder, a pipe or a device; give a file")

    os.mkfifo(tmp_path / "pipe")
    assert encode("--image", PAGES[0], "--out", tmp_path / "pipe") == 2
    is_one_line(capsys, "encode", "is a folder, a pipe or a device; give a file")
    assert (tmp_path / "pipe").is_fifo()

    def full(*given):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert encode("--image", PAGES[0], "--out", tmp_path / "x.safetensors") == 2
    is_one_line(capsys, "encode", "cannot write")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["folder", "pipe"]


def test_wrong_pictures_of_generate_are_one_line(tmp_path, capsys):
    other = tmp_path / "other.safetensors"
    pictures = encode_pictures(*load_small_model(), [open_picture(PAGES[0])])
    pictures.mark = pictures.mark * 1.1
    pictures.save(other)
    (tmp_path / "cut").write_bytes(other.read_bytes()[:900])
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    cases = [
        (("--pictures", tmp_path / "none"), "no such file of encoded pictures"),
        (("--pictures", tmp_path), "no such file of encoded pictures"),
        (("--pictures", tmp_path / "a.png"), "this is a picture, not a file that `trim-plugin encode` wrote"),
        (("--pictures", tmp_path / "cut"), "cut off or damaged"),
        (("--pictures", other), "encoded by another model"),
        (("--pictures", other, "--image", PAGES[0]), "--image and --pictures are both given"),
        (("--pictures", other, "--prompt", "<|image|><|image|>?"), "has 2 pictures"),
    ]
    for options, message in cases:
        assert main(["generate", "--prompt", "?", *map(str, options)]) == 2, options
        is_one_line(capsys, "generate", message)


def is_one_line(capsys, command, message):
    lines = [line for line in capsys.readouterr().err.strip().splitlines() if "it/s" not in line]
    (line,) = [line for line in lines if not line.endswith(": loading small ...")]
    assert line.startswith(f"trim-plugin {command}: ")
    assert message in line
