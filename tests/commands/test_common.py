import importlib.metadata

import pytest
from PIL import Image
from transformers import LlamaConfig

from trim_plugin.commands import UserError, common, loading
from trim_plugin.embedded import SMALL_MODEL

from ..random_models import random_config


def test_a_picture_is_opened_or_the_user_is_told(tmp_path):
    Image.new("L", (4, 3)).save(tmp_path / "a.png")
    assert common.picture_or_error(tmp_path / "a.png").mode == "RGB"
    (tmp_path / "b.png").write_text("text")
    for name, message in (("b.png", "not a picture"), ("c.png", "no such picture")):
        with pytest.raises(UserError, match=message):
            common.picture_or_error(tmp_path / name)


@pytest.mark.parametrize("text", ["0", "-0.1", "1.01", "nan", "inf", "half", ""])
def test_shares_that_are_none(text):
    with pytest.raises(UserError, match=r"--kept-share must be a number in \(0, 1\], got "):
        common.check_ratio(text, "--kept-share")


def test_shares_are_read():
    assert [common.check_ratio(text) for text in ("1", "0.25", "1e-3")] == [1.0, 0.25, 0.001]


def test_devices_that_are_not_here():
    assert loading.check_device("cpu") == "cpu"
    for device in ("cuda:77", "abacus"):
        with pytest.raises(UserError, match=f"--device {device} cannot be used here: "):
            loading.check_device(device)


def test_only_mllama_passes(tmp_path):
    loading.check_is_mllama(str(SMALL_MODEL))
    random_config().save_pretrained(tmp_path / "mllama")
    loading.check_is_mllama(str(tmp_path / "mllama"))
    LlamaConfig(num_hidden_layers=1).save_pretrained(tmp_path / "llama")
    with pytest.raises(UserError, match="is a llama model"):
        loading.check_is_mllama(str(tmp_path / "llama"))
    with pytest.raises(UserError, match="cannot load"):
        loading.check_is_mllama(str(tmp_path / "nothing"))


def test_without_an_installed_loader_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **_: ())
    with pytest.raises(ImportError, match="pip install -e"):
        loading.pretrained_loader()


def test_the_loader_is_found_by_its_group(monkeypatch):
    asked = []

    class Entry:
        def load(self):
            return "the loader"

    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **query: asked.append(query) or [Entry()])
    assert loading.pretrained_loader() == "the loader"
    assert asked == [{"group": "trim_plugin.loaders", "name": "pretrained"}]


def test_an_error_is_one_line():
    assert common.first_line(ValueError("\n one\n two")) == "one"
    assert common.first_line(ValueError()) == "ValueError"
