import argparse
import importlib.metadata

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import LlamaConfig

from trim_plugin import commands
from trim_plugin.commands import UserError, common, loading
from trim_plugin.embedded import SMALL_MODEL

from ..random_models import random_config


def test_a_picture_is_opened_or_the_user_is_told(tmp_path):
    Image.new("L", (4, 3)).save(tmp_path / "a.png")
    (opened,) = common.pictures_of([str(tmp_path / "a.png")])
    assert opened.mode == "RGB"
    (tmp_path / "b.png").write_text("text")
    for name, message in (("b.png", "not a picture"), ("c.png", "no such picture")):
        with pytest.raises(UserError, match=message):
            common.pictures_of([str(tmp_path / "a.png"), str(tmp_path / name)])


@pytest.mark.parametrize(
    "address", ["https://host/a.png", "HTTP://host/a.jpg", "s3://bucket/a.png", "data:/x", "hf://a/b"]
)
@pytest.mark.parametrize(("files", "option"), [(common.pictures_of, "--image"), (common.encoded_files, "--pictures")])
def test_addresses_are_not_fetched(files, option, address):
    with pytest.raises(UserError, match=f"{option} {address}: addresses are not fetched. Download the picture"):
        files([address])


def test_what_looks_like_an_address_may_be_a_file(tmp_path, monkeypatch):
    """A drive's letter, and a colon in a name."""
    monkeypatch.chdir(tmp_path)
    Image.new("L", (4, 3)).save(tmp_path / "a:b.png")
    assert len(common.pictures_of(["a:b.png"])) == 1
    with pytest.raises(UserError, match="no such picture"):
        common.pictures_of(["C:/pictures/a.png"])


def test_a_picture_given_as_an_encoded_file_and_the_reverse(tmp_path):
    picture, encoded = tmp_path / "photo.jpg", tmp_path / "photo.safetensors"
    Image.new("RGB", (8, 8)).save(picture)
    save_file({"states": torch.zeros(1)}, encoded)
    with pytest.raises(UserError, match=r"photo\.jpg: this is a picture, not a file .* Give it as --image"):
        common.encoded_files([str(picture)])
    with pytest.raises(UserError, match=r"photo\.safetensors: this is no picture\. A file that .* goes to --pictures"):
        common.pictures_of([str(encoded)])
    assert common.encoded_files([str(encoded)]) == [encoded]
    with pytest.raises(UserError, match="no such file of encoded pictures: nowhere"):
        common.encoded_files(["nowhere"])


def test_a_model_behind_the_pictures_is_told_where_it_belongs(tmp_path):
    random_config().save_pretrained(tmp_path)
    for model in ("small", str(tmp_path)):
        with pytest.raises(UserError, match=f"--image {model}: this is a model. It goes first"):
            common.pictures_of([model])


def test_what_to_install_is_named_by_its_packages():
    common.needs("a test", "pytest", "pytest")
    with pytest.raises(
        UserError, match=r"a test needs no_such, which is not installed. Install it: pip install some more$"
    ):
        common.needs("a test", "no_such", "some", "more")


@pytest.mark.parametrize("text", ["0", "-0.1", "1.01", "nan", "inf", "half", ""])
def test_shares_are_read_and_what_is_none_is_named(text):
    parser = argparse.ArgumentParser()
    common.add_share(parser, "--kept-share", "x", action="append")
    words = ["--kept-share=1", "--kept-share=0.25", "--kept-share=1e-3"]
    assert parser.parse_args(words).kept_share == [1.0, 0.25, 0.001]
    with pytest.raises(UserError, match=rf"--kept-share must be a number in \(0, 1\], got {text}$"):
        parser.parse_args([f"--kept-share={text}"])


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "many", "9" * 5000])
def test_counts_are_read_and_what_is_none_is_named(text):
    parser = argparse.ArgumentParser()
    common.add_count(parser, "--limit", "x", default=3)
    assert [parser.parse_args(words).limit for words in ([], ["--limit", "1"])] == [3, 1]
    with pytest.raises(UserError, match=f"--limit must be at least 1, got {text}$"):
        parser.parse_args([f"--limit={text}"])


def test_devices_that_are_not_here():
    assert loading.check_device("cpu") == "cpu"
    for device in ("cuda:77", "abacus"):
        with pytest.raises(UserError, match=f"--device {device} cannot be used here: "):
            loading.check_device(device)


def test_only_mllama_passes(tmp_path):
    loading.model_numbers(str(SMALL_MODEL))
    random_config().save_pretrained(tmp_path / "mllama")
    loading.model_numbers(str(tmp_path / "mllama"))
    LlamaConfig(num_hidden_layers=1).save_pretrained(tmp_path / "llama")
    with pytest.raises(UserError, match="is a llama model"):
        loading.model_numbers(str(tmp_path / "llama"))
    with pytest.raises(UserError, match="cannot load"):
        loading.model_numbers(str(tmp_path / "nothing"))


def test_without_an_installed_loader_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **_: ())
    with pytest.raises(ImportError, match="pip install -e"):
        loading.plugged_in("trim_plugin.loaders", "pretrained")


def test_the_loader_is_found_by_its_group(monkeypatch):
    asked = []

    class Entry:
        def load(self):
            return "the loader"

    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **query: asked.append(query) or [Entry()])
    assert loading.plugged_in("trim_plugin.loaders", "pretrained") == "the loader"
    assert asked == [{"group": "trim_plugin.loaders", "name": "pretrained"}]


def test_an_error_is_one_line():
    assert commands.first_line(ValueError("\n one\n two")) == "one"
    assert commands.first_line(ValueError()) == "ValueError"
