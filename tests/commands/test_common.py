import argparse
import importlib.metadata

import pytest
from PIL import Image

from trim_plugin import commands
from trim_plugin.commands import UserError, common, loading

from ..random_models import random_config


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


def test_a_model_behind_the_pictures_is_told_where_it_belongs(tmp_path):
    random_config().save_pretrained(tmp_path)
    for model in ("small", str(tmp_path)):
        with pytest.raises(UserError, match=f"--image {model}: this is a model. It goes first"):
            common.pictures_of([model])


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
