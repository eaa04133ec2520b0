"""What is wrong with a model is said at once, and as that."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys

import pytest

from trim_plugin.commands import UserError, loading
from trim_plugin.embedded import SMALL_MODEL


class Hub:
    """Stands in for the hub: counts how often it is asked."""

    def __init__(self, monkeypatch, error=None):
        self.asked = []
        import huggingface_hub

        def model_info(api, name, timeout):
            self.asked.append((name, timeout))
            if error is not None:
                raise error

        monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
        monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: None)


def response(status):
    import types

    request = types.SimpleNamespace(url="https://hub")
    return types.SimpleNamespace(status_code=status, headers={}, request=request, url="https://hub")


@pytest.mark.parametrize(
    "name", ["nothing", "./not/there", "/not/there", "a/b/c", "with space/x", "~/model", "tests/model"]
)
def test_what_can_only_be_a_folder_is_not_looked_for_on_the_hub(name, monkeypatch):
    hub = Hub(monkeypatch)
    with pytest.raises(UserError, match=f"cannot load {name}: there is no such folder"):
        loading.model_numbers(name)
    assert hub.asked == []


def test_the_hub_is_asked_once(monkeypatch):
    from huggingface_hub.errors import RepositoryNotFoundError

    hub = Hub(monkeypatch, RepositoryNotFoundError("404", response=response(404)))
    with pytest.raises(UserError, match="cannot load no/such: it is neither a folder here nor known to the hub"):
        loading.model_numbers("no/such")
    assert hub.asked == [("no/such", loading.HUB_SECONDS)]


@pytest.mark.parametrize("module", ["httpx", "httpx2", "requests.exceptions", "builtins"])
def test_without_a_network(monkeypatch, module):
    kind = OSError if module == "builtins" else type("ConnectError", (Exception,), {"__module__": module})
    Hub(monkeypatch, kind("Name or service not known"))
    with pytest.raises(UserError, match=r"the hub cannot be asked \(Name or service not known\)"):
        loading.model_numbers("no/such")


def test_a_programming_error_is_not_taken_for_the_network(monkeypatch):
    Hub(monkeypatch, AttributeError("x"))
    with pytest.raises(AttributeError):
        loading.model_numbers("no/such")


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(UserError, match=r"there is no config\.json in it"):
        loading.model_numbers(str(tmp_path))


def test_the_small_model_has_one_name():
    assert loading.model_of(None) == loading.model_of("small") == str(SMALL_MODEL)
    for weights, model, expected in ((None, None, "fp32"), (None, "org/name", "bf16"), ("int8", None, "int8")):
        assert loading.weights_of(argparse.Namespace(weights=weights, model=model)) == expected


@pytest.mark.parametrize(
    ("device", "there", "processes", "expected"),
    [
        ("auto", False, 1, "cpu"),
        ("balanced", False, 2, "cpu"),
        ("auto", True, 1, "auto"),
        ("auto", True, 4, "cuda:3"),
        ("cuda", True, 4, "cuda:3"),
        ("cuda:1", True, 4, "cuda:1"),
        ("cpu", True, 4, "cpu"),
    ],
)
def test_the_device_of_a_process(monkeypatch, device, there, processes, expected):
    import torch

    monkeypatch.setattr(torch.accelerator, "is_available", lambda: there)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    assert loading.device_of(device, {"LOCAL_RANK": "3", "WORLD_SIZE": str(processes)}) == expected


GATED = "403 Client Error: you are not in the authorized list"


@pytest.mark.parametrize("where", ["the model", "its configuration"])
def test_a_gated_model_says_where_to_ask(monkeypatch, where):
    """The hub describes gated models to everybody, and refuses their files."""
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError

    refused = GatedRepoError(GATED, response=response(403))
    Hub(monkeypatch, refused if where == "the model" else None)

    def download(*_, **__):
        raise refused

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(UserError) as error:
        loading.model_numbers("meta-llama/Gated")
    assert "cannot load meta-llama/Gated: it is a gated model" in str(error.value)
    assert "https://huggingface.co/meta-llama/Gated" in str(error.value)
    assert "hf auth login" in str(error.value)


def test_a_gated_model_whose_configuration_is_cached_says_so_too(monkeypatch, tmp_path):
    """Where transformers meets the refusal, it raises an error of its own, whose first line is not enough."""
    from huggingface_hub.errors import GatedRepoError

    def refused(*_):
        try:
            raise GatedRepoError(GATED, response=response(403))
        except GatedRepoError as error:
            raise OSError("You are trying to access a gated repo.\nMake sure to have access to it") from error

    monkeypatch.setattr(loading, "_load_plain", refused)
    given = argparse.Namespace(
        model="org/gated", weights="fp32", device="cpu", adapter=None, max_memory=None, offload_folder=None
    )
    with pytest.raises(UserError, match=r"cannot load org/gated: it is a gated model.*hf auth login"):
        loading.load_model(given)


def test_a_hubs_configuration_is_downloaded_alone(monkeypatch, tmp_path):
    import huggingface_hub

    hub = Hub(monkeypatch)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mllama", "text_config": {"hidden_size": 64}}))
    asked = []

    def download(name, file, **_):
        asked.append((name, file))
        return str(tmp_path / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert loading.model_numbers("org/name").text_config.hidden_size == 64
    assert asked == [("org/name", "config.json")]
    assert hub.asked == [("org/name", loading.HUB_SECONDS)]


def test_a_hubs_model_without_a_configuration(monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import RemoteEntryNotFoundError

    Hub(monkeypatch)

    def download(*_, **__):
        raise RemoteEntryNotFoundError("404", response=response(404))

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(UserError, match=r"cannot load org/name: there is no config\.json in it"):
        loading.model_numbers("org/name")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["generate"], "the following arguments are required: --prompt"),
        (["generate", "--prompt", "x", "--image", "nope.png"], "no such picture: nope.png"),
        (["generate", "--prompt", "x", "--pictures", "nope"], "no such file of encoded pictures: nope"),
        (["generate", "/nowhere", "--prompt", "x"], "cannot load /nowhere"),
        (["generate", "--prompt", "x", "--max-memory", "0"], "--max-memory must look like 0=20GiB"),
        (["generate", "--prompt", "x", "--max-memory", "0=20"], "--max-memory 0 needs a unit: 20GiB"),
        (["generate", "--prompt", "x", "--max-memory", "cpu=much"], "--max-memory cpu must look like 24GiB"),
        (["generate", "--prompt", "x", "--adapter", "nowhere"], "no adapter in nowhere"),
        (["generate", "--prompt", "x", "--top-k-ratio", "2"], "--top-k-ratio must be a number"),
        (["encode", "/nowhere", "--image", "x.png", "--out", "x"], "no such picture: x.png"),
        (["demo", "/nowhere"], "cannot load /nowhere"),
        (["demo", "--image", "nope.png"], "no such picture: nope.png"),
        (["eval", "--data", "nope"], "--data: no such folder: nope"),
        (["batch", "--questions", "nope.jsonl", "--out", "x.jsonl"], "no such file: nope.jsonl"),
        (["serve", "/nowhere"], "cannot load /nowhere"),
        (["serve", "--max-tokens", "0"], "--max-tokens must be at least 1"),
    ],
)
def test_a_slip_costs_no_loading(words, message):
    """In a process of its own: neither torch nor transformers is loaded."""
    program = (
        "import sys; from trim_plugin.cli import main\n"
        f"status = main({words!r})\n"
        "sys.exit(f'{status} ' + ' '.join(name for name in ('torch', 'transformers') if name in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    *told, last = done.stderr.splitlines()
    assert last == "2 ", done.stderr
    assert "loading" not in done.stderr
    assert message in "\n".join(told)


@pytest.mark.parametrize("words", [["generate", "--prompt", "x"], ["serve"], ["demo"]])
def test_what_loads_says_so_first(words):
    """Before torch is imported, which takes seconds: nothing of it is there when the line is."""
    program = (
        "import sys; from trim_plugin.cli import main\n"
        "class Line:\n"
        "    def write(self, text):\n"
        "        sys.stdout.write(text)\n"
        "        if 'loading small' in text:\n"
        "            sys.stdout.flush()\n"
        "            print('torch' in sys.modules, 'transformers' in sys.modules, flush=True)\n"
        "            import os; os._exit(0)\n"
        "    def flush(self): pass\n"
        f"sys.stderr = Line(); main({words!r})"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert f"trim-plugin {words[0]}: loading small" in done.stdout
    assert done.stdout.rstrip().endswith("False False"), done.stdout
