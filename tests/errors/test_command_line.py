"""What the command line says of a slip, before anything is loaded; names as in docs/errors.md."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from trim_plugin.cli import main


@pytest.fixture
def said(capsys):
    """What a call says that ends with 2: one line, and none before it that says that a model is being loaded."""

    def call(*words):
        assert main([str(word) for word in words]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"trim-plugin {words[0]}: ")
        return line

    return call


ASK = ("generate", "--prompt", "?")


def test_command_picture_is_an_address(said):
    message = "--image {}://host/a.png: addresses are not fetched. Download the picture, then give the file"
    for command, scheme in ((("demo",), "http"), (("encode", "--out", "x"), "http"), (ASK, "https")):
        assert message.format(scheme) in said(*command, "--image", f"{scheme}://host/a.png")


def test_command_picture_given_as_encoded(said, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "photo.jpg")
    line = said(*ASK, "--pictures", tmp_path / "photo.jpg")
    assert "photo.jpg: this is a picture, not a file that `trim-plugin encode` wrote. Give it as --image" in line


def test_command_encoded_given_as_picture(said, tmp_path):
    save_file({"states": torch.zeros(1)}, tmp_path / "document.safetensors")
    line = said(*ASK, "--image", tmp_path / "document.safetensors")
    assert "document.safetensors: this is no picture. A file that `trim-plugin encode` wrote goes to --pictures" in line


def test_command_model_behind_the_pictures(said, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    line = said(*ASK, "--image", tmp_path / "a.png", "small")
    assert "--image small: this is a model. It goes first: trim-plugin COMMAND small --image FILE" in line


def test_command_model_given_twice(said):
    for command in (ASK, ("demo",), ("plan",), ("serve",), ("eval", "--data", ".")):
        assert "the model is given twice: a and b" in said(*command, "--model", "a", "--model", "b")


def test_command_memory_for_one_at_a_time(said, data):
    line = said("eval", "--data", data, "--max-running", "1", "--memory", "8GiB")
    assert "--memory is for questions that are answered at once, but --max-running is 1. Leave one out" in line


def test_command_model_not_found(said):
    line = said(*ASK, "--model", "./nowhere")
    assert "cannot load ./nowhere: there is no such folder, and a hub id looks like owner/name" in line


def test_command_model_gated(said, monkeypatch):
    import types

    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError

    answer = types.SimpleNamespace(status_code=401, headers={}, request=types.SimpleNamespace(url="x"), url="x")

    def refused(*_, **__):
        raise GatedRepoError("401", response=answer)

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: None)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: None)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refused)
    for command in (ASK, ("plan",), ("demo",)):
        line = said(*command, "--model", "org/gated")
        assert "cannot load org/gated: it is a gated model, and the hub does not give it to you" in line
        assert "Ask for access at https://huggingface.co/org/gated, then log in with your token: hf auth login" in line


def test_command_another_architecture(said, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    for command in (ASK, ("plan",)):
        line = said(*command, "--model", tmp_path)
        assert f"{tmp_path} is a llama model; trim-plugin needs an Mllama (Llama-3.2-Vision) model" in line


def test_command_size_without_unit(said):
    assert "--memory needs a unit: 24GiB, 24GB or 24MiB, got 24" in said("plan", "--memory", "24")
    assert "--max-memory 0 needs a unit: 20GiB, 20GB or 20MiB, got 20" in said(*ASK, "--max-memory", "0=20")


def test_command_weights_do_not_fit(capsys):
    assert main(["plan", "--model", "90b", "--memory", "24GiB", "--json"]) == 0
    for variant in json.loads(capsys.readouterr().out)["ways"]:
        assert variant["largest_batch"] == 0
        assert variant["reason"] == (
            "the weights alone take 165.02 GiB in bf16, and with a reserve of 1.00 GiB that is more than 24.00 GiB. They fit in "
            "no format, only spread over devices of this size: at least 8 in bf16 or 2 in nf4"
        )


@pytest.mark.parametrize(
    ("words", "missing", "install"),
    [
        ((*ASK, "--weights", "nf4"), "bitsandbytes", "bitsandbytes accelerate"),
        ((*ASK, "--kv-quantization", "int8"), "bitsandbytes", "bitsandbytes accelerate"),
        ((*ASK, "--adapter", "."), "peft", "peft accelerate"),
        (("serve",), "uvicorn", "starlette uvicorn openai prometheus_client"),
    ],
)
def test_command_package_missing(said, monkeypatch, words, missing, install):
    """The package itself is on no index, so its extras are of no use to who has not cloned it."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == missing else find_spec(name, *rest)
    )
    line = said(*words)
    assert f"needs {missing}, which is not installed. Install it: pip install {install}" in line
    assert "trim-plugin[" not in line
