"""What is wrong with a model is said at once, and as that."""

from __future__ import annotations

import argparse

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
        loading.check_is_mllama(name)
    assert hub.asked == []


def test_the_hub_is_asked_once(monkeypatch):
    from huggingface_hub.errors import RepositoryNotFoundError

    hub = Hub(monkeypatch, RepositoryNotFoundError("404", response=response(404)))
    with pytest.raises(UserError, match="cannot load no/such: it is neither a folder here nor known to the hub"):
        loading.check_is_mllama("no/such")
    assert hub.asked == [("no/such", loading.HUB_SECONDS)]


@pytest.mark.parametrize("module", ["httpx", "httpx2", "requests.exceptions", "builtins"])
def test_without_a_network(monkeypatch, module):
    kind = OSError if module == "builtins" else type("ConnectError", (Exception,), {"__module__": module})
    Hub(monkeypatch, kind("Name or service not known"))
    with pytest.raises(UserError, match=r"the hub cannot be asked \(Name or service not known\)"):
        loading.check_is_mllama("no/such")


def test_a_programming_error_is_not_taken_for_the_network(monkeypatch):
    Hub(monkeypatch, AttributeError("x"))
    with pytest.raises(AttributeError):
        loading.check_is_mllama("no/such")


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(UserError, match=r"there is no config\.json in it"):
        loading.check_is_mllama(str(tmp_path))


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
    pytest.importorskip("accelerate")
    import torch

    monkeypatch.setattr(torch.accelerator, "is_available", lambda: there)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    assert loading.device_of(device, {"LOCAL_RANK": "3", "WORLD_SIZE": str(processes)}) == expected
